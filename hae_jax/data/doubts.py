"""What a user should know about a case that is used all the same: warnings that can be counted."""


class Doubt(str):
    """A warning about one case. Doubts of one kind differ in their numbers and names alone.

    Attributes:
      kind: the words that all of them have.
    """

    kind: str
    _values: tuple[object, ...]

    def __new__(cls, kind: str, *values: object) -> "Doubt":
        """Puts this case's values where `kind` has a brace pair, as `str.format` does."""
        doubt = super().__new__(cls, kind.format(*values))
        doubt.kind = kind
        doubt._values = values
        return doubt

    def __reduce__(self) -> tuple:
        """Pickles kind and values: doubts come from worker processes."""
        return Doubt, (self.kind, *self._values)
