"""The strict session of every test: eight CPU devices, no implicit promotion of dtype or rank, no window for plots.

`pytest` starts one worker per core; with files, `-k` or `-m optimized` on its command line it is one process, without
workers. Workers compile with little optimization, which halves the time. What is said of compiled programs (accuracy,
rounding, memory) is marked `optimized`, and tested on those that users run: workers leave it to a process that
tests/test_optimized.py starts. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` optimizes everywhere.

The environment variables come before `import jax`, which reads them when it starts.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

MAPS = Path("/proc/self/maps")  # of Linux alone
BEFORE = {name: value for name, value in os.environ.items() if "XDIST" not in name}


def add_flag(flag: str) -> None:
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


os.environ.setdefault("JAX_PLATFORMS", "cpu")
add_flag("--xla_force_host_platform_device_count=8")
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
# Less work to compile, and the other cores have tests of their own. Some programs fail to compile so on 0.6.
if JAXLIB > (0, 6):
    add_flag("--xla_cpu_parallel_codegen_split_count=1")
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
if QUICK and JAXLIB < (0, 11):  # later ones know no such flag
    add_flag("--xla_cpu_use_fusion_emitters=false")

import hypothesis
import jax
import pytest

from tests.helpers import enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property test compiles, so no deadline fits; derandomized, so that two runs test the same.
hypothesis.settings.register_profile("jaxsoftmax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxsoftmax")


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers(config):
    cores = yield
    one = config.option.keyword or "optimized" in config.option.markexpr or any(".py" in arg for arg in config.args)
    return 0 if one else min(cores, 8)


def pytest_collection_modifyitems(config, items):
    """Where programs are compiled quickly, the marked tests are left to tests/test_optimized.py, which comes first."""
    if QUICK:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("optimized")])
        items[:] = [item for item in items if not item.get_closest_marker("optimized")]
        items.sort(key=lambda item: item.path.name != "test_optimized.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What is imported stays: a million objects, which every full garbage collection would walk through."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def fresh_caches():
    """What was compiled is dropped after some files: a process may hold 65,530 memory maps, and a program has some."""
    yield
    if not MAPS.exists() or len(MAPS.read_bytes().splitlines()) > 4000:
        jax.clear_caches()
        gc.collect()  # programs in reference cycles hold gigabytes


@pytest.fixture
def environment():
    """The environment as it was before this file changed it."""
    return BEFORE


@pytest.fixture
def x64():
    """float64 for one whole test."""
    with enable_x64():
        yield


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)
