"""The steps of the GPU report: `python -m hae_jax.benchmark.gpu_steps NAME ...`, started by `gpu_report`.

A step adds each metric to a file of JSON lines as soon as it is measured. In a rehearsal, all sizes are small.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hae_jax.benchmark import blocks, naive
from hae_jax.benchmark.gpu_report import DEVICE_LOCK, RUNNING, WAITING
from hae_jax.benchmark.loader import made_up_slices
from hae_jax.benchmark.measure import (
    Compiled,
    compile_program,
    copy_speed,
    in_turns,
    longest_kernels,
    matmul_peak,
    peak_of_first_call,
)
from hae_jax.benchmark.programs import PLAIN, Form, Program, TrainingStep, TranslationOfBatch, with_model
from hae_jax.benchmark.results import OURS
from hae_jax.commands.config import read_config
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.localization.denoisers import network_denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings, forward_process
from hae_jax.model import UNet
from hae_jax.ops.forms import compiler_options
from hae_jax.provenance import cores, versions
from hae_jax.torch_interop.weights import load_torch_state, torch_state
from hae_jax.training.mesh import make_mesh
from hae_jax.training.state import network_config

REPOSITORY = Path(__file__).resolve().parents[2]
_BATCH = 28  # batch size of the published training
_FULL, _REFERENCE = "configs/brats_v2c.py", "configs/phantom_reference.py"
# The network of a rehearsal: the variant that compiles fastest.
_SMALL = {"variant": "fpdm", "image_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,),
          "attention_resolutions": ()}
_NOT_RUN = (RuntimeError, ValueError, NotImplementedError)  # errors of a kernel that this device does not have
_WAITING_STEPS = "compare", "torch-compile"  # they wait for other steps
_SETTLE = 0.5  # seconds until the device has finished the kernels of steps that were stopped
_TIMED_STEPS = 60  # steps of a translation that are timed
_SAVING = 45.0  # seconds reserved to save and export the reference network; 20 in a rehearsal


@dataclasses.dataclass(frozen=True)
class Report:
    """The destination of a step's metrics, and the metrics of other steps.

    Attributes:
      figures: file of JSON lines, named after the step.
      results: `results.json`, which contains the metrics of the steps so far.
      output: folder for files.
      end: when the step must be over, by `time.monotonic`.
      rehearse: whether everything is to be small.
    """

    figures: Path
    results: Path
    output: Path
    end: float
    rehearse: bool

    def add(self, name: str, value: float, unit: str = "", *, at_most: float | None = None,
            at_least: float | None = None, **details: Any) -> None:
        """Adds a metric, which must be finite, with its goals, if any."""
        goals = {"at_most": at_most, "at_least": at_least}
        self.write({"name": name, "value": float(value), "unit": unit,
                    **{key: goal for key, goal in goals.items() if goal is not None}, **details})

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line immediately."""
        with self.figures.open("a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def found(self, step: str, name: str) -> float | None:
        """The value of a metric of another step, if it is there."""
        return next((f["value"] for f in self._results()["figures"] if (f["step"], f["name"]) == (step, name)), None)

    def config(self) -> ml_collections.ConfigDict:
        """The config of the full network, or of a small one in a rehearsal."""
        config = read_config(str(REPOSITORY / _FULL), [])
        return with_model(config, **_SMALL) if self.rehearse else config

    def batch(self, images: int) -> int:
        """The batch size, or a small one in a rehearsal."""
        return 2 if self.rehearse else images

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return jax.default_backend() == "gpu"

    def compiled(self, program: Program, form: Form = PLAIN, options: dict[str, Any] | None = None) -> Compiled:
        """Compiles a program, while other steps may do the same.

        One process compiles one program at a time: with jax 0.11.2 on an H200, eight compilations in the threads of a
        process did not end.
        """
        compiled = compile_program(functools.partial(program.lower, form), 1, options)
        self.add("time until compiled, beside other steps", compiled.seconds, "s")
        return compiled

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context for measurements: stops the processes of all other steps. Only one step can be in it."""
        folder = self.figures.parent
        with (folder / DEVICE_LOCK).open("w") as lock:  # the end of the process releases the lock as well
            fcntl.flock(lock, fcntl.LOCK_EX)
            others = []
            for path in folder.glob("*.pid"):
                with contextlib.suppress(FileNotFoundError):  # the step has just ended
                    others += [int(path.read_text())] if path.stem != self.figures.stem else []
            try:
                _send(signal.SIGSTOP, others)
                time.sleep(_SETTLE)
                yield
            finally:
                _send(signal.SIGCONT, others)
                fcntl.flock(lock, fcntl.LOCK_UN)  # processes that were started meanwhile have the file open, too

    def wait_for(self, *names: str) -> None:
        """Waits until these steps have ended, if they are part of the report, but not longer than this step's time."""
        while time.monotonic() < self.end and any(
                done["step"] in names and done["status"] in (WAITING, RUNNING) for done in self._results()["steps"]):
            time.sleep(1)

    def steps_before(self) -> list[str]:
        """The names of the steps that are listed before this one, without those that wait for other steps."""
        names = [done["step"] for done in self._results()["steps"]]
        return [name for name in names[:names.index(self.figures.stem)] if name not in _WAITING_STEPS]

    def _results(self) -> dict[str, Any]:
        return json.loads(self.results.read_text())


def _send(number: signal.Signals, groups: Sequence[int]) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):  # the step has ended
            os.killpg(group, number)


