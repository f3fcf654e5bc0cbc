"""Global arrays on a mesh of axes of type Explicit, batch and classes split: value and gradient as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.helpers import DERIVATIVE_RTOL, assert_close

pytestmark = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no axes of type Explicit")

B, K = 4, 8
_rng = np.random.default_rng(17)
Z, V = (_rng.normal(size=(B, K)).astype(np.float32) for _ in range(2))
Y = np.exp(V) / np.exp(V).sum(-1, keepdims=True)
LABELS = np.array([3, 0, 7, 4], np.int32)
WEIGHTS = (_rng.random(K) + 0.5).astype(np.float32)

ce = js.softmax_cross_entropy_with_integer_labels
J = js.SoftmaxJacobian.from_logits

CASES = {
    "softmax": (js.softmax, Z),
    "log_softmax": (js.log_softmax, Z),
    "labels": (lambda z: ce(z, LABELS), Z),
    "options": (
        lambda z, w: ce(z, LABELS, label_smoothing=0.1, class_weights=w, ignore_index=4, z_loss=0.1),
        Z,
        WEIGHTS,
    ),
    "soft": (js.softmax_cross_entropy, Z, Y),
    "focal": (lambda z: js.focal_loss_with_integer_labels(z, LABELS), Z),
    "divergence": (js.softmax_kl_divergence, Z, V),
    "logistic": (js.sigmoid_binary_cross_entropy, Z, Y),
    "sigmoid_focal": (lambda z, y: js.sigmoid_focal_loss(z, y, 0.3, 1.5), Z, Y),
    "huber": (js.huber_loss, Z, V),
    "sparsemax": (js.sparsemax, Z),
    "entmax_loss": (lambda z: js.entmax_loss(z, LABELS), Z),
    "jacobian": (js.softmax_jacobian, Z),
    "mv": (lambda z, v: J(z).mv(v), Z, V),
    "solve": (lambda z, v: J(z).solve(v, 0.1), Z, V),
    "spectral_norm": (lambda z: J(z).spectral_norm(), Z),
    "eigvalsh": (lambda z: J(z).eigvalsh(), Z),
    "hessian": (lambda z, v: js.logits_hessian(ce, z, LABELS, logit_softcap=3.0).solve(v, 0.1), Z, V),
}


def value_and_gradient(fn):
    def total(*args):
        out = fn(*args)
        return jnp.sum(out * out), out

    return jax.jit(lambda *args: jax.grad(total, tuple(range(len(args))), has_aux=True)(*args))


@pytest.mark.parametrize("split", ["batch", "both"])
@pytest.mark.parametrize("name", CASES)
def test_as_on_one_device(name, split):
    fn, *args = CASES[name]
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("batch", "classes"), devices=jax.devices()[:4], axis_types=explicit)
    classes = "classes" if split == "both" else None

    def place(x):
        spec = jax.sharding.PartitionSpec("batch", classes) if x.ndim == 2 else jax.sharding.PartitionSpec(classes)
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        got = value_and_gradient(fn)(*map(place, args))
    assert_close(got, value_and_gradient(fn)(*map(jnp.asarray, args)), 10 * DERIVATIVE_RTOL["float32"])
