"""The MeanFlow example: the loss falls, and there is a picture."""

import importlib

import jax
import numpy as np
import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the framework, on other JAX versions than its own
def test_meanflow_learns(tmp_path, monkeypatch):
    pytest.importorskip("equinox")
    path, example = tmp_path / "meanflow.svg", importlib.import_module("meanflow")
    monkeypatch.setattr(example, "LAYERS", 1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the framework's own
        losses = example.main(["--steps", "60", "--picture", str(path)])
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:4])
    assert path.stat().st_size > 1000
