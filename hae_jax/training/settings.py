"""Checks of a training's settings that need neither the data nor the devices."""

import ml_collections

from hae_jax.data.slices import SCALINGS
from hae_jax.errors import UserError
from hae_jax.localization.methods import residual_method
from hae_jax.training.log import import_wandb
from hae_jax.training.step import step_settings


def measures_localization(config: ml_collections.ConfigDict) -> bool:
    """Whether the training measures how well lesions are found, which needs a network with classes."""
    return (bool(config.training.localization_every) and config.model.num_classes is not None
            and config.model.task == "denoise")


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Checks the values of `config.training`, and that data and network have the same number of channels.

    Raises:
      UserError: naming the field.
    """
    training, modalities = config.training, config.data.modalities
    if len(modalities) != config.model.in_channels:
        raise UserError(f"data.modalities names {len(modalities)} channels ({', '.join(modalities)}), but "
                        f"model.in_channels is {config.model.in_channels}; change one of them")
    if config.data.scaling not in SCALINGS:
        raise UserError(f"data.scaling is {config.data.scaling!r}: choose {' or '.join(SCALINGS)}")
    for name in ("steps", "log_every", "save_every", "keep", "accumulation"):
        if training[name] < 1:
            raise UserError(f"training.{name} is {training[name]}: it must be at least 1")
    for name in ("validate_every", "localization_every", "sample_every", "warmup_steps"):
        if training[name] < 0:
            raise UserError(f"training.{name} is {training[name]}: it must not be negative")
    for name in ("learning_rate", "weight_decay"):
        if training[name] < 0:
            raise UserError(f"training.{name} is {training[name]}: it must not be negative")
    if training.clip_norm is not None and not training.clip_norm > 0:
        raise UserError(f"training.clip_norm is {training.clip_norm}: it must be above 0; None turns clipping off")
    if training.sample_every and not training.sample_guidance:
        raise UserError("training.sample_guidance is empty: give at least one number, or set training.sample_every to "
                        "0")
    if training.validate_every and training.validation_slices < 1:
        raise UserError(f"training.validation_slices is {training.validation_slices}: it must be at least 1, or set "
                        "training.validate_every to 0")
    if measures_localization(config):
        if training.localization_slices < 1:
            raise UserError(f"training.localization_slices is {training.localization_slices}: it must be at least 1, "
                            "or set training.localization_every to 0")
        try:
            residual_method(config)
        except UserError as error:
            raise UserError(f"{error}; or set training.localization_every to 0") from error
    if not 0 <= training.p_uncond <= 1:
        raise UserError(f"training.p_uncond is {training.p_uncond}: it must be in [0, 1]")
    if config.model.task == "classify" and training.sample_every:
        raise UserError(f"training.sample_every is {training.sample_every}, but model.task is 'classify': a classifier "
                        "draws no samples; set it to 0")
    if config.model.task == "classify" and config.data.healthy_only:
        raise UserError("data.healthy_only is True, but model.task is 'classify': a classifier needs both classes")
    if config.data.healthy_only and config.data.balance:
        raise UserError("data.healthy_only and data.balance are both True: choose one of the two")
    if not training.ema_rates or not all(0 <= rate < 1 for rate in training.ema_rates):
        raise UserError(f"training.ema_rates is {training.ema_rates}: give at least one rate in [0, 1)")
    if training.wandb is not None:
        import_wandb(training.wandb)
    step_settings(config)
