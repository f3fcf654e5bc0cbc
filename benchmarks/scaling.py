"""The linear head divided over a mesh: `python -m benchmarks.scaling`, on forced CPU devices.

First, compiled programs for 1 to 64 devices: matrix products of a device over its share, temporary memory, and bytes
that a device sends in one value and gradient, beside what its split cannot do without: gradients of what several
devices share, added up once in a ring, and the weights' features gathered. Then the processor time of 8 devices over
that of one, run.
"""

import argparse
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=64".strip()

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax import linear_softmax_cross_entropy_loss
from tests import programs

N, D, V = 4096, 256, 32768
MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1), (2, 4), (1, 8), (4, 4), (2, 8), (4, 8), (8, 8), (1, 64)]


def arguments(mesh: tuple[int, int], over_features: bool = False):
    """Shapes of x, labels and weights on a mesh of tokens × classes."""
    devices = np.array(jax.devices()[: math.prod(mesh)]).reshape(mesh)
    on = Mesh(devices, ("data", "classes"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, P(*spec)))
    weights = place((D, V), jnp.float32, "data" if over_features else None, "classes")
    return place((N, D), jnp.float32, "data"), place((N,), jnp.int32, "data"), weights


def compiled(args):
    return jax.jit(jax.value_and_grad(linear_softmax_cross_entropy_loss, (0, 2))).lower(*args).compile()


def sent(op: programs.Operation, devices: int) -> float:
    """Bytes that a device sends, in a ring."""
    size = op.devices or devices
    factor = {"all-reduce": 2 * (size - 1) / size, "all-gather": (size - 1) / size, "reduce-scatter": size - 1}
    return op.times * op.bytes * factor[op.name]


def bound(mesh: tuple[int, int]) -> float:
    """Bytes that a device must send for the gradients of x and W, however W lies over the tokens' devices."""
    t, c = mesh
    return 4 * (2 * (t - 1) / t * D * V / c + 2 * (c - 1) / c * N * D / t)


def processor_time(compiled, args) -> float:
    """Seconds of all cores, the least of three runs."""
    values = [jnp.zeros(a.shape, a.dtype, device=a.sharding) for a in args]
    runs = []
    for _ in range(4):
        start = time.process_time()
        jax.block_until_ready(compiled(*values))
        runs.append(time.process_time() - start)
    return min(runs[1:])


class Program(NamedTuple):
    """Of one device: its part of the products, in units of an equal share; temporary memory and bytes sent, in MiB."""

    products: float
    temp: float
    sent: float


def measured(mesh: tuple[int, int], over_features: bool = False) -> Program:
    program, devices = compiled(arguments(mesh, over_features)), math.prod(mesh)
    text = program.as_text()
    return Program(
        programs.multiplications(text) / (3 * N * D * V / devices),
        program.memory_analysis().temp_size_in_bytes / 2**20,
        sum(sent(op, devices) for op in programs.collectives(text)) / 2**20,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"N = {N}, D = {D}, V = {V}, float32\n")
    print("| tokens × classes | products | temp MiB | sent MiB | bound |\n|---|---|---|---|---|")
    for mesh in MESHES:
        for over_features in (False, True) if mesh[0] > 1 else (False,):
            found = measured(mesh, over_features)
            name = f"{mesh[0]} × {mesh[1]}{' FSDP' if over_features else ''}"
            numbers = f"{found.products:.3f} | {found.temp:.1f} | {found.sent:.2f} | {bound(mesh) / 2**20:.2f}"
            print(f"| {name} | {numbers} |", flush=True)
    alone = arguments((1, 1))
    on_no_mesh = compiled([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in alone]).memory_analysis()
    print(f"\non no mesh: {on_no_mesh.temp_size_in_bytes / 2**20:.1f} MiB")
    one = processor_time(compiled(alone), alone)
    print()
    for mesh in ((8, 1), (2, 4), (1, 8)):
        args = arguments(mesh)
        ratio = processor_time(compiled(args), args) / one
        print(f"processor time on {mesh[0]} × {mesh[1]} over that of one device: {ratio:.2f}")


if __name__ == "__main__":
    main()
