"""The functions whose accuracy is measured, with their exact formulas, and the same functions of other libraries."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax as js
from tests import references as exact

DAMPING, WEIGHTS = 0.125, np.array([0.5, 1.0, 2.0, 1.5, 0.75])


def computed_in(dtype) -> np.finfo:
    """float64 or float32, in which half precision is computed."""
    return np.finfo(np.float64 if dtype == np.float64 else np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A public function of logits (N, K) and more arguments, and its formula.

    Args:
      call: (logits, *args) -> values (N,), (N, K) or (N, K, K).
      formula: of tests/references.py, (z, n, *args) -> a number or a list.
      args: what the other arguments are: "label", "soft" labels, other "logits", "log" probabilities or a "vector".
      order: of the highest derivative that is measured.
      product: linear in its vectors, and measured in |J||v|.
      absolute: whether a constant added to the logits changes it.
      elementwise: of each logit alone.
      many: whether it is measured for many classes, too.
      loss: whether half precision gives float32.
      support: whether it divides by p, or takes its root or logarithm, where a p that flushes counts as 0: such slices
        have another answer.
      logarithms: whether the logits are logarithms of probabilities.
      terms: formulas that add up to this one, where they cancel: their sizes add up.
      peers: the same from other libraries.
    """

    call: Callable
    formula: Callable
    args: tuple[str, ...] = ()
    order: int = 2
    product: bool = False
    absolute: bool = False
    elementwise: bool = False
    many: bool = True
    loss: bool = True
    support: bool = False
    logarithms: bool = False
    terms: tuple[Callable, ...] = ()
    peers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


def on_operator(method: str, *options) -> Callable:
    """A method of the operator at the logits; its vectors come after the logits."""
    return lambda z, *args: getattr(js.SoftmaxJacobian.from_logits(z), method)(*args, *options)


def with_options(z, c):
    weights = jnp.asarray(np.resize(WEIGHTS, z.shape[-1]), computed_in(z.dtype).dtype)
    return js.softmax_cross_entropy_with_integer_labels(z, c, label_smoothing=0.125, class_weights=weights, z_loss=0.25)


def exact_with_options(z, n, c):
    return exact.label_loss_with_options(z, n, c, 0.125, np.resize(WEIGHTS, len(z)).tolist(), 0.25)


def nn_label_loss(z, c):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), c[..., None], -1)[..., 0]


def nn_soft_loss(z, y):
    return -jnp.sum(y * jax.nn.log_softmax(z), -1)


def bind(f: Callable, *options) -> Callable:
    """`f` with these arguments after its own."""
    return lambda *args: f(*args, *options)


Map = functools.partial(Function, loss=False)
Product = functools.partial(Function, product=True, order=0, many=False, loss=False)
Scalar = functools.partial(Function, order=1, many=False, loss=False)
Elementwise = functools.partial(Function, elementwise=True, absolute=True, many=False)

