"""Tables in Markdown whose columns line up, so that they read as well on a screen."""

from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers are set to the right."""
    columns = [[name, *(row[i] for row in rows)] for i, name in enumerate(header)]
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [_is_numeric(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.rjust(width) if right else cell.ljust(width)
                                 for cell, width, right in zip(cells, widths, numeric, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if right else "-")
                          for width, right in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def number(value: float | None, unit: str = "") -> str:
    """Three digits at least; empty for None."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def seconds(value: float | None) -> str:
    """In the unit that suits."""
    if value is None:
        return ""
    return number(value, "s") if value >= 1 else number(1e3 * value, "ms")


def size(count: float | None) -> str:
    """Bytes in the unit that suits."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else number(count / 1e6, "MB")


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(cell == "" or cell[0].isdigit() for cell in cells)
