"""First and second derivatives of every method in the logits, in all compositions, against 150 digits and more.

Of the Hessians of the heads the second in the slow set, for one in three.

In units of eps: a gradient of |g| + |H| w (w the size of the logits behind their maximum, by whose rounding it is
known), a Hessian of the absolute sum of its row. Eigenvectors in units of the largest row: their derivative is 0 along
the constant, which a small entry knows only by what the large ones leave of it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp, mpf

from jaxsoftmax import entmax, losses
from jaxsoftmax.operators import DiagonalPlusLowRank, SoftmaxJacobian
from tests.helpers import enable_x64, one_in
from tests.registry import formulas as exact

pytestmark = pytest.mark.optimized

SCALES = (1, 6, 25)
K = 3
GOAL = {1: 10, 2: 60}  # eps; a wrong formula is off by 1/eps
DAMPING = float(np.float32(1e-8))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def eigenpairs(z) -> list:
    """(λ, u), ascending."""
    size = len(z)
    values, vectors = mp.eigsy(mp.matrix(np.array(exact.dense_jacobian(z, [1] * size)).reshape(size, size).tolist()))
    return sorted(((values[i], [vectors[j, i] for j in range(size)]) for i in range(size)), key=lambda pair: pair[0])


@dataclasses.dataclass(frozen=True)
class Method:
    """A number of a method's result and vectors a, b, c: by the operator A; exactly by the dense A, or by z."""

    call: Callable
    formula: Callable
    whole: bool = False  # units of the largest row


def product(name: str, formula: Callable, *options) -> Method:
    call = lambda A, a, b, c: jnp.sum(c * getattr(A, name)(a, *options))
    return Method(call, lambda A, z, a, b, c: dot(c, formula(A, z, a, *options)))


def number(name: str, formula: Callable, *options) -> Method:
    return Method(lambda A, *_: getattr(A, name)(*options), lambda A, z, *_: formula(A, z, *map(mpf, options)))


def of_softmax(formula: Callable) -> Callable:
    return lambda A, z, *args: formula(z, [1] * K, *args)


def of_vectors(J, a, b, c):
    _, u = J.eigh()
    return jnp.sum(c * jnp.matmul(a, u) * jnp.matmul(b, u))


def damped(A, damping) -> mp.matrix:
    return mp.matrix(A) + mpf(damping) * mp.eye(K)


def solution(A, z, v, damping) -> list:
    return list(mp.lu_solve(damped(A, damping), mp.matrix(v)))