def facts(report: Report) -> None:
    """The device's peak of matrix products and copies."""
    mesh, repeats = _one_device(), 1 if report.rehearse else 5
    report.add("bfloat16 matrix product", matmul_peak(mesh, "bfloat16", repeats) / 1e12, "TFLOP/s")
    report.add("copy", copy_speed(mesh, repeats) / 1e9, "GB/s")


def numbers(report: Report) -> None:
    """Checks that this device computes correct results."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "model"))
    from golden_weights import read_case  # pyright: ignore[reportMissingImports]  the golden cases lie beside the tests

    folder = REPOSITORY / "tests" / "golden"
    names = ("hae_v2c_tiny", "hae_v2c_options", "fpdm_tiny", "fpdm_options")
    for name in ("fpdm_tiny",) if report.rehearse else names:
        outputs, gradients = _golden_errors(read_case(folder, name))
        report.add(f"{name}, float32, outputs", outputs, "of the maximum", at_most=1e-4)
        report.add(f"{name}, float32, gradient norms", gradients, "of the norm", at_most=1e-4)
    case = read_case(folder, "fpdm_tiny" if report.rehearse else "hae_v2c_brats")
    exact = case.output("cond").astype(np.float64)
    for form in ("xla", "cudnn") if report.on_gpu else ("auto",):
        rounded = _golden_output(case, dtype="bfloat16", attention=form)
        report.add(f"bfloat16 against float32, attention {form}, relative L2",
                   float(np.linalg.norm(rounded - exact) / np.linalg.norm(exact)), at_most=2e-2)
    case = read_case(folder, "fpdm_tiny" if report.rehearse else "hae_v2c_tiny")
    report.add("translation, masks against the CPU's", _translation_dice(case, report), "Dice", at_least=0.99)
    resume(report, at_most=1e-6)  # operations of a GPU may add in an order that varies


def resume(report: Report, at_most: float = 0) -> None:
    """Training of 3 + 3 steps against 6."""
    report.add("resume, 3 + 3 steps against 6, largest difference", _resume_difference(), at_most=at_most)


def training(report: Report, variant: str = "") -> None:
    """The training step, with its longest kernels and the whole profile as a file; or a variant without these.

    Args:
      report: destination.
      variant: number of images, "naive", "xla" (attention), or "options" (XLA's own instead of this project's).
    """
    config, mesh = report.config(), _one_device()
    batch = report.batch(int(variant) if variant.isdigit() else _BATCH)
    # This project's options for GPUs are all False. XLA's own values of them are True.
    options = dict.fromkeys(compiler_options(), True) if variant == "options" and report.on_gpu else None
    (step, form), longest = _training_step(config, mesh, batch, variant), []
    compiled = report.compiled(step, form, options)
    for last_try in (False, True):
        try:
            with report.alone():
                step.place()
                memory = _peak(step, compiled, mesh)
                seconds = float(np.median(_timed(report, [(step, compiled)])[0]))
                if not variant:
                    longest = longest_kernels(functools.partial(step.call, compiled.executable),
                                              keep=report.output / "profile.xplane.pb.gz")
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if last_try:
                report.add(f"batch {batch}, fits beside other steps", 0)
                return
        del step
        report.wait_for(*report.steps_before())  # they also take memory
        step, _ = _training_step(config, mesh, batch, variant)
    report.add(f"batch {batch}", batch / seconds, "images/s", seconds=seconds)
    report.add(f"batch {batch}, peak memory", memory / 1e9, "GB", planned=_planned(compiled))
    if peak := report.found("facts", "bfloat16 matrix product"):
        report.add(f"batch {batch}, MFU", 100 * step.flops() / seconds / (1e12 * peak), "% of the matrix product")
    if longest:
        report.add("kernels of a step, together", 1e3 * longest[0][1] / longest[0][2], "ms")
    for rank, (name, duration, share) in enumerate(longest, 1):
        report.add(f"kernel {rank}, {name[:80]}", 100 * share, "%", seconds=duration)


def _training_step(
    config: ml_collections.ConfigDict, mesh: Mesh, batch: int, variant: str
) -> tuple[TrainingStep, Form]:
    if variant == "xla":
        config = with_model(config, attention="xla")
    pieces = naive.pieces_of(naive.NAIVE, network_config(config.to_dict()), translation=False)
    return TrainingStep(config, mesh, batch), Form(naive.NAIVE, pieces) if variant == "naive" else PLAIN


def compare(report: Report, mode: str | None = None) -> None:
    """The training step in PyTorch and, with eager PyTorch, in our other forms, each in turns with ours.

    Args:
      report: destination.
      mode: of torch.compile, which takes minutes; None: eager. A rehearsal is always eager.
    """
    import torch

    from hae_jax.benchmark.torch_programs import Options, TorchTrainingStep, device_for

    config, mesh, batch = report.config(), _one_device(), report.batch(_BATCH)
    device, theirs = device_for(mesh.devices.flat[0].platform, 1), None
    name = "PyTorch, torch.compile" if mode else "PyTorch, eager"
    memory_errors = jax.errors.JaxRuntimeError, torch.OutOfMemoryError
    try:
        with report.alone():  # the first call tries several convolutions for each shape
            program = TorchTrainingStep(config, batch, device, Options(channels_last=True))
            program.call().block_until_ready()
        if mode and not report.rehearse:
            del program
            program = TorchTrainingStep(config, batch, device, Options(compile=mode, channels_last=True))
            program.call().block_until_ready()  # compiles it
        with report.alone():
            theirs = program.call, program.peak_memory()
    except memory_errors:
        report.add(f"{name}, fits beside other steps", 0)
    step = TrainingStep(config, mesh, batch)
    variants = {"training": ""} if mode else {"training": "", "training-xla": "xla", "training-naive": "naive"}
    traced = {other: program.lower(form) for other, variant in variants.items()
              for program, form in [_training_step(config, mesh, batch, variant)]}

    def loaded(name: str) -> tuple[Callable[[], Any], float] | None:
        """The program that another step has compiled, from the compilation cache, and its peak memory in bytes."""
        report.wait_for(name)
        if memory := report.found(name, f"batch {batch}, peak memory"):
            compiled = compile_program(lambda: traced[name], 1)
            report.add(f"{name}, time to load or compile it", compiled.seconds, "s")
            return functools.partial(step.call, compiled.executable), 1e9 * memory
        return None

    def measure(name: str, call: Callable[[], Any], memory: float | None) -> None:
        try:
            with report.alone():
                step.place()
                turns = in_turns([*([ours[0]] if ours else []), call], 1 if report.rehearse else 3)
        except memory_errors as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            report.add(f"{name}, fits beside other steps", 0)
            return
        report.add(f"{name}, batch {batch}", batch / float(np.median(turns[-1])), "images/s", turns=turns.tolist())
        if ours:
            report.add(f"{name} over ours, time", float(np.median(turns[1] / turns[0])), "x")
            if memory:
                report.add(f"{name} over ours, memory", memory / ours[1], "x")

    ours = loaded("training")
    if theirs:
        measure(name, *theirs)
    for other in list(variants)[1:]:
        if found := loaded(other):
            measure(other, *found)


def translation(report: Report, images: int = _BATCH) -> None:
    """The published forward process: some of its steps, which all cost the same."""
    config, mesh, batch = report.config(), _one_device(), report.batch(images)
    steps, timed = config.translation.forward_steps, 4 if report.rehearse else _TIMED_STEPS
    program = TranslationOfBatch(config, mesh, batch, timed)
    compiled = report.compiled(program)
    with report.alone():
        program.place()
        start = time.perf_counter()
        jax.block_until_ready(program.call(compiled.executable))
        seconds = (time.perf_counter() - start) / batch * steps / timed
    report.add(f"{steps} steps, from {timed}, batch {batch}", seconds, "s/slice", planned=_planned(compiled))


def attention_and_noise(report: Report) -> None:
    """Forms of attention at the network's largest sizes, forward and with gradients; simplex noise."""
    batch, mesh, calls = (1 if report.rehearse else _BATCH), _one_device(), {}
    for make in (blocks.attention_block, blocks.smallest_patches):
        for form in ("xla", "cudnn") if report.on_gpu else ("xla",):
            block = make(batch, "bfloat16", form, small=report.rehearse)
            arguments = block.placed(mesh)
            for name, wrap in (("forward", lambda f: f), ("with gradients", blocks.with_gradients)):
                program = jax.jit(wrap(block.forms[OURS]))
                try:
                    jax.block_until_ready(program(*arguments))  # compiles it
                except _NOT_RUN:
                    report.add(f"{block.name}, {form}, {name}, runs", 0)
                    continue
                calls[f"{block.name}, {form}, {name}"] = functools.partial(program, *arguments)
    noise = blocks.simplex_noise(batch)
    program, arguments = jax.jit(noise.forms[OURS]), noise.placed(mesh)
    jax.block_until_ready(program(*arguments))
    calls[f"{noise.name}, batch {batch}"] = functools.partial(program, *arguments)
    with report.alone():
        turns = in_turns(list(calls.values()), 3)
    for name, seconds in zip(calls, turns.min(1), strict=True):
        report.add(name, 1e3 * seconds, "ms")


