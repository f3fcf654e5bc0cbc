"""Every public differentiable function on global arrays under jit, split over a mesh: as on one device.

The mesh has axes of type Auto or Explicit; batch, or batch and classes are split.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import DERIVATIVE_RTOL, assert_close, one_in
from tests.meshes import KINDS, around, mesh_of, placed
from tests.registry import CASES, HEADS
from tests.registry.samples import LOGP, B, K, Z

DEFAULT = {(name, "Explicit", "both") for name in ("entmax", "softmax_vjp", "huber_loss")}
DEFAULT |= {("label_cross_entropy_options", "Explicit", "both"), ("softmax", "Auto", "both")}


def every():
    """Every function with both axes split, by XLA alone one in three; the batch alone for one in four."""
    for i, case in enumerate(CASES):
        for kind in KINDS if i % 3 == 0 else KINDS[-1:]:
            for split in ("both", *(["batch"] * (i % 4 == 0))):
                default = (case.name, kind, split) in DEFAULT
                yield pytest.param(
                    case, kind, split, id=f"{case.name}-{kind}-{split}", marks=() if default else pytest.mark.slow
                )


def split_over(mesh, split: str, arrays):
    """Axes of length B over "batch" and, where they are split, of length K over "classes"."""
    names = {B: "batch", K: "classes" if split == "both" else None}
    return placed(mesh, list(arrays), [tuple(map(names.get, x.shape)) for x in arrays])


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
    mesh = mesh_of(kind, batch=B, classes=K // 2)
    args = split_over(mesh, split, case.cast("float64"))
    with around(mesh):
        got = jax.jit(functools.partial(derivatives, case))(*args)
    assert_close(got, on_one_device(case), 10 * DERIVATIVE_RTOL["float64"])


OF_TARGETS = [h for h in HEADS if {"soft", "logits", "log"} & {*h.kinds}]


@pytest.mark.skipif("Explicit" not in KINDS, reason="this JAX has no axes of type Explicit")
@pytest.mark.parametrize("whole", [0, 1], ids=["logits", "targets"])
@pytest.mark.parametrize("head", one_in(4, OF_TARGETS), ids=lambda head: head.name)
def test_logits_and_targets_that_lie_otherwise(head, whole, x64):
    """One of the two split, the other on every device: gradients come back as their arguments lie."""
    args = [jnp.asarray(x) for x in (LOGP if head.logarithms else Z, *head.args)]
    both = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(head.loss(*args))), (0, 1)))
    mesh = mesh_of("Explicit", batch=B, classes=K // 2)
    with around(mesh):
        lying = [x if i == whole else split for i, (x, split) in enumerate(zip(args, split_over(mesh, "both", args)))]
        got = both(*lying)
    assert_close(got, both(*args))
    assert jax.typeof(got[1][1 - whole]).sharding == jax.typeof(lying[1 - whole]).sharding
