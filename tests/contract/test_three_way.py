"""jacrev, jacfwd, the closed form and central differences of every closed derivative, at hostile logits."""

import jax
import jax.numpy as jnp
import pytest

import jaxsoftmax as js
from jaxsoftmax.verify import compare_derivatives
from tests.helpers import one_in

INF = jnp.inf
REGIMES = {
    "sure": [15.0, 0.0, 1.0, -2.0],
    "ties": [0.0] * 4,
    "offset": [1e4 + 0.5, 1e4 - 1.0, 1e4, 1e4 + 1.25],
    "excluded": [1.0, -INF, 0.0, 0.5],
    "two classes": [0.3, -0.7, -INF, -INF],
    "one class": [2.5, -INF, -INF, -INF],
}


def probabilities(z):
    """softmax and its complement by the definition; the complement as the sum of the others, which does not cancel."""
    e = jnp.exp(z - jnp.max(z))
    others = jnp.sum(e[None, :] * (1 - jnp.eye(z.size)), 1)
    return e / jnp.sum(e), others / jnp.sum(e)


def jacobian(z):
    p, complement = probabilities(z)
    return jnp.diag(p * complement) - jnp.outer(p, p) * (1 - jnp.eye(z.size))


def minus_p(z):
    """δ_ij - p_j."""
    p, complement = probabilities(z)
    return jnp.diag(complement) - p[None, :] * (1 - jnp.eye(z.size))


def soft_labels(z):
    return jnp.where(z > -INF, 0.5, 0.0).at[0].set(1.0)


def soft_label_gradient(z):
    return -soft_labels(z) @ minus_p(z)


def second_derivative(z):
    """D²σ_ijk = p_i [(δ_ij - p_j)(δ_ik - p_k) - J_jk]."""
    p, d = probabilities(z)[0], minus_p(z)
    return p[:, None, None] * (d[:, :, None] * d[:, None, :] - jacobian(z)[None])


label_loss = lambda z: js.softmax_cross_entropy_with_integer_labels(z, 0)
FORMS = {
    "softmax": (js.softmax, jacobian),
    "log_softmax": (
        lambda z: jnp.where(z > -INF, js.log_softmax(z), 0.0),
        lambda z: jnp.where((z > -INF)[:, None], minus_p(z), 0.0),
    ),
    "logsumexp": (js.logsumexp, lambda z: probabilities(z)[0]),
    "label loss": (label_loss, lambda z: -minus_p(z)[0]),
    "soft label loss": (lambda z: js.softmax_cross_entropy(z, soft_labels(z)), soft_label_gradient),
    "squared error": (
        lambda z: js.sum_squared_error(jnp.atan(z), jnp.full_like(z, 0.5)),
        lambda z: 2 * (jnp.atan(z) - 0.5) / (1 + z**2),
    ),
    "Hessian of the label loss": (jax.grad(label_loss), jacobian),
    "Hessian of logsumexp": (jax.grad(js.logsumexp), jacobian),
    "second derivative of softmax": (jax.jacrev(js.softmax), second_derivative),
    "second derivative of softmax, forward": (jax.jacfwd(js.softmax), second_derivative),
}


@pytest.mark.parametrize("form", one_in(2, FORMS))
def test_four_ways(form, x64):
    f, analytic = FORMS[form]
    regimes = {name: (jnp.array(z),) for name, z in REGIMES.items()}
    normal = jnp.array([1.3, -0.4, 0.6, 2.1])
    report = compare_derivatives(f, normal, analytic=analytic, regimes=regimes, tolerance=4.0)
    report.assert_ok()
    assert not report.missing
