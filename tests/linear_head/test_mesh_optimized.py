"""The linear heads on a mesh: what is compiled, and rounding.

The sizes are such that a device has several chunks and a chunk several slabs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax import linear_softmax_cross_entropy_loss
from tests import programs
from tests.linear_head.test_mesh import BOTH, CLASSES, EXPLICIT, WHOLE, Mesh, arguments

pytestmark = pytest.mark.optimized

SIZE = 1024, 64, 8192  # N, D, V
RELEASE = tuple(int(part) for part in jax.__version__.split(".")[:2])


def test_bfloat16_is_rounded_once():
    """With float32 products, parts are added up in float32, too: as close to the exact one as a device alone gets."""
    args, labels = arguments(jnp.bfloat16)
    mesh = EXPLICIT((8, 1), WHOLE)
    loss = functools.partial(linear_softmax_cross_entropy_loss, precision="highest")
    grad = lambda x, labels, weights: jax.grad(loss, 2)(x, labels, weights)
    got = jax.jit(grad)(*mesh.place((args.x, labels, args.weights), (P("data"), P("data"), WHOLE)))
    exact = jax.jit(grad)(args.x.astype(jnp.float32), labels, args.weights.astype(jnp.float32))
    half_ulp = 0.501 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(exact), rtol=half_ulp, atol=1e-6)


def compiled(mesh: Mesh | None, told=None):
    n, d, v = SIZE
    shapes = ((n, d), jnp.float32), ((n,), jnp.int32), ((d, v), jnp.float32)
    specs = P("data"), P("data"), None if mesh is None else mesh.weights
    on = None if mesh is None else mesh.make()
    place = lambda spec: {} if on is None else {"sharding": NamedSharding(on, spec)}
    args = [jax.ShapeDtypeStruct(*shape, **place(spec)) for shape, spec in zip(shapes, specs)]
    grad = jax.value_and_grad(
        functools.partial(linear_softmax_cross_entropy_loss, chunk_size=64, **(told or {})), (0, 2)
    )
    return jax.jit(grad).lower(*args).compile()


@pytest.mark.skipif(RELEASE < (0, 10), reason="XLA tells the trip counts of fewer loops")
@pytest.mark.parametrize("mesh", [EXPLICIT((8, 1), WHOLE), EXPLICIT((2, 4), BOTH), EXPLICIT((1, 8), CLASSES)], ids=str)
def test_work_is_divided(mesh):
    text = compiled(mesh).as_text()
    assert programs.multiplications(text) <= 1.05 * 3 * np.prod(SIZE) / 8
    within = [op for op in programs.collectives(text) if op.in_loop]
    assert all(op.name == "all-reduce" and op.bytes <= 4 * 4 * 64 for op in within)  # few numbers per token
    n, d, v = SIZE
    of_x, of_weights = 4 * n * d // mesh.shape[0], 4 * d * v // mesh.shape[1]
    of_weights = of_weights // mesh.shape[0] if "data" in mesh.weights else of_weights
    outside = [op for op in programs.collectives(text) if not op.in_loop and op.name != "all-gather"]
    sizes = sorted(op.bytes for op in outside if op.bytes > 8)
    wanted = [of_x] * (mesh.shape[1] > 1) + [of_weights] * (mesh.shape[0] > 1)
    np.testing.assert_allclose(sizes, sorted(wanted), atol=8)  # the loss may travel with a gradient


@pytest.mark.skipif(RELEASE < (0, 10), reason="XLA tells the trip counts of fewer loops")
@pytest.mark.parametrize(
    "mesh", [Mesh((8, 1), WHOLE), Mesh((2, 4), CLASSES), Mesh((1, 8), CLASSES), Mesh((2, 4), BOTH)], ids=str
)
def test_xla_divides_the_work(mesh):
    """Axes of type Auto of which nothing is told: no device does more than its part, and split features alone are
    gathered, once.
    """
    text = compiled(mesh).as_text()
    assert programs.multiplications(text) <= 1.05 * 3 * np.prod(SIZE) / 8
    others = [op for op in programs.collectives(text) if op.name != "all-reduce"]
    assert [(op.name, op.times) for op in others] == [("all-gather", 1)] * ("data" in mesh.weights)


@pytest.mark.skipif(RELEASE < (0, 10), reason="XLA tells the trip counts of fewer loops")
def test_chunks_that_xla_divides_are_as_long_on_each_device():
    """8192 tokens of 8 devices are two chunks, whether the call is told how they lie or not."""
    mesh, shapes = Mesh((8, 1), WHOLE).make(), ((8192, 16), (8192,), (16, 512))
    place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    args = map(place, shapes, (jnp.float32, jnp.int32, jnp.float32), (P("data"), P("data"), WHOLE))
    x, labels, weights = args
    for told in ({}, {"token_axes": "data"}):
        loss = functools.partial(linear_softmax_cross_entropy_loss, **told)
        text = jax.jit(jax.grad(loss, 2)).lower(x, labels, weights).compile().as_text()
        assert '"known_trip_count":{"n":"2"}' in text


@pytest.mark.skipif(RELEASE < (0, 10), reason="XLA tells the trip counts of fewer loops")
def test_chunks_that_xla_divides_of_a_number_without_divisors():
    """4099 tokens per device, a prime number: padded to nine chunks, with the numbers of one device."""
    mesh, n = Mesh((8, 1), WHOLE), 8 * 4099
    keys = jax.random.split(jax.random.key(0), 3)
    x, weights = jax.random.normal(keys[0], (n, 4)), jax.random.normal(keys[1], (4, 32))
    labels = jax.random.randint(keys[2], (n,), 0, 32)
    f = jax.jit(jax.value_and_grad(functools.partial(linear_softmax_cross_entropy_loss, reduction="mean"), (0, 2)))
    wanted = f(x, labels, weights)
    x, labels, weights = mesh.place((x, labels, weights), (P("data"), P("data"), WHOLE))
    compiled = f.lower(x, labels, weights).compile()
    assert '"known_trip_count":{"n":"9"}' in compiled.as_text()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), compiled(x, labels, weights), wanted
    )
