"""The strict session of every test: eight CPU devices, no implicit promotion of dtype or rank, no window for plots.

`pytest` starts one worker per core and one more; files named on the command line run in one process, without workers.
Two of three workers compile quickly, with little optimization, which halves the time. What is said of compiled programs
(accuracy, rounding, memory) is tested on those that users run: the files `test_*_optimized.py` go to the third worker.
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` optimizes everywhere.

The environment variables come before `import jax`, which reads them when it starts.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

MAPS = Path("/proc/self/maps")  # of Linux alone
QUICK = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "0"


def compiles_quickly(worker: str) -> bool:
    """Whether the worker of this name, gw0, gw1, …, leaves most optimizations out."""
    return QUICK and int(worker.removeprefix("gw")) % 3 > 0


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
if compiles_quickly(os.environ.get("PYTEST_XDIST_WORKER", "gw0")):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if JAXLIB < (0, 11):  # later ones know no such flag
        add_flag("--xla_cpu_use_fusion_emitters=false")

import hypothesis
import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.helpers import enable_x64

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property test compiles, so no deadline fits; derandomized, so that two runs test the same.
hypothesis.settings.register_profile("jaxsoftmax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxsoftmax")


class Schedule(LoadScopeScheduling):
    """A whole file of tests at a time to each worker, of its own kind.

    There is one worker more than cores. The last waits until another has no file of its kind left.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node) -> None:
        working = [other for other in self.nodes if self.assigned_work[other] and not other.shutting_down]
        if QUICK and node not in working and len(working) == len(self.nodes) - 1 > 0:
            return
        quick = compiles_quickly(node.gateway.id)
        for scope in self.workqueue:
            if not QUICK or len(self.nodes) == 1 or quick != scope.endswith("_optimized.py"):
                self.workqueue.move_to_end(scope, last=False)
                return super()._assign_work_unit(node)
        node.shutdown()
        for other in self.nodes:
            if not self.assigned_work[other] and not other.shutting_down:
                self._reschedule(other)
                self._reschedule(other)  # a worker keeps its last test until it has the next


def pytest_xdist_make_scheduler(config, log):
    return Schedule(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers(config):
    cores = yield
    return 0 if any(".py" in argument for argument in config.args) else min(cores, 8) + 1


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
def x64():
    """float64 for one whole test."""
    with enable_x64():
        yield


@pytest.fixture
def key():
    """A PRNG key, the same in every run."""
    return jax.random.key(0)
