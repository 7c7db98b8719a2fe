"""Checkpoints: complete, saved in the background, and restored onto any devices. Only this module uses Orbax.

A checkpoint is the folder `<workdir>/checkpoints/<step>`. It holds one item for each part of the state, the config, and
the checksums of all these files. Translation reads only the item with the parameters. Arrays are stored under readable
names, such as "input_blocks/1/0/in_conv/kernel". Orbax writes into a temporary folder and renames it at the end. The
checksums are written before that, so every checkpoint has them. Damaged checkpoints are renamed, never deleted.
"""

import functools
import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from hae_jax.errors import UserError
from hae_jax.model import UNet
from hae_jax.model.classifier import Classifier
from hae_jax.model.config import FORM_FIELDS
from hae_jax.training.guard import agreed, disk_errors
from hae_jax.training.integrity import damage, move_aside, seal
from hae_jax.training.mesh import make_mesh, replicated
from hae_jax.training.state import TrainState, abstract_network, network_config

_LOG = logging.getLogger(__name__)
# Fields of the config that may change when a run is resumed.
_FREE_FIELDS = ("translation.", "evaluation.", "data.root", "data.workers", "data.prefetch", "data.phantom",
                "model.remat", "training.steps", "training.log_every", "training.save_every", "training.keep",
                "training.sample_", "training.mesh", "training.accumulation", "training.nonfinite",
                "training.validat", "training.localization", "training.wandb")
_FREE_NAMES = tuple(f"model.{name}" for name in FORM_FIELDS)
# Field of the state -> its item; the other fields make up the item "progress".
_ITEMS = {"params": "params", "ema": "ema", "opt_state": "optimizer"}
# Orbax divides the writing of an array among the devices that hold copies of it. Parts that are smaller than this
# number of bytes take longer to cut out than to write. On eight devices, a save stopped the training for ten times as
# long with them.
_SMALLEST_PART = 1 << 20
# Files that Orbax completes when it commits a checkpoint. They hold dates, which are not used.
_COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Network(NamedTuple):
    """A trained network, ready for use."""

    config: dict[str, Any]  # the config tree of its training
    model: UNet | Classifier
    identity: dict[str, Any]  # path, step, parameters; results state them as their origin


class Checkpoints:
    """The checkpoints of one run. With several processes, all must make the same calls."""

    def __init__(self, workdir: str | Path, keep: int | None = 3):
        """Opens or makes `<workdir>/checkpoints`. Half-written checkpoints are removed; the newest `keep` are kept.

        Raises:
          UserError: if the folder cannot be made.
        """
        self._workdir, self.folder = Path(workdir), Path(workdir).resolve() / "checkpoints"
        self._saving = None  # step of the last save
        # Folders are made in the foreground to get errors at once. In the background, Orbax waits minutes for them.
        background = ocp.AsyncOptions(post_finalization_callback=self._seal, create_directories_asynchronously=False)
        with disk_errors(lambda: f"{workdir}: cannot hold checkpoints"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = _manager(
                self.folder, max_to_keep=keep, cleanup_tmp_directories=True, async_options=background)

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def recover(self) -> int | None:
        """Finds the step to resume from: the newest checkpoint whose files agree with their checksums.

        Damaged checkpoints are logged and renamed, so that their steps can be saved again.

        Returns:
          The step of the newest intact checkpoint; None if there are no checkpoints.

        Raises:
          UserError: all checkpoints are damaged. They are not changed.
        """
        step = None
        with agreed():
            if jax.process_index() == 0:
                step = self._recover()
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        self._manager.reload()
        return None if step == -1 else step

    def save(self, state: TrainState, config: dict[str, Any]) -> None:
        """Saves the state in the background. The state may be donated as soon as this method returns.

        Raises:
          UserError: this or the previous checkpoint cannot be written. Older checkpoints are kept.
        """
        step = int(state.step)
        items = {name: ocp.args.StandardSave(_named(value)) for name, value in _items(state).items()}
        self.check(wait=True)
        self._saving = step
        with disk_errors(self._failed):
            saved = self._manager.save(step, args=ocp.args.Composite(**items, config=ocp.args.JsonSave(config)))
        if not saved:
            raise RuntimeError(f"step {step} is not newer than the newest checkpoint, {self.latest()}")

    def check(self, wait: bool = False) -> None:
        """Raises the error of the last save, if it has ended with one.

        Args:
          wait: wait until the save has ended.

        Raises:
          UserError: the checkpoint could not be written. Older checkpoints are kept.
        """
        if wait or not self._manager.is_saving_in_progress():
            with disk_errors(self._failed):
                self._manager.wait_until_finished()

    def config(self, step: int) -> dict[str, Any]:
        """The config that a checkpoint was saved with."""
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def restore(self, step: int, like: TrainState, shardings: TrainState) -> TrainState:
        """Reads a checkpoint onto the devices of `shardings`. Their number may differ from that at saving.

        Args:
          like: a state of the same network, of which only the shapes are used.
          shardings: the sharding of each leaf.

        Raises:
          UserError: if the checkpoint lacks arrays of the state.
        """
        abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, shardings)
        wanted = {item: _named(value) for item, value in _items(abstract).items()}
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(w) for item, w in wanted.items()}))
        except (KeyError, ValueError) as error:
            lacking = [f"{item}/{name}" for item, leaves in wanted.items()
                       for name in sorted(leaves.keys() - set(_stored_names(self.folder / str(step) / item)))]
            if not lacking:
                raise
            raise UserError(f"{self.folder / str(step)}: lacks {len(lacking)} arrays, the first is {lacking[0]}; it "
                            "was written by another version, resume with that version") from error
        return _state({item: _unnamed(value, found[item]) for item, value in _items(like).items()})

    def close(self) -> None:
        """Waits until all checkpoints are written.

        Raises:
          UserError: if the last save could not be written; older checkpoints are kept.
        """
        try:
            self.check(wait=True)
        finally:
            self._manager.close()

    def _recover(self) -> int | None:
        if not (steps := self._manager.all_steps()):
            return None
        step, damaged = _newest_sound(self.folder, steps)
        for bad, reason in damaged.items():
            aside = move_aside(self.folder / str(bad))
            _LOG.info("%s: checkpoint %s is damaged (%s) and is kept as %s; using checkpoint %s",
                      self._workdir, bad, reason, aside.name, step)
        return step

    def _seal(self) -> None:
        # Orbax calls this in the first process, after all processes have written their files, before the renaming.
        seal(self.folder / f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}", _COMMIT_FILES)

    def _failed(self) -> str:
        steps = [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()]
        kept = f"checkpoint {max(steps)} is kept" if steps else "there is none yet"
        return f"{self._workdir}: checkpoint {self._saving} could not be saved, {kept}"


