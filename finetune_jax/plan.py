"""What a recipe would take on machines that are not here: its real train and evaluation step, compiled for them.

Memory, FLOPs, bytes and collectives are the compiler's; times are bounds from below, from published peak rates.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from finetune_jax import signals
from finetune_jax.config import Config
from finetune_jax.data.pipeline import Batches, Examples, ImageExamples, evaluation_shape, train_shape
from finetune_jax.data.sources import cache_root
from finetune_jax.data.text import TextFeatures, prompted
from finetune_jax.errors import UserError
from finetune_jax.hf.pretrained import Checkpoint
from finetune_jax.hlo import BETWEEN_SLICES, Collective, Program, read_program
from finetune_jax.job import (
    FAMILIES,
    Job,
    job_of_task,
    make_job,
    open_pretrained,
    open_source,
    parse_model,
    task_from_config,
)
from finetune_jax.limits import validate
from finetune_jax.models.layers import Product
from finetune_jax.prepare import check_mixing, check_splits, deciding_metric, with_class_weights
from finetune_jax.sharding import batch_parts, bytes_a_device
from finetune_jax.state import TrainState
from finetune_jax.step import (
    Updates,
    abstract_batch,
    lower_forward,
    lower_train_step,
    make_forward,
    make_train_step,
)
from finetune_jax.targets import Target, compiler_version, devices_of, parse_target
from finetune_jax.tasks import Task
from finetune_jax.updates import abstract_state_of, cached_width, make_updates

PLANS = "plans"
"""Folder of the cache: what was read of programs that were compiled before."""
PLANS_VERSION = 3
CLOSE = 0.03
"""The largest batch is searched to within this share."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the data would say, where they are not here."""

    examples: int
    """Of the training split."""
    tokens: int
    """Word pieces of an example; of images ignored."""
    labels: int
    """Classes."""

    def check(self, max_length: int) -> None:
        """
        Raises:
            UserError: A number is below 1, or the texts are longer than what is read of one.
        """
        for name in ("examples", "tokens", "labels"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if self.tokens > max_length:
            raise UserError(
                f"--tokens is {self.tokens}, of which data.max-length {max_length} leaves less; lower it, or raise that"
            )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a train step."""

    parameters: int
    """Trained and frozen weights, and running averages."""
    optimizer: int
    """Its state."""
    batch: int
    """The rows of one step."""
    gradients: int
    """One float32 for each trained parameter: all are there at once, for their norm."""
    activations: int
    """All that the compiler needs besides: kept for the backward pass, and work space."""
    padding: int
    """What the device's tiles add to the arguments."""
    code: int
    """The program."""
    capacity: int
    """What there is."""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self)) - self.capacity


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A recipe on a target."""

    target: Target
    config: Config
    mesh: dict[str, int]
    examples: float
    """A step, on average."""
    rows: int
    """Of a batch, over all devices."""
    filled: int
    """Rows of them that the batch needs; the others only make it divide by the devices."""
    length: int
    """Of a row: word pieces; 1 of images."""
    steps: int
    """Of the whole run."""
    over: int
    """Bytes that are missing on a device; 0 where it fits."""
    memory: Memory | None
    """None where the compiler gave up for want of memory."""
    program: Program | None
    donated: int
    """Bytes of a device's state that a train step writes where it read them."""
    minimum_flops: float
    """Of one device and step: the products that the gradient needs, by the model's formulas."""
    evaluation: int
    """Bytes of one device while the run evaluates: the evaluation step's, and the state that training goes on with."""
    evaluation_over: int
    """As `over`, of those."""
    compile_seconds: float
    compiler: str

    @property
    def fits(self) -> bool:
        """Training and evaluation both."""
        return not self.over and not self.evaluation_over

    @property
    def peak(self) -> int:
        """Bytes of one device at the fullest moment of the run, where it trains or where it evaluates."""
        return max(self.memory.peak if self.memory is not None else 0, self.evaluation)

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds a step at least, by what takes them: none can be faster than the slowest."""
        assert self.program is not None
        machine, program = self.target.machine, self.program
        peak = machine.flops if self.config.model.dtype == "bfloat16" else machine.flops_float32
        far = sum(
            c.sent
            for c in program.collectives
            if c.axes == BETWEEN_SLICES or c.group > self.target.neighbours
        )
        near = sum(c.sent for c in program.collectives) - far
        return {
            "matrix products": program.flops / peak,
            "memory": program.bytes / machine.bandwidth,
            "links": near / machine.link,
            "network": far / machine.network,
        }

    @property
    def step_seconds(self) -> float:
        """Of a step, at least."""
        return max(self.bounds.values())

    @property
    def run_hours(self) -> float:
        """Of the whole run, at least."""
        return self.step_seconds * self.steps / 3600


def plan(
    config: Config,
    targets: Sequence[str],
    batch_size: int | str | None = None,
    workload: Workload | None = None,
) -> list[tuple[Estimate, list[tuple[str, Estimate]]]]:
    """A recipe on each target, and of one that does not fit, what was tried to make it.

    Args:
        config: The recipe.
        targets: Such as v5e:4x4, v5e:4x4:2 or h100:8.
        batch_size: Instead of the recipe's; auto finds the largest that fits.
        workload: Instead of the recipe's data.

    Raises:
        UserError: An unknown target, a missing compiler, a mesh or batch that does not divide.
    """
    if not targets:
        raise UserError("plan needs a --target, such as v5e:4x4 or h100:8")
    signals.phase("planning")
    if workload is not None:
        workload.check(config.data.max_length)
    machines = [(target, devices_of(target)) for target in map(parse_target, targets)]
    if isinstance(batch_size, int):
        config = _with(config, "train.batch_size", batch_size)
    subject = Subject.open(validate(config), workload)
    found = []
    for target, devices in machines:
        estimate = (
            subject.largest(target, devices)
            if batch_size == "auto"
            else subject.estimate(config, target, devices)
        )
        found.append((estimate, [] if estimate.fits else subject.rescue(config, target, devices)))
    return found


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A recipe's train step, traced for a target's devices."""

    job: Job
    batches: Batches
    steps: int
    """Of the whole run."""
    state: TrainState
    """Shapes and places."""
    batch: Any
    """Shapes and places."""
    program: Any
    """What `lower` gave."""
    minimum_flops: float
    """As in `Estimate`."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A recipe with its data, to be compiled again and again as its knobs change."""

    config: Config
    task: Task
    model_config: Any
    data: Examples
    count: int
    """Training examples."""
    cache: Path
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, config: Config, workload: Workload | None) -> "Subject":
        """The recipe's own data, opened as training would; or a stand-in of the same size."""
        deciding_metric(config)
        checkpoint = open_pretrained(config.model)
        model_config = parse_model(config.model, checkpoint)
        cache = cache_root(config.data) / PLANS
        if workload is None:
            source = open_source(config, checkpoint)
            if "train" not in source.splits:
                raise UserError("data.train names no split; give --examples, --tokens and --labels instead")
            task = task_from_config(config, checkpoint, model_config, source.labels)
            check_splits(config, source)
            data = task.examples(source.splits["train"], train=True, cache_key=(source.fingerprint, "train"))
            task = with_class_weights(task, config, source, data)
            return cls(config, task, model_config, data, len(data), cache, checkpoint)
        regression = config.task.name == "sequence_regression"
        labels = None if regression else tuple(str(index) for index in range(workload.labels))
        task = task_from_config(config, checkpoint, model_config, labels, reads=False)
        data = _stand_in(config, task, workload)
        return cls(config, task, model_config, data, workload.examples, cache, checkpoint)

    def train_step(self, config: Config, devices: list[Any]) -> "Lowered":
        """The recipe's train step, as it is or with other knobs, ready to compile."""
        job = job_of_task(config, self.task, self.model_config, self.checkpoint, devices)
        parts = batch_parts(job.mesh) * config.train.accumulation
        batching, longest = config.data.batching, self.task.row_length
        shape = train_shape(self.data, config.train.batch_size, longest, batching, parts)
        check_mixing(config, shape)
        batches = Batches(self.data, shape, config.seed, parts=parts)
        steps = config.train.steps or math.ceil(
            self.count / len(self.data) * batches.epochs.steps(config.train.epochs)
        )
        updates = make_updates(config, job, steps)
        if cached_width(config, job, updates):
            raise UserError(
                "model.cache-features: the step of a run with kept features is too small to plan; without it plan shows"
                " what computing them takes"
            )
        state = abstract_state_of(job, updates)
        batch = abstract_batch(batches.blank(batches.shape.length), batches.rows, job.mesh)
        step = make_train_step(job.task, job.parts, updates, config.train.accumulation)
        lowered = lower_train_step(step, state, batch, job.mesh)
        return Lowered(job, batches, steps, state, batch, lowered, self._minimum(job, updates, batches))

    def estimate(self, config: Config, target: Target, devices: list[Any]) -> Estimate:
        """The recipe, as it is or with other knobs, compiled for a target."""
        step = self.train_step(config, devices)
        job, batches = step.job, step.batches
        mesh, machine = dict(job.mesh.shape), int(target.machine.memory)
        programs = [step.program, self._lower_evaluation(config, job, step.state)]
        # A compilation does not fill two cores.
        with no_compile_cache(), ThreadPoolExecutor(len(programs)) as pool:
            trained, evaluated = pool.map(
                lambda program: compiled(program, target, mesh, self.cache), programs
            )

        memory = None
        if "sizes" in trained:
            memory = _memory(trained["sizes"], step.state, step.batch, machine)
        # A run that evaluates keeps what training goes on with.
        beside = bytes_a_device(step.state)[1] - bytes_a_device(step.state.served)[1]
        evaluation = _need(evaluated, machine) + beside
        return Estimate(
            target=target,
            config=config,
            mesh=mesh,
            examples=len(self.data) / batches.epochs.steps(1.0),
            rows=batches.rows,
            filled=batches.shape.rows,
            length=batches.shape.length,
            steps=step.steps,
            over=max(0, _need(trained, machine) - machine),
            memory=memory,
            program=program_of(trained),
            donated=trained.get("sizes", {}).get("alias", 0),
            minimum_flops=step.minimum_flops,
            evaluation=evaluation,
            evaluation_over=max(0, evaluation - machine),
            compile_seconds=max(trained["seconds"], evaluated["seconds"]),
            compiler=compiler_version(target),
        )

    def _lower_evaluation(self, config: Config, job: Job, state: TrainState) -> Any:
        """The evaluation step; the training split stands for the others, which are as long in all that matters here."""
        batching, parts = config.data.batching, batch_parts(job.mesh)
        shape = evaluation_shape(self.data, config.evaluation.batch_size, self.task.row_length, batching)
        batches = Batches(self.data, shape, None, parts=parts)
        batch = abstract_batch(batches.blank(batches.shape.length), batches.rows, job.mesh)
        return lower_forward(make_forward(job.task.measured(), job.parts), state.weights, batch, job.mesh)

    def largest(self, target: Target, devices: list[Any]) -> Estimate:
        """The largest batch that fits, to within a few per cent.

        Raises:
            UserError: Not even the smallest does.
        """
        mesh = make_job(
            self.task, self.config.model.family, self.model_config, self.config.mesh, devices
        ).mesh
        unit = batch_parts(mesh) * self.config.train.accumulation
        tried: dict[int, Estimate] = {}

        def over(units: int) -> float:
            config = _with(self.config, "train.batch_size", units * unit)
            found = tried[units] = self.estimate(config, target, devices)
            over = max(found.over, found.evaluation_over)
            return over or found.peak - int(target.machine.memory)

        best = largest_without(over, max(1, round(self.config.train.batch_size / unit)))
        if not best:
            raise UserError(
                f"{target}: not even a batch of {unit} fits; set --mesh.fsdp, --model.remat or a larger target"
            )
        return tried[best]

    def rescue(self, config: Config, target: Target, devices: list[Any]) -> list[tuple[str, Estimate]]:
        """Knobs that save memory, each turned on top of those before it, until all fits."""
        chips = len(devices)
        knobs: list[tuple[str, str, Any]] = []
        if config.model.dtype == "float32":
            knobs.append(("--model.dtype bfloat16", "model.dtype", "bfloat16"))
        if config.model.remat != "full":
            knobs.append(("--model.remat full", "model.remat", "full"))
        if config.mesh.fsdp == 1 and config.mesh.data == -1 and chips > config.mesh.tensor:
            knobs.append(
                (f"--mesh.fsdp {chips // config.mesh.tensor}", "mesh.fsdp", chips // config.mesh.tensor)
            )
        halves = config.train.accumulation * 2
        while config.train.batch_size % halves == 0 and halves <= 64 * config.train.accumulation:
            knobs.append((f"--train.accumulation {halves}", "train.accumulation", halves))
            halves *= 2
        tried: list[tuple[str, Estimate]] = []
        together, words = config, []
        for word, path, value in knobs:
            together = _with(together, path, value)
            words = [w for w in words if w.split()[0] != word.split()[0]] + [word]
            try:
                tried.append((" ".join(words), self.estimate(together, target, devices)))
            except UserError:  # micro-batches that no longer divide by the devices
                break
            if tried[-1][1].fits:
                break
        return tried

    def _minimum(self, job: Job, updates: Updates, batches: Batches) -> float:
        """FLOPs of one device."""
        rows, length = batches.rows, batches.shape.length
        if job.family == "bert":
            tokens = job.task.of_pieces
            outputs = rows * (length if tokens else batches.shape.segments)
            sizes = (rows, length, outputs)
        else:
            task: Any = job.task
            sizes = (rows, task.processor.size)
        products = FAMILIES[job.family].products(self.model_config, job.task.num_labels, *sizes)
        trained = {path for path, frozen in updates.is_frozen.items() if not frozen}
        return minimum_flops(products, trained) / job.mesh.size


def compiled(program: Any, target: Target, mesh: Mapping[str, int], cache: Path) -> dict[str, Any]:
    """What a program needs and does, as JSON values; kept, by the program's text and the compiler's version.

    Args:
        program: Lowered.
        target: Whose devices it is for.
        mesh: Sizes of the axes, in order.
        cache: Folder of what was found before.

    Returns:
        `missing`, bytes, where the compiler gave up; else `sizes` of its memory, `program` (see `program_of`) and
        `accessed`, the bytes by XLA's own analysis, None where it has none. And `seconds`.
    """
    compiler = (compiler_version(target), jax.__version__, *compiler_options())
    key = (PLANS_VERSION, str(target), compiler, program.as_text())
    file = cache / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    since = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        done = program.compile()
    except jax.errors.JaxRuntimeError as error:
        found |= out_of_memory(str(error))
    else:
        sizes = done.memory_analysis()
        found["sizes"] = {
            name: int(getattr(sizes, f"{name}_size_in_bytes"))
            for name in ("argument", "output", "alias", "temp", "generated_code")
        }
        found["program"] = dataclasses.asdict(read_program(done.as_text(), mesh, target.slices))
        found["accessed"] = (done.cost_analysis() or {}).get("bytes accessed")
    found["seconds"] = time.perf_counter() - since
    cache.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{time.time_ns()}")
    draft.write_text(json.dumps(found), encoding="utf-8")
    draft.rename(file)
    return found


def compiler_options() -> tuple[Any, ...]:
    """What else decides what a compiler makes of a program."""
    efforts = ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort", "jax_optimization_level")
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return (*(str(getattr(jax.config, name)) for name in efforts), *(os.environ.get(name) for name in flags))


@contextlib.contextmanager
def no_compile_cache() -> Iterator[None]:
    """JAX's persistent cache writes programs of devices that are not here, and then fails to read them."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX asks whether there is a cache once in a process, and keeps the answer until a reset.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def largest_without(over: Callable[[int], float], start: int) -> int:
    """The largest number that is not over, to within `CLOSE`; 0 where 1 is.

    Args:
        over: How much too much a number takes, below 0 where room is left; about a straight line. Slow.
        start: Where to begin.
    """
    found = {start: over(start)}
    following = start * 2 if found[start] <= 0 else max(1, start // 2)
    while True:
        if following not in found:
            found[following] = over(following)
        low = max((n for n, excess in found.items() if excess <= 0), default=0)
        high = min((n for n, excess in found.items() if excess > 0), default=None)
        if high == 1 or (high is not None and low and high - low <= max(1, CLOSE * low)):
            return low
        (a, excess_a), (b, excess_b) = sorted(found.items(), key=lambda item: abs(item[1]))[:2]
        slope = max((excess_b - excess_a) / (b - a), 1e-9)
        guess = math.floor(a - excess_a / slope)
        if high is not None and len(found) > 5:  # no line at all
            guess = (low + high) // 2
        least = low + max(1, math.floor(CLOSE * low))
        most = 8 * max(found) if high is None else max(low + 1, high - max(1, math.floor(CLOSE * high / 2)))
        following = min(max(guess, least), most)


def minimum_flops(products: Sequence[Product], trained: Collection[str]) -> float:
    """FLOPs that the gradient needs at least: each product forward, again for its kernel where that is trained, and
    again for each input that anything trained goes into.

    Args:
        products: In their order.
        trained: Paths of the parameters that are.
    """
    moves: dict[str, bool] = {}
    total = 0.0
    for product in products:
        inputs = [moves[name] for name in product.reads]
        total += product.flops * (1 + (f"{product.name}/kernel" in trained) + sum(inputs))
        own = product.around and any(path.startswith(product.around) for path in trained)
        moves[product.name] = bool(own) or any(inputs)
    return total


def out_of_memory(message: str) -> dict[str, Any]:
    """Bytes that were missing, from the compiler's words.

    Raises:
        UserError: It failed for another reason.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"Used {number} of {number} hbm", message) or re.search(
        rf"HLO temporaries \({number}\) exceeds available HBM \({number}\)", message
    )
    if used is None:
        raise UserError(f"the compiler refuses the step: {message.splitlines()[0][:300]}")
    need, there = (float(used[i]) * units[used[i + 1]] for i in (1, 3))
    return {"missing": int(need - there)}


