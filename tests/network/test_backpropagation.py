"""Feedforward networks: the formulas of docs/mathematics.md, section 7, and the gradient by hand against jax.grad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax
from jaxsoftmax import network
from tests.helpers import enable_x64

SIZES = (7, 6, 5, 4)


def normalized(z):
    """An activation that is not element-wise, and not softmax either."""
    return jnp.tanh(z) / jnp.sqrt(1 + jnp.sum(z * z, -1, keepdims=True))


ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "softmax": jaxsoftmax.softmax,
    "normalized": normalized,
}


@functools.partial(jax.jit, static_argnums=(3, 4))
def backprop(params, x, targets, loss, activation):
    return network.backprop(params, x, targets, loss, activation)


@functools.partial(jax.jit, static_argnums=(3, 4))
def grad(params, x, targets, loss, activation):
    return jax.grad(plain_loss)(params, x, targets, loss, activation)


def plain_loss(params, x, targets, loss, activation):
    """The mean loss, written anew for one example at a time, for jax.grad to differentiate."""

    def one(x, target):
        for W, b in params[:-1]:
            x = activation(W @ x if b is None else W @ x + b)
        W, b = params[-1]
        return loss(W @ x if b is None else W @ x + b, target)

    for _ in range(jnp.ndim(x) - 1):
        one = jax.vmap(one)
    return jnp.mean(one(x, targets))


def sample(batch, *, bias=True, dtype=float, sizes=SIZES):
    """Random parameters (biases too), inputs and labels."""
    rng = np.random.default_rng(0)
    dtype = jnp.zeros((), dtype).dtype

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    params = tuple(
        network.Layer(normal(d_out, d_in, scale=d_in**-0.5), normal(d_out) if bias else None)
        for d_in, d_out in zip(sizes, sizes[1:])
    )
    return params, normal(*batch, sizes[0]), jnp.asarray(rng.integers(0, sizes[-1], batch))


def assert_close(found, wanted, ulps):
    """Equal trees, each array to `ulps` units in the last place of its largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        ulp = float(jnp.finfo(b.dtype).eps) * np.abs(np.asarray(b, np.float64)).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=ulps * ulp)


# --- init and forward ---


def test_init_shapes(key):
    params = network.init(key, SIZES)
    assert [(layer.W.shape, layer.b.shape) for layer in params] == [((6, 7), (6,)), ((5, 6), (5,)), ((4, 5), (4,))]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not any(layer.b.any() for layer in params)
    assert len(jax.tree.leaves(network.init(key, SIZES, bias=False))) == 3


def test_init_dtype(key):
    assert network.init(key, (2, 3), dtype=jnp.bfloat16)[0].b.dtype == jnp.bfloat16
    with enable_x64():
        assert network.init(key, (2, 3))[0].W.dtype == jnp.float64


def test_init_keeps_the_variance(key):
    """N(0, 1/d_in), independent from layer to layer: checked to five standard errors."""
    first, second = network.init(key, (200, 400, 200), bias=False)
    first, second = 200**0.5 * np.asarray(first.W, np.float64), 400**0.5 * np.asarray(second.W, np.float64)
    for entries in (first, second):
        assert abs(entries.mean()) < 5 * entries.size**-0.5
        assert abs(entries.var() - 1) < 5 * (2 / entries.size) ** 0.5
    assert abs((first * second.T).mean()) < 5 * first.size**-0.5


def test_forward_is_the_formula(x64):
    params, x, _ = sample((3,))
    a = np.asarray(x).T
    for n, (W, b) in enumerate(params):
        z = np.asarray(W) @ a + np.asarray(b)[:, None]
        a = np.tanh(z) if n < 2 else z
    np.testing.assert_allclose(network.forward(params, x), a.T, rtol=1e-14)


def test_forward_without_hidden_layer_has_no_activation(key):
    (layer,) = params = network.init(key, (3, 2))
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(network.forward(params, x, jaxsoftmax.softmax), layer.W @ x)


# --- backprop ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("batch", "bias"), [((), False), ((2, 3), True)])
def test_backprop_is_the_plain_gradient(x64, activation, batch, bias):
    """In float64, against a network written without this module."""
    loss, activation = jaxsoftmax.sum_squared_error, ACTIVATIONS[activation]
    params, x, _ = sample(batch, bias=bias)
    targets = jnp.ones((*batch, 4))
    wanted = grad(params, x, targets, loss, activation)
    assert_close(backprop(params, x, targets, loss, activation), wanted, ulps=32)


@pytest.mark.parametrize("sizes", [(3, 2), (3, 1, 2), (5, 4, 4, 4, 4, 4, 3)], ids=str)
def test_backprop_at_any_depth(x64, sizes):
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    params, x, labels = sample((6,), sizes=sizes)
    wanted = grad(params, x, labels, loss, jnp.tanh)
    assert_close(backprop(params, x, labels, loss, jnp.tanh), wanted, ulps=4)