def load_network(
    workdir: str | Path, *, ema: bool = True, forms: Mapping[str, str] | None = None
) -> Network:
    """Reads a trained network from the newest checkpoint that is not damaged. The run's folder is not changed.

    Args:
      workdir: the folder that `train.py --workdir` wrote.
      ema: the EMA weights (of the first rate) instead of the last ones.
      forms: how the network is computed (`model.config.FORM_FIELDS`), instead of as in training.

    Raises:
      UserError: if there is no checkpoint that is not damaged.
    """
    folder = Path(workdir).resolve() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir}: has no checkpoints; train with train.py --workdir {workdir}, or give the folder "
                        "of a finished run")
    manager = _manager(folder, create=False, save_root_metadata=False)
    if not (steps := manager.all_steps()):
        raise UserError(f"{workdir}: has no checkpoint yet; train with train.py --workdir {workdir}")
    step, damaged = _newest_sound(folder, steps, ("config", "params", "ema"))
    for bad, reason in damaged.items():
        _LOG.info("%s: checkpoint %s is damaged (%s); using checkpoint %s", workdir, bad, reason, step)
    config = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
    graph, params = abstract_network(network_config(config, forms))
    sharding = replicated(make_mesh())
    sets = len(config["training"]["ema_rates"]) if ema else 0
    item, tree = ("ema", (params,) * sets) if sets else ("params", params)
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in _named(tree).items()}
    found = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)}))[item]
    manager.close()
    loaded = _unnamed(tree, found)
    loaded = loaded[0] if sets else loaded
    parameters = f"ema {config['training']['ema_rates'][0]}" if sets else "params"
    identity = {"path": str(folder / str(step)), "step": step, "parameters": parameters}
    return Network(config, nnx.merge(graph, loaded), identity)


def check_same_run(workdir: str | Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Checks that a run is resumed with its original settings.

    Raises:
      UserError: naming every field that differs.
    """
    old, new = _flat(saved), _flat(json.loads(json.dumps(config)))
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
                 and not name.startswith(_FREE_FIELDS) and name not in _FREE_NAMES]
    if differing:
        changes = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in differing)
        raise UserError(f"{workdir}: its checkpoints belong to another config ({changes}); use another --workdir, or "
                        "give the same values")


def checkpoint_bytes(state: TrainState) -> int:
    """Size of a checkpoint of this state (arrays or their shapes)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
    _set_up_orbax()
    return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(**options))


@functools.cache
def _set_up_orbax() -> None:
    # Orbax logs each save, and the traceback of every error that it also raises.
    absl = logging.getLogger("absl")
    absl.setLevel(logging.WARNING)
    absl.addFilter(_not_of_orbax)
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_PART)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _newest_sound(
    folder: Path, steps: Iterable[int], items: Collection[str] | None = None
) -> tuple[int, dict[int, str]]:
    """The newest checkpoint without damage (in these items; None: in all), and the damage of newer ones."""
    damaged = {}
    for step in sorted(steps, reverse=True):
        problem = damage(folder / str(step), items)
        if problem is None:
            return step, damaged
        damaged[step] = problem
    reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
    raise UserError(f"{folder}: has no intact checkpoint ({reasons}); restore a copy of one, "
                    "or start in another --workdir")


def _stored_names(item: Path) -> Collection[str]:
    return ocp.StandardCheckpointHandler().metadata(item).tree.keys()


def _items(state: TrainState) -> dict[str, Any]:
    progress = {name: value for name, value in state._asdict().items() if name not in _ITEMS}
    return {item: getattr(state, field) for field, item in _ITEMS.items()} | {"progress": progress}


def _state(items: dict[str, Any]) -> TrainState:
    return TrainState(**{field: items[item] for field, item in _ITEMS.items()}, **items["progress"])


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path. The paths leave out the Variable in which Flax wraps each parameter."""
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _unnamed(like: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `_named`; `like` gives the structure of the tree."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _named(like)])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: value for key, child in tree.items()
            for name, value in _flat(child, f"{prefix}.{key}" if prefix else key).items()}
