"""Which trained network a command uses, and with which settings."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections

from hae_jax.commands.config import overridden, read_config
from hae_jax.errors import UserError
from hae_jax.files import read_json

if TYPE_CHECKING:
    from hae_jax.runs import TrainedRun


DEMO_CONFIG, DEMO_WEIGHTS = "phantom", "phantom"  # defaults of the commands
_FIXED = ("--config.model.", "--config.diffusion.", "--config.training.", "--config.data.scaling")
_FORMS = ("--config.model.attention=", "--config.model.convolution=")  # how the network is computed


def newest_run(config_path: str, data_root: str, folder: str | Path = "runs") -> Path:
    """The run with the newest checkpoint among those in `folder` that were trained on these data.

    Args:
      config_path: the configuration file, for the message.
      data_root: its `data.root`.
      folder: where the runs are.

    Raises:
      UserError: if there is none. The message says how to train one.
    """
    found = {}
    for path in Path(folder).glob("*/config.json"):
        steps = [step for step in (path.parent / "checkpoints").glob("*") if step.name.isdecimal()]
        if steps and _data_root(path) == data_root:
            found[max(step.stat().st_mtime for step in steps)] = path.parent
    if not found:
        raise UserError(f"{folder}/: no checkpoint that was trained on {data_root}; train one with python train.py "
                        f"--config {config_path} --workdir {folder}/{Path(config_path).stem} (or make demo), or give "
                        "one with --checkpoint")
    return found[max(found)]


def _data_root(config: Path) -> str | None:
    """The data that a run was trained on; None if the folder is not a run, or its config is damaged."""
    try:
        return read_json(config)["data"]["root"]
    except (UserError, KeyError, TypeError, IndexError):
        return None


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuses overrides of settings that are fixed by the training.

    Raises:
      UserError: an argument is such an override, or is no override. The message names it.
    """
    for argument in overrides:
        if not argument.startswith("--config."):
            raise UserError(f"{argument}: unknown argument; see --help")
        if argument.startswith(_FIXED) and not argument.startswith(_FORMS):
            raise UserError(f"{argument}: is fixed by the training and comes from the checkpoint; leave it out "
                            "(translation, data, evaluation and seed can be set)")


def trained_config(tree: Mapping[str, Any], overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """The config of a checkpoint with overrides; fields that are newer than the checkpoint have their defaults.

    Raises:
      UserError: if an override names no field or has the wrong type.
    """
    from hae_jax.runs import completed_config

    return overridden(completed_config(tree), overrides)


def with_network(config: ml_collections.ConfigDict, tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """`config` with the model, diffusion, training and scaling of slices of the saved config `tree`."""
    from hae_jax.runs import as_config

    with config.unlocked():
        config.model, config.diffusion, config.training = (
            as_config(tree[part]) for part in ("model", "diffusion", "training"))
        config.data.scaling = tree.get("data", {}).get("scaling", "slice")
    return config


def chosen_network(
    config_path: str | None, checkpoint: str | Path | None, overrides: Sequence[str]
) -> "TrainedRun":
    """The network that a command line selects, with its settings. The model is None if the method needs none.

    Args:
      config_path: a configuration file; None: the config of the checkpoint, or `DEMO_CONFIG` without a checkpoint.
      checkpoint: a run folder, a folder of exported weights, or a name of shipped weights; None: the newest run that
        was trained on the data of `config_path`, or the shipped weights of the phantom if `config_path` is None.
      overrides: such as `--config.seed=1`.

    Raises:
      UserError: if there is no such file or network, or an override does not fit.
    """
    from hae_jax.model import UNetConfig  # here: --help needs no JAX
    from hae_jax.pipeline.cache_key import weights_hash
    from hae_jax.runs import TrainedRun
    from hae_jax.training.weights import load_trained, trained_folder

    config = None
    if config_path or not checkpoint:
        named, config_path = config_path is not None, config_path or DEMO_CONFIG
        config = read_config(config_path, overrides)
        if not checkpoint and config.translation.method == "threshold":
            return TrainedRun(None, config, {"path": "none needed", "parameters": config.translation.method},
                              Path("runs") / Path(config_path).stem)
        checkpoint = checkpoint or (newest_run(config_path, config.data.root) if named else DEMO_WEIGHTS)
    forms = dict(argument.removeprefix("--config.model.").split("=", 1) for argument in overrides
                 if argument.startswith(_FORMS))
    UNetConfig.from_mapping(forms)  # raises for an unknown form
    network = load_trained(checkpoint, forms=forms)
    if network.config["model"].get("task") == "classify":
        raise UserError(f"{checkpoint}: is a classifier, which cannot find lesions alone; give the network that it "
                        f"guides with --checkpoint, and --classifier {checkpoint} --method classifier")
    config = with_network(config or trained_config(network.config, overrides), network.config)
    with config.unlocked():
        config.model.update(forms)
    learnt = tuple(network.config.get("data", {}).get("modalities", config.data.modalities))
    if tuple(config.data.modalities) != learnt:
        print(f"warning: the network was trained with the channels {', '.join(learnt)} in this order, but "
              f"data.modalities is {', '.join(config.data.modalities)}", file=sys.stderr)
    if not config.translation.ema:  # the config of the checkpoint may set it
        network = load_trained(checkpoint, ema=False, forms=forms)
    identity = {**network.identity, "sha256": weights_hash(network.model, config)}
    return TrainedRun(network.model, config, identity, trained_folder(checkpoint))


def with_classifier(loaded: "TrainedRun", run: str) -> "TrainedRun":
    """The network together with the classifier of a run that guides it.

    Raises:
      UserError: if there is no network to guide, the run holds no classifier, or its data or diffusion differ.
    """
    from hae_jax.model.classifier import Classifier, GuidedNetwork
    from hae_jax.model.config import FORM_FIELDS
    from hae_jax.pipeline.cache_key import weights_hash
    from hae_jax.training.weights import load_trained

    config = loaded.config
    if loaded.model is None:
        raise UserError(f"--classifier {run}: the method {config.translation.method} needs no network; leave it out")
    found = load_trained(run, forms={name: config.model[name] for name in FORM_FIELDS if name in config.model})
    if not isinstance(found.model, Classifier):
        raise UserError(f"--classifier {run}: is not a classifier; give a run of configs/classifier.py")
    wanted = config.to_dict()
    for section, name in (("model", "image_size"), ("model", "in_channels"), ("data", "modalities"),
                          ("data", "scaling"), ("diffusion", "schedule"), ("diffusion", "steps")):
        its, ours = found.config[section].get(name), wanted[section][name]
        if json.dumps(its) != json.dumps(ours):
            raise UserError(f"--classifier {run}: was trained with {section}.{name} {its}, but the network with "
                            f"{ours}; train a classifier with the network's settings")
    guided = GuidedNetwork(loaded.model, found.model)
    return loaded._replace(model=guided, identity={
        **loaded.identity, "classifier": {**found.identity, "path": str(run)}, "sha256": weights_hash(guided, config)})
