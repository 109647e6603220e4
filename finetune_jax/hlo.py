"""What a compiled program does, read from its text: matrix FLOPs, bytes to and from main memory, collectives.

XLA's own cost analysis counts the body of a loop once, knows no CUDA program, and says nothing of collectives. Here a
loop's body counts as often as it runs. All figures are of one device.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
    }
)
"""Operations that move no bytes."""
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
BETWEEN_SLICES = "data between slices"
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of one array of a program."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool
    """Not in a scratch memory beside the cores (TPU's VMEM), nor the host's."""

    @property
    def bytes(self) -> int:
        """Without the padding that a layout may add."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    arrays: tuple[Array, ...]
    """Its result; several where it is a tuple."""
    opcode: str
    arguments: str
    """What stands in its parentheses."""
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by role: calls, body, condition, to_apply."""
        return dict(re.findall(r"\b(calls|body|condition|to_apply)=%?([\w.\-]+)", self.attributes))


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication of a program, all of its occurrences together."""

    kind: str
    """all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute."""
    axes: str
    """Mesh axes it runs over, such as data or data+fsdp; `part of data` where a group is smaller than the axes, and
    `BETWEEN_SLICES`."""
    group: int
    """Devices that talk to each other."""
    count: int
    """Times a step."""
    bytes: int
    """A step: of the whole arrays, as they are before a reduce-scatter or after an all-gather."""

    @property
    def sent(self) -> float:
        """Bytes that a device must send at least: (n - 1) / n of the array, twice that for an all-reduce, all of a permute."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Program:
    """Figures of one device and one call."""

    flops: float
    """Of matrix products and convolutions, a multiplication and an addition being two."""
    bytes: float
    """To and from main memory: each kernel reads its operands and writes its result once."""
    collectives: tuple[Collective, ...]


def read_program(text: str, axes: Mapping[str, int], slices: int = 1) -> Program:
    """Figures of a compiled program.

    Args:
        text: What `compiled.as_text()` gives.
        axes: Sizes of the mesh's axes, in order; device n of the program is number n of the mesh.
        slices: Of TPUs, that talk over the data center's network.
    """
    computations, entry = parse(text)
    walk = _Walk(computations, axes, slices)
    walk.visit(entry, 1)
    found = [
        Collective(*key, count=count, bytes=size) for key, (count, size) in sorted(walk.collectives.items())
    ]
    return Program(walk.flops, walk.bytes, tuple(found))


def parse(text: str) -> tuple[Mapping[str, Computation], str]:
    """(computations by name, name of the first one to run)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[1], {})
                entry = head[1] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":  # a kernel's metadata has lines of its own, that begin with one
            current = None
        else:
            found = _instruction(line)
            if found is not None:
                current[found.name] = found
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    start = _LINE.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), not re.search(r"S\([1-9]", layout or ""))
        for dtype, shape, layout in _ARRAY.findall(line[at:end])
    )
    opening = line.index("(", end)
    closing = _closing(line, opening)
    arguments, root = line[opening + 1 : closing - 1], line.lstrip().startswith("ROOT ")
    return Instruction(start[1], arrays, line[end:opening].strip(), arguments, line[closing:], root)


def _closing(line: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"a parenthesis is not closed: {line[opening : opening + 80]}")


