"""Side-by-side timings with peers: `python -m benchmarks NAME... [--gpu-sizes] [--json FILE]`.

A benchmark is a generator of rows, in a module `bench_*.py` of this folder:

    @benchmark("softmax")
    def softmax() -> Iterator[Row]:
        times = compare({"ours": jax.jit(jaxsoftmax.softmax), "theirs": jax.jit(jax.nn.softmax)}, (x,))
        yield times.row("softmax", x.shape, goal=1.1)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table. `ratio` is ours over theirs; `goal` is the largest one wanted, None if there is none.

    `note` is printed behind it.
    """

    name: str
    size: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    goal: float | None
    note: str = ""


BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {}
GPU_SIZES: dict[str, Callable[[], Iterator[Row]]] = {}  # what `--gpu-sizes` adds to the benchmark of the same name


def benchmark(name: str, gpu_sizes: bool = False):
    """Register a generator of rows under `name`."""
    registry = GPU_SIZES if gpu_sizes else BENCHMARKS

    def register(rows: Callable[[], Iterator[Row]]) -> Callable[[], Iterator[Row]]:
        if name in registry:
            raise ValueError(f"benchmark name {name!r} is taken by {registry[name].__module__}: choose another")
        registry[name] = rows
        return rows

    return register