FUNCTIONS: dict[str, Function] = {
    "softmax": Map(js.softmax, exact.softmax, peers={"jax.nn": jax.nn.softmax}),
    "log_softmax": Map(js.log_softmax, exact.log_softmax, peers={"jax.nn": jax.nn.log_softmax}),
    "logsumexp": Map(
        lambda z: js.logsumexp(z, -1),
        exact.logsumexp,
        absolute=True,
        peers={"jax.nn": lambda z: jax.nn.logsumexp(z, -1)},
    ),
    "sparsemax": Map(js.sparsemax, lambda z, n: exact.entmax(z, n, 1), order=1, many=False),
    "entmax15": Map(js.entmax15, lambda z, n: exact.entmax(z, n, 2), many=False),
    "entmax(1.25)": Map(lambda z: js.entmax(z, 1.25), lambda z, n: exact.entmax(z, n, 4), many=False),
    "softmax_jvp": Product(lambda z, v: js.softmax_jvp(v, js.softmax(z)), exact.jacobian_product, ("vector",)),
    "softmax_vjp": Product(lambda z, v: js.softmax_vjp(v, js.softmax(z)), exact.jacobian_product, ("vector",)),
    "softmax_jacobian": Scalar(js.softmax_jacobian, exact.dense_jacobian, order=0),
    "second_derivative": Product(
        lambda z, u, v: js.softmax_second_derivative(u, v, js.softmax(z)),
        exact.second_derivative,
        ("vector", "vector"),
    ),
    "third_derivative": Product(
        lambda z, u, v, w: js.softmax_third_derivative(u, v, w, js.softmax(z)),
        exact.third_derivative,
        ("vector", "vector", "vector"),
    ),
    "J.mv": Product(on_operator("mv"), exact.jacobian_product, ("vector",)),
    "J.solve": Product(on_operator("solve", DAMPING), bind(exact.solve, DAMPING), ("vector",)),
    "J.pinv_mv": Product(on_operator("pinv_mv"), exact.pinv_product, ("vector",), support=True),
    "J.factor_mv": Product(on_operator("factor_mv"), exact.factor_product, ("vector",), support=True),
    "J.factor_rmv": Product(on_operator("factor_rmv"), exact.factor_transposed_product, ("vector",), support=True),
    "J.quadratic_form": Scalar(on_operator("quadratic_form"), exact.quadratic_form, ("vector",)),
    "J.trace": Scalar(on_operator("trace"), exact.trace),
    "J.frobenius_norm": Scalar(on_operator("frobenius_norm"), exact.frobenius_norm),
    "J.spectral_norm": Scalar(on_operator("spectral_norm"), exact.spectral_norm, order=0),
    "J.logdet": Scalar(on_operator("logdet", DAMPING), bind(exact.logdet, DAMPING)),
    "J.pseudo_logdet": Scalar(on_operator("pseudo_logdet"), exact.pseudo_logdet, support=True),
    "label_cross_entropy": Function(
        js.softmax_cross_entropy_with_integer_labels,
        exact.label_loss,
        ("label",),
        peers={"jax.nn": nn_label_loss, "optax": optax.losses.softmax_cross_entropy_with_integer_labels},
    ),
    "label_cross_entropy(options)": Function(with_options, exact_with_options, ("label",), absolute=True, many=False),
    "cross_entropy": Function(
        js.softmax_cross_entropy,
        exact.soft_label_loss,
        ("soft",),
        peers={"jax.nn": nn_soft_loss, "optax": optax.losses.softmax_cross_entropy},
    ),
    "safe_cross_entropy": Function(
        js.safe_softmax_cross_entropy,
        exact.soft_label_loss,
        ("soft",),
        many=False,
        peers={"optax": optax.losses.safe_softmax_cross_entropy},
    ),
    "focal": Function(bind(js.focal_loss_with_integer_labels, 2.0), bind(exact.focal, 2), ("label",)),
    "poly": Function(
        bind(js.poly_loss_cross_entropy, 2.0),
        lambda z, n, y: exact.soft_label_loss(z, n, y) + 2 * exact.missed(z, n, y),
        ("soft",),
        terms=(exact.soft_label_loss, lambda z, n, y: 2 * exact.missed(z, n, y)),
        peers={"optax": functools.partial(optax.losses.poly_loss_cross_entropy, epsilon=2.0)},
    ),
    "natural_gradient_norm": Function(
        js.natural_gradient_norm, exact.natural_gradient_norm, ("label",), many=False, support=True
    ),
    "softmax_kl": Function(js.softmax_kl_divergence, exact.kl, ("logits",)),
    "jensen_shannon": Function(js.jensen_shannon_divergence, exact.jensen_shannon, ("logits",)),
    "entropy": Function(js.softmax_entropy, exact.entropy),
    "brier": Function(js.brier_loss, exact.brier, ("soft",)),
    "entmax_loss": Function(js.entmax_loss, bind(exact.entmax_loss, 2), ("label",), many=False),
    "multiclass_sparsemax_loss": Function(
        js.multiclass_sparsemax_loss,
        bind(exact.entmax_loss, 1),
        ("label",),
        many=False,
        peers={"optax": optax.losses.multiclass_sparsemax_loss},
    ),
    "kl_divergence": Function(
        js.kl_divergence,
        exact.log_kl,
        ("soft",),
        absolute=True,
        logarithms=True,
        peers={"optax": optax.losses.kl_divergence},
    ),
    "kl_with_log_targets": Function(
        js.kl_divergence_with_log_targets,
        exact.log_targets_kl,
        ("log",),
        absolute=True,
        logarithms=True,
        peers={"optax": optax.losses.kl_divergence_with_log_targets},
    ),
    "generalized_kl": Function(
        js.generalized_kl_divergence, exact.generalized_kl, ("soft",), absolute=True, logarithms=True
    ),
    "sum_squared_error": Function(js.sum_squared_error, exact.sum_squared_error, ("logits",), absolute=True),
    "binary_cross_entropy": Elementwise(
        js.sigmoid_binary_cross_entropy,
        exact.logistic,
        ("soft",),
        peers={"optax": optax.losses.sigmoid_binary_cross_entropy},
    ),
    "sigmoid_focal": Elementwise(
        bind(js.sigmoid_focal_loss, None, 2.0),
        bind(exact.sigmoid_focal, 2),
        ("soft",),
        peers={"optax": functools.partial(optax.losses.sigmoid_focal_loss, gamma=2.0)},
    ),
    "sparsemax_loss": Elementwise(js.sparsemax_loss, exact.sparse_logistic, ("soft",)),
    "squared_error": Elementwise(
        js.squared_error, exact.squared_error, ("logits",), peers={"optax": optax.losses.squared_error}
    ),
    "l2_loss": Elementwise(js.l2_loss, exact.l2_loss, ("logits",), peers={"optax": optax.losses.l2_loss}),
    "huber_loss": Elementwise(js.huber_loss, exact.huber, ("logits",), peers={"optax": optax.losses.huber_loss}),
    "log_cosh": Elementwise(js.log_cosh, exact.log_cosh, ("logits",), peers={"optax": optax.losses.log_cosh}),
    "softcap_logits": Elementwise(bind(js.softcap_logits, 30.0), bind(exact.softcap, 30), loss=False),
}
