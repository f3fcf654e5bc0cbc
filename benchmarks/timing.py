"""Timing of contestants in one process, in interleaved rounds, so that drift of the machine hits all of them alike."""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import Row

SAMPLE = 0.1  # seconds of repeated calls per sample, so that the noise of clock and scheduler averages out


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Medians in seconds, and medians of the ratios to `baseline`, each ratio taken within one round."""

    seconds: dict[str, float]
    ratios: dict[str, float]
    baseline: str

    def row(self, name: str, size: Any, goal: float | None, ours: str = "ours") -> Row:
        size = "×".join(map(str, size)) if isinstance(size, tuple) else str(size)
        times = 1e3 * self.seconds[ours], 1e3 * self.seconds[self.baseline]
        return Row(name, size, *times, self.ratios[ours], goal)


def run_time(fn: Callable, args: Sequence) -> float:
    """Seconds per call of `fn(*args)`, finished results included."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    once = time.perf_counter() - start
    if once >= SAMPLE:
        return once
    repeats = math.ceil(SAMPLE / once)
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(fn(*args))
    return (time.perf_counter() - start) / repeats


def compile_time(fn: Callable, args: Sequence) -> float:
    """Seconds to trace and compile `jax.jit(fn)` for `args`, from empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(lambda *args: fn(*args)).lower(*args).compile()
    return time.perf_counter() - start


def trace_time(fn: Callable, args: Sequence) -> float:
    """Seconds of this thread to trace `fn` for `args`, with the caches of whatever it calls."""
    start = time.thread_time()
    jax.jit(lambda *args: fn(*args)).trace(*args)
    return time.thread_time() - start


def temp_bytes(fn: Callable, *args: Any) -> int:
    """Bytes of temporary memory that the compiled `fn(*args)` asks for, beside its arguments and results."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def passes(fn: Callable, *args: Any) -> int:
    """Kernels of the compiled `fn(*args)` that read or write an array of the size of the first argument."""
    size = args[0].size
    entry = jax.jit(fn).lower(*args).compile().as_text().split("\nENTRY ")[1].split("\n}")[0]
    large = {}  # by name of an instruction: whether its result is large
    count = 0
    for name, result, operation, rest in re.findall(r"(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", entry):
        shapes = re.findall(r"\w+\[([\d,]+)\]", result)
        large[name] = any(math.prod(map(int, shape.split(","))) >= size for shape in shapes)
        operands = re.findall(r"%[\w.\-]+", rest.split(")")[0])
        if operation not in ("parameter", "constant", "tuple", "bitcast", "get-tuple-element"):
            count += large[name] or any(large.get(operand) for operand in operands)
    return count


def reductions(fn: Callable, *args: Any) -> int:
    """Sums and maxima of the compiled `fn(*args)` over arrays of the size of the first argument.

    Counted behind the simplifications of this platform's compiler, in particular of what is written twice.
    """
    size = args[0].size
    text = jax.jit(fn).lower(*args).compile().as_text()
    shapes = dict(re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", text))
    operands = re.findall(r" reduce\((?:\w+\[[^ ]* )?(%[\w.\-]+)", text)
    return sum(math.prod(map(int, filter(None, shapes[name].split(",")))) >= size for name in operands)


def compare(
    contestants: Mapping[str, Callable],
    args: Sequence,
    rounds: int = 11,
    baseline: str = "theirs",
    measure: Callable[[Callable, Sequence], float] = run_time,
) -> Comparison:
    """Measure every contestant once per round, in an order that rotates from round to round.

    Args:
      contestants: functions by name, already jitted where that is wanted.
      args: the arguments that all of them get.
      rounds: number of rounds that count; one more comes first, to compile and warm up.
      baseline: the contestant that the ratios are taken to.
      measure: seconds that one contestant takes: `run_time`, `compile_time` or `trace_time`.
    """
    if baseline not in contestants:
        raise ValueError(f"baseline={baseline!r} is not among the contestants {sorted(contestants)}")
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        measure(contestants[name], args)
    for shift in range(rounds):
        for i in range(len(names)):
            name = names[(i + shift) % len(names)]
            samples[name].append(measure(contestants[name], args))
    paired = {name: [a / b for a, b in zip(samples[name], samples[baseline])] for name in names}
    return Comparison(
        seconds={name: statistics.median(times) for name, times in samples.items()},
        ratios={name: statistics.median(ratios) for name, ratios in paired.items()},
        baseline=baseline,
    )
