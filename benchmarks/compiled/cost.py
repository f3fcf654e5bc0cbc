"""What a compiled program costs at least: per kernel, the longer of products at peak and bytes at full bandwidth.

A kernel is an operation of the program that runs by itself, most often a fusion. It reads each operand once, of one
that it only slices, as it stands or element by element, the slice, and writes its results once, of one that it updates
in place the update. What lies in a memory on the chip costs nothing until it is copied from or to the device's memory.
A loop counts as often as it runs. What depends on numbers is bounded from below: of a branch the cheapest side, of a
loop a given number of rounds.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from benchmarks.compiled.text import Array, Computation, Operation, Program

# No kernel of their own: names of what is there already, or whose work another operation stands for.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "partition-id", "replica-id"}
FREE |= {"after-all", "opt-barrier", "add-dependency", "get-dimension-size"}
INNER = {"while", "conditional", "call", "async-start"}
BRANCHES = "branch_computations", "true_computation", "false_computation"
SLICES = {"slice", "dynamic-slice", "gather"}
COPIES = {"copy-start", "slice-start", "dynamic-slice-start"}  # by hardware of their own, beside the kernels
UPDATES = {"dynamic-update-slice", "scatter"}
SAME = {"bitcast", "convert", "reshape", "transpose", "copy"}
ELEMENTWISE = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "select", "compare"}
ELEMENTWISE |= {"and", "or", "not", "negate", "abs", "exponential", "exponential-minus-one", "log", "log-plus-one"}
ELEMENTWISE |= {"floor", "ceil", "sign", "sqrt", "rsqrt", "power", "tanh"}
SENT = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"}
HALF_WIDTHS = {"bf16", "f16"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a bound of the time needs to know: rates per second, and seconds that a launch takes."""

    platform: str
    topology: str
    flops: float  # of products of 16-bit numbers; of wider ones half of it
    bandwidth: float
    launch: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run on one device.

    Args:
      seconds: the lower bound.
      bytes: read from and written to the device's memory.
      flops: of matrix products.
      kernels: how many are launched.
      temp: bytes beside arguments and results; None where only the text is known.
      undecided: loops and branches that depend on numbers.
      sent: kind of collective -> (how many, bytes of the larger of operand and result).
      parts: the dearest kernels: (seconds in all, name, how often).
    """

    seconds: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    kernels: int = 0
    temp: int | None = None
    undecided: int = 0
    sent: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    parts: tuple[tuple[float, str, int], ...] = ()

    def times(self, n: int) -> "Cost":
        return dataclasses.replace(
            self,
            seconds=n * self.seconds,
            bytes=n * self.bytes,
            flops=n * self.flops,
            kernels=n * self.kernels,
            sent={kind: (n * count, n * size) for kind, (count, size) in self.sent.items()},
            parts=tuple((n * seconds, name, n * count) for seconds, name, count in self.parts),
        )


def total(costs: Iterable[Cost]) -> Cost:
    """Of one after the other."""
    costs = list(costs)
    sent: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for cost in costs:
        for kind, (count, size) in cost.sent.items():
            sent[kind] = sent[kind][0] + count, sent[kind][1] + size
    return Cost(
        seconds=math.fsum(c.seconds for c in costs),
        bytes=math.fsum(c.bytes for c in costs),
        flops=math.fsum(c.flops for c in costs),
        kernels=sum(c.kernels for c in costs),
        undecided=sum(c.undecided for c in costs),
        sent=dict(sent),
        parts=tuple(sorted((part for c in costs for part in c.parts), reverse=True)[:8]),
    )


def cost_of(program: Program, chip: Chip, rounds: int = 1) -> Cost:
    """Of one run, with `rounds` of each loop whose number of rounds is not known."""
    return _Counter(program, chip, rounds).computation(program.entry)


class _Counter:
    def __init__(self, program: Program, chip: Chip, rounds: int):
        self.program, self.chip, self.rounds = program, chip, rounds

    def computation(self, here: Computation) -> Cost:
        return total(self.operation(here, op) for op in here.operations.values())

    def operation(self, here: Computation, op: Operation) -> Cost:
        if op.opcode in FREE or op.opcode.endswith("-done") or '"AllocateBuffer"' in op.attributes:
            return Cost()
        if op.opcode in INNER:
            return self.inner(op)
        moved, (flops, narrow) = self.moved(here, op), self.flops(here, op)
        peak = self.chip.flops if narrow else self.chip.flops / 2
        seconds = max(flops / peak, moved / self.chip.bandwidth) + self.chip.launch
        kind = op.opcode.removesuffix("-start")
        sent = {kind: (1, max(_logical(op.result), *map(_logical, here.operands(op))))} if kind in SENT else {}
        return Cost(seconds, moved, flops, int(op.opcode not in COPIES), None, 0, sent, ((seconds, op.name, 1),))

    def inner(self, op: Operation) -> Cost:
        """Of an operation that only runs others: a loop's rounds, the cheapest branch, a call."""
        if op.opcode == "conditional":
            cheapest = min(map(self.named, op.called(*BRANCHES)), key=lambda c: c.seconds)
            return dataclasses.replace(cheapest, undecided=cheapest.undecided + 1)
        round_ = total(map(self.named, op.called("calls", "body", "condition", "to_apply", "called_computations")))
        if op.opcode != "while":
            return round_
        trips = op.trips or self.bound_of_counter(op)
        if trips:
            return round_.times(trips)
        return dataclasses.replace(round_.times(self.rounds), undecided=round_.undecided + 1)

    def named(self, name: str) -> Cost:
        return self.computation(self.program.computations[name])

    def bound_of_counter(self, op: Operation) -> int | None:
        """What a loop's condition compares its counter with, if it does only that."""
        condition = self.program.computations[next(op.called("condition"))]
        if not (condition.root.opcode == "compare" and "direction=LT" in condition.root.attributes):
            return None
        limits = (condition.operations[name] for name in condition.root.operands)
        return next((int(c.inside) for c in limits if c.opcode == "constant" and c.inside.isdigit()), None)

    # Bytes.

    def in_memory(self, array: Array) -> float:
        """Bytes of an array in the device's memory. Only the compiler for TPU puts arrays elsewhere."""
        return 0.0 if self.chip.platform == "tpu" and array.space else array.nbytes

    def moved(self, here: Computation, op: Operation) -> float:
        results = [self.in_memory(a) for a in op.result]
        operands = [sum(map(self.in_memory, kind)) for kind in here.operands(op)]
        match op.opcode:
            case "fusion" | "fusion-start":
                if op.opcode == "fusion-start":  # its result is ((operands…), results…, flag)
                    op = dataclasses.replace(op, result=op.result[sum(map(len, here.operands(op))) :])
                inner = self.program.computations[next(op.called("calls"))]
                read = (self.share(inner, inner.parameters[i]) * size for i, size in enumerate(operands))
                return math.fsum(read) + self.written(inner, op)
            case "copy-start":  # its result is (copy, original, flag)
                return results[0] + results[1]
            case "slice-start" | "dynamic-slice-start":  # ((operands…), slice, flag)
                return op.result[1].nbytes * bool(operands[0]) + results[1]
            case "slice" | "dynamic-slice" | "gather":
                return op.result[0].nbytes * bool(operands[0]) + results[0] + sum(operands[1:])
            case "dynamic-update-slice":
                return 2 * operands[1]
            case "scatter":
                return 3 * operands[-1]
            case _:
                return sum(results) + sum(dict(zip(op.operands, operands)).values())

    def share(self, here: Computation, name: str) -> float:
        """Which part of one of its values a computation reads."""
        size = _size(here.operations[name].result)
        return self.taken(here, name) / size if size else 0.0

    def taken(self, here: Computation, name: str) -> int:
        """How many numbers of one of its values a computation reads."""
        size = _size(here.operations[name].result)
        if here.operations[name].root:
            return size
        return min(size, sum(self.taken_by(here, op, i, size) for op, i in here.users[name]))

    def taken_by(self, here: Computation, op: Operation, i: int, size: int) -> int:
        if op.opcode in SLICES and i == 0:
            return _size(op.result)
        if op.opcode in UPDATES and i == 0:
            return 0  # in place
        if op.opcode in SAME or op.opcode in ELEMENTWISE and _size(op.result) == size:
            return self.taken(here, op.name)
        if op.opcode in ("fusion", "fusion-start"):
            inner = self.program.computations[next(op.called("calls"))]
            return self.taken(inner, inner.parameters[i])
        return size

    def written(self, inner: Computation, op: Operation) -> float:
        """Bytes that a fusion writes."""
        names = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
        sizes = (
            self.put(inner, inner.operations[name]) / max(inner.operations[name].result[0].size, 1) for name in names
        )
        return math.fsum(part * self.in_memory(array) for part, array in zip(sizes, op.result))

    def put(self, here: Computation, op: Operation) -> int:
        """How many numbers of its result an operation writes anew."""
        if op.opcode in SAME:
            return self.put(here, here.operations[op.operands[0]])
        if op.opcode == "dynamic-update-slice":
            return _size(here.operands(op)[1])
        if op.opcode == "scatter":
            return 2 * _size(here.operands(op)[-1])  # read and written
        if op.opcode == "fusion":
            inner = self.program.computations[next(op.called("calls"))]
            return self.put(inner, inner.root)
        return _size(op.result)

    # Products.

    def flops(self, here: Computation, op: Operation) -> tuple[float, bool]:
        """Of its matrix products, and whether all their operands have 16 bits."""
        if op.opcode == "fusion":
            inner = self.program.computations[next(op.called("calls"))]
            counts = [self.flops(inner, part) for part in inner.operations.values()]
            return math.fsum(flops for flops, _ in counts), all(narrow for flops, narrow in counts if flops)
        if op.opcode not in ("dot", "convolution") and not (op.opcode == "custom-call" and "gemm" in op.attributes):
            return 0.0, True
        (left,), (right,) = here.operands(op)[:2]
        return 2.0 * op.result[0].size * _depth(left, right, op), {left.dtype, right.dtype} <= HALF_WIDTHS


def _depth(left: Array, right: Array, op: Operation) -> float:
    """How many products each number of the result adds up."""
    if op.opcode != "convolution":
        contracted = re.search(r'lhs_contracting_dim\w*\W*?[\[{]([\d", ]*)', op.attributes)
        return math.prod(left.dims[int(i)] for i in re.findall(r"\d+", contracted[1] if contracted else ""))
    # All of the kernel but its output features; an axis of a batch is written as one that is dilated to the full.
    features = re.search(r"dim_labels=\w+_(\w+)->", op.attributes)
    dilated = re.search(r"lhs_dilate=([\dx]+)", op.attributes)
    batch = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
    return right.size / right.dims[features[1].index("o")] / batch if features else 1.0


def _size(kind: Iterable[Array]) -> int:
    return sum(a.size for a in kind)


def _logical(kind: Iterable[Array]) -> float:
    return sum(a.size * a.width for a in kind)