def test_backprop_is_the_formula_for_one_layer(x64):
    """l = (z - ŷ)ᵀ(z - ŷ): ∂l/∂W = x · 2(z - ŷ)ᵀ in numerator layout, whose transpose JAX calls the gradient."""
    (layer,), x, _ = sample((), sizes=(3, 2))
    target = jnp.array([1.0, -1.0])
    row = 2 * (np.asarray(layer.W) @ np.asarray(x) + np.asarray(layer.b) - np.asarray(target))
    (grads,) = network.backprop((layer,), x, target, jaxsoftmax.sum_squared_error)
    np.testing.assert_allclose(grads.W, np.outer(np.asarray(x), row).T, rtol=1e-14)
    np.testing.assert_allclose(grads.b, row, rtol=1e-14)


def test_backprop_in_half_precision():
    """Gradients come back in the parameters' dtype, even where the inputs are wider."""
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    params, x, labels = sample((5,), dtype=jnp.bfloat16)
    wanted = grad(params, x, labels, loss, jnp.tanh)
    assert_close(backprop(params, x, labels, loss, jnp.tanh), wanted, ulps=4)
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.eval_shape(lambda: network.backprop(params, x.astype(jnp.float32), labels, loss))
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_backprop_under_transformations(x64):
    """vmap, whose per-example gradients have the batch's gradient as their mean; jvp, a Hessian product."""
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    params, x, labels = sample((5,))

    def by_hand(params, x, labels):
        return network.backprop(params, x, labels, loss, jaxsoftmax.softmax)

    def by_grad(params):
        return jax.grad(plain_loss)(params, x, labels, loss, jaxsoftmax.softmax)

    grads = jax.jit(by_hand)(params, x, labels)
    each = jax.jit(jax.vmap(by_hand, (None, 0, 0)))(params, x, labels)
    assert_close(jax.tree.map(lambda g: g.mean(0), each), grads, ulps=4)
    hvp = jax.jit(lambda v: jax.jvp(lambda params: by_hand(params, x, labels), (params,), (v,))[1])(grads)
    assert_close(hvp, jax.jit(lambda v: jax.jvp(by_grad, (params,), (v,))[1])(grads), ulps=16)


def test_gradients_are_shaped_like_params():
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    params, x, labels = sample((5,))
    for given in (list(params), (params[0]._replace(b=None), *params[1:])):
        grads = jax.eval_shape(lambda given=given: network.backprop(given, x, labels, loss))
        assert jax.tree.structure(grads) == jax.tree.structure(given)
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, given)


def test_no_examples_no_gradient():
    params, x, labels = sample((0,))
    grads = network.backprop(params, x, labels, jaxsoftmax.softmax_cross_entropy_with_integer_labels)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_intermediate_derivatives(x64):
    """∂l/∂z_n and ∂l/∂a_n, against jax.grad in perturbations added to z_n and a_n."""
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    params, x, labels = sample((5,))
    found = jax.jit(lambda: network.derivatives(params, x, labels, loss, jaxsoftmax.softmax))()

    def perturbed(dz, da):
        a = x
        for n, (W, b) in enumerate(params):
            z = a @ W.T + jnp.broadcast_to(b, (5, len(b))) + dz[n]
            a = jaxsoftmax.softmax(z) + da[n] if n < len(da) else z
        return loss(z, labels).mean()

    zeros = jax.tree.map(jnp.zeros_like, (found.z, found.a))
    assert_close((found.z, found.a), jax.jit(jax.grad(perturbed, (0, 1)))(*zeros), ulps=4)


# --- errors ---


def test_errors_name_the_layer(key):
    first, second = network.init(key, (4, 3, 2))
    with pytest.raises(ValueError, match=r"W_1 has shape \(3, 4\), so params' W_2 must have shape \(d_2, 3\)"):
        network.forward((first, first), jnp.ones(4))
    with pytest.raises(ValueError, match=r"W_1 has shape \(3, 4\), so b_1 must have shape \(3,\), got \(2,\)"):
        network.forward((first._replace(b=second.b), second), jnp.ones(4))
    with pytest.raises(ValueError, match=r"loss must return one value per example, shape \(5,\), got \(5, 2\)"):
        network.backprop((first, second), jnp.ones((5, 4)), jnp.ones((5, 2)), jaxsoftmax.squared_error)


@pytest.mark.optimized
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("batch", "bias"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in (((), True), ((5,), False))), ((2, 3), True)],
)
def test_backprop_is_grad(activation, batch, bias):
    """To a few ulp: the two sum in the same order."""
    loss, activation = jaxsoftmax.softmax_cross_entropy_with_integer_labels, ACTIVATIONS[activation]
    params, x, labels = sample(batch, bias=bias)
    wanted = jax.jit(jax.grad(lambda params: loss(network.forward(params, x, activation), labels).mean()))(params)
    assert_close(backprop(params, x, labels, loss, activation), wanted, ulps=4)
