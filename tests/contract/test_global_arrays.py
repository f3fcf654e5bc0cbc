"""Every public differentiable function on global arrays under jit, split over a mesh: as on one device.

The mesh has axes of type Auto or Explicit; batch, or batch and classes are split.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import DERIVATIVE_RTOL, assert_close
from tests.registry import CASES
from tests.registry.samples import B, K

REPRESENTATIVES = {"softmax", "entmax", "softmax_jacobian", "softmax_vjp", "label_cross_entropy_options", "huber_loss"}
KINDS = ["Auto", "Explicit"] if hasattr(jax, "set_mesh") else ["Auto"]


def every():
    """Every function with both axes split; the batch alone for one in four."""
    for i, case in enumerate(CASES):
        for kind in KINDS:
            for split in ("both", *(["batch"] * (i % 4 == 0))):
                default = case.name in REPRESENTATIVES and split == "both"
                yield pytest.param(
                    case, kind, split, id=f"{case.name}-{kind}-{split}", marks=() if default else pytest.mark.slow
                )


def mesh_of(kind: str):
    devices = jax.devices()[: B * K // 2]
    return jax.make_mesh((B, K // 2), ("batch", "classes"), devices=devices, axis_types=(AxisType[kind],) * 2)


def placed(mesh, split: str, x):
    """x with its axes of length B over "batch" and, where they are split, of length K over "classes"."""
    names = {B: "batch", K: "classes" if split == "both" else None}
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*map(names.get, x.shape))))


def derivatives(case, *args):
    """Value, gradient, jvp, Hessian-vector product and Jacobian."""

    def f(*variable):
        every = dict(enumerate(args)) | dict(zip(case.argnums, variable))
        return case.fn(*every.values())

    def gradient(*variable):
        return jax.grad(lambda *variable: jnp.sum(jnp.sin(f(*variable))), everywhere)(*variable)

    variable, everywhere = tuple(args[i] for i in case.argnums), tuple(range(len(case.argnums)))
    tangents = tuple(map(jnp.cos, variable))
    product = jax.jvp(gradient, variable, tangents)
    return jax.jvp(f, variable, tangents), product, jax.jacrev(f, everywhere)(*variable)


@functools.cache
def on_one_device(case):
    return jax.jit(functools.partial(derivatives, case))(*case.cast("float64"))


@pytest.mark.parametrize("case, kind, split", list(every()))
def test_as_on_one_device(case, kind, split, x64):
    mesh = mesh_of(kind)
    args = (placed(mesh, split, x) for x in case.cast("float64"))
    with jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext():
        got = jax.jit(functools.partial(derivatives, case))(*args)
    assert_close(got, on_one_device(case), 10 * DERIVATIVE_RTOL["float64"])
