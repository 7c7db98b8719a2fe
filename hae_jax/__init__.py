"""Weakly supervised lesion localisation in brain MRI, in JAX and Flax.

    from hae_jax import Localizer
    Localizer.load("runs/a")(volume, affine).mask

Research use only. Not a medical device; not for diagnosis or treatment.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hae_jax.localization.forward_process import forward_process
    from hae_jax.localization.localizer import Localizer
    from hae_jax.model import UNet, UNetConfig
    from hae_jax.runs import load_run

__version__ = "0.2.0"
__all__ = ["Localizer", "UNet", "UNetConfig", "__version__", "forward_process", "load_run"]

_HOMES = {"Localizer": "hae_jax.localization.localizer", "UNet": "hae_jax.model", "UNetConfig": "hae_jax.model",
          "forward_process": "hae_jax.localization.forward_process", "load_run": "hae_jax.runs"}


def __getattr__(name: str):
    """Imports a public name at its first use, because importing JAX takes seconds and `--help` does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hae_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
