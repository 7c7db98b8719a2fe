"""What a page must not tell: paths of the machine always, names of cases if they are to be hidden."""

import re
from collections.abc import Iterable, Mapping

# A path: what begins with /, ~/, ./ or ../ at the start of a word, up to a sign that seldom stands in one.
_PATH = re.compile(r"""(?<![^\s'"(\[=:,])(?:~|\.{1,2})?/(?:[^\s'"<>,;:()\[\]]*/)*([^\s'"<>,;:()\[\]/]*)""")


class Privacy:
    """Cleans text before it comes into a page.

    Attributes:
      labels: by the name of a case what it is called instead; empty: cases keep their names.
    """

    def __init__(self, folders: Iterable[str], names: Iterable[str], *, anonymous: bool):
        """Takes what is known to be private.

        Args:
          folders: absolute paths that may stand in messages; known ones are found even where they hold spaces.
          names: of all cases, in the order of their numbers.
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
        """What a case is called on the page."""
        return printable(self.labels.get(name, name))

    def text(self, message: str) -> str:
        """A message without paths: of each the file name stays, and of an anonymous page not even that."""
        message = self._folders.sub(
            lambda found: "" if message[found.end():].startswith("/") else "the folder", message)
        message = _PATH.sub((lambda found: "a file") if self.anonymous else (lambda found: found[1] or "/"), message)
        return printable(self._hidden.sub(lambda found: self.labels[found[0]], message))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the texts, the longest one that fits, where no letter or digit goes on; without any, nothing."""
    escaped = map(re.escape, sorted(set(texts), key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(escaped) or '(?!)'})(?![A-Za-z0-9_])")


def printable(text: str) -> str:
    """Text that UTF-8 can hold: file names may have bytes that are no text, which become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
