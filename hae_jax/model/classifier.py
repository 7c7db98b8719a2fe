"""A classifier of noised slices for classifier guidance: the U-Net's encoder with a separate head."""

import jax
import jax.numpy as jnp
from flax import nnx

from hae_jax.errors import UserError
from hae_jax.model.attention import AttentionBlock
from hae_jax.model.conditioning import EmbeddingMLP, timestep_embedding
from hae_jax.model.config import UNetConfig
from hae_jax.model.layers import Conditioning, Dropout, ParameterKeys, Randomness, ResBlock, group_norm, linear
from hae_jax.model.unet import UNet, encoder, run_block


class Classifier(nnx.Module):
    """Predicts the class of a noised slice (Dhariwal and Nichol 2021, section 4; pooled by the mean over positions).

    Args:
      config: the sizes; `num_classes` is the number of logits.
      rngs: the stream that the parameters are drawn from.

    Raises:
      UserError: a config without classes.
    """

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        if config.num_classes is None:
            raise UserError("model.task is 'classify', but model.num_classes is None: give the number of classes")
        self.config = config
        rngs = ParameterKeys.of(rngs)
        self.time_embed = EmbeddingMLP(config, rngs)
        self.input_blocks, _ = encoder(config, rngs)
        width, heads = config.widths[-1], config.heads(config.widths[-1], decoder=False)
        self.middle_block = nnx.List([
            ResBlock(width, width, config, rngs),
            AttentionBlock(width, heads, config, rngs),
            ResBlock(width, width, config, rngs),
        ])
        self.head_norm = group_norm(width, rngs, dtype=jnp.float32)
        self.head = linear(width, config.num_classes, rngs, dtype=jnp.float32)
        dropouts = [module for _, module in nnx.iter_modules(self) if isinstance(module, Dropout)]
        for i, dropout in enumerate(dropouts):
            dropout.layer = i
        self._dropouts = len(dropouts)

    def __call__(
        self,
        x: jax.Array,  # [B, H, W, C]
        t: jax.Array,  # [B] or [1] original timesteps
        rngs: Randomness | None = None,
    ) -> jax.Array:  # [B, num_classes] float32
        """The logits of the classes; `rngs` is the randomness of a training step."""
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels))
        keys = None if rngs is None else rngs.of_layers(self._dropouts)
        cond, h = Conditioning(emb, None, keys), x.astype(self.config.dtype)
        for block in (*self.input_blocks, self.middle_block):
            h = run_block(block, (h,), cond, (), self.config.remat != "none")
        return self.head(self.head_norm(h, silu=True).mean((1, 2)))


def make_network(config: UNetConfig, rngs: nnx.Rngs) -> UNet | Classifier:
    """The network for the config's task.

    Raises:
      UserError: a classifier without classes.
    """
    return UNet(config, rngs) if config.task == "denoise" else Classifier(config, rngs)


class GuidedNetwork(nnx.Module):
    """A denoising network with the classifier that guides it. A call runs the denoising network only."""

    def __init__(self, network: UNet, classifier: Classifier):
        self.network, self.classifier = network, classifier

    def __call__(self, *args, **kwargs) -> jax.Array:
        """The denoising network's output."""
        return self.network(*args, **kwargs)
