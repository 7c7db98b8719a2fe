"""Helpers for tests with arbitrary input. They use a few fixed examples; HAE_EXAMPLES=2000 draws 2000 new ones."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hae_jax.errors import UserError

MANY = os.environ.get("HAE_EXAMPLES")
few = settings(max_examples=int(MANY or 15), deadline=None, database=None, derandomize=MANY is None,
               suppress_health_check=list(HealthCheck))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=8)


def right_or_one_line(read, named=None):
    """Returns the value of `read()`, or None after a UserError of one line, which must name the file `named`."""
    try:
        return read()
    except UserError as error:
        text = " ".join(str(error).split("\n")) if named is None else str(error)
        assert text
        assert len(text) < 2000
        assert named is None or str(named) in text
        return None


def changed(tree, draw):
    """A JSON tree with one value replaced or removed."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        if not draw(st.integers(0, 3)):
            return {name: value for name, value in tree.items() if name != key}
        return {**tree, key: changed(tree[key], draw)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 4)):
        k = draw(st.integers(0, len(tree) - 1))
        return [*tree[:k], changed(tree[k], draw), *tree[k + 1:]]
    return draw(JSON)


def changed_bytes(content, draw, where=None):
    """Bytes of which a few are replaced, or the end is cut off."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        k = draw(st.integers(0, (where or len(content)) - 1))
        content[k] = draw(st.integers(0, 255))
    return bytes(content[:draw(st.integers(0, len(content)))] if draw(st.integers(0, 4)) == 0 else content)
