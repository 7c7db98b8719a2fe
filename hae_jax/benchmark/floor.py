"""The least traffic with memory that a network can have, beside which its operations are the other floor of its time.

Every convolution and every product with weights reads its input and its weights once and writes its output once. What
stands between them (norms, activations, additions) may be computed on the way, and scores of attentions never leave
the chip.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def least_bytes(f: Callable[..., Any], *args: Any) -> int:
    """Bytes that `f(*args)` must at least read and write; nothing is run.

    Args:
      args: arrays, or `jax.ShapeDtypeStruct`.
    """
    return _bytes_of(jax.make_jaxpr(f)(*args).jaxpr)


def _bytes_of(jaxpr: Any) -> int:
    return sum(map(_bytes_of_equation, jaxpr.eqns))


def _bytes_of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" or (name == "dot_general" and not params["dimension_numbers"][1][0]):
        arrays = [*equation.invars, *equation.outvars]
        return sum(array.aval.size * array.aval.dtype.itemsize for array in arrays)
    inner = [_bytes_of(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":  # the forms of an operation for different platforms; the last one is the direct one
        return inner[-1]
    return (params["length"] if name == "scan" else 1) * sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