def peak(sizes: Mapping[str, int]) -> int:
    """Bytes that a program needs, arguments included: what it writes where it read counts once."""
    return sum(sizes.values()) - 2 * sizes["alias"]


def _need(found: dict[str, Any], capacity: int) -> int:
    """Bytes that a program needs of a device."""
    return capacity + found["missing"] if "missing" in found else peak(found["sizes"])


def program_of(found: dict[str, Any]) -> Program | None:
    """Its figures, of what `compiled` found."""
    if "program" not in found:
        return None
    values = found["program"]
    return Program(
        values["flops"], values["bytes"], tuple(Collective(**each) for each in values["collectives"])
    )


def _memory(sizes: dict[str, int], state: TrainState, batch: Any, capacity: int) -> Memory:
    """The compiler's total, shared out: what lies in arguments by its shapes, the rest as said in `Memory`."""
    held = ([state.weights, state.averages], state.opt_state, batch)
    weights, moments, rows = (bytes_a_device(tree)[1] for tree in held)
    gradients = min(bytes_a_device(state.params)[1], sizes["temp"])
    fresh = sizes["output"] - sizes["alias"]
    return Memory(
        parameters=weights,
        optimizer=moments,
        batch=rows,
        gradients=gradients,
        activations=sizes["temp"] - gradients + fresh,
        padding=sizes["argument"] - weights - moments - rows,
        code=sizes["generated_code"],
        capacity=capacity,
    )


