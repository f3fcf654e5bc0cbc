"""examples/jacobian_tour.py: what it prints, and the pictures it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_tour(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "examples" / "jacobian_tour.py", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "0.628532" in done.stdout and "ok" in done.stdout and "FAILS" not in done.stdout
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("jacobian.png", "spectrum.png"))
