"""The examples in Equinox and Flax NNX: they learn, and the fused head gives the losses of the full one."""

import importlib

import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the frameworks, on other JAX versions than their own
]


def run(name: str, *arguments: str):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the frameworks' own
        return importlib.import_module(name).main(list(arguments))


@pytest.mark.parametrize("framework", ["equinox", "nnx"])
def test_transformer_learns_and_the_heads_agree(framework):
    pytest.importorskip({"nnx": "flax"}.get(framework, framework))
    fused = run(f"transformer_{framework}", "--steps", "60")
    full = run(f"transformer_{framework}", "--steps", "4", "--head", "full")
    assert np.mean(fused[-10:]) < 0.8 * fused[0]
    np.testing.assert_allclose(fused[:4], full, rtol=2e-3)  # the body is bfloat16
    np.testing.assert_allclose(fused[:2], full[:2], rtol=1e-5)  # before the first update


@pytest.mark.parametrize("framework", ["equinox", "nnx"])
def test_two_devices_take_the_same_steps(framework):
    pytest.importorskip({"nnx": "flax"}.get(framework, framework))
    one, two = (run(f"transformer_{framework}", "--steps", "4", "--devices", devices) for devices in "12")
    np.testing.assert_allclose(two, one, rtol=2e-3)
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)


def test_more_devices_than_there_are(capsys):
    pytest.importorskip("equinox")
    with pytest.raises(SystemExit):
        run("distillation", "--devices", "99")
    assert "99 devices needed" in capsys.readouterr().err


def test_distillation_learns():
    pytest.importorskip("equinox")
    losses = run("distillation", "--steps", "40")
    assert np.mean(losses["student"][-10:]) < 0.85 * losses["student"][0]
