"""Two processes that train together, by jax.distributed: the numbers of one process, and an end when the other dies."""

import inspect
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import distributed_worker as worker
from tests.helpers import assert_close

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture
def start(tmp_path):
    """Starts all processes, with further arguments; whatever happens, none is left."""
    processes = []

    def start(*arguments: str) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        flags = "--xla_force_host_platform_device_count=2"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        for i in range(worker.PROCESSES):
            command = [sys.executable, "-m", worker.__name__, str(tmp_path / f"{i}.npz"), port, str(i), *arguments]
            settings = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, **settings))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_train_as_one(start, tmp_path):
    for process in start():
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    alone = worker.results(jax.sharding.Mesh(np.reshape(jax.devices()[:1], (1, 1)), ("classes", "data")))
    assert alone[0][-1] < 0.95 * alone[0][0]  # the loss of the digits
    for i in range(worker.PROCESSES):
        with np.load(tmp_path / f"{i}.npz") as arrays:
            assert_close([arrays[name] for name in arrays.files], alone, 1e-5)


@pytest.mark.skipif(
    "heartbeat_timeout_seconds" not in inspect.signature(jax.distributed.initialize).parameters,
    reason="this JAX waits a fixed time",
)
@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_one_ends_the_other(start, killed):
    """Long before jax's own timeouts of 100 and 300 seconds, and with a message that says why."""
    processes = start(str(killed))
    dead, other = processes[killed], processes[1 - killed]
    assert dead.wait(timeout=300) == -signal.SIGKILL
    _, said = other.communicate(timeout=4 * worker.TIMEOUT)
    assert other.returncode != 0
    assert "another task died" in said and "UNAVAILABLE" in said