def _with(config: Config, path: str, value: Any) -> Config:
    room, name = path.split(".")
    return validate(
        dataclasses.replace(config, **{room: dataclasses.replace(getattr(config, room), **{name: value})})
    )


class _Blank:
    """So many black images."""

    def __init__(self, count: int, size: int, channels: int) -> None:
        self._count, self._record = count, {"image": np.zeros((size, size, channels), np.uint8), "label": 0}

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._record for _ in indices]


def _stand_in(config: Config, task: Any, workload: Workload) -> Examples:
    """Examples of the workload's size, all alike; at most a million of them, for more change no shape."""
    count = min(workload.examples, 10**6)
    if config.model.family == "resnet":
        size = task.processor.size
        return ImageExamples(_Blank(count, size, task.channels), task.processor, task.channels, None, 0)
    length = min(workload.tokens, config.data.max_length)
    pieces = np.broadcast_to(np.int32(1), (count * length,))
    tags = config.task.name == "token_classification"
    kind = np.float32 if config.task.name == "sequence_regression" else np.int32
    made = TextFeatures(
        input_ids=pieces,
        token_type_ids=np.broadcast_to(np.uint8(0), pieces.shape),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        example_ids=np.arange(count, dtype=np.int32),
        labels=pieces if tags else np.zeros(count, kind),
        words=pieces if tags else np.zeros(0, np.int32),
        word_offsets=np.arange(count + 1, dtype=np.int64) * length if tags else np.zeros(0, np.int32),
        cut=np.asarray(0, np.int64),
    )
    return prompted(made, task.virtual_ids)
