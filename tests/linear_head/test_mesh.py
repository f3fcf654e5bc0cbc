"""The linear heads on a mesh: the numbers of one device, the work divided, what the devices tell each other."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax import (
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
    linear_softmax_kl_divergence,
    linear_softmax_top_k_kl_divergence,
)
from tests.helpers import shard_map

N, D, V = 16, 4, 24
SLOW = pytest.mark.slow
ALL_OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_softcap": 3.0, "ignore_index": 5}


class Arguments(NamedTuple):
    x: jax.Array
    weights: jax.Array
    bias: jax.Array
    token_weights: jax.Array
    class_weights: jax.Array


def arguments(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(3), 6)
    x, weights = jax.random.normal(keys[0], (N, D), dtype), jax.random.normal(keys[1], (D, V), dtype)
    bias, token_weights = jax.random.normal(keys[2], (V,), dtype), jax.random.uniform(keys[3], (N,), dtype, 0.5, 1.5)
    class_weights = jax.random.uniform(keys[4], (V,), dtype, 0.5, 2.0)
    labels = jax.random.randint(keys[5], (N,), 0, V).at[3].set(5)
    return Arguments(x, weights, bias, token_weights.at[1].set(0.0), class_weights), labels


class Mesh(NamedTuple):
    """How the arguments lie on a mesh with the axes data and classes."""

    shape: tuple[int, int]
    weights: P
    kind: AxisType = AxisType.Auto

    @property
    def specs(self) -> Arguments:
        over_classes = P("classes") if "classes" in self.weights else P()
        return Arguments(P("data"), self.weights, over_classes, P("data"), over_classes)

    def make(self):
        return jax.make_mesh(self.shape, ("data", "classes"), axis_types=(self.kind,) * 2)

    def place(self, *arrays_and_specs):
        mesh = self.make()
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        return jax.tree.map(put, *arrays_and_specs)

    @property
    def told(self) -> dict:
        """What the call must be told."""
        if self.kind == AxisType.Explicit:
            return {}
        return {"token_axes": "data", "class_axes": "classes" if "classes" in self.weights else None}


WHOLE, CLASSES, FEATURES, BOTH = P(), P(None, "classes"), P("data", None), P("data", "classes")
EXPLICIT = functools.partial(Mesh, kind=AxisType.Explicit)
MESHES = [
    Mesh((2, 4), CLASSES),
    EXPLICIT((2, 4), BOTH),
    pytest.param(Mesh((8, 1), WHOLE), marks=SLOW),
    pytest.param(Mesh((1, 8), CLASSES), marks=SLOW),
    pytest.param(Mesh((2, 4), FEATURES), marks=SLOW),
    pytest.param(EXPLICIT((8, 1), WHOLE), marks=SLOW),
    pytest.param(EXPLICIT((1, 8), CLASSES), marks=SLOW),
    pytest.param(EXPLICIT((2, 4), FEATURES), marks=SLOW),
]


def loss(options, labels, *args):
    """A function whose cotangents differ from token to token and from 1."""
    x, weights, bias, token_weights, class_weights = args
    found = linear_softmax_cross_entropy_loss(
        x, labels, weights, bias=bias, token_weights=token_weights, class_weights=class_weights, chunk_size=3, **options
    )
    return jnp.sum(jnp.sin(0.7 * found))


def derivatives(f, labels, args, tangents):
    """Value, gradient, and their derivative along the tangents."""
    return jax.jvp(jax.value_and_grad(functools.partial(f, labels), range(5)), tuple(args), tuple(tangents))


def assert_close(got, wanted, ulps=1e3):
    def close(got, wanted):
        bound = ulps * float(jnp.finfo(wanted.dtype).eps) * max(1.0, float(jnp.max(jnp.abs(wanted))))
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=0, atol=bound)

    jax.tree.map(close, got, wanted)


@functools.cache
def on_one_device(reduction: str, everything: bool):
    args, labels = arguments()
    options = {**(ALL_OPTIONS if everything else {}), "reduction": reduction}
    return jax.jit(functools.partial(derivatives, functools.partial(loss, options)))(
        labels, args, jax.tree.map(jnp.cos, args)
    )


@pytest.mark.parametrize("reduction,everything", [("mean", False), pytest.param("none", True, marks=SLOW)])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equals_one_device(mesh, reduction, everything, x64):
    args, labels = arguments()
    options = {**(ALL_OPTIONS if everything else {}), "reduction": reduction, **mesh.told}
    labels, args = mesh.place((labels, args), (P("data"), mesh.specs))
    got = jax.jit(functools.partial(derivatives, functools.partial(loss, options)))(
        labels, args, jax.tree.map(jnp.cos, args)
    )
    assert_close(got, on_one_device(reduction, everything))
    for gradient, argument in zip(got[0][1], args):
        if mesh.kind == AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(argument.sharding, argument.ndim)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=SLOW)])
def test_inside_shard_map(everything, x64):
    """Classes over one axis by `axis_name`, tokens over the other by the caller, who adds up."""
    mesh, (args, labels) = Mesh((2, 4), CLASSES), arguments()
    options = ALL_OPTIONS if everything else {}

    def local(labels, *args):
        return jax.lax.psum(loss({**options, "axis_name": "classes"}, labels, *args), "data")

    f = shard_map(local, mesh=mesh.make(), in_specs=(P("data"), *mesh.specs), out_specs=P())

    def alone(labels, x, weights, bias, token_weights, class_weights):
        parts = [(labels[i], x[i], weights, bias, token_weights[i], class_weights) for i in (slice(8), slice(8, 16))]
        return sum(loss(options, *part) for part in parts)

    tangents = jax.tree.map(jnp.cos, args)
    got, wanted = (jax.jit(functools.partial(derivatives, f))(labels, args, tangents) for f in (f, alone))
    assert_close(got, wanted)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_statistics(kind, x64):
    mesh, (args, labels) = Mesh((2, 4), CLASSES, kind), arguments()

    def call(labels, args, **told):
        loss = linear_softmax_cross_entropy_with_statistics
        return loss(args.x, labels, args.weights, bias=args.bias, chunk_size=3, ignore_index=5, **told)

    wanted = jax.jit(call)(labels, args)
    got = jax.jit(functools.partial(call, **mesh.told))(*mesh.place((labels, args), (P("data"), mesh.specs)))
    assert_close(got[0], wanted[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got[1], wanted[1])


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("top_k", [False, True])
def test_distillation(top_k, kind, x64):
    mesh, (args, _) = Mesh((2, 4), BOTH, kind), arguments()
    teacher, of_teacher = (jnp.cos(args.x[:, :2]), jnp.sin(args.weights[:2])), (P("data"), CLASSES)
    if top_k:
        words = (jnp.arange(N)[:, None] + jnp.array([[0, 7, 11]])) % V
        teacher, of_teacher = (words, jnp.log(jnp.array([[0.5, 0.2, 0.1]])) * jnp.ones((N, 1))), (P("data"), P("data"))

    def value_and_gradient(x, weights, teacher, **told):
        options = {"chunk_size": 3, "reduction": "mean", **told}

        def f(x, weights):
            if top_k:
                return linear_softmax_top_k_kl_divergence(x, *teacher, weights, **options)
            return linear_softmax_kl_divergence(x, teacher[0], weights, teacher[1], **options)

        return jax.value_and_grad(f, (0, 1))(x, weights)

    wanted = jax.jit(value_and_gradient)(args.x, args.weights, teacher)
    specs = P("data"), BOTH, of_teacher
    placed = mesh.place((args.x, args.weights, teacher), specs)
    assert_close(jax.jit(functools.partial(value_and_gradient, **mesh.told))(*placed), wanted)


def test_tokens_of_several_axes(x64):
    """x (B, T, D): the batch over one axis of the mesh, the sequence over another, as types or a PartitionSpec tell."""
    args, labels = arguments()
    x, labels = args.x.reshape(4, 4, D), labels.reshape(4, 4)
    call = lambda x, labels, weights, **told: jax.value_and_grad(
        lambda x: jnp.sum(linear_softmax_cross_entropy_loss(x, labels, weights, reduction="none", **told) ** 2)
    )(x)
    wanted = jax.jit(call)(x, labels, args.weights)
    spec = P("data", "classes")
    for mesh, told in ((EXPLICIT((2, 4), WHOLE), {}), (Mesh((2, 4), WHOLE), {"token_axes": spec})):
        placed = mesh.place((x, labels, args.weights), (spec, spec, WHOLE))
        assert_close(jax.jit(functools.partial(call, **told))(*placed), wanted)


def test_errors():
    args, labels = arguments(jnp.float32)
    call = functools.partial(linear_softmax_cross_entropy_loss, args.x, labels, args.weights)
    with pytest.raises(ValueError, match="there is none"):
        call(token_axes="data")
    whole = functools.partial(linear_softmax_cross_entropy_loss, axis_name="classes")
    mesh = jax.make_mesh((2, 4), ("data", "classes"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match="weights of shape .* is the same on every device along .*classes"):
        shard_map(whole, mesh=mesh, in_specs=P(), out_specs=P())(args.x, labels, args.weights)
    with pytest.raises(ValueError, match="needs a jax.shard_map"):
        call(axis_name="classes")
    x, labels, weights = Mesh((2, 4), CLASSES).place((args.x, labels, args.weights), (P("data"), P("data"), CLASSES))
    call = functools.partial(linear_softmax_cross_entropy_loss, x, labels, weights)
    with pytest.raises(ValueError, match="axes of the mesh"):
        call(token_axes="rows")
    with pytest.raises(ValueError, match="class_axes.*'data' twice"):
        call(token_axes="data", class_axes="data")
    with pytest.raises(ValueError, match="class_axes=.*twice"):
        call(class_axes=("data", "data"))
    for wrong in (3, P(2), {"data": 1}):
        with pytest.raises(TypeError, match="token_axes must be .* got"):
            call(token_axes=wrong)
    with pytest.raises(ValueError, match="number of classes, 23, .* 4 devices .* pad it"):
        linear_softmax_cross_entropy_loss(x, labels, args.weights[:, 1:], class_axes="classes")
    with pytest.raises(ValueError, match="must be a multiple of the 8 devices"):
        linear_softmax_cross_entropy_loss(x[:12], labels[:12], weights, token_axes=("data", "classes"))