def reference(report: Report) -> None:
    """Trains the phantom's reference network until the time limit, and exports its EMA weights."""
    saving = 20 if report.rehearse else _SAVING
    with tempfile.TemporaryDirectory() as folder:
        work, start = Path(folder), time.monotonic()
        config, overrides = _reference_config(report, work)
        from hae_jax.phantom.on_demand import ensure_phantom

        ensure_phantom(config.data, config.model.image_size)
        report.add("phantom", time.monotonic() - start, "s", subjects=config.data.phantom.subjects)
        run = work / "run"
        command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(REPOSITORY / _REFERENCE), "--workdir",
                   str(run), *overrides, f"--config.training.steps={_affordable_steps(report, config, saving)}"]
        _until(subprocess.Popen(command, cwd=REPOSITORY), report.end - saving)
        _export(report, run)


def _reference_config(report: Report, work: Path) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The reference network's config, with data in a separate folder and a batch large enough for a GPU."""
    workers = min(16, cores())
    fields = {"data.root": work / "store", "data.phantom.cases": work / "cases", "data.phantom.workers": workers,
              "model.dtype": "bfloat16", "training.batch_size": 64, "training.ema_rates": "(0.9995,)"}
    if report.rehearse:
        fields |= {f"model.{name}": value for name, value in _SMALL.items()}
        fields |= {"data.phantom.size": 0.1, "data.phantom.subjects": 4, "data.phantom.train_fraction": 0.5,
                   "data.phantom.val_fraction": 0.25, "data.phantom.workers": 1, "training.batch_size": 8,
                   "training.validate_every": 0, "training.localization_every": 0, "training.sample_every": 4,
                   "training.sample_steps": 2, "training.log_every": 1}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return read_config(str(REPOSITORY / _REFERENCE), overrides), overrides


