"""Products with the curvature of a network against kfac_jax's, which reads the loss from a tag in the function.

kfac_jax follows JAX late: 0.0.8 imports and runs with JAX 0.6, so nothing here depends on it.
`pip install kfac-jax tfp-nightly && pytest -m slow tests/curvature/test_kfac_jax.py`
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import curvature
from tests.helpers import assert_close

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
N, K = 6, 4
RNG = np.random.default_rng(0)
PARAMS = {"w": 0.5 * RNG.normal(size=(3, 5)), "out": 0.5 * RNG.normal(size=(5, K))}
V = {name: RNG.normal(size=p.shape) for name, p in PARAMS.items()}
X, LABELS, ON = RNG.normal(size=(N, 3)), RNG.integers(0, K, N), RNG.integers(0, 2, (N, K)) * 1.0

# A head, its labels, and the name under which kfac_jax knows it.
HEADS = {
    "categorical": (js.softmax_cross_entropy_with_integer_labels, LABELS, "categorical_predictive_distribution"),
    "bernoulli": (js.sigmoid_binary_cross_entropy, ON, "multi_bernoulli_predictive_distribution"),
    "normal": (js.l2_loss, ON, "normal_predictive_distribution"),
}


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["out"]


@pytest.mark.parametrize("name", HEADS)
def test_products_are_theirs(name, x64):
    if jax.__version_info__ > (0, 7):
        pytest.skip("kfac_jax 0.0.8 does not run with this JAX")
    kfac_jax = pytest.importorskip("kfac_jax")
    loss, labels, register = HEADS[name]

    def tagged(params, batch):
        z = network(params, batch[0])
        options = {"variance": 1.0} if name == "normal" else {}
        getattr(kfac_jax, f"register_{register}")(z, batch[1], **options)
        return jnp.sum(loss(z, batch[1])) / N

    params, v, x, labels = jax.tree.map(jnp.asarray, (PARAMS, V, X, labels))
    theirs = kfac_jax.ImplicitExactCurvature(tagged)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        multiply = theirs.multiply_hessian, theirs.multiply_ggn, theirs.multiply_fisher
        wanted = [product((params, (x, labels)), v) for product in multiply]
    got = [f(network, loss, params, x, labels, v) for f in (curvature.hvp, curvature.ggn_vp, curvature.fisher_vp)]
    size = labels.size / N  # a mean over all values of a loss per logit; theirs is a sum over the logits
    assert_close(jax.tree.map(lambda g: size * g, got), wanted, rtol=1e-12)
