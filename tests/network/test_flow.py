"""What backpropagation passes on its way: layouts, Jacobians, gradients of single examples, the flow of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import network, plotting
from jaxsoftmax.curvature.krylov import extreme_singular_values
from tests.helpers import assert_close, one_in
from tests.network.test_backpropagation import sample

LOSS = js.softmax_cross_entropy_with_integer_labels
ACTIVATIONS = {"tanh": jnp.tanh, "softmax": js.softmax}  # element-wise, and not
with_activation = pytest.mark.parametrize("activation", one_in(2, ACTIVATIONS.values()), ids=ACTIVATIONS)


def test_numerator_layout_is_the_formula_of_the_text(x64):
    """∂l/∂W_n = a_{n-1} ∂l/∂z_n and ∂l/∂z_{n-1} = ∂l/∂z_n W_n ∂a_{n-1}/∂z_{n-1}, literally, for one example."""
    params, x, label = sample(())
    found = jax.jit(lambda params: network.derivatives(params, x, label, LOSS, layout="numerator"))(params)
    a, dense = np.asarray(x), jax.jit(network.jacobians)(params, x)[0]
    found, dense, params = jax.tree.map(np.asarray, (found, dense, params))
    for n, (layer, dz, dlayer) in enumerate(zip(params, found.z, found.layers)):
        assert_close(dlayer.W, a[:, None] @ dz[None])
        np.testing.assert_array_equal(dlayer.b, dz)
        if n < len(params) - 1:
            row = found.z[n + 1][None] @ params[n + 1].W
            assert_close(found.a[n], row[0])
            assert_close(dz, (row @ dense[n])[0])
        a = np.tanh(layer.W @ a + layer.b)


def test_layouts_are_transposes(x64):
    params, x, labels = sample((6,))
    gradients = jax.jit(jax.grad(lambda params: LOSS(network.forward(params, x), labels).mean()))(params)
    for layout, turn in (("denominator", np.asarray), ("numerator", np.transpose)):
        found = jax.jit(lambda params, layout=layout: network.backprop(params, x, labels, LOSS, layout=layout))(params)
        assert_close(jax.tree.map(turn, found), gradients)


@with_activation
def test_jacobians_by_the_chain_rule(activation, x64):
    """∂z_N/∂z_n against jacrev and jacfwd of the rest of the network at z_n."""
    params, x, _ = sample((6,))

    def by_autodiff(params, x, mode):
        z, layers, outputs = network.forward(params[:1], x), [], []
        for n in range(1, len(params)):
            rest = lambda z, n=n: network.forward(params[n:], activation(z), activation)
            layers.append(jax.vmap(mode(activation))(z))
            outputs.append(jax.vmap(mode(rest))(z))
            z = network.forward([params[n]], activation(z))
        return layers, [*outputs, jnp.broadcast_to(jnp.eye(4), (6, 4, 4))]

    found = jax.jit(network.jacobians, static_argnums=2)(params, x, activation)
    for mode in (jax.jacrev, jax.jacfwd):
        assert_close(found, jax.jit(by_autodiff, static_argnums=2)(params, x, mode))


@pytest.mark.parametrize(
    "activation, batch, bias", [(js.softmax, (6,), True), (jnp.tanh, (2, 3), False), (jax.nn.relu, (), True)]
)
def test_per_example_gradients_and_norms(activation, batch, bias, x64):
    params, x, labels = sample(batch, bias=bias)

    def gradient(x, label):
        return jax.grad(lambda params: LOSS(network.forward(params, x, activation), label))(params)

    for _ in batch:
        gradient = jax.vmap(gradient)
    methods = network.per_example_gradients, network.per_example_gradient_norms
    both = jax.jit(lambda *data: [method(params, *data, LOSS, activation) for method in methods])
    wanted, (found, norms) = jax.tree.map(np.asarray, (jax.jit(gradient)(x, labels), both(x, labels)))
    assert_close(found, wanted)
    squares = sum(np.sum(g**2, axis=tuple(range(len(batch), g.ndim))) for g in jax.tree.leaves(wanted))
    assert_close(norms, np.sqrt(squares))


# Singular values and the flow of gradients


@functools.partial(jax.jit, static_argnums=1)
def extremes(M, num_steps=None):
    return jnp.stack(extreme_singular_values(lambda x: M @ x, jnp.ones(M.shape[1]), jax.random.key(0), num_steps))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 3)], ids=str)
def test_extreme_singular_values(shape, x64):
    M = np.random.default_rng(0).standard_normal(shape)
    s = np.linalg.svd(M, compute_uv=False)
    assert_close(extremes(M), s[[0, -1]])


def test_extreme_singular_values_of_hard_matrices(x64):
    """Tiny values keep their digits (no JᵀJ), repeated ones and zero are found, few steps give bounds."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    with_values = lambda values: (U * values) @ V.T
    for values in (np.repeat([3.0, 2.0, 1.0], 4), np.ones(12), np.repeat([1.0, 0.0], [5, 7]), np.zeros(12)):
        np.testing.assert_allclose(extremes(with_values(values)), values[[0, -1]], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(extremes(with_values(np.geomspace(1, 1e-10, 12))), [1, 1e-10], rtol=1e-5)
    largest, smallest = extremes(with_values(np.linspace(3, 1, 12)), 4)
    assert 2.5 < largest < 3 and 1 < smallest < 2


@with_activation
def test_gradient_flow_against_dense_jacobians(activation, x64):
    params, x, labels = sample((3,))
    flow = network.gradient_flow(params, x, labels, LOSS, activation)
    dense = lambda: (network.jacobians(params, x, activation), network.derivatives(params, x, labels, LOSS, activation))
    (layers, outputs), found = jax.tree.map(np.asarray, jax.jit(dense)())
    extremes = lambda J: np.linalg.svd(J, compute_uv=False)[..., [0, -1]]
    assert_close(flow.gradient_norms, np.stack([3 * np.linalg.norm(dz, axis=-1) for dz in found.z]))
    maps = [np.broadcast_to(params[0].W, (3, 6, 7)), *(np.asarray(p.W) @ J for p, J in zip(params[1:], layers))]
    assert_close(flow.layer_singular_values, np.stack([extremes(J) for J in maps]), rtol=1e-9)
    assert_close(flow.output_singular_values, np.stack([extremes(J) for J in outputs[:-1]]), rtol=1e-9)
    diagonals = [np.diagonal(J, axis1=-2, axis2=-1) for J in layers]
    assert_close(flow.saturation, np.stack([np.mean(np.abs(d) < 0.1, -1) for d in diagonals]))


@pytest.mark.slow
def test_gradient_flow_tells_a_saturated_network_from_a_healthy_one():
    params, x, labels = sample((16,), sizes=(20, 20, 20, 20, 4))
    healthy = network.gradient_flow(params, x, labels, LOSS)
    large = [*(layer._replace(W=20 * layer.W) for layer in params[:-1]), params[-1]]
    stuck = network.gradient_flow(large, x, labels, LOSS)
    assert healthy.saturation.mean() < 0.2 and stuck.saturation.mean() > 0.6
    small = [*(layer._replace(W=0.1 * layer.W) for layer in params[:-1]), params[-1]]
    vanishing = network.gradient_flow(small, x, labels, LOSS)
    ratio = lambda flow: jnp.median(flow.gradient_norms[0] / flow.gradient_norms[-1])
    assert ratio(vanishing) < 0.05 * ratio(healthy)


def test_gradient_flow_of_one_layer(x64):
    params, x, labels = sample((2,), sizes=(4, 3))
    flow = network.gradient_flow(params, x, labels, LOSS)
    assert flow.output_singular_values.shape == (0, 2, 2) and flow.saturation.shape == (0, 2)
    assert flow.layer_singular_values.shape == (1, 2, 2)


@pytest.mark.optimized
def test_norms_form_no_gradients():
    """The compiled norms need no array of the size of the per-example gradients."""
    params, x, labels = sample((64,), sizes=(32, 128, 10))
    norms = jax.jit(lambda params, x, labels: network.per_example_gradient_norms(params, x, labels, LOSS))
    temporaries = norms.lower(params, x, labels).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 64 * 128 * 32 * 4 / 2


def test_picture_of_one_layer():
    """No layer lies below another, so two of the quantities have no value."""
    pytest.importorskip("matplotlib")
    params = network.init(jax.random.key(0), (4, 2))
    figure = plotting.visualize_gradient_flow(params, jnp.ones((5, 4)), jnp.zeros((5, 2)), js.sum_squared_error)
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 0]
