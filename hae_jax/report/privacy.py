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
        self._folders = sorted({folder for folder in folders if len(folder) > 1}, key=len, reverse=True)
        names = list(dict.fromkeys(names))
        digits = max(3, len(str(len(names))))
        self.labels: Mapping[str, str] = {
            name: f"case_{i:0{digits}}" for i, name in enumerate(names, 1)} if anonymous else {}
        self._hidden = sorted(self.labels, key=len, reverse=True)

    @property
    def anonymous(self) -> bool:
        """Whether names of cases are hidden."""
        return bool(self.labels)

    def label(self, name: str) -> str:
        """What a case is called on the page."""
        return printable(self.labels.get(name, name))

    def text(self, message: str) -> str:
        """A message without paths: of each the file name stays, and of an anonymous page not even that."""
        for folder in self._folders:
            message = message.replace(folder + "/", "/").replace(folder, "/the folder")
        message = _PATH.sub((lambda found: "a file") if self.anonymous else (lambda found: found[1] or "/"), message)
        for name in self._hidden:
            message = message.replace(name, self.labels[name])
        return printable(message)


def printable(text: str) -> str:
    """Text that UTF-8 can hold: file names may have bytes that are no text, which become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
