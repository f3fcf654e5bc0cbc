"""Programs compiled for an accelerator that is not there: XLA's compilers for CUDA and TPU need no device.

They are packages: libtpu for TPU; jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12 for CUDA. What is left
out is the choice among kernels that times them on the device.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from benchmarks.compiled.cost import Chip, Cost, cost_of
from benchmarks.compiled.text import parse

# Rates from the data sheets: dense products of bfloat16, and the device's memory. A launch takes about 2 µs on CUDA; a
# TPU has the whole program.
CHIPS = {
    "h100": Chip("cuda", "1x1x1", flops=989e12, bandwidth=3.35e12, launch=2e-6),
    "v5e": Chip("tpu", "v5e:2x4", flops=197e12, bandwidth=819e9, launch=0.0),
    "v6e": Chip("tpu", "v6e:2x4", flops=918e12, bandwidth=1640e9, launch=0.0),
}

# An H100 SXM as XLA wants it described, from its data sheet.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
"""

PACKAGES = {"cuda": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"), "tpu": ("libtpu",)}

INSTALL = """\
An environment for it, of 1.7 GB, where no device is needed (Python 3.12 or later has the newest compilers):

    python3.12 -m venv accelerators && . accelerators/bin/activate
    pip install ".[accelerators]"
"""

# libtpu asks a machine of Google's cloud what it is, unless it is told: one host of a slice. It drives no device here,
# and several processes may load it.
TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def missing(chip: str) -> list[str]:
    """What the compiler for this chip lacks: packages that are absent or of another release than jaxlib."""
    found = []
    for name in PACKAGES[CHIPS[chip].platform]:
        try:
            version, wanted = importlib.metadata.version(name), importlib.metadata.version("jaxlib")
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
        else:
            if name.startswith("jax-") and version != wanted:
                found.append(f"{name}=={wanted} (found {version})")
    return found


@functools.cache
def devices(chip: str, topology: str | None = None) -> Sequence[Any]:
    """The devices of one host, or of a topology: 'v5e:16x16' for 256 chips, '1xHxG' for H hosts of G GPUs.

    None of them runs anything; a `Mesh` of them compiles.
    """
    if absent := missing(chip):
        raise ImportError(f"chip={chip!r} needs the packages {', '.join(absent)}\n\n{INSTALL}")
    platform, topology = CHIPS[chip].platform, topology or CHIPS[chip].topology
    if platform == "tpu":
        for name, value in TPU_HOST.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(topology, "tpu").devices
    return topologies.get_topology_desc(chip, "cuda", topology=topology, target_config=H100).devices


def compiled(f: Callable, *args: Any, chip: str, mesh: Mesh | None = None):
    """`jax.jit(f)` at `args`, arrays or shapes with dtypes, compiled for one device or for those of a mesh.

    Without a mesh the arguments lie on one device; with one, where their shardings say.
    """
    alone = SingleDeviceSharding(devices(chip)[0])
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if mesh else alone)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return jax.jit(f).lower(*jax.tree.map(place, args)).compile()


def measure(f: Callable, *args: Any, chip: str, mesh: Mesh | None = None, rounds: int = 1) -> Cost:
    """The bound of one run of `f`, on one device of them; `rounds` are of loops whose end depends on the numbers."""
    program = compiled(f, *args, chip=chip, mesh=mesh)
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None and text is not None  # every compiler here gives both
    temp = memory.temp_size_in_bytes  # in which libtpu counts results that a loop leaves once more
    if hasattr(memory, "total_allocation_bytes"):  # of JAX 0.12
        apart = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temp = memory.total_allocation_bytes - apart
    return dataclasses.replace(cost_of(parse(text), CHIPS[chip], rounds), temp=temp)