def _affordable_steps(report: Report, config: ml_collections.ConfigDict, saving: float) -> int:
    """The number of training steps that fit into 90 % of the remaining time, so that annealing is completed."""
    if report.rehearse:
        return 4
    mesh = _one_device()
    step = TrainingStep(config, mesh, config.training.batch_size)
    compiled = compile_program(step.lower, 1)
    step.place()
    seconds = float(np.median(_timed(report, [(step, compiled)])))
    left = report.end - saving - time.monotonic() - 2 * compiled.seconds
    return max(100, int(0.9 * left / seconds))


def _until(process: subprocess.Popen, end: float) -> None:
    """Waits for a training. At the time limit, it asks the training to save and stop."""
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _export(report: Report, run: Path) -> None:
    from hae_jax.training.weights import export_weights

    network = export_weights(run, report.output)
    shutil.copy(run / "metrics.jsonl", report.output)
    if grids := sorted((run / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime):
        shutil.copy(grids[-1], report.output / "samples.png")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    report.add("steps", network.identity["step"])
    report.add("loss", last["loss"])


def _one_device() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def _peak(program: Program, compiled: Compiled, mesh: Mesh) -> int:
    """The peak memory in bytes of the first call, or else of XLA's plan."""
    return peak_of_first_call(mesh.devices.flat[0], lambda: program.call(compiled.executable),
                              compiled.arguments) or _planned(compiled)


def _planned(compiled: Compiled) -> int:
    assert compiled.memory is not None  # XLA plans the memory of CPUs and GPUs
    return compiled.memory


def _timed(report: Report, programs: Sequence[tuple[Program, Compiled]]) -> np.ndarray:  # [programs, turns] seconds
    return in_turns([lambda p=program, c=compiled: p.call(c.executable) for program, compiled in programs],
                    1 if report.rehearse else 5)


def _golden_network(case: Any, **fields: str) -> tuple[nnx.GraphDef, nnx.State]:
    config = dataclasses.replace(case.config, **{"dtype": "float32", **fields})
    model = nnx.eval_shape(lambda: UNet(config, nnx.Rngs(0)))
    load_torch_state(model, case.weights)
    return nnx.split(model)


def _golden_forward(graph: nnx.GraphDef, case: Any) -> Callable[..., jax.Array]:
    t, y = jnp.asarray(case.values["t"]), jnp.asarray(case.values["y"])
    return lambda state, null, drop: nnx.merge(graph, state)(
        case.x, t, y, null=null, drop=drop, sparse_masks=case.masks)


@jax.default_matmul_precision("highest")
def _golden_errors(case: Any) -> tuple[float, float]:
    """The largest errors of outputs and of gradient norms, as shares of the largest output and norm."""
    graph, state = _golden_network(case)
    forward, direction = _golden_forward(graph, case), case.gradient_direction()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def scalar(state, null, drop):
        out = forward(state, null, drop)
        return jnp.mean(out * direction), out

    run, outputs = jax.jit(scalar, compiler_options=compiler_options()), []
    for mode, (null, drop) in case.modes().items():
        (_, out), gradients = run(state, null, drop)
        outputs.append(np.abs(out - case.output(mode)).max() / np.abs(case.output(mode)).max())
        if mode == str(case.values["grad_mode"]):
            found = torch_state(nnx.merge(graph, gradients))
    wanted = dict(zip(case.values["grad_keys"].tolist(), case.values["grad_l2"], strict=True))
    # A bias before a norm has a gradient of rounding errors only. So a share of the largest norm is added.
    floor = 1e-3 * max(wanted.values())
    worst = max(abs(np.linalg.norm(found[name].astype(np.float64)) - norm) / (norm + floor)
                for name, norm in wanted.items())
    return float(max(outputs)), float(worst)


@jax.default_matmul_precision("highest")
def _golden_output(case: Any, **fields: str) -> np.ndarray:
    graph, state = _golden_network(case, **fields)
    forward = jax.jit(_golden_forward(graph, case), compiler_options=compiler_options())
    return np.asarray(forward(state, *case.modes()["cond"]), np.float64)


@jax.default_matmul_precision("highest")
def _translation_dice(case: Any, report: Report) -> float:
    """The Dice of the masks of the forward process on this device and on the CPU."""
    graph, state = _golden_network(case)
    process = Process(make_schedule("linear", 1000, "50"))
    settings = ForwardSettings(4 if report.rehearse else 30, modality=(0,))
    x0 = np.tanh(np.random.default_rng(0).standard_normal((2, *case.x.shape[1:]), np.float32))

    def translate(state, x0, seed):
        keys = jax.random.split(jax.random.key(seed), len(x0))
        return forward_process(process, network_denoisers(nnx.merge(graph, state)), x0,
                               step_noise(keys, x0.shape[1:]), settings).map[..., 0]

    run, masks = jax.jit(translate), []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        maps = np.asarray(run(*jax.device_put((state, x0, np.uint32(0)), device)))
        masks.append(maps >= np.quantile(maps, 0.9, axis=(1, 2), keepdims=True))
    return float(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()))