times = lambda A, z, v: [dot(row, v) for row in A]
METHODS = {
    "mv": product("mv", times),
    "solve": product("solve", solution, DAMPING),
    "solve, damped by 1": product("solve", solution, 1.0),
    "pinv_mv": product("pinv_mv", of_softmax(exact.pinv_product)),
    "factor_mv": product("factor_mv", of_softmax(exact.factor_product)),
    "factor_rmv": product("factor_rmv", of_softmax(exact.factor_transposed_product)),
    "quadratic_form": Method(lambda A, a, *_: A.quadratic_form(a), lambda A, z, a, *_: dot(a, times(A, z, a))),
    "diagonal": Method(
        lambda A, a, b, c: jnp.sum(c * A.diagonal()), lambda A, z, a, b, c: dot(c, [A[i][i] for i in range(K)])
    ),
    "trace": number("trace", lambda A, z: sum(A[i][i] for i in range(K))),
    "frobenius_norm": number("frobenius_norm", lambda A, z: mp.sqrt(sum(x * x for row in A for x in row))),
    "logdet": number("logdet", lambda A, z, damping: mp.log(mp.det(damped(A, damping))), 1.0),
    "pseudo_logdet": number("pseudo_logdet", of_softmax(exact.pseudo_logdet)),
    "spectral_norm": Method(lambda A, *_: A.spectral_norm(), lambda A, z, *_: eigenpairs(z)[-1][0]),
    "eigvalsh": Method(
        lambda A, a, b, c: jnp.sum(c * A.eigvalsh()),
        lambda A, z, a, b, c: dot(c, [value for value, _ in eigenpairs(z)]),
    ),
    "eigh": Method(
        of_vectors, lambda A, z, a, b, c: dot(c, [dot(a, u) * dot(b, u) for _, u in eigenpairs(z)]), whole=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """An operator at logits z and another argument y of its head, and the dense matrix at both."""

    call: Callable
    dense: Callable
    argument: Callable = lambda z, rng: np.zeros(())


def jacobian(z, _=None) -> list:
    rows = exact.dense_jacobian(z, [1] * K)
    return [rows[i * K : i * K + K] for i in range(K)]


def square(z, _) -> list:
    J = jacobian(z)
    return [[dot(row, column) for column in J] for row in J]


def hessian(loss: Callable, formula: Callable, argument: Callable, cap: float | None = None, **options) -> Kind:
    of_capped = lambda z: z if cap is None else [exact.softcap([x], [1], mpf(cap)) for x in z]

    def dense(z, y):
        y = y if isinstance(y, list) else int(y)
        return exact.derivatives(lambda x: formula(of_capped(x), [1] * K, y, **options), z)[2][0].tolist()

    return Kind(lambda z, y: losses.logits_hessian(loss, z, y, logit_softcap=cap, **options), dense, argument)


top = lambda z, rng: np.argmax(z).astype(np.int32)
bottom = lambda z, rng: np.argmin(z).astype(np.int32)
one_hot = lambda z, rng: np.eye(K, dtype=z.dtype)[np.argmax(z)]
soft = lambda z, rng: rng.dirichlet(np.ones(K)).astype(np.float32).astype(z.dtype)
others = lambda z, rng: (np.ptp(z) * rng.normal(size=K)).astype(np.float32).astype(z.dtype)
CE, FOCAL = losses.softmax_cross_entropy_with_integer_labels, losses.focal_loss_with_integer_labels
KINDS = {
    "logits": Kind(lambda z, _: SoftmaxJacobian.from_logits(z), jacobian),
    "weights": Kind(
        lambda z, _: (lambda J: DiagonalPlusLowRank(J.probs, J.probs))(SoftmaxJacobian.from_logits(z)), jacobian
    ),
    "focal": hessian(FOCAL, exact.focal, top),
    "focal missed": hessian(FOCAL, exact.focal, bottom, gamma=0.5),
    "focal capped": hessian(FOCAL, exact.focal, top, cap=5.0),
    "z-loss": hessian(CE, exact.label_loss, bottom, z_loss=0.0625),
    "poly": hessian(losses.poly_loss_cross_entropy, exact.poly, soft),
    "brier": hessian(losses.brier_loss, exact.brier, one_hot),
    "brier square": Kind(lambda z, y: losses.logits_ggn(losses.brier_loss, z, y), square, soft),
    "jensen-shannon": hessian(losses.jensen_shannon_divergence, exact.jensen_shannon, others),
    "entropy": Kind(
        lambda z, _: losses.logits_hessian(losses.softmax_entropy, z),
        lambda z, _: exact.derivatives(lambda x: exact.entropy(x, [1] * K), z)[2][0].tolist(),
    ),
}
# Every method of the Jacobian apart; of a head's operator those that differ from the Jacobian's, in one program.
OF_SOFTMAX = "pinv_mv", "pseudo_logdet", "spectral_norm", "eigvalsh", "eigh"
OF_HEADS = "mv", "solve", "solve, damped by 1", "quadratic_form", "diagonal", "frobenius_norm", "logdet"
CASES = {f"{name} of logits": ("logits", (name,)) for name in METHODS}
CASES |= {f"{name} of weights": ("weights", (name,)) for name in METHODS if name not in OF_SOFTMAX}
CASES |= {kind: (kind, OF_HEADS) for kind in KINDS if kind not in ("logits", "weights")}


@functools.cache
def reference(case: str, scale: int, dtype: str) -> tuple:
    """z, y, a, b, c, and the derivatives of every method with their units."""
    rng, (kind, names) = np.random.default_rng([scale, 1]), CASES[case]
    z, *vectors = (
        np.asarray(jnp.asarray(x, dtype).astype(float)) for x in (scale * rng.normal(size=K), *rng.normal(size=(3, K)))
    )
    y = KINDS[kind].argument(z, rng)
    numbers = lambda x: [mpf(float(v)) for v in x]
    exactly, other = numbers(z), numbers(y) if y.ndim else y
    with mp.workdps(exact.digits(exactly) + 150):

        def formulas(x):
            dense = KINDS[kind].dense(x, other)
            return [METHODS[name].formula(dense, x, *map(numbers, vectors)) for name in names]

        gradients, hessians = map(exact.longdouble, exact.derivatives(formulas, exactly)[1:])
    behind = np.maximum(abs(z - z.max()), 1)
    units = abs(gradients) + abs(hessians) @ behind, abs(hessians).sum(-1, keepdims=True)
    units = tuple(np.full_like(u, u.max()) for u in units) if METHODS[names[0]].whole else units
    return (z, y, *vectors), (gradients, hessians), units


def compositions(f: Callable, orders: tuple[int, ...]) -> Callable:
    derivatives = {
        (1, "rev"): jax.jacrev(f),
        (1, "fwd"): jax.jacfwd(f),
        (2, "fwd of rev"): jax.jacfwd(jax.jacrev(f)),
        (2, "rev of rev"): jax.jacrev(jax.jacrev(f)),
        (2, "fwd of fwd"): jax.jacfwd(jax.jacfwd(f)),
        (2, "rev of fwd"): jax.jacrev(jax.jacfwd(f)),
    }
    return lambda *args: {key: g(*args) for key, g in derivatives.items() if key[0] in orders}


def missed(case: str, dtype: str, orders: tuple[int, ...] = (1, 2), goal: dict[int, int] = GOAL) -> dict:
    kind, names = CASES[case]

    def f(z, y, *vectors):
        A = KINDS[kind].call(z, y)
        return jnp.stack([METHODS[name].call(A, *vectors) for name in names])

    with enable_x64() if dtype == "float64" else contextlib.nullcontext():
        found = [reference(case, scale, dtype) for scale in SCALES]
        args = [np.stack(x) for x in zip(*(args for args, _, _ in found))]
        args = [jnp.asarray(x, dtype if x.dtype.kind == "f" else None) for x in args]
        got = jax.jit(jax.vmap(compositions(f, orders)))(*args)
    info, out = np.finfo(dtype), {}
    for (order, how), values in got.items():
        for i, (_, want, units) in enumerate(found):
            error = abs(np.asarray(values[i], np.longdouble) - want[order - 1]) - 100 * info.tiny
            error = np.where(error > 0, error / (info.eps * units[order - 1]), error)
            for name, worst in zip(names, np.max(error.reshape(len(names), -1), -1)):
                if not worst <= goal[order]:  # a NaN is not
                    out[name, order, how, SCALES[i]] = worst
    return out


OF_JACOBIAN = [case for case in CASES if " of " in case]
HEADS = [case for case in CASES if case not in OF_JACOBIAN]


@pytest.mark.parametrize("case", one_in(6, OF_JACOBIAN, 2))
def test_float32(case):
    assert not missed(case, "float32")


@pytest.mark.parametrize("case", one_in(5, HEADS))
def test_heads_in_float32(case):
    assert not missed(case, "float32", (1,))


@pytest.mark.slow
@pytest.mark.parametrize("case", HEADS[::3])
def test_heads_in_float32_at_second_order(case):
    assert not missed(case, "float32", (2,), {2: 150})


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_JACOBIAN)
def test_float64(case):
    assert not missed(case, "float64")


# Reported cases, where float32 gave another number, or none.


def test_a_component_of_an_eigenvector():
    z = jnp.array([2.0, 1.0, 0.5, -0.5])
    f = lambda z: SoftmaxJacobian.from_logits(z).eigh()[1][0, -1] ** 2
    with enable_x64():
        step = 1e-5 * np.eye(4)
        dense = lambda z: np.diag(p := np.exp(z) / np.exp(z).sum()) - np.outer(p, p)
        exactly = lambda z: np.linalg.eigh(dense(z))[1][0, -1] ** 2
        z64 = np.asarray(z, np.float64)
        want = [(exactly(z64 + h) - exactly(z64 - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(jax.jit(jax.grad(f))(z), want, rtol=1e-5)


def test_zeros_and_ties_are_no_nan():
    """A class of probability 0 has derivative 0; an eigenvalue that equal classes share the mean over them."""
    rows = jnp.array([[1.0, -np.inf, 0.5, 0.2], [90.0, 0.0, 0.5, 0.2], [1.0, 1.0, 1.0, 0.2]])

    def f(z):
        J = SoftmaxJacobian.from_logits(z)
        return jnp.stack([J.eigvalsh()[-1], J.spectral_norm(), jnp.sum(J.eigh()[1][:, -1] ** 3)])

    jacobian, hessian = jax.jit(jax.vmap(lambda z: (jax.jacrev(f)(z), jax.hessian(f)(z))))(rows)
    assert np.all(np.isfinite(jacobian)) and np.all(np.isfinite(hessian))
    assert not np.asarray(jacobian)[0, :, 1].any()


def test_norm_of_a_focal_hessian_whose_entries_square_to_0():
    """At γ = 5 and 1 - p = 3e-6 the entries are 1e-32, and products of them leave float32, cotangents too."""
    z = np.float32([9.12, -9.52, -3.67])
    f = lambda z: losses.logits_hessian(FOCAL, z, 0, gamma=5.0).frobenius_norm()
    dense = hessian(FOCAL, exact.focal, top, gamma=5.0).dense
    exactly = [mpf(float(x)) for x in z]
    with mp.workdps(exact.digits(exactly) + 150):
        norm = lambda z: METHODS["frobenius_norm"].formula(dense(z, np.int32(0)), z)
        want = exact.longdouble(exact.derivatives(norm, exactly, 1)[1][0])
    assert abs(want).max() < 1e-30
    for got in jax.jit(compositions(f, (1,)))(z).values():
        assert np.all(abs(np.asarray(got, np.longdouble) - want) < 60 * np.finfo(np.float32).eps * abs(want).max())


@pytest.mark.slow
def test_focal_hessian_where_one_class_is_sure():
    """Its derivatives of both orders are 0, in every composition: 1 - p has no square in float32."""
    f = lambda z: losses.logits_hessian(FOCAL, z, jnp.argmax(z)).frobenius_norm()
    for z in ([0.0, -np.inf, -np.inf], [200.0, 0.0, 1.0]):
        for how, derivative in jax.jit(compositions(f, (1, 2)))(jnp.array(z)).items():
            assert not np.asarray(derivative).any(), how


def test_an_eigenvalue_between_two_equal_classes():
    """Two equal classes share one eigenvalue, which is simple: it has derivatives of both orders."""
    rows = [1.0, 1.0, 0.25, -0.25], [1.0, 0.25, 0.25, -0.25], [1.0, 1.0, 0.25, 0.25]
    J = SoftmaxJacobian.from_logits
    f = lambda z: jnp.append(J(z).eigvalsh()[1:], J(z).spectral_norm())
    got = jax.jit(jax.vmap(lambda z: (jax.jacrev(f)(z), jax.hessian(f)(z))))(jnp.array(rows))
    for i, z in enumerate(rows):
        with mp.workdps(exact.digits(list(map(mpf, z)))):
            numbers = lambda z: [*(values := [value for value, _ in eigenpairs(z)])[1:], values[-1]]
            for mine, want in zip(got, exact.derivatives(numbers, list(map(mpf, z)))[1:]):
                want = np.float64(exact.longdouble(want))
                np.testing.assert_allclose(mine[i], want, atol=1e-6 * np.max(abs(want)))


def test_spectral_norm_of_two_equal_classes():
    """λ = 2σ(1 - σ) in the difference of the logits, with second derivative -1/4 at 0."""
    got = jax.jit(jax.hessian(lambda z: SoftmaxJacobian.from_logits(z).spectral_norm()))(jnp.zeros(2))
    np.testing.assert_allclose(got, [[-0.25, 0.25], [0.25, -0.25]], rtol=1e-6)


def test_pseudo_inverse_of_probabilities_whose_square_no_float32_is():
    z, v = jnp.array([60.0, 0.0, 1.0]), [0.0, 1.0, 2.0]
    got = jax.jit(jax.grad(lambda z: SoftmaxJacobian.from_logits(z).pinv_mv(jnp.asarray(v))[1]))(z)
    with mp.workdps(exact.digits([mpf(60), mpf(0)])):
        formula = lambda z: exact.pinv_product(z, [1] * 3, list(map(mpf, v)))[1]
        want = exact.longdouble(exact.derivatives(formula, [mpf(60), mpf(0), mpf(1)], 1)[1][0])
    np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=1e-5, atol=1e-5 * float(max(abs(want))))


@pytest.mark.parametrize("head", one_in(3, [CE, losses.softmax_kl_divergence, None], 1))
def test_methods_of_the_inverse_where_a_probability_has_no_square(head):
    """The Hessian of a head knows its logits as J does, and `from_probs` stays in range."""
    z, v = np.float32([9.12, -52.5, -3.67]), np.float32([1.0, -0.5, 0.25])
    y = 0 if head is CE else jnp.zeros(K)
    J = lambda z: SoftmaxJacobian.from_probs(jax.nn.softmax(z)) if head is None else losses.logits_hessian(head, z, y)
    f = lambda z: (lambda J: jnp.append(1e-20 * J.pinv_mv(v), J.pseudo_logdet()))(J(z))
    number = lambda z: [mpf(float(x)) for x in z]
    with mp.workdps(exact.digits(number(z)) + 150):
        pinv = lambda z: [x / mpf(10) ** 20 for x in exact.pinv_product(z, [1] * K, number(v))]
        formula = lambda z: [*pinv(z), exact.pseudo_logdet(z, [1] * K)]
        want = exact.longdouble(exact.derivatives(formula, number(z))[2])
    units = abs(want).max((-2, -1), keepdims=True) if head is None else abs(want).sum(-1, keepdims=True)
    units = np.maximum(units, 0.1 if head is None else 0)  # in p a sum of K terms of size 1 cancels
    for how, got in jax.jit(compositions(f, (2,)))(z).items():
        assert np.all(abs(np.asarray(got, np.longdouble) - want) <= 60 * np.finfo(np.float32).eps * units), how


def test_factor_where_a_weight_is_0():
    """Of the square of J, whose smallest weight is p²: finite in every composition."""
    z, u = np.float32([90.0, 0.0, -3.0]), np.float32([1.0, -0.5, 0.25])
    f = lambda z: losses.logits_ggn(losses.brier_loss, z, np.eye(K, dtype="float32")[0]).factor_mv(u)
    for derivatives in jax.jit(compositions(f, (2,)))(z).values():
        assert np.all(np.abs(derivatives) < 1e-30)


@pytest.mark.slow
def test_entmax_near_the_edge_of_its_support():
    """In p second derivatives lose the digits of √p, which is 0.006 at the smallest class here."""
    z = np.float32([-0.577, 0.615, 0.585, -0.252, 0.253, 0.009])
    c = np.float32([-0.855, -1.975, -0.484, -0.853, 1.307, 0.239])
    f = lambda z: jnp.sum(c * SoftmaxJacobian.from_logits(z, alpha=1.5).diagonal())

    def formula(z):
        q = exact.entmax_root(z, [1] * 6, 2)
        return dot([mpf(float(x)) for x in c], [x - x * x / sum(q) for x in q])

    with mp.workdps(300):
        want = exact.longdouble(exact.derivatives(formula, [mpf(float(x)) for x in z])[2][0])
    for got in jax.jit(compositions(f, (2,)))(z).values():
        assert np.all(
            abs(np.asarray(got, np.longdouble) - want)
            < 10 * np.finfo(np.float32).eps * abs(want).sum(-1, keepdims=True)
        )


@pytest.mark.parametrize("order", one_in(2, [1, 2]))
@pytest.mark.parametrize("alpha", one_in(3, [1.5, 1.25, 2.0], 1))
def test_entmax_in_logits_and_alpha(alpha, order, x64):
    """As the derivatives of the matrix made of p."""
    z, c = jnp.array([0.3, -0.2, 0.5, 0.17, -3.0]), jnp.array([0.2, -1.0, 0.7, 0.4, 1.0])
    q = lambda p, a: jnp.where(p > 0, jnp.where(p > 0, p, 1.0) ** (2 - a), 0.0)
    dense = lambda q: jnp.sum(c * (q - q * q / jnp.sum(q)))
    f = lambda z, a: jnp.sum(c * SoftmaxJacobian.from_logits(z, alpha=a).diagonal())
    want = lambda z, a: dense(q(entmax(z, a), a))
    modes = jax.jacrev, jax.jacfwd
    derivatives = lambda f: [g(f, (0, 1)) for g in modes]
    for _ in range(order - 1):
        derivatives = lambda f, first=derivatives: [g(d, (0, 1)) for d in first(f) for g in modes]
    got, right = (jax.jit(lambda *x, f=f: [d(*x) for d in derivatives(f)])(z, alpha) for f in (f, want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
