"""Writing of the page: template, style, code and data in one file, with the pictures in it or in files beside it."""

import base64
import hashlib
import json
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hae_jax import provenance
from hae_jax.files import written_whole
from hae_jax.report.privacy import printable

_STATIC = Path(__file__).parent / "static"
_SCRIPTS = ("base.js", "charts.js", "volume.js", "viewer.js", "table.js", "training.js", "main.js")
_SIDECAR = "// HAE-JAX report, part of a page: "


class Pictures:
    """The data that the page loads on demand: a JSON text for each case, in the page or in files beside it.

    They stay in memory up to the limit. Beyond the limit, all of them are written to `<page without suffix>/<name>.js`.
    """

    def __init__(self, page: Path, limit: int):
        """Starts a page.

        Args:
          page: path of the page.
          limit: largest size of pictures in the page, bytes.
        """
        self.folder = page.with_suffix("")
        self._limit, self._size = limit, 0
        self._inside: dict[str, str] = {}
        self._waiting: dict[str, tuple[str, str, dict[str, Any]]] = {}
        self.outside: dict[str, str] = {}  # address by name

    def known(self, name: str, key: str) -> dict[str, Any] | None:
        """The case's entry on the page, if a file beside the page has its pictures with this key."""
        path = self._path(name)
        try:
            with path.open(encoding="utf-8") as stream:
                first = stream.readline()
                if not first.startswith(_SIDECAR):
                    return None
                found = json.loads(first.removeprefix(_SIDECAR))
                if found["key"] != key:
                    return None
                text = stream.read()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        body = text.removeprefix(_call(name)).rstrip().removesuffix(")")
        self._keep(name, body, key, found["entry"])
        return found["entry"]

    def add(self, name: str, content: Any, key: str = "", entry: Mapping[str, Any] | None = None) -> None:
        """Adds pictures.

        Args:
          name: name of the case on the page.
          content: data, ready for JSON.
          key: key of the input from which they were made.
          entry: the case's entry on the page, stored for `known`.
        """
        self._keep(name, script_json(content), key, dict(entry or {}))

    def _keep(self, name: str, body: str, key: str, entry: dict[str, Any]) -> None:
        self._size += len(body) + len(entry.get("thumbnail") or "")
        if self.outside or self._size > self._limit:
            for waiting, (own_body, own_key, own_entry) in self._waiting.items():
                self._write(waiting, own_body, own_key, own_entry)
            self._waiting.clear()
            self._write(name, body, key, entry)
        else:
            self._waiting[name] = (body, key, entry)

    def _write(self, name: str, body: str, key: str, entry: dict[str, Any]) -> None:
        path = self._path(name)
        text = f"{_SIDECAR}{script_json({'key': key, 'entry': entry})}\n{_call(name)}{body})\n"
        self.outside[name] = f"{self.folder.name}/{urllib.parse.quote(os.fsencode(path.name))}"
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.js"

    def inside(self) -> dict[str, str]:
        """Returns JSON texts by name. Unused files of earlier pages are deleted."""
        for path in self.folder.glob("*.js"):
            if path.stem not in self.outside and path.read_text(encoding="utf-8").startswith(_SIDECAR):
                path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        return {name: body for name, (body, _, _) in self._waiting.items()}


def _call(name: str) -> str:
    """The call with which a file beside the page begins, after its first line."""
    return f"haePictures({script_json(name)},"


def script_json(value: Any) -> str:
    """JSON that is safe in a <script> element: it cannot end the element or start another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path: Path, data: Mapping[str, Any], pictures: Pictures) -> None:
    """Writes a page, whole or not at all.

    Args:
      data: data for `main.js`: "kind", "title", "facts", ...
    """
    inside = pictures.inside()
    style = (_STATIC / "style.css").read_text(encoding="utf-8")
    code = "\n".join((_STATIC / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    files = " 'self' file:" if pictures.outside else ""
    policy = (f"default-src 'none'; script-src {_hash(code)}{files}; style-src {_hash(style)}; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, loader=jinja2.FileSystemLoader(_STATIC))
    page = environment.get_template("page.html.j2").render(
        title=printable(str(data["title"])), policy=policy, style=style, code=code, notice=provenance.RESEARCH_USE,
        kind=data["kind"], phantom=data.get("phantom", False),
        data=script_json({**data, "outside": pictures.outside}), pictures=list(inside.values()), names=list(inside))
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
