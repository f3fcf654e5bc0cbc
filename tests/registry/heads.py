"""The loss heads: what a new head enters to be tested everywhere."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax
from mpmath import mp, mpf

from jaxsoftmax import losses
from tests.registry import formulas as exact
from tests.registry.samples import KINDS, WEIGHTS, K
from tests.wrong_calls import NOT_NUMBERS, NUMBER, POSITIVE, N
from tests.wrong_calls import K as FEW

INF, NAN, L2 = np.inf, np.nan, np.log(2.0)
ZEROS = [0.0, 0.0, 0.0]


@dataclasses.dataclass(frozen=True)
class Option:
    """Values of an option beside its default, exact in float32; one value per class in an array; and wrong values."""

    values: tuple
    wrong: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """One head.

    Args:
      loss: the public function.
      formula: the textbook's, of tests/registry/formulas.py: (z, n, *args, **options) -> a number.
      kinds: what its arguments after the logits are, of `samples.KINDS`.
      choices: its options; every combination is tested.
      special: what comes out for infinite and missing values, as in tests/contract/test_special_values.py.
      minimum: z -> (target, smallest loss), the argument for which the logits z are optimal.
      elementwise: of each logit alone, not of a class vector.
      absolute: whether a constant added to the logits changes it.
      logarithms: whether the logits are logarithms of probabilities.
      support: whether it divides by p, where a p that flushes counts as 0: such slices have another answer.
      many: whether its accuracy is measured for many classes, too.
      kinks: whether it is only piecewise smooth; the samples lie away from its kinks.
      hessian: whether `logits_hessian` knows it.
      terms: formulas that add up to this one, where they cancel: the sizes of their errors add up.
      peers: the same from other libraries.
    """

    loss: Callable
    formula: Callable
    kinds: tuple[str, ...] = ()
    choices: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    special: tuple = ()
    minimum: Callable | None = None
    elementwise: bool = False
    absolute: bool = False
    logarithms: bool = False
    support: bool = False
    many: bool = True
    kinks: bool = False
    hessian: bool = True
    terms: tuple[Callable, ...] = ()
    peers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def parameters(self) -> list[str]:
        return list(inspect.signature(self.loss).parameters)

    @property
    def has_axis(self) -> bool:
        return "axis" in self.parameters

    @property
    def has_where(self) -> bool:
        return "where" in self.parameters

    @property
    def args(self) -> tuple[np.ndarray, ...]:
        """Sample arguments after the logits."""
        return tuple(KINDS[kind] for kind in self.kinds)

    @property
    def options(self) -> tuple[dict[str, Any], ...]:
        """Every combination, from the defaults to the last value of each."""
        return self.options_for(K)

    def options_for(self, num_classes: int) -> tuple[dict[str, Any], ...]:
        def value(x):
            return np.resize(x, num_classes) if isinstance(x, np.ndarray) else x

        single = ([{}, *({name: value(x)} for x in option.values)] for name, option in self.choices.items())
        return tuple({k: v for part in parts for k, v in part.items()} for parts in itertools.product(*single))

    def expected(self, z: np.ndarray, *args, order: int = 1, **options) -> tuple[np.ndarray, ...]:
        """Loss, gradient and, of order 2, Hessian of each example of (B, K) by the formula, as long doubles."""
        options = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in options.items()}
        rows = [self._example(z[i], [a[i] for a in args], order, options) for i in range(len(z))]
        return tuple(exact.longdouble(np.stack(part)) for part in zip(*rows))

    def expected_of_rest(self, z: np.ndarray, mask: np.ndarray, *args, order: int = 1, **options):
        """As `expected`, of the classes that the mask leaves; 0 in the derivatives at the others."""
        size, outs = z.shape[1], []
        for i, kept in enumerate(map(np.flatnonzero, mask)):
            rest = [a[i : i + 1, kept] if a.ndim == 2 else np.searchsorted(kept, a[i : i + 1]) for a in args]
            few = {name: x[kept] if isinstance(x, np.ndarray) else x for name, x in options.items()}
            if few.get("ignore_index") is not None:
                few["ignore_index"] = int(np.searchsorted(kept, few["ignore_index"]))
            value, *derivatives = (part[0] for part in self.expected(z[i : i + 1, kept], *rest, order=order, **few))
            whole = [np.zeros((size,) * part.ndim, np.longdouble) for part in derivatives]
            for out, part in zip(whole, derivatives):
                out[np.ix_(*[kept] * part.ndim)] = part
            outs.append((value, *whole))
        return tuple(np.stack(part) for part in zip(*outs))

    def _example(self, z, args, order, options):
        def derivatives(part):
            x = [mpf(float(v)) for v in z[part]]
            here = [int(a) if a.ndim == 0 and a.dtype.kind == "i" else [mpf(float(v)) for v in a[part]] for a in args]
            return exact.derivatives(lambda x: self.formula(x, [1] * len(x), *here, **options), x, order)

        with mp.workdps(exact.digits([*map(float, z), 0.0])):
            if not self.elementwise:
                return tuple(d[0] for d in derivatives(slice(None)))
            each = [derivatives(slice(i, i + 1)) for i in range(len(z))]
            return tuple(np.concatenate([d[n].ravel() for d in each]) for n in range(order + 1))


# Rows of special values: logits, the other argument, value, gradient. A gradient is a list, "nan" for NaN in every
# class, "finite" for no NaN, None for nothing to say.

excluded, certain, two, none, broken = [-INF, 0.0, 0.0], [INF, 0.0, -INF], [INF, INF, 0.0], [-INF] * 3, [NAN, 0.0, 0.0]
NO_LIMIT = (none, broken)
HARD = (
    (certain, 0, 0, ZEROS),
    (certain, 1, INF, "finite"),
    (excluded, 0, INF, "finite"),
    (excluded, 2, "same", "finite"),
    *((z, 1, NAN, "nan") for z in NO_LIMIT),
    *((ZEROS, c, NAN, "nan") for c in (-1, 3, -100, 2**31 - 1, -(2**31))),
)
SOFT = (
    (certain, [1.0, 0.0, 0.0], 0, ZEROS),
    (certain, [0.0, 1.0, 0.0], INF, "finite"),
    (excluded, [1.0, 0.0, 0.0], INF, "finite"),
    (excluded, [0.0, 0.0, 1.0], "same", "finite"),
    *((z, [0.0, 1.0, 0.0], NAN, "nan") for z in NO_LIMIT),
)
TO_LOGITS = (
    (excluded, excluded, 0, ZEROS),
    (certain, certain, 0, ZEROS),
    *((z, ZEROS, NAN, "nan") for z in NO_LIMIT),
)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def entropy(z):
    return -np.sum(softmax(z) * np.log(softmax(z)))


def entmax15(z):
    """By bisection."""
    low, high = z.max() / 2 - 1, z.max() / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if np.sum(np.maximum(z / 2 - middle, 0) ** 2) < 1 else (middle, high)
    return np.maximum(z / 2 - high, 0) ** 2


# Options with values to test beside the default, and wrong ones.
CLASS_WEIGHTS = (*NOT_NUMBERS[:3], np.ones(2), np.ones((N, FEW)), 1j * np.ones(FEW))
TEMPERATURE = {"temperature": Option((2.5,), POSITIVE)}
IGNORED, SMOOTHING = Option((3,), (1.5, "x", 1j)), (*NUMBER[:2], -0.1, 1.5, float("nan"), np.ones(7))
OPTIONS = {
    losses.softmax_cross_entropy_with_integer_labels: {
        "ignore_index": IGNORED,
        "class_weights": Option((WEIGHTS,), CLASS_WEIGHTS),
        "z_loss": Option((0.0625,), NUMBER),
        "label_smoothing": Option((0.125,), SMOOTHING),
    },
    losses.softmax_cross_entropy: {
        "class_weights": Option((WEIGHTS,), CLASS_WEIGHTS),
        "label_smoothing": Option((0.125,), SMOOTHING),
    },
    losses.focal_loss_with_integer_labels: {
        "gamma": Option((0.0, 0.5, 1.0), (*NUMBER, -1.0, float("nan"))),
        "ignore_index": IGNORED,
    },
    losses.poly_loss_cross_entropy: {"epsilon": Option((0.0, -0.75), NUMBER)},
    losses.natural_gradient_norm: {"ignore_index": IGNORED},
    losses.softmax_kl_divergence: TEMPERATURE,
    losses.jensen_shannon_divergence: TEMPERATURE,
    losses.softmax_entropy: TEMPERATURE,
    losses.entmax_loss: {
        "alpha": Option((1.25, 2.0), ("x", 1j, 0.5, float("nan"), np.ones(7))),
        "ignore_index": IGNORED,
    },
    losses.multiclass_sparsemax_loss: {"ignore_index": IGNORED},
    losses.sigmoid_binary_cross_entropy: {"pos_weight": Option((2.5,), ("x", 1j, -1.0, np.ones(7)))},
    losses.sigmoid_focal_loss: {
        "alpha": Option((0.25,), ("x", 1j, 1.5, -0.1, np.ones(7))),
        "gamma": Option((0.0, 0.5, 1.0), ("x", 1j, -1.0, np.ones(7))),
    },
    losses.huber_loss: {"delta": Option((0.375,), (*POSITIVE[:2], -1.0))},
}
SPECIAL = {
    losses.softmax_cross_entropy_with_integer_labels: (
        *HARD,
        (excluded, 1, L2, [0, -0.5, 0.5]),
        (excluded, 0, INF, [-1, 0.5, 0.5]),
        (certain, 1, INF, [1, -1, 0]),
    ),
    losses.natural_gradient_norm: HARD,
    losses.softmax_cross_entropy: (
        *SOFT,
        (excluded, [0.0, 0.5, 0.5], L2, ZEROS),
        (excluded, [1.0, 0.0, 0.0], INF, [-1, 0.5, 0.5]),
        (certain, [0.0, 1.0, 0.0], INF, [1, -1, 0]),
        (excluded, [0.2, 0.4, 0.4], INF, "finite"),
    ),
    losses.safe_softmax_cross_entropy: SOFT,
    losses.focal_loss_with_integer_labels: HARD,
    losses.poly_loss_cross_entropy: SOFT,
    losses.softmax_kl_divergence: (*TO_LOGITS, (excluded, [0.0, 0.0, -INF], INF, "finite")),
    losses.jensen_shannon_divergence: (*TO_LOGITS, (certain, [-INF, 0.0, -INF], L2, ZEROS)),
    losses.softmax_entropy: (
        (excluded, None, L2, ZEROS),
        (certain, None, 0, ZEROS),
        *((z, None, NAN, "nan") for z in NO_LIMIT),
    ),
    losses.brier_loss: (
        (excluded, [0.0, 1.0, 0.0], 0.25, [0, -0.25, 0.25]),
        (certain, [0.0, 1.0, 0.0], 1, ZEROS),
        (certain, [1.0, 0.0, 0.0], 0, ZEROS),
        *((z, [0.0, 1.0, 0.0], NAN, "nan") for z in NO_LIMIT),
    ),
    losses.entmax_loss: HARD,
    losses.multiclass_sparsemax_loss: HARD,
}

# z -> (the target for which the logits z are optimal, the loss there).
itself = lambda z: (z, 0)
MINIMUM = {
    losses.softmax_cross_entropy: lambda z: (softmax(z), entropy(z)),
    losses.softmax_kl_divergence: lambda z: (z + 3, 0),
    losses.jensen_shannon_divergence: lambda z: (z - 2, 0),
    losses.brier_loss: lambda z: (softmax(z), 0),
    losses.entmax_loss: lambda z: (entmax15(z), 0),
    losses.generalized_kl_divergence: lambda z: (np.exp(z), 0),
    losses.sum_squared_error: itself,
    losses.sigmoid_binary_cross_entropy: lambda x: (
        sigmoid(x),
        -sigmoid(x) * np.log(sigmoid(x)) - sigmoid(-x) * np.log(sigmoid(-x)),
    ),
    losses.sparsemax_loss: lambda x: (np.clip((x + 1) / 2, 0, 1), 0),
    losses.squared_error: itself,
    losses.l2_loss: itself,
    losses.huber_loss: itself,
    losses.log_cosh: itself,
}
TERMS = {losses.poly_loss_cross_entropy: (lambda z, n, y, **_: exact.soft_label_loss(z, n, y), exact.missed)}
LOG_PROBS, ELEMENT, DIVIDES = "absolute logarithms", "elementwise absolute not_many", "support not_many not_hessian"

# The function, its formula, its argument after the logits, and what else it is: fields of a head, or not.
# fmt: off
TABLE = [
    (losses.softmax_cross_entropy_with_integer_labels, exact.label_loss,            "label", ""),
    (losses.softmax_cross_entropy,                     exact.soft_label_loss,       "soft", ""),
    (losses.safe_softmax_cross_entropy,                exact.soft_label_loss,       "soft", "not_many"),
    (losses.natural_gradient_norm,                     exact.natural_gradient_norm, "label", DIVIDES),
    (losses.focal_loss_with_integer_labels,            exact.focal,                 "label", ""),
    (losses.poly_loss_cross_entropy,                   exact.poly,                  "soft", ""),
    (losses.softmax_kl_divergence,                     exact.kl,                    "logits", ""),
    (losses.jensen_shannon_divergence,                 exact.jensen_shannon,        "logits", ""),
    (losses.softmax_entropy,                           exact.entropy,               "", ""),
    (losses.brier_loss,                                exact.brier,                 "soft", ""),
    (losses.entmax_loss,                               exact.entmax_loss,           "label", "not_many kinks"),
    (losses.multiclass_sparsemax_loss,                 exact.multiclass_sparsemax,  "label", "not_many kinks"),
    (losses.kl_divergence,                             exact.log_kl,                "soft", LOG_PROBS),
    (losses.kl_divergence_with_log_targets,            exact.log_targets_kl,        "log", LOG_PROBS),
    (losses.generalized_kl_divergence,                 exact.generalized_kl,        "soft", LOG_PROBS),
    (losses.sum_squared_error,                         exact.sum_squared_error,     "logits", "absolute"),
    (losses.sigmoid_binary_cross_entropy,              exact.logistic,              "soft", ELEMENT),
    (losses.sigmoid_focal_loss,                        exact.sigmoid_focal,         "soft", ELEMENT),
    (losses.sparsemax_loss,                            exact.sparse_logistic,       "soft", ELEMENT + " kinks"),
    (losses.squared_error,                             exact.squared_error,         "logits", ELEMENT),
    (losses.l2_loss,                                   exact.l2_loss,               "logits", ELEMENT),
    (losses.huber_loss,                                exact.huber,                 "logits", ELEMENT + " kinks"),
    (losses.log_cosh,                                  exact.log_cosh,              "logits", ELEMENT),
]
# fmt: on


def of_row(loss: Callable, formula: Callable, argument: str, what: str) -> Head:
    by_loss = {"choices": OPTIONS, "special": SPECIAL, "minimum": MINIMUM, "terms": TERMS}
    fields = {field: table[loss] for field, table in by_loss.items() if loss in table}
    fields |= {word.removeprefix("not_"): not word.startswith("not_") for word in what.split()}
    theirs = getattr(optax.losses, loss.__name__, None)
    peers = {} if theirs is None else {"optax": theirs}
    return Head(loss, formula, (argument,) if argument else (), peers=peers, **fields)


HEADS = [of_row(*row) for row in TABLE]
