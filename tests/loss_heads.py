"""Every loss head with sample arguments and its formulas in plain numpy: the registry of the contract test.

The formulas are the textbook's, per example, class axis last: `value` and `gradient` take logits and the arguments as
numpy arrays, longdouble where digits count. They share nothing with the package.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxsoftmax import losses

B, K = 3, 4
_rng = np.random.default_rng(5)
Z = _rng.normal(size=(B, K)) * 1.5
X = _rng.normal(size=(B, K)) * 1.5  # other logits
Y = _rng.dirichlet(np.ones(K), size=B)
LABELS = np.array([1, 3, 0])
MASK = np.array([[True, True, False, True], [True, True, True, True], [True, False, False, True]])
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5])


@dataclasses.dataclass(frozen=True)
class Head:
    """One head.

    Args:
      loss: the public function.
      value, gradient: its formulas, (z, *args, **options) -> numpy arrays; of one class vector, or element by element.
      args: sample arguments after the logits.
      options: sets of options to go through; the first is used where one is enough.
      per_class: whether the loss sums over classes, so that `axis` and `where` mean something.
      has_axis, has_where: whether it takes them.
      at_minimum: (z) -> (target, the smallest loss), the argument for which the logits z are optimal.
    """

    loss: Callable
    value: Callable
    gradient: Callable
    args: tuple[np.ndarray, ...] = ()
    options: tuple[Mapping[str, Any], ...] = ({},)
    per_class: bool = True
    has_axis: bool = True
    has_where: bool = True
    at_minimum: Callable | None = None

    @property
    def name(self) -> str:
        return self.loss.__name__

    def example(self, args, i: int) -> tuple:
        """The arguments of example i."""
        return tuple(a[i] for a in args)

    def values(self, z, args, options) -> np.ndarray:
        if not self.per_class:
            return self.value(z, *args, **options)
        return np.array([self.value(z[i], *self.example(args, i), **options) for i in range(len(z))])

    def gradients(self, z, args, options) -> np.ndarray:
        if not self.per_class:
            return self.gradient(z, *args, **options)
        return np.array([self.gradient(z[i], *self.example(args, i), **options) for i in range(len(z))])


def probabilities(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def lse(z):
    return z.max() + np.log(np.exp(z - z.max()).sum())


def one_hot(label, z):
    return (np.arange(len(z)) == label).astype(z.dtype)


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-abs(x)))


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


def xlogx(p):
    return p * np.log(np.where(p == 0, 1, p))


# Cross-entropy: L = Σ y (lse - z) + ζ lse².


def class_weights_of(z, label, label_smoothing=0.0, class_weights=None, ignore_index=None, z_loss=0.0):
    w = np.ones_like(z) if class_weights is None else np.asarray(class_weights, z.dtype)
    return (1 - label_smoothing) * w * one_hot(label, z) + label_smoothing * w / len(z)


def ce(z, label, **options):
    if label == options.get("ignore_index"):
        return z.dtype.type(0)
    y = class_weights_of(z, label, **options)
    return (y * (lse(z) - z)).sum() + options.get("z_loss", 0.0) * lse(z) ** 2


def ce_gradient(z, label, **options):
    if label == options.get("ignore_index"):
        return np.zeros_like(z)
    y = class_weights_of(z, label, **options)
    return (y.sum() + 2 * options.get("z_loss", 0.0) * lse(z)) * probabilities(z) - y


def soft_ce(z, y):
    return (y * (lse(z) - z)).sum()


def soft_ce_gradient(z, y):
    return y.sum() * probabilities(z) - y


# Functions f(L) of the cross-entropy: gradient f′(L) (p - e).


def focal(z, label, gamma=2.0):
    p = probabilities(z)[label]
    return (1 - p) ** gamma * ce(z, label)


def focal_gradient(z, label, gamma=2.0):
    p, loss = probabilities(z)[label], ce(z, label)
    slope = (1 - p) ** gamma + (gamma * (1 - p) ** (gamma - 1) * p * loss if gamma else 0)
    return slope * ce_gradient(z, label)


def poly(z, y, epsilon=2.0):
    return soft_ce(z, y) + epsilon * (y * (1 - probabilities(z))).sum()


def poly_gradient(z, y, epsilon=2.0):
    p = probabilities(z)
    return soft_ce_gradient(z, y) - epsilon * p * (y - (p * y).sum())


# Functions of p.


def both(x, z, temperature):
    """p, q, log p, log q."""
    logp, logq = x / temperature - lse(x / temperature), z / temperature - lse(z / temperature)
    return np.exp(logp), np.exp(logq), logp, logq


def kl(x, z, temperature=1.0):
    p, q, logp, logq = both(x, z, temperature)
    return (q * (logq - logp)).sum()


def kl_gradient(x, z, temperature=1.0):
    p, q, *_ = both(x, z, temperature)
    return (p - q) / temperature


def log_mean(logp, logq):
    return np.logaddexp(logp, logq) - np.log(logp.dtype.type(2))


def jensen_shannon(x, z, temperature=1.0):
    p, q, logp, logq = both(x, z, temperature)
    m = log_mean(logp, logq)
    return (p * (logp - m) + q * (logq - m)).sum() / 2


def jensen_shannon_gradient(x, z, temperature=1.0):
    p, q, logp, logq = both(x, z, temperature)
    a = (logp - log_mean(logp, logq)) / 2
    return p * (a - (p * a).sum()) / temperature


def entropy(z):
    return (probabilities(z) * (lse(z) - z)).sum()


def entropy_gradient(z):
    return -probabilities(z) * (z - (probabilities(z) * z).sum())


def brier(z, y):
    return ((probabilities(z) - y) ** 2).sum() / 2


def brier_gradient(z, y):
    p = probabilities(z)
    return p * ((p - y) - (p * (p - y)).sum())


# Divergences of log-probabilities.


def log_kl(logq, t):
    return (xlogx(t) - t * logq).sum()


def log_kl_gradient(logq, t):
    return -t


def log_targets_kl(logq, logt):
    return (np.exp(logt) * (logt - logq)).sum()


def log_targets_kl_gradient(logq, logt):
    return -np.exp(logt)


def generalized_kl(logq, t):
    return log_kl(logq, t) + (np.exp(logq) - t).sum()


def generalized_kl_gradient(logq, t):
    return np.exp(logq) - t


# α-entmax by bisection.


def entmax(z, alpha):
    z, b = z - z.max(), z.dtype.type(alpha - 1)
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if (np.maximum(b * z - middle, 0) ** (1 / b)).sum() < 1 else (middle, high)
    return np.maximum(b * z - high, 0) ** (1 / b)


def entmax_loss(z, label, alpha=1.5):
    p = entmax(z, alpha)
    tsallis = (p - p**alpha).sum() / (alpha * (alpha - 1))
    return (p * (z - z[label])).sum() + tsallis


def entmax_gradient(z, label, alpha=1.5):
    return entmax(z, alpha) - one_hot(label, z)


# Element by element.


def logistic(x, y, pos_weight=1.0):
    return pos_weight * y * softplus(-x) + (1 - y) * softplus(x)


def logistic_gradient(x, y, pos_weight=1.0):
    return (1 - y) * sigmoid(x) - pos_weight * y * sigmoid(-x)


def sigmoid_focal(x, y, alpha=None, gamma=2.0):
    u = (1 - y) * sigmoid(x) + y * sigmoid(-x)
    return (1 if alpha is None else alpha * y + (1 - alpha) * (1 - y)) * u**gamma * logistic(x, y)


def sigmoid_focal_gradient(x, y, alpha=None, gamma=2.0):
    u, du = (1 - y) * sigmoid(x) + y * sigmoid(-x), (1 - 2 * y) * sigmoid(x) * sigmoid(-x)
    balance = 1 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return balance * (gamma * u ** (gamma - 1) * du * logistic(x, y) + u**gamma * logistic_gradient(x, y))


def sparse_sigmoid(x):
    return np.clip((x + 1) / 2, 0, 1)


def sparse_logistic(x, y):
    s = sparse_sigmoid(x)
    return (s - y) ** 2 + abs(s - y) * np.maximum(abs(x) - 1, 0)


def huber(x, t, delta=1.0):
    e = abs(x - t)
    return np.where(e <= delta, e**2 / 2, delta * (e - delta / 2))


def log_cosh(x, t):
    e = abs(x - t)
    near = np.log1p(2 * np.sinh(np.minimum(e, 1) / 2) ** 2)
    return np.where(e < 1, near, e + np.log1p(np.exp(-2 * e)) - np.log(e.dtype.type(2)))


OPTIONS = {"label_smoothing": 0.1, "class_weights": WEIGHTS, "ignore_index": 3, "z_loss": 0.05}
SUBSETS = tuple({name: OPTIONS[name] for i, name in enumerate(OPTIONS) if n >> i & 1} for n in range(2 ** len(OPTIONS)))


def each(**values) -> tuple:
    """One set of options per value of the one keyword."""
    ((name, values),) = values.items()
    return tuple({name: value} for value in values)


def elementwise(loss, value, gradient, args=(X,), options=({},), at_minimum=None) -> Head:
    return Head(loss, value, gradient, args, options, False, False, False, at_minimum)


def on_classes(loss, value, gradient, args=(Y,), options=({},), at_minimum=None) -> Head:
    return Head(loss, value, gradient, args, options, at_minimum=at_minimum)


def without_axis(loss, value, gradient, args) -> Head:
    return Head(loss, value, gradient, args, has_axis=False, has_where=False)


TEMPERATURES = ({}, {"temperature": 2.5})
FOCAL = ({}, *({"alpha": alpha, "gamma": gamma} for alpha in (None, 0.3) for gamma in (0.0, 0.5, 1.0)))

HEADS = [
    on_classes(losses.softmax_cross_entropy_with_integer_labels, ce, ce_gradient, (LABELS,), SUBSETS),
    on_classes(
        losses.softmax_cross_entropy, soft_ce, soft_ce_gradient, at_minimum=lambda z: (probabilities(z), entropy(z))
    ),
    without_axis(losses.safe_softmax_cross_entropy, soft_ce, soft_ce_gradient, (Y,)),
    on_classes(
        losses.focal_loss_with_integer_labels, focal, focal_gradient, (LABELS,), each(gamma=(2.0, 0.0, 0.5, 1.0))
    ),
    on_classes(losses.poly_loss_cross_entropy, poly, poly_gradient, options=each(epsilon=(2.0, 0.0, -0.7))),
    on_classes(losses.softmax_kl_divergence, kl, kl_gradient, (X,), TEMPERATURES, lambda z: (z + 3, 0)),
    on_classes(
        losses.jensen_shannon_divergence,
        jensen_shannon,
        jensen_shannon_gradient,
        (X,),
        TEMPERATURES,
        lambda z: (z - 2, 0),
    ),
    on_classes(losses.softmax_entropy, entropy, entropy_gradient, ()),
    on_classes(losses.brier_loss, brier, brier_gradient, at_minimum=lambda z: (probabilities(z), 0)),
    on_classes(losses.kl_divergence, log_kl, log_kl_gradient),
    on_classes(losses.kl_divergence_with_log_targets, log_targets_kl, log_targets_kl_gradient, (X,)),
    on_classes(
        losses.generalized_kl_divergence,
        generalized_kl,
        generalized_kl_gradient,
        at_minimum=lambda z: (np.exp(z), 0),
    ),
    on_classes(
        losses.entmax_loss,
        entmax_loss,
        entmax_gradient,
        (LABELS,),
        each(alpha=(1.5, 1.2, 2.0)),
        lambda z: (entmax(z, 1.5), 0),
    ),
    without_axis(
        losses.multiclass_sparsemax_loss,
        lambda z, c: entmax_loss(z, c, 2.0),
        lambda z, c: entmax_gradient(z, c, 2.0),
        (LABELS,),
    ),
    elementwise(
        losses.sigmoid_binary_cross_entropy,
        logistic,
        logistic_gradient,
        (Y,),
        ({}, {"pos_weight": 2.5}),
        lambda x: (sigmoid(x), -xlogx(sigmoid(x)) - xlogx(sigmoid(-x))),
    ),
    elementwise(losses.sigmoid_focal_loss, sigmoid_focal, sigmoid_focal_gradient, (Y,), FOCAL),
    elementwise(
        losses.sparsemax_loss,
        sparse_logistic,
        lambda x, y: sparse_sigmoid(x) - y,
        (Y,),
        at_minimum=lambda x: (sparse_sigmoid(x), 0),
    ),
    elementwise(losses.squared_error, lambda x, t: (x - t) ** 2, lambda x, t: 2 * (x - t), at_minimum=lambda x: (x, 0)),
    elementwise(losses.l2_loss, lambda x, t: (x - t) ** 2 / 2, lambda x, t: x - t, at_minimum=lambda x: (x, 0)),
    Head(
        losses.sum_squared_error,
        lambda x, t: ((x - t) ** 2).sum(),
        lambda x, t: 2 * (x - t),
        (X,),
        has_where=False,
        at_minimum=lambda x: (x, 0),
    ),
    elementwise(
        losses.huber_loss,
        huber,
        lambda x, t, delta=1.0: np.clip(x - t, -delta, delta),
        options=({}, {"delta": 0.4}),
        at_minimum=lambda x: (x, 0),
    ),
    elementwise(losses.log_cosh, log_cosh, lambda x, t: np.tanh(x - t), at_minimum=lambda x: (x, 0)),
]
