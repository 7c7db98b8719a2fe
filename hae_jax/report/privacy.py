"""Removal of private text from a page: paths always, names of cases on request."""

import re
from collections.abc import Iterable, Mapping

# A path begins with /, ~/, ./ or ../ at the start of a word. It ends before a character that is rare in paths.
_PATH = re.compile(r"""(?<![^\s'"(\[=:,])(?:~|\.{1,2})?/(?:[^\s'"<>,;:()\[\]]*/)*([^\s'"<>,;:()\[\]/]*)""")


class Privacy:
    """Removes private parts of text for a page.

    Attributes:
      labels: new name of each case, by its name; empty: cases keep their names.
    """

    def __init__(self, folders: Iterable[str], names: Iterable[str], *, anonymous: bool):
        """Takes the private folders and names.

        Args:
          folders: absolute paths that may occur in messages. These are also found if they contain spaces.
          names: names of all cases, in the order of their numbers.
          anonymous: whether cases are numbered.
        """
        self._folders = _any_of(folder for folder in folders if len(folder) > 1)
        names = list(dict.fromkeys(names))
        digits = max(3, len(str(len(names))))
        self.labels: Mapping[str, str] = {
            name: f"case_{i:0{digits}}" for i, name in enumerate(names, 1)} if anonymous else {}
        self._hidden = _any_of(self.labels)

    @property
    def anonymous(self) -> bool:
        """Whether names of cases are hidden."""
        return bool(self.labels)

    def label(self, name: str) -> str:
        """The name of a case on the page."""
        return printable(self.labels.get(name, name))

    def text(self, message: str) -> str:
        """A message in which paths are reduced to file names. On an anonymous page, file names are removed as well."""
        message = self._folders.sub(
            lambda found: "" if message[found.end():].startswith("/") else "the folder", message)
        message = _PATH.sub((lambda found: "a file") if self.anonymous else (lambda found: found[1] or "/"), message)
        return printable(self._hidden.sub(lambda found: self.labels[found[0]], message))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of the texts as a whole word. Without texts, it matches nothing."""
    escaped = map(re.escape, sorted(set(texts), key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(escaped) or '(?!)'})(?![A-Za-z0-9_])")


def printable(text: str) -> str:
    """Text that UTF-8 can encode. Bytes of file names that are not text become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
