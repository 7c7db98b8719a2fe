"""The Dockerfile and the Apptainer definition pass a linter and agree with the package."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_dockerfile_is_clean():
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_it_copies_is_there_and_not_ignored():
    dockerfile, allowed = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*)", dockerfile, re.MULTILINE)
              for name in line.split()[:-1]}
    assert copied == {name[1:] for name in allowed if name.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    in_apptainer = re.search(r"%files\n(.*?)\n\n", (ROOT / "apptainer.def").read_text(), re.DOTALL)[1]
    assert {line.split()[0] for line in in_apptainer.splitlines()} == copied


def test_it_does_not_run_as_root():
    users = re.findall(r"^USER (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
