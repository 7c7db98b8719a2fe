"""The networks: `UNet(UNetConfig(variant=...), rngs=nnx.Rngs(0))`, and PyTorch weights in and out."""

from hae_jax.model.config import VARIANTS, UNetConfig
from hae_jax.model.torch_weights import load_torch_state, torch_state
from hae_jax.model.unet import UNet

__all__ = ["VARIANTS", "UNet", "UNetConfig", "load_torch_state", "torch_state"]
