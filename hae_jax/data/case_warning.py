"""Warnings about cases that are used nevertheless. Warnings of the same kind can be counted."""


class CaseWarning(str):
    """A warning about one case. Warnings of one kind differ in their numbers and names alone.

    Attributes:
      kind: the words that all of them have.
    """

    kind: str
    _values: tuple[object, ...]

    def __new__(cls, kind: str, *values: object) -> "CaseWarning":
        """Puts this case's values where `kind` has a brace pair, as `str.format` does."""
        warning = super().__new__(cls, kind.format(*values))
        warning.kind = kind
        warning._values = values
        return warning

    def __reduce__(self) -> tuple:
        """Pickles the kind and the values, since worker processes return warnings."""
        return CaseWarning, (self.kind, *self._values)
