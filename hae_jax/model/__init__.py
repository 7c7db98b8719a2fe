"""The networks: `UNet(UNetConfig(variant=...), rngs=nnx.Rngs(0))`."""

from hae_jax.model.config import VARIANTS, UNetConfig
from hae_jax.model.unet import UNet

__all__ = ["VARIANTS", "UNet", "UNetConfig"]
