"""What is no function of the registry, on a mesh of axes of type Explicit: operators, networks and their curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import curvature, network
from tests.helpers import DERIVATIVE_RTOL, assert_close
from tests.meshes import KINDS, around, mesh_of, placed

pytestmark = pytest.mark.skipif("Explicit" not in KINDS, reason="this JAX has no axes of type Explicit")
SLOW = pytest.mark.slow

B, K = 4, 8
_rng = np.random.default_rng(17)
Z, V = (_rng.normal(size=(B, K)).astype(np.float32) for _ in range(2))
LABELS = np.array([3, 0, 7, 4], np.int32)

ce = js.softmax_cross_entropy_with_integer_labels


def assert_as_on_one_device(fn, args, specs):
    mesh = mesh_of("Explicit", batch=2, classes=2)
    with around(mesh):
        got = jax.jit(fn)(*placed(mesh, args, specs))
    assert_close(got, jax.jit(fn)(*args), 10 * DERIVATIVE_RTOL["float32"])


# Operators.


def of_jacobian(J, v):
    numbers = J.spectral_norm() + J.frobenius_norm() + J.null_space().frobenius_norm()
    return J.mv(v) + J.solve(v, 0.1) + J.eigvalsh() + numbers[:, None]


def of_hessian(H, v):
    numbers = H.frobenius_norm() + H.logdet(2.0) + H.trace()
    return H.solve(v, 2.0) + jnp.sum(H.as_matrix() ** 2, -1) + numbers[:, None]


capped = functools.partial(js.logits_hessian, ce, logit_softcap=3.0)
OPERATORS = {
    "jacobian": (js.SoftmaxJacobian.from_logits, of_jacobian),
    "capped": (lambda z: capped(z, LABELS), of_hessian),
    "penalized": (lambda z: js.logits_ggn(ce, z, LABELS, z_loss=0.1), lambda G, v: G.factor_mv(G.factor_rmv(v))),
    "divergence": (lambda z: js.logits_hessian(js.softmax_kl_divergence, z, jnp.asarray(V)), of_hessian),
    "diagonal": (lambda z: js.logits_hessian(js.sigmoid_binary_cross_entropy, z, jnp.asarray(abs(V))), of_hessian),
    "focal": (lambda z: js.logits_hessian(js.focal_loss_with_integer_labels, z, LABELS), of_hessian),
}
SHORT = {"jacobian", "capped", "penalized"}


@pytest.mark.parametrize("split", [pytest.param("batch", marks=SLOW), "both"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHORT else SLOW) for n in OPERATORS])
def test_operators(name, split):
    """Values and their gradient in the logits and the vector."""
    build, method = OPERATORS[name]

    def value_and_gradient(z, v):
        def total(z, v):
            out = method(build(z), v)
            return jnp.sum(out * out), out

        return jax.grad(total, (0, 1), has_aux=True)(z, v)

    spec = ("batch", "classes" if split == "both" else None)
    assert_as_on_one_device(value_and_gradient, (Z, V), (spec, spec))


# Networks of three layers; the weights lie over the axis of the batch, the other one, or neither.

LAYOUTS = {
    "whole": ((None, None), (None,)),
    "rows": (("classes", None), ("classes",)),
    "columns": ((None, "classes"), (None,)),
    "features": ((None, "batch"), (None,)),
    "batch": (("batch", None), (None,)),
}
WIDTHS = (4, 6, 6, K)


def gradients(params, x, labels, v):
    return network.backprop(params, x, labels, ce), network.per_example_gradient_norms(params, x, labels, ce)


def details(params, x, labels, v):
    per_example = network.per_example_gradients(params, x, labels, ce)
    flow = network.gradient_flow(params, x, labels, ce, num_steps=2)
    return per_example, network.jacobians(params, x), flow.gradient_norms, flow.layer_singular_values[..., 0]


def products(params, x, labels, v):
    data = network.forward, ce, params, x, labels
    of_vector = [curvature.hvp, curvature.ggn_vp, curvature.fisher_vp, curvature.empirical_fisher_vp]
    sampled = functools.partial(curvature.fisher_vp, key=jax.random.key(0), num_samples=2)
    in_batches = functools.partial(curvature.ggn_vp, batch_size=2)
    return [product(*data, v) for product in (*of_vector, sampled, in_batches)]


def solution(params, x, labels, v):
    product = functools.partial(curvature.ggn_vp, network.forward, ce, params, x, labels)
    return curvature.damped_solve(product, v, 1.0)[0]


def estimates(params, x, labels, v):
    product = functools.partial(curvature.ggn_vp, network.forward, ce, params, x, labels)
    arguments = product, params, jax.random.key(0), 2
    return curvature.top_eigenpairs(*arguments)[0], curvature.hutchinson_diagonal(*arguments).mean


@pytest.mark.parametrize("layout", [pytest.param(n, marks=() if n == "features" else SLOW) for n in LAYOUTS])
@pytest.mark.parametrize(
    "of_network", [gradients, *(pytest.param(f, marks=SLOW) for f in (details, products, solution, estimates))]
)
def test_networks(of_network, layout):
    params = jax.tree.map(np.asarray, network.init(jax.random.key(0), WIDTHS))
    layer = network.Layer(*LAYOUTS[layout])
    specs = jax.tree.map(lambda _: layer, params, is_leaf=lambda leaf: isinstance(leaf, network.Layer))
    args = params, V[:, :4], LABELS, jax.tree.map(np.cos, params)
    assert_as_on_one_device(of_network, args, (specs, ("batch",), ("batch",), specs))


def test_the_gradient_by_hand_lies_as_the_weights_do():
    mesh, spec = mesh_of("Explicit", batch=2, classes=2), (("classes", "batch"), ("classes",))
    params = network.init(jax.random.key(0), (4, K))
    with around(mesh):
        (layer,) = placed(mesh, params, (network.Layer(*spec),))
        x, labels = placed(mesh, (V[:, None, :4], LABELS[:, None]), (("batch",), ("batch",)))
        (found,) = jax.jit(lambda layer: network.backprop((layer,), x, labels, ce))(layer)
    assert jax.typeof(found.W).sharding == jax.typeof(layer.W).sharding
    assert jax.typeof(found.b).sharding == jax.typeof(layer.b).sharding
