"""Checkpoints: saved whole in the background, restored onto any devices. The only file that knows Orbax.

A checkpoint is the folder `<workdir>/checkpoints/<step>` with one item for each part of the state, so that translation
can read the parameters alone, and the config. Arrays are stored under readable names, such as
"input_blocks/1/0/in_conv/kernel".
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from hae_jax.errors import UserError
from hae_jax.model import UNet
from hae_jax.training.mesh import make_mesh, replicated
from hae_jax.training.state import TrainState, abstract_network, network_config

# What a resumed run may change without becoming another run.
_FREE_FIELDS = ("translation.", "evaluation.", "data.root", "data.workers", "data.prefetch", "data.phantom",
                "model.remat", "training.steps", "training.log_every", "training.save_every", "training.keep",
                "training.sample_")


class Network(NamedTuple):
    """A trained network, ready to be called."""

    config: dict[str, Any]  # the config tree of its training
    model: UNet
    identity: dict[str, Any]  # path, step, parameters: what a result says about its origin


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | Path, keep: int = 3):
        """Opens `<workdir>/checkpoints`, made if absent, and keeps the newest `keep` in it."""
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax narrates each save
        self.folder = Path(workdir).resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Saves the state in the background; it may be donated as soon as this returns."""
        step = int(state.step)
        items = {name: ocp.args.StandardSave(_named(value)) for name, value in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items, config=ocp.args.JsonSave(config)))

    def config(self, step: int) -> dict[str, Any]:
        """The config that a checkpoint was saved with."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def restore(self, step: int, like: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint onto the devices that `shardings` names, however many had written it.

        Args:
          step: which.
          like: a state of the same network, whose values are not read.
          shardings: where each leaf shall lie.
        """
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings)
        wanted = {name: ocp.args.StandardRestore(_named(value)) for name, value in _items(abstract).items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        parts = {name: _unnamed(value, found[name]) for name, value in _items(like).items()}
        return TrainState(params=parts["params"], ema=parts["ema"], opt_state=parts["optimizer"], **parts["progress"])

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def load_network(workdir: str | Path, *, step: int | None = None, ema: bool = True) -> Network:
    """Reads a trained network from a run's folder.

    Args:
      workdir: the folder that `train.py --workdir` wrote.
      step: which checkpoint; None: the newest.
      ema: the averaged parameters (of the first rate) instead of the last ones.

    Raises:
      UserError: if there is no such checkpoint.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir}: no checkpoints there; train with train.py --workdir {workdir}, or name the folder "
                        "of a finished run")
    checkpoints = Checkpoints(workdir, keep=None)
    steps = sorted(checkpoints._manager.all_steps())
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{workdir}: no checkpoint of step {step if step is not None else '...'}; "
                        f"there are {', '.join(map(str, steps)) or 'none'}")
    step = steps[-1] if step is None else step
    config = checkpoints.config(step)
    graph, params = abstract_network(network_config(config))
    sharding = replicated(make_mesh())
    averages = len(config["training"]["ema_rates"]) if ema else 0
    item, tree = ("ema", (params,) * averages) if averages else ("params", params)
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in _named(tree).items()}
    wanted = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    found = checkpoints._manager.restore(step, args=wanted)[item]
    checkpoints.close()
    loaded = _unnamed(tree, found)
    loaded = loaded[0] if averages else loaded
    parameters = f"ema {config['training']['ema_rates'][0]}" if averages else "params"
    identity = {"path": str(folder / str(step)), "step": step, "parameters": parameters}
    return Network(config, nnx.merge(graph, loaded), identity)


def check_same_run(workdir: str | Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """A run can only go on with the settings that it began with.

    Raises:
      UserError: naming every field that differs.
    """
    old, new = _flat(saved), _flat(json.loads(json.dumps(config)))
    differing = [name for name in sorted(old.keys() | new.keys())
                 if old.get(name) != new.get(name) and not name.startswith(_FREE_FIELDS)]
    if differing:
        changes = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing)
        raise UserError(f"{workdir}: its checkpoints belong to another config ({changes}); use another --workdir, or "
                        "give the same values")


def _items(state: TrainState) -> dict[str, Any]:
    progress = {"step": state.step, "window": state.window}
    return {"params": state.params, "ema": state.ema, "optimizer": state.opt_state, "progress": progress}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under their paths; that Flax wraps each parameter in a Variable does not show."""
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(like: Any, leaves: dict[str, Any]) -> Any:
    """The tree that `_named` took apart."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _named(like)])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, child in tree.items()
            for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()}
