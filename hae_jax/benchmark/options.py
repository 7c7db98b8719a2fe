"""What ours can be tried with on a machine: an option of XLA, or other kernels of attention."""

import contextlib
from collections.abc import Iterator

import jax

from hae_jax.errors import UserError
from hae_jax.ops import platform

_ATTENTION = "attention"
_BOOLEANS = {"true": True, "false": False}


@contextlib.contextmanager
def tried(option: str) -> Iterator[dict[str, str | bool]]:
    """While it lasts, programs are traced with "NAME=VALUE", and are to be compiled with what it yields: XLA's options.

    Nothing is tried where the option is empty.

    Raises:
      UserError: XLA does not know the option or its value, or the kernel is not to be had.
    """
    name, _, value = option.partition("=")
    if name == _ATTENTION:
        with platform.attention_by(value):
            if value != platform.XLA and not platform.attention_kernels():
                raise UserError(f"--option {option}: that kernel needs a GPU")
            yield {}
        return
    try:
        yield {name: _BOOLEANS.get(value, value)} if option else {}
    except jax.errors.JaxRuntimeError as error:
        if option and name in str(error) and "INVALID_ARGUMENT" in str(error):
            raise UserError(f"--option {option}: {str(error).partition(': ')[2]}") from error
        raise