class _Walk:
    """Adds up what the computations do, each as often as it runs."""

    def __init__(self, computations: Mapping[str, Computation], axes: Mapping[str, int], slices: int) -> None:
        self.computations, self.axes, self.slices = computations, axes, slices
        self.flops = self.bytes = 0.0
        self.collectives: dict[tuple[str, str, int], tuple[int, int]] = {}

    def visit(self, name: str, times: int, fused: bool = False) -> None:
        """Add a computation that runs so many times; the inside of a kernel moves no bytes of its own."""
        inside = self.computations[name]
        attributes = [instruction.attributes for instruction in inside.values()]
        starts = any("AsyncCollectiveStart" in text for text in attributes)
        # A TPU's reduce-scatter: a kernel with an all-reduce, of which each device keeps a slice.
        scatters = name.startswith("all-reduce-scatter")
        whole = scatters and not any("AsyncCollective" in text for text in attributes)
        for instruction in inside.values():
            opcode = instruction.opcode
            self.flops += times * _flops(instruction, inside)
            # A TPU program repeats an asynchronous collective in each kernel that it passes through.
            kind = _kind(opcode)
            if kind and (starts or whole or not fused):
                self._communicate("reduce-scatter" if scatters else kind, instruction, inside, times)
            between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
            if opcode == "send" and between:
                size = _operand_bytes(instruction, inside)
                self._add(between[1].lower().replace("_", "-"), BETWEEN_SLICES, self.slices, times, size)
            if not fused:
                self.bytes += times * self._moved(instruction, inside)
            if opcode == "while":
                trips = self._trips(instruction)
                self.visit(instruction.called["body"], times * trips)
                self.visit(instruction.called["condition"], times * trips)
            elif "calls" in instruction.called:
                self.visit(instruction.called["calls"], times, fused or opcode == "fusion")
            elif opcode == "call":
                self.visit(instruction.called["to_apply"], times, fused)
            elif opcode == "conditional":
                for branch in _branches(instruction):
                    self.visit(branch, times, fused)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        # A counter from 0 against a constant, as `lax.scan` makes it.
        condition = self.computations[loop.called["condition"]]
        limits = [
            i.arguments for i in condition.values() if i.opcode == "constant" and i.arguments.isdecimal()
        ]
        return -(-max(map(int, limits), default=1) // self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """What a loop's body adds to its counter: XLA unrolls the loops that it makes itself, and counts them by two."""
        condition, body = (self.computations[loop.called[role]] for role in ("condition", "body"))
        read = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        root = next(instruction for instruction in body.values() if instruction.root)
        for instruction in read:
            index = int(re.findall(r"index=(\d+)", instruction.attributes)[0])
            update = body.get(root.operands[index]) if index < len(root.operands) else None
            if update is None or update.opcode != "add":
                continue
            added = [body[name] for name in update.operands if name in body]
            steps = [o.arguments for o in added if o.opcode == "constant" and o.arguments.isdecimal()]
            if steps:
                return int(steps[0])
        return 1

    def _moved(self, instruction: Instruction, inside: Computation) -> int:
        """Bytes that a kernel reads from and writes to main memory."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode in ("while", "call", "conditional") or opcode.endswith("-done"):
            return 0
        if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
            return 0
        operands = [inside[name] for name in instruction.operands if name in inside]
        if opcode == "fusion":
            return self._moved_by_fusion(instruction, operands)
        if opcode == "slice-start":  # a TPU's, ahead of use: its result is (operand, slice, a flag)
            written = instruction.arrays[1:2]
            read_from_memory = any(array.in_main_memory for array in operands[0].arrays)
            return _main(written) + read_from_memory * written[0].bytes
        written = instruction.arrays[:1] if opcode.endswith("-start") else instruction.arrays
        if opcode in _SLICES:
            return _main(written) + min(_main(written), _main(operands[0].arrays))
        if opcode == "dynamic-update-slice":
            return 2 * _main(operands[1].arrays)
        return _main(written) + sum(_main(operand.arrays) for operand in operands)

    def _moved_by_fusion(self, fusion: Instruction, operands: Sequence[Instruction]) -> int:
        inside = self.computations[fusion.called["calls"]]
        users: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in inside.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        parameters = {int(i.arguments): i for i in inside.values() if i.opcode == "parameter"}
        total = 0
        for index, operand in enumerate(operands):
            if index in parameters:
                total += self._read(parameters[index], users, _main(operand.arrays))
        root = next(instruction for instruction in inside.values() if instruction.root)
        roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for result, array in zip(roots, fusion.arrays, strict=False):
            while result.opcode == "bitcast":
                result = inside[result.operands[0]]
            updates = result.opcode == "dynamic-update-slice"  # in place: only the slice is written
            total += (
                inside[result.operands[1]].arrays[0].bytes if updates else array.bytes
            ) * array.in_main_memory
        return total

    def _read(self, value: Instruction, users: Mapping[str, list[Instruction]], whole: int) -> int:
        """Bytes of an operand that a kernel reads: of one that is only sliced, the slices."""
        if not whole:
            return 0
        read = 0
        for user in users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode == "bitcast":
                read += self._read(user, users, whole)
            elif user.opcode in _SLICES and first:
                read += sum(array.bytes for array in user.arrays)
            elif not (user.opcode == "dynamic-update-slice" and first):
                return whole
        return min(read, whole)

    def _communicate(self, kind: str, instruction: Instruction, inside: Computation, times: int) -> None:
        results = instruction.arrays
        if instruction.opcode == "all-gather-start":  # its result is (operands, gathered)
            results = results[len(results) // 2 :]
        size = sum(a.bytes for a in results) if kind == "all-gather" else _operand_bytes(instruction, inside)
        group = _group(instruction.attributes, math.prod(self.axes.values()))
        if len(group) < 2:
            return
        self._add(kind, self._axes_of(group), len(group), times, size)

    def _add(self, kind: str, axes: str, group: int, times: int, size: int) -> None:
        count, total = self.collectives.get((kind, axes, group), (0, 0))
        self.collectives[kind, axes, group] = (count + times, total + times * size)

    def _axes_of(self, group: frozenset[int]) -> str:
        """Names of the axes along which the members of device 0's group differ: the fewest that hold them all."""
        numbers = np.arange(math.prod(self.axes.values())).reshape(tuple(self.axes.values()))
        split = [index for index, size in enumerate(self.axes.values()) if size > 1]
        for count in range(1, len(split) + 1):
            for chosen in itertools.combinations(split, count):
                index = tuple(slice(None) if axis in chosen else 0 for axis in range(numbers.ndim))
                along = frozenset(numbers[index].reshape(-1).tolist())
                if group <= along:
                    names = "+".join(list(self.axes)[axis] for axis in chosen)
                    return names if group == along else f"part of {names}"
        return "none"


def _operand_bytes(instruction: Instruction, inside: Computation) -> int:
    return sum(a.bytes for name in instruction.operands if name in inside for a in inside[name].arrays)


def _main(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_main_memory)


def _branches(instruction: Instruction) -> Iterator[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = (
        found[1]
        if found
        else " ".join(re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", instruction.attributes))
    )
    yield from re.findall(r"[\w.\-]+", names)


def _kind(opcode: str) -> str | None:
    """Which collective an operation is; the end of an asynchronous one is none."""
    name = opcode.removesuffix("-start")
    return name if name in _COLLECTIVES else None


def _group(attributes: str, devices: int) -> frozenset[int]:
    """Devices that device 0 talks to, itself included, from any of XLA's three notations."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        order = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        index = tuple(slice(None) if f"'{name}'" in mesh[3].split(",") else 0 for name in sizes)
        return frozenset(np.asarray(order.reshape(tuple(sizes.values()))[index]).reshape(-1).tolist())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        groups = _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")]).tolist()
        return next(frozenset(group) for group in groups if 0 in group)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        found = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return next(frozenset(group) for group in found if 0 in group)
    pairs = re.findall(r"\{(\d+),(\d+)\}", attributes.partition("source_target_pairs=")[2])
    return frozenset({0, 1}) if pairs else frozenset(range(devices))


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7 as two rows of four, transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs of one instruction
# ---------------------------------------------------------------------------------------------------------------------


def _flops(instruction: Instruction, inside: Computation) -> float:
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    operands = [
        inside[name].arrays[0].shape
        for name in instruction.operands
        if name in inside and inside[name].arrays
    ]
    result = instruction.arrays[0].shape
    if opcode == "dot":
        return _product_flops(result, operands[0], r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    if opcode == "convolution":
        return _convolution_flops(operands[0], operands[1], result, attributes)
    if "__cublas" in attributes:
        return _product_flops(result, operands[0], r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
    # cuDNN's two backward calls are described by the forward convolution that they belong to.
    if "__cudnn$convBackwardInput" in attributes:
        return _convolution_flops(result, operands[1], operands[0], attributes)
    if "__cudnn$convBackwardFilter" in attributes:
        return _convolution_flops(operands[0], result, operands[1], attributes)
    if "__cudnn$conv" in attributes:
        return _convolution_flops(operands[0], operands[1], result, attributes)
    for kernel, products in _SPLASH.items():
        if instruction.name.startswith(kernel):
            rows_heads_length_width = next(shape for shape in operands if len(shape) == 4)
            return 2.0 * products * math.prod(rows_heads_length_width) * rows_heads_length_width[2]
    return 0.0


_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of L x L by H that each kernel of splash attention makes; the backward ones begin with the scores again."""


def _product_flops(result: Sequence[int], left: Sequence[int], pattern: str, attributes: str) -> float:
    found = re.search(pattern, attributes)
    contracted = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * math.prod(result) * math.prod(left[index] for index in contracted)


def _convolution_flops(
    image: Sequence[int], kernel: Sequence[int], result: Sequence[int], attributes: str
) -> float:
    """Of the taps that meet a pixel; padding and the holes of a dilated image count for nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    of_image, of_kernel, of_result = labels.groups()
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1])
    )
    taps = 1
    for axis, number in enumerate(sorted(set(of_kernel) - {"i", "o"})):
        sizes = (
            image[of_image.index(number)],
            kernel[of_kernel.index(number)],
            result[of_result.index(number)],
        )
        taps *= _taps(
            *sizes,
            **{name: _entry(window, name, axis) for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")},
        )
    channels = kernel[of_kernel.index("i")]
    return 2.0 * taps * channels * result[of_result.index("b")] * result[of_result.index("f")]


def _entry(window: Mapping[str, str], name: str, axis: int) -> int:
    text = window.get(name)
    if text is None:
        return 0 if name == "pad" else 1
    return int(text.split("x")[axis].split("_")[0])


def _taps(
    pixels: int, size: int, results: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of a result and a tap of the kernel that meet a pixel, along one axis."""
    place = np.arange(results)[:, None] * stride - pad + np.arange(size)[None, :] * rhs_dilate
    real = (place >= 0) & (place <= (pixels - 1) * lhs_dilate) & (place % lhs_dilate == 0)
    return int(real.sum())
