"""What an error says beside the argument's name: the value, and what would mend it. One row for each text.

That every argument of every function is refused by name is in test_wrong_calls.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax.operators import SoftmaxJacobian
from tests.wrong_calls import LABELS, K, N, P, V, Z

ce = js.softmax_cross_entropy_with_integer_labels
linear = js.linear_head.linear_softmax_cross_entropy_loss
capped = lambda c: js.dot_product_attention(*[jnp.ones((2, 1, 4))] * 3, logit_softcap=c)
J = SoftmaxJacobian.from_probs(P[0])
INDICES = np.ones((N, K), int)  # of a dtype that class indices have, too

# fmt: off
ROWS = [
    (lambda: js.softmax("abc"), TypeError, "x must be an array or a nested sequence of numbers, got str"),
    (lambda: js.softmax(1j * Z), TypeError, "x must be real, got dtype complex.*; take its real part"),
    (lambda: js.softmax(np.float32(1.0)), ValueError, "axis=-1 needs an array with at least one axis"),
    (lambda: js.softmax(Z, axis=2), ValueError, "axis=2 is out of range for 2 axes"),
    (lambda: js.softmax(Z, axis=0.5), TypeError, "axis must be an integer, got 0.5"),
    (lambda: js.softmax(Z, axis=(1, -1)), ValueError, "names an axis twice"),
    (lambda: js.softmax(Z, where=V), TypeError, "where must be boolean, got dtype float32; compare it with 0"),
    (lambda: js.softmax(Z, where=V[0, 1:] > 0), ValueError, r"where has shape \(2,\).*\(2, 3\)"),
    (lambda: jax.jit(lambda z: js.entmax(z, 0.5))(Z), ValueError, "alpha must be finite and at least 1 .*, got 0.5"),
    # Heads.
    (lambda: ce(INDICES, LABELS), TypeError, r"logits must have a floating-point dtype, got int.*astype\(float\)"),
    (lambda: ce(Z, V[:, 0]), TypeError, "labels must have an integer dtype"),
    (lambda: ce(Z, INDICES[0]), ValueError, r"labels has shape \(3,\)"),
    (lambda: ce(Z, LABELS, where=np.ones(4, bool)), ValueError, r"where has shape \(4,\).*\(2, 3\)"),
    (lambda: ce(Z, LABELS, label_smoothing=1.5), ValueError, "label_smoothing must lie in"),
    (lambda: ce(Z, LABELS, class_weights=V[0, 1:]), ValueError, "class_weights must have"),
    (lambda: ce(Z, LABELS, ignore_index=1.5), TypeError, "ignore_index must be an integer"),
    (lambda: ce(Z, LABELS, z_loss="x"), TypeError, "z_loss must be a real number"),
    (lambda: js.softmax_cross_entropy(Z, 1j * P), TypeError, "labels must be real"),
    (lambda: js.softmax_cross_entropy(Z, V[0, 1:]), ValueError, r"labels has shape \(2,\)"),
    (lambda: js.squared_error(V[0], V[0, 1:]), ValueError, r"targets must have the shape of predictions, .*got \(2,\)"),
    (lambda: js.softmax_kl_divergence(Z, LABELS), TypeError, "target_logits .*; class indices go to softmax_cross"),
    (lambda: linear(Z, P, np.eye(K, dtype="float32")), TypeError, "got float32; one-hot labels go as jnp.argmax"),
    (lambda: jax.jit(capped)(2.0), TypeError, "logit_softcap must be a number, got a traced array: .* static"),
    # Curvature of the heads.
    (lambda: js.logits_hessian(jnp.mean, Z), TypeError, r"must be a head .*\(brier_loss, .*_error\).*got mean"),
    (lambda: js.logits_ggn(3, Z), TypeError, "got 3"),
    (lambda: js.logits_fisher(js.brier_loss, Z, Z), TypeError, "loss must be a likelihood .* got brier_loss"),
    (lambda: js.logits_hessian(ce, Z.T, LABELS, axis=0), ValueError, "axis must be the last"),
    (lambda: js.logits_hessian(js.l2_loss, Z[0, 0]), ValueError, r"logits must have a last axis .* got shape \(\)"),
    (lambda: js.logits_hessian(ce, Z, LABELS, logit_softcap=0.0), ValueError, "logit_softcap must be larger than 0"),
    (lambda: js.logits_hessian(ce, Z, LABELS, logit_softcap=2.0).factor_mv(Z), TypeError, "capped logits has no"),
    # Products and the operator.
    (lambda: js.softmax_jvp(P[0, 1:], P[0]), ValueError, "t must have the shape of p"),
    (lambda: js.softmax_jvp(P, INDICES), TypeError, "p must have a floating-point dtype"),
    (lambda: SoftmaxJacobian.from_probs(P[0, 1:]), ValueError, "p must sum to 1"),
    (lambda: SoftmaxJacobian.from_probs(np.array([1.2, -0.2])), ValueError, "p must not be negative"),
    (lambda: SoftmaxJacobian.from_probs(np.float32(1)), ValueError, "p must have a last axis"),
    (lambda: SoftmaxJacobian.from_probs(P).mv(np.ones((3, 3))), ValueError, "v has batch axes"),
    (lambda: J.mv(np.ones(4)), ValueError, "v must have 3 entries"),
    (lambda: J.mv(1.0), ValueError, "v must have 3 entries"),
    (lambda: J @ np.ones((2, 3)), ValueError, "factor of @ must have 3 rows"),
    (lambda: J.solve(V[0], -1.0), ValueError, "damping must lie in"),
    (lambda: J.solve(V[0], np.nan), ValueError, "damping must lie in"),
    (lambda: J.solve(V[0], np.ones(2)), ValueError, "damping has shape"),
    (lambda: J.solve(V[0], 0.0), ValueError, "damping must be positive, .*pinv_mv"),
    (lambda: J.logdet(0), ValueError, "damping must be positive, .*pseudo_logdet"),
    (lambda: J.sample_inverse(jax.random.key(0), 0.0), ValueError, "damping must be positive, .*sample_pinv"),
    (lambda: J.scaled(np.ones(2)), ValueError, "weight has shape"),
]
# fmt: on


@pytest.mark.parametrize("call, error, words", ROWS, ids=lambda x: x if isinstance(x, str) else "")
def test_message(call, error, words):
    with pytest.raises(error, match=words):
        call()


# The other head's labels, and another axis: the message says which.


@pytest.mark.parametrize("loss", [ce, js.focal_loss_with_integer_labels, js.multiclass_sparsemax_loss])
@pytest.mark.parametrize("labels", [P, INDICES])
def test_weights_of_classes_for_a_head_of_indices(loss, labels):
    words = r"labels .*\(2, 3\) .* axis 1; .*softmax_cross_entropy, .*argmax"
    with pytest.raises((TypeError, ValueError), match=words):
        loss(jnp.asarray(Z), labels)


@pytest.mark.parametrize("loss", [js.softmax_cross_entropy, js.poly_loss_cross_entropy, js.brier_loss])
@pytest.mark.parametrize("size", [N, K])
def test_indices_for_a_head_of_weights(loss, size):
    """Also where as many examples as classes let them broadcast."""
    with pytest.raises(TypeError, match=rf"labels .*int.*\({size}, 3\) .* axis 1; .*_with_integer_labels, .*one_hot"):
        loss(jnp.zeros((size, K)), np.zeros(size, int))


def test_labels_along_another_axis():
    with pytest.raises(ValueError, match=r"shape \(2,\), and class indices need \(3,\) beside .*\(2, 3\) .* axis 0"):
        ce(jnp.asarray(Z), LABELS, axis=0)
