"""The tests marked `optimized`, in a process that compiles as users do, beside workers that do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.optimized

TESTS = Path(__file__).parent
MARKED = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.optimized" in path.read_text("utf-8")]


@pytest.mark.skipif(os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "1", reason="this process optimizes: they ran")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_what_is_said_of_optimized_programs(which, environment):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *MARKED]
    environment = environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command += ["-m", f"optimized and {which}"]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
