"""Every loss head against its optax twin: value with gradient, Hessian-vector products, and the damped solve."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import Row, benchmark
from benchmarks.timing import compare, run_time
from jaxsoftmax import losses
from jaxsoftmax.losses.hessian import logits_hessian

SIZES = (1024, 32768), (65536, 64)
theirs = optax.losses


def their_softmax_kl(logits, targets):
    return theirs.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), jax.nn.log_softmax(targets))


def their_jensen_shannon(logits, targets):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(targets)
    mean = jnp.logaddexp(p, q) - math.log(2.0)
    return (theirs.kl_divergence_with_log_targets(mean, p) + theirs.kl_divergence_with_log_targets(mean, q)) / 2


def their_entropy(logits):
    return theirs.softmax_cross_entropy(logits, jax.nn.softmax(logits))


def their_brier(logits, labels):
    return jnp.sum(theirs.l2_loss(jax.nn.softmax(logits), labels), -1)


def their_focal(logits, labels, gamma=2.0):
    loss = theirs.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-loss)) ** gamma * loss


def their_sum_squared_error(predictions, targets):
    return jnp.sum(theirs.squared_error(predictions, targets), -1)


# Head, twin in optax (or made of optax's parts), and what the second argument is.
TWINS: list[tuple[Callable, Callable, str]] = [
    (losses.sigmoid_binary_cross_entropy, theirs.sigmoid_binary_cross_entropy, "distributions"),
    (losses.sigmoid_focal_loss, theirs.sigmoid_focal_loss, "distributions"),
    (losses.focal_loss_with_integer_labels, their_focal, "labels"),
    (losses.poly_loss_cross_entropy, theirs.poly_loss_cross_entropy, "distributions"),
    (losses.kl_divergence, theirs.kl_divergence, "distributions"),
    (losses.kl_divergence_with_log_targets, theirs.kl_divergence_with_log_targets, "logits"),
    (losses.generalized_kl_divergence, theirs.generalized_kl_divergence, "distributions"),
    (losses.softmax_kl_divergence, their_softmax_kl, "logits"),
    (losses.jensen_shannon_divergence, their_jensen_shannon, "logits"),
    (losses.softmax_entropy, their_entropy, ""),
    (losses.brier_loss, their_brier, "distributions"),
    (losses.multiclass_sparsemax_loss, theirs.multiclass_sparsemax_loss, "labels"),
    (losses.sparsemax_loss, theirs.sparsemax_loss, "binary"),
    (losses.squared_error, theirs.squared_error, "logits"),
    (losses.l2_loss, theirs.l2_loss, "logits"),
    (losses.sum_squared_error, their_sum_squared_error, "logits"),
    (losses.huber_loss, theirs.huber_loss, "logits"),
    (losses.log_cosh, theirs.log_cosh, "logits"),
]


def arguments(size, kind: str) -> tuple[jax.Array, ...]:
    k1, k2 = jax.random.split(jax.random.key(0))
    logits, other = 3 * jax.random.normal(k1, size), jax.random.normal(k2, size)
    if kind == "labels":
        return logits, jax.random.randint(k2, size[:-1], 0, size[-1])
    if kind == "distributions":
        return logits, jax.nn.softmax(other)
    if kind == "binary":
        return logits, (other > 0).astype(jnp.int32)
    return (logits, other) if kind else (logits,)


def value_and_grad(loss: Callable) -> Callable:
    return jax.jit(jax.value_and_grad(lambda logits, *args: loss(logits, *args).mean()))


@benchmark("heads")
def heads() -> Iterator[Row]:
    for head, twin, kind in TWINS:
        both = {"ours": value_and_grad(head), "theirs": value_and_grad(twin)}
        for size in SIZES:
            yield compare(both, arguments(size, kind), rounds=7).row(f"{head.__name__} value+grad", size, goal=1.1)


def along(loss: Callable) -> Callable:
    """Forward over reverse: what one writes without operators."""

    def product(logits, v, *args):
        return jax.jvp(jax.grad(lambda z: jnp.sum(loss(z, *args))), (logits,), (v,))[1]

    return jax.jit(product)


def operator(loss: Callable) -> Callable:
    return jax.jit(lambda logits, v, *args: logits_hessian(loss, logits, *args).mv(v))


@benchmark("hvp")
def hessian_vector_products() -> Iterator[Row]:
    """Through `logits_hessian`, and by jvp of grad of our loss, against jvp of grad of the twin."""
    cross_entropy = (
        losses.softmax_cross_entropy_with_integer_labels,
        theirs.softmax_cross_entropy_with_integer_labels,
        "labels",
    )
    chosen = {head.__name__: (head, twin, kind) for head, twin, kind in [cross_entropy, *TWINS]}
    names = cross_entropy[0].__name__, "focal_loss_with_integer_labels", "poly_loss_cross_entropy", "brier_loss"
    for head, twin, kind in (chosen[name] for name in names):
        contestants = {"operator": operator(head), "jvp of grad": along(head), "theirs": along(twin)}
        for size in SIZES:
            logits, *args = arguments(size, kind)
            times = compare(contestants, (logits, jnp.cos(logits), *args), rounds=7)
            for ours in ("operator", "jvp of grad"):
                yield times.row(f"{head.__name__} HVP, {ours}", size, goal=0.8, ours=ours)


# The damped solve (H + λI) x = g of a trust region or natural gradient step: O(K), where Cholesky is O(K³).

BATCH, CLASSES, DAMPING = 256, 50257, 1e-2
OURS_AT, DENSE_AT = (CLASSES // 2, CLASSES, 2 * CLASSES), (256, 512, 1024)


def solve(logits, g, labels):
    return logits_hessian(losses.softmax_cross_entropy_with_integer_labels, logits, labels).solve(g, DAMPING)


def dense_solve(logits, g, labels):
    def one(logits, g):
        p = jax.nn.softmax(logits)
        matrix = jnp.diag(p + DAMPING) - jnp.outer(p, p)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), g)

    return jax.vmap(one)(logits, g)


def exponent(sizes, seconds) -> float:
    """Slope of log(seconds) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


@benchmark("damped_solve")
def damped_solves() -> Iterator[Row]:
    """Ours at K = 50257, batch 256, beside dense Cholesky at a K where that is possible; then both exponents of K."""

    def problem(batch, size):
        logits, labels = arguments((batch, size), "labels")
        return logits, jnp.cos(logits), labels

    both = {"ours": jax.jit(solve), "theirs": jax.jit(dense_solve)}
    yield compare(both, problem(16, 1024), rounds=5).row("damped solve, dense Cholesky beside", (16, 1024), goal=None)
    times = {size: np.median([run_time(both["ours"], problem(BATCH, size)) for _ in range(5)]) for size in OURS_AT}
    dense = {size: np.median([run_time(both["theirs"], problem(4, size)) for _ in range(5)]) for size in DENSE_AT}
    most = float(dense[DENSE_AT[-1]]) * BATCH / 4 * (CLASSES / DENSE_AT[-1]) ** 3
    ours = float(times[CLASSES])
    name = f"damped solve (theirs: ×(K/{DENSE_AT[-1]})³ from there)"
    yield Row(name, f"{BATCH}×{CLASSES}", 1e3 * ours, 1e3 * most, ours / most, None)
    slopes = exponent(OURS_AT, list(times.values())), exponent(DENSE_AT, list(dense.values()))
    yield Row("damped solve: exponents of K (no ms)", "", *slopes, slopes[0] / slopes[1], None)
