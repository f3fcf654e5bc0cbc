"""Curvature of the heads: digits of a sure model, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoftmax import losses
from jaxsoftmax.losses.hessian import logits_hessian
from tests.losses.test_hessian import CE

pytestmark = pytest.mark.optimized


def test_digits_where_the_model_is_sure():
    """At a logit gap of 30 the float32 operators keep the digits that dense float32 algebra loses."""
    z = np.array([[30.0, 0.5, -1.0, 0.0]], "float32")
    labels, v = jnp.array([0]), np.array([[1.0, -0.5, 2.0, 0.3]], "float32")
    for loss, options in ((CE, {}), (losses.focal_loss_with_integer_labels, {"gamma": 0.5})):
        got = np.asarray(logits_hessian(loss, jnp.asarray(z), labels, **options).mv(jnp.asarray(v)))
        e = np.exp(z[0].astype(np.longdouble) - 30)
        u, q, w = e[1:].sum() / e.sum(), e[1:] / e[1:].sum(), v[0].astype(np.longdouble)
        # With s the margin: H v = F″ ∇s <∇s, v> - F′ (q∘(v - <q,v>)), by the softplus series at u = 1 - p_c → 0.
        gamma, L = options.get("gamma", 0.0), -np.log1p(-u)
        first = -(u**gamma) * (gamma * (1 - u) * L + u)
        second = u**gamma * (1 - u) * (gamma**2 * (1 - u) * L - gamma * u * L + (2 * gamma + 1) * u)
        grad = np.concatenate([[1], -q])
        want = second * grad * (grad @ w)
        want[1:] -= first * q * (w[1:] - q @ w[1:])
        np.testing.assert_allclose(got[0], want.astype("float64"), rtol=2e-5)


def test_no_dense_matrix_is_built():
    """K = 200 000, where K² numbers are 160 GB: products and solves take a few vectors."""
    z = jax.ShapeDtypeStruct((200_000,), jnp.float32)

    def work(z, v):
        h = logits_hessian(losses.brier_loss, z, v)
        return h.mv(v), h.solve(v, 0.5), h.logdet(0.5), h.trace()

    memory = jax.jit(work).lower(z, z).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 20 * 4 * 200_000
