"""Checks of the values in the files of a folder of results, so that an edited file does not stop the page."""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _each(check: Check) -> Check:
    """A check for lists whose items pass `check`."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def _under(check: Check) -> Check:
    """A check for objects whose values pass `check`."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _with(**checks: Check) -> Check:
    """A check for objects whose values with these names pass their checks or are null."""
    return lambda value: isinstance(value, dict) and not wrong(value, checks)


def wrong(value: Mapping[str, Any], checks: Mapping[str, Check]) -> list[str]:
    """The names whose values fail their checks. null passes."""
    return [name for name, check in checks.items() if value.get(name) is not None and not check(value[name])]


_text, _number, _object = _is(str), _is(int, float), _is(dict)
_checkpoint = _with(path=_text, sha256=_text)
_data = _with(root=_text)
MANIFEST = {"failed": _under(_text), "config": _with(data=_with(modalities=_each(_text))), "versions": _object,
            "checkpoint": _checkpoint, "command": _is(list), "devices": _each(_text), "seconds": _number}
METRICS = {"checkpoint": _checkpoint, "results": _object, "baselines": _under(_object), "definitions": _object,
           "method": _text, "rule": _text, "labels": _text, "seconds_per_slice": _number, "image_size": _number}
CALIBRATION = {"threshold": _number, "slice_threshold": _number, "slice_auc": _number, "healthy_slices": _number,
               "lesion_slices": _number, "method": _text, "rule": _text, "labels": _text,
               "made_with": _with(data=lambda value: _text(value) or _data(value)),
               "slice_scores": _with(edges=_each(_number), healthy=_each(_number), lesion=_each(_number))}
RECORD = {"row": _under(lambda value: value is None or _is(str, int, float, bool)(value)), "failed": _text}
_ROWS = ("slice", "anomaly_score", "lesion", "truth")
_SLICES = {
    "images": _each(lambda value: _with(path=_text, modality=_text, volume=_is(int), volumes=_is(int))(value)
                    and value.get("path") is not None),
    "segmentation": _text, "warnings": _each(_text), "slice": _each(lambda value: _is(int)(value) and value >= 0),
    "anomaly_score": _each(_number), "lesion": _each(_is(int, bool)), "truth": _each(_is(int, bool))}


def are_slices(facts: Mapping[str, Any]) -> bool:
    """Whether the fields of slices/<case>.json have the form that translate.py writes. Fields may be missing."""
    nulls = [name for name in facts.keys() & _SLICES.keys() if facts[name] is None]
    rows = {len(facts[name]) for name in _ROWS if isinstance(facts.get(name), list)}
    return (not wrong(facts, _SLICES) and set(nulls) <= {"segmentation", "truth"} and len(rows) < 2
            and facts.get("images") != [])
