"""The registry of public differentiable functions, and the one tolerance table.

Every test by transformation runs over `CASES`, so a function entered here inherits them all. A case holds a function of
its differentiable arguments alone, and sample arguments as float64 numpy arrays with a leading batch axis of length 3,
along which the function works example by example unless `batched` is False. A function with `kinks` is only piecewise
smooth; the samples lie away from its kinks.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as js

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:  # JAX 0.6.0
    from jax.experimental.shard_map import shard_map as shard_map

# Relative tolerance per dtype: of a value, and of a derivative (one more rounding, one more sum).
VALUE_RTOL = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
DERIVATIVE_RTOL = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3.2e-2}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One function of the registry with sample arguments."""

    name: str
    fn: Callable
    args: tuple[np.ndarray, ...]
    batched: bool = True
    is_loss: bool = False
    kinks: bool = False

    def cast(self, dtype) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(a, dtype) for a in self.args)


BATCH, K = 3, 4
_rng = np.random.default_rng(7)
Z = _rng.normal(size=(BATCH, K)) * 1.5
Z[0, 1] += 6.0  # one example that is sure of itself
V = _rng.normal(size=(BATCH, K))
P = np.exp(Z) / np.exp(Z).sum(-1, keepdims=True)
Y = np.exp(V) / np.exp(V).sum(-1, keepdims=True)
LABELS = np.array([1, 3, 0], np.int32)
MASK = np.array([[True, True, False, True], [True, True, True, True], [True, False, False, True]])
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5])


ce = js.softmax_cross_entropy_with_integer_labels

CASES = [
    Case("softmax", js.softmax, (Z,)),
    Case("softmax_where", lambda z: js.softmax(z, where=MASK), (Z,), batched=False),
    Case("softmax_axis0", lambda z: js.softmax(z, axis=0), (Z,), batched=False),
    Case("softmax_axis_none", lambda z: js.softmax(z, axis=None), (Z,), batched=False),
    Case("log_softmax", js.log_softmax, (Z,)),
    Case("log_softmax_axes", lambda z: js.log_softmax(z, axis=(0, 1)), (Z,), batched=False),
    Case("log_softmax_where", lambda z: jnp.where(MASK, js.log_softmax(z, where=MASK), 0.0), (Z,), batched=False),
    Case("logsumexp", lambda z: js.logsumexp(z, -1), (Z,)),
    Case("logsumexp_all", lambda z: js.logsumexp(z, keepdims=True), (Z,), batched=False),
    Case("logsumexp_b", lambda z, b: js.logsumexp(z, -1, b=b, return_sign=True)[0], (Z, V)),
    Case("logsumexp_where", lambda z: js.logsumexp(z, -1, where=MASK), (Z,), batched=False),
    Case("cross_entropy", js.softmax_cross_entropy, (Z, Y), is_loss=True),
    Case(
        "cross_entropy_where",
        lambda z: js.softmax_cross_entropy(z, jnp.where(MASK, jnp.asarray(Y, jnp.float32), 0.0), where=MASK),
        (Z,),
        batched=False,
        is_loss=True,
    ),
    Case("safe_cross_entropy", js.safe_softmax_cross_entropy, (Z, Y), is_loss=True),
    Case("label_cross_entropy", lambda z: ce(z, LABELS), (Z,), batched=False, is_loss=True),
    Case(
        "label_cross_entropy_axis0",
        lambda z: ce(z, np.array([0, 2, 1, 1], np.int32), axis=0),
        (Z,),
        batched=False,
        is_loss=True,
    ),
    Case(
        "label_cross_entropy_options",
        lambda z, w: ce(z, LABELS, label_smoothing=0.1, class_weights=w, ignore_index=3, z_loss=0.01),
        (Z, WEIGHTS),
        batched=False,
        is_loss=True,
    ),
    Case("sparsemax", js.sparsemax, (Z,), kinks=True),
    Case("entmax15", js.entmax15, (Z,), kinks=True),
    Case("entmax", js.entmax, (Z, np.array([1.2, 1.5, 1.8])), kinks=True),
    Case("softmax_vjp", js.softmax_vjp, (V, P)),
    Case("softmax_jvp", js.softmax_jvp, (V, P)),
    Case("softmax_jacobian", js.softmax_jacobian, (Z,)),
    Case("softmax_hessian", js.softmax_hessian, (Z,)),
    Case("softmax_second_derivative", js.softmax_second_derivative, (V, Y, P)),
    Case("softmax_third_derivative", lambda u, v, p: js.softmax_third_derivative(u, v, v, p), (V, Y, P)),
    Case("sigmoid_binary_cross_entropy", js.sigmoid_binary_cross_entropy, (Z, Y), is_loss=True),
    Case("sigmoid_focal_loss", js.sigmoid_focal_loss, (Z, Y), is_loss=True),
    Case("focal_loss", lambda z: js.focal_loss_with_integer_labels(z, LABELS, 2.0), (Z,), batched=False, is_loss=True),
    Case("poly_loss", js.poly_loss_cross_entropy, (Z, Y), is_loss=True),
    Case("kl_divergence", js.kl_divergence, (np.log(P), Y), is_loss=True),
    Case("kl_divergence_with_log_targets", js.kl_divergence_with_log_targets, (np.log(P), np.log(Y)), is_loss=True),
    Case("convex_kl_divergence", js.convex_kl_divergence, (np.log(P), Y), is_loss=True),
    Case("softmax_kl_divergence", js.softmax_kl_divergence, (Z, V), is_loss=True),
    Case("jensen_shannon_divergence", js.jensen_shannon_divergence, (Z, V), is_loss=True),
    Case("softmax_entropy", js.softmax_entropy, (Z,), is_loss=True),
    Case("brier_loss", js.brier_loss, (Z, Y), is_loss=True),
    Case("sparsemax_loss", js.sparsemax_loss, (Z, Y), is_loss=True, kinks=True),
    Case("entmax_loss", js.entmax_loss, (Z, Y), is_loss=True, kinks=True),
    Case("huber_loss", js.huber_loss, (Z, V), is_loss=True, kinks=True),
    Case("log_cosh", js.log_cosh, (Z, V), is_loss=True),
    Case("squared_error", js.squared_error, (Z, V), is_loss=True),
    Case("l2_loss", js.l2_loss, (Z, V), is_loss=True),
    Case("sum_squared_error", js.sum_squared_error, (Z, V), is_loss=True),
]


def case_id(case: Case) -> str:
    return case.name


def assert_close(got, want, rtol: float, scale=None) -> None:
    """|got - want| ≤ rtol · max|want| per leaf; shapes equal, NaN nowhere."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        bound = rtol * max(np.max(np.abs(b), initial=0.0) if scale is None else scale, np.finfo(np.float64).tiny)
        assert np.all(np.abs(a - b) <= bound), f"off by {np.max(np.abs(a - b))}, allowed {bound}"


def ulp(x: float, dtype) -> float:
    """Distance from |x| to the next number of that dtype."""
    info = jnp.finfo(dtype)
    return max(2.0 ** math.floor(math.log2(abs(x) or float(info.tiny))), float(info.tiny)) * float(info.eps)
