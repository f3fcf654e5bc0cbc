"""The report and the pictures of the Jacobian."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import verify
from tests.helpers import one_in

LOGITS = {
    "four classes": [2.0, 1.0, 0.5, -0.5],
    "two equal": [0.0, 0.0],
    "one class": [3.0],
    "ties": [1.0, 1.0, 1.0, 0.0],
    "sure": [12.0, 0.0, 1.0],
}


@pytest.mark.parametrize("alpha", one_in(2, [1.0, 1.5, 2.0]))
@pytest.mark.parametrize("name", one_in(3, LOGITS))
def test_every_property_holds(name, alpha):
    report = js.verify_jacobian_properties(jnp.array(LOGITS[name]), alpha=alpha)
    assert report.ok, f"\n{report}"


def test_batch_and_float64(x64):
    z = np.random.default_rng(0).normal(size=(3, 5))
    report = js.verify_jacobian_properties(z)
    assert report.ok and report.eigenvalues.shape == (3, 5)
    assert next(p for p in report.properties if p.name == "jacrev").measured < 1e-15


def test_the_sharp_bound_is_reached():
    """1/2 at p = (1/2, 1/2), above the 1/4 that bounds the diagonal."""
    report = js.verify_jacobian_properties(jnp.zeros(2))
    found = {p.name: p for p in report.properties}
    assert found["largest eigenvalue"].measured == pytest.approx(0.5, rel=1e-6)
    assert found["diagonal bound"].measured == pytest.approx(0.25, rel=1e-6)
    assert "1/4 bounds the diagonal" in str(report)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9])
@pytest.mark.parametrize("num_classes", [2, 5, 300])
def test_the_bound_of_entmax_is_sharp(alpha, num_classes):
    """Reached at two equal classes or at one large and the rest equal, and passed nowhere nearby or at random."""
    bound = verify.largest_eigenvalue_bound(alpha, num_classes)
    large = 1 / (1 + (num_classes - 1) ** (-(alpha - 1) / (3 - alpha)))
    pair = np.zeros(num_classes)
    pair[:2] = 0.5
    single = np.full(num_classes, (1 - large) / (num_classes - 1))
    single[0] = large
    norm = lambda p: float(js.SoftmaxJacobian.from_probs(jnp.asarray(p, jnp.float32), alpha=alpha).spectral_norm())
    assert max(norm(pair), norm(single)) == pytest.approx(bound, rel=1e-5)
    rng = np.random.default_rng(0)
    random = [rng.dirichlet(np.full(num_classes, c)) for c in (0.05, 0.3, 1.0, 5.0)]
    near = [p * np.exp(0.1 * rng.normal(size=num_classes)) for p in (pair, single)]
    assert all(norm(p / p.sum()) <= bound * (1 + 1e-6) for p in [*random, *near])


@pytest.mark.parametrize("alpha", one_in(2, [2.5, 3.0, 4.0], 1))
def test_beyond_sparsemax_there_is_no_bound(alpha):
    """At uniform p, λ₁ = K^(α-2); the report holds there, and near a class that is about to leave the support."""
    assert verify.largest_eigenvalue_bound(alpha, 3) == np.inf
    report = js.verify_jacobian_properties(jnp.zeros(3), alpha=alpha)
    assert report.ok, f"\n{report}"
    assert report.eigenvalues[0] == pytest.approx(3 ** (alpha - 2), rel=1e-5)
    report = js.verify_jacobian_properties(jnp.array([[0.3, 0.1, -0.05], [0.0, 2.0, -1.0]]), alpha=alpha)
    assert report.ok, f"\n{report}"


def test_a_wrong_jacobian_is_found_out(monkeypatch):
    """With a diagonal off by 0.01 the report fails, and names what is wrong."""

    class Wrong:
        def __init__(self, right):
            self.right = right

        @classmethod
        def from_probs(cls, p, alpha):
            return cls(js.SoftmaxJacobian.from_probs(p, alpha))

        def __getattr__(self, name):
            return getattr(self.right, name)

        def as_matrix(self):
            return self.right.as_matrix() + 0.01 * jnp.eye(4)

    monkeypatch.setattr(verify.properties, "SoftmaxJacobian", Wrong)
    report = js.verify_jacobian_properties(jnp.array(LOGITS["four classes"]))
    failing = {p.name for p in report.properties if not p.holds}
    assert {"row sums", "column sums", "diagonal", "jacfwd", "jacrev", "spectrum"} <= failing
    assert not report.ok and "FAILS" in str(report)


def test_pictures():
    names = ["cat", "dog", "eel", "fox", "gnu"]
    z = jnp.array([2.0, 1.0, 0.5, -0.5, 0.0])
    figure = js.visualize_jacobian(z, class_names=names)
    heat, diagonal, bars = figure.axes[:3]
    image = heat.images[0]
    assert image.norm.vmin == -image.norm.vmax
    np.testing.assert_allclose(image.get_array(), js.softmax_jacobian(z), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose([b.get_height() for b in bars.patches], js.softmax(z), rtol=1e-6)
    assert [t.get_text() for t in diagonal.get_xticklabels()] == names
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (heat, diagonal, bars))
    picture = js.visualize_spectrum(z).axes[0]
    points = picture.lines[0].get_ydata()
    zero, *values = js.SoftmaxJacobian.from_logits(z).eigvalsh()  # the picture counts the zeros in its title
    np.testing.assert_allclose(np.sort(points), values, rtol=1e-5)
    assert zero == 0 and "one eigenvalue 0" in picture.get_title()