def _resume_difference() -> float:
    """The largest difference between the EMA weights after 3 + 3 steps and after 6 steps."""
    from hae_jax.training.checkpoint import load_network
    from hae_jax.training.loop import train

    with tempfile.TemporaryDirectory() as folder:
        config = read_config(str(REPOSITORY / "configs" / "default.py"), [])
        config = with_model(config, **_SMALL)
        config.data.root = f"{folder}/store"
        config.training.update({"batch_size": 8, "log_every": 1, "sample_every": 0, "validate_every": 0,
                                "localization_every": 0, "ema_rates": (0.9,)})
        made_up_slices(Path(config.data.root), [16, 16, 4])
        for name, stops in (("whole", (6,)), ("parts", (3, 6))):
            for config.training.steps in stops:
                train(config, Path(folder) / name, jax.devices()[:1])
        whole, parts = (nnx.state(load_network(f"{folder}/{name}").model, nnx.Param) for name in ("whole", "parts"))
        return float(max(map(lambda a, b: np.abs(a - b).max(), jax.tree.leaves(whole), jax.tree.leaves(parts))))


def _driver() -> str | None:
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                             text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


_STEPS: dict[str, Callable[[Report], None]] = {
    "facts": facts, "training": training,
    **{f"training-{variant}": functools.partial(training, variant=variant)
       for variant in ("56", "112", "224", "naive", "xla", "options")},
    "translation": translation, "translation-112": functools.partial(translation, images=112), "compare": compare,
    "torch-compile": functools.partial(compare, mode="default"),
    "numbers": numbers, "blocks": attention_and_noise, "deterministic": resume, "reference": reference,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=_STEPS)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True, help="by time.monotonic")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args(argv)
    report = Report(arguments.figures, arguments.results, arguments.output, arguments.end, arguments.rehearse)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # steps share the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # for the largest batch; JAX's default is 0.75
    device = jax.devices()[0]
    report.write({"machine": {"device": device.device_kind, "platform": device.platform, "driver": _driver(),
                              "cores": os.cpu_count(), "versions": versions()}})
    _STEPS[arguments.step](report)


if __name__ == "__main__":
    main()
