"""Products with the Jacobian and the operator, measured against 80 digits of dense algebra; rounding and memory."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from jaxsoftmax._core.centring import about_centred, centred_transpose
from jaxsoftmax._core.classes import ClassAxis
from jaxsoftmax.maps.derivatives import (
    softmax_hessian,
    softmax_jacobian,
    softmax_jvp,
    softmax_second_derivative,
    softmax_third_derivative,
    softmax_vjp,
)
from jaxsoftmax.maps.softmax import softmax
from jaxsoftmax.operators.softmax_jacobian import SoftmaxJacobian
from tests.helpers import one_in
from tests.operators.test_softmax_jacobian import METHODS, logits

pytestmark = pytest.mark.optimized

EPS = float(np.finfo(np.float32).eps)

TINY = float(np.finfo(np.float32).tiny)

GOAL = 5  # eps; a quarter of what the project asks for

DAMPINGS = 1e-20, 1e-8, 1e-3, 0.3, 1.0, 30.0


def hostile_probs():
    """float32 distributions from flat to one-hot to 1e-37, with ties and zeros."""
    rng = np.random.default_rng(1)
    found = {}
    for k in (1, 2, 5, 7):
        for gap in (0, 1, 12, 20, 40, 60, 80):
            z = rng.normal(size=k)
            z[-1] += gap
            found[f"top-{k}-{gap}"] = z
            found[f"ramp-{k}-{gap}"] = np.linspace(0, gap, k)
    found["ties"] = np.array([1.0, 0, 1, 0, 0])
    found["half"] = np.array([40.0, 40, 0, 1])
    found["zeros"] = np.array([1.0, -np.inf, 0, -np.inf, 0.5])
    found["one-hot"] = np.array([0.0, -np.inf, -np.inf])
    return {name: (np.exp(z - z.max()) / np.exp(z - z.max()).sum()).astype(np.float32) for name, z in found.items()}


HOSTILE = hostile_probs()

over_hostile = pytest.mark.parametrize("p", one_in(4, HOSTILE.values()), ids=HOSTILE.keys())


def exact_matrix(p):
    """J of the normalised p in 80 digits."""
    mp.mp.dps = 80
    p = [mp.mpf(float(x)) for x in p]
    p = [x / sum(p) for x in p]
    return mp.matrix([[(x * (1 - x) if i == j else -x * y) for j, y in enumerate(p)] for i, x in enumerate(p)])


def exact(array):
    return mp.matrix([mp.mpf(float(x)) for x in array])


def absolute(matrix):
    return matrix.apply(abs)


def off(got, want, unit):
    """Largest error in units of eps · unit; what float32 cannot hold (less than its smallest normal) is no error."""
    errors = [abs(mp.mpf(float(g)) - w) - 2 * TINY for g, w in zip(np.ravel(got), want, strict=True)]
    return max(float(error / (EPS * u + mp.mpf(10) ** -70)) for error, u in zip(errors, unit))


@over_hostile
def test_products_to_a_few_eps(p):
    j, v = exact_matrix(p), logits(p.size, seed=5).astype(np.float32)
    operator, want, unit = SoftmaxJacobian.from_probs(p), j * exact(v), absolute(j) * absolute(exact(v))
    assert off(operator.mv(v), want, unit) <= GOAL
    assert off(softmax_jvp(v, p), want, unit) <= GOAL
    assert off(softmax_vjp(v, p), want, unit) <= GOAL
    assert off(operator @ v[:, None], want, unit) <= GOAL
    assert off(operator.quadratic_form(v), [(exact(v).T * want)[0]], [(absolute(exact(v)).T * unit)[0]]) <= GOAL
    # Lᵀ, and L through J = L Lᵀ
    assert off(operator.factor_mv(operator.factor_rmv(v)), want, unit) <= GOAL


@over_hostile
def test_an_offset_does_not_reach_the_quadratic_form(p):
    v = (np.arange(p.size) % 3 + 1e4).astype(np.float32)  # the differences are exact
    j, operator = exact_matrix(p), SoftmaxJacobian.from_probs(p)
    want = (exact(v).T * j * exact(v))[0]
    assert off(operator.quadratic_form(v), [want], [abs(want)]) <= GOAL


@over_hostile
def test_entries_and_norms_to_a_few_eps(p):
    j, operator = exact_matrix(p), SoftmaxJacobian.from_probs(p)
    entries, diagonal = list(j), [j[i, i] for i in range(p.size)]
    frobenius = mp.sqrt(sum(x * x for x in entries))
    assert off(operator.as_matrix().ravel(), entries, map(abs, entries)) <= GOAL
    assert off(operator.diagonal(), diagonal, diagonal) <= GOAL
    assert off(operator.trace(), [sum(diagonal)], [sum(diagonal)]) <= GOAL
    assert off(operator.frobenius_norm(), [frobenius], [frobenius]) <= GOAL


@over_hostile
def test_damped_solve_and_determinant_to_a_few_eps(p):
    operator, v = SoftmaxJacobian.from_probs(p), logits(p.size, seed=6).astype(np.float32)
    first, second = (np.argsort(p)[-2:]) if p.size > 1 else (0, 0)
    contrast = np.zeros(p.size, np.float32)
    contrast[first], contrast[second] = 1, -1
    for damping in map(np.float32, DAMPINGS):
        damped = exact_matrix(p) + mp.mpf(float(damping)) * mp.eye(p.size)
        inverse = damped**-1
        want, unit = inverse * exact(v), absolute(inverse) * absolute(exact(v))
        assert off(operator.solve(v, damping), want, unit) <= GOAL
        logdet = mp.log(mp.det(damped))
        assert off(operator.logdet(damping), [logdet], [abs(logdet)]) <= GOAL
        # A contrast of two classes with p > damping: the null vector 1, with its factor 1/damping, is not to be seen.
        if first != second and p[first] > damping:
            want = inverse * exact(contrast)
            assert off(operator.solve(contrast, damping), want, [max(map(abs, want))] * p.size) <= GOAL


@over_hostile
def test_pseudo_inverse_to_a_few_eps(p):
    operator, support = SoftmaxJacobian.from_probs(p), np.flatnonzero(p >= TINY)
    n, v = support.size, logits(p.size, seed=7).astype(np.float32)
    centring = mp.eye(n) - mp.ones(n) / n
    total = mp.mpf(float(p.sum(dtype=np.float64)))
    inverse = centring * mp.diag([total / mp.mpf(float(x)) for x in p[support]]) * centring
    got = np.asarray(operator.pinv_mv(v))
    assert not got[np.setdiff1d(np.arange(p.size), support)].any()
    unit = absolute(centring) * mp.diag([1 / mp.mpf(float(x)) for x in p[support]]) * absolute(centring)
    assert off(got[support], inverse * exact(v[support]), unit * absolute(exact(v[support]))) <= GOAL
    logs = [mp.log(mp.mpf(float(x)) / total) for x in p[support]]
    assert off(operator.pseudo_logdet(), [mp.log(n) + sum(logs)], [mp.log(n) + sum(map(abs, logs))]) <= GOAL


def test_higher_derivatives_to_a_few_eps():
    for p in HOSTILE.values():
        u, v, w = (logits(p.size, seed=s).astype(np.float32) for s in (1, 2, 3))
        mp.mp.dps = 80
        q = [mp.mpf(float(x)) for x in p]
        q = [x / sum(q) for x in q]
        mean = lambda x: sum(a * b for a, b in zip(q, x))
        times = lambda *factors: [mp.fprod(x) for x in zip(*factors)]
        a, b, c = ([mp.mpf(float(x)) - mean(map(mp.mpf, map(float, t))) for x in t] for t in (u, v, w))
        size = 4 * sum(times(q, [1 - x for x in q]))  # J, and with it every derivative, is that small
        largest = max(map(abs, (*a, *b, *c)))
        second = [x * (y - mean(times(a, b))) for x, y in zip(q, times(a, b))]
        assert off(softmax_second_derivative(u, v, p), second, [size * largest**2] * p.size) <= GOAL
        bc, ac, ab, abc = mean(times(b, c)), mean(times(a, c)), mean(times(a, b)), mean(times(a, b, c))
        third = [r * (x * y * z - abc - x * bc - y * ac - z * ab) for r, x, y, z in zip(q, a, b, c)]
        assert off(softmax_third_derivative(u, v, w, p), third, [size * largest**3] * p.size) <= GOAL


def test_dense_forms_keep_their_digits_near_one_hot():
    p = HOSTILE["top-5-40"].astype(np.longdouble)
    z = np.log(p / p.max()).astype(np.float32)
    p = np.exp(z.astype(np.longdouble))
    p /= p.sum()
    rest = 1 - p
    rest[-1] = p[:-1].sum()
    jacobian = np.where(np.eye(5, dtype=bool), p * rest, -np.outer(p, p))
    hessian = np.empty((5, 5, 5))
    for i, j, k in np.ndindex(5, 5, 5):
        if i == j == k:
            hessian[i, j, k] = p[i] * rest[i] * (1 - 2 * p[i])
        elif i == j or j == k or i == k:
            twin, other = (i, k) if i == j else (j, i) if j == k else (i, j)
            hessian[i, j, k] = -p[twin] * p[other] * (1 - 2 * p[twin])
        else:
            hessian[i, j, k] = 2 * p[i] * p[j] * p[k]
    gap = 50 * EPS  # exp of a logit of -40, rounded, is off by that much
    for got, want in ((softmax_jacobian(z), jacobian), (softmax_hessian(z), hessian)):
        assert np.all(np.abs(np.asarray(got, np.longdouble) - want) <= gap * np.abs(want) + TINY)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    z = jnp.asarray(logits((5, 8)), dtype)
    p, u, v = (softmax(z), *(jnp.asarray(logits((5, 8), seed=s), dtype) for s in (1, 2)))
    for f, args in ((softmax_jvp, (u, p)), (softmax_vjp, (u, p)), (softmax_second_derivative, (u, v, p))):
        got, want = f(*args), f(*(x.astype(jnp.float32) for x in args))
        assert got.dtype == dtype and (got == want.astype(dtype)).all()
    for f in (softmax_jacobian, softmax_hessian):
        assert f(z).dtype == dtype and (f(z) == f(z.astype(jnp.float32)).astype(dtype)).all()
    operator = SoftmaxJacobian.from_logits(z)
    assert operator.dtype == jnp.float32 and operator.mv(u).dtype == jnp.float32


@pytest.mark.parametrize("name", one_in(3, [n for n in METHODS if n not in ("as_matrix", "eigh", "eigvalsh")]))
def test_memory_is_linear_in_the_number_of_classes(name):
    z = jax.ShapeDtypeStruct((20_000,), jnp.float32)
    f = lambda z, v: METHODS[name](SoftmaxJacobian.from_logits(z), v)
    assert jax.jit(f).lower(z, z).compile().memory_analysis().temp_size_in_bytes <= 32 * 4 * z.size


def test_memory_of_dense_forms_and_the_spectrum():
    z = jax.ShapeDtypeStruct((20_000,), jnp.float32)
    f = lambda z: SoftmaxJacobian.from_logits(z).eigvalsh()
    assert jax.jit(f).lower(z).compile().memory_analysis().temp_size_in_bytes <= 64 * 4 * z.size
    small = jax.ShapeDtypeStruct((2000,), jnp.float32)
    assert jax.jit(softmax_jacobian).lower(small).compile().memory_analysis().temp_size_in_bytes <= 8 * 4 * 2000


@pytest.mark.parametrize("top", [0.2, 5.0, 40.0])
def test_centring_beside_classes_that_all_but_never_occur(top):
    """Every entry of P and Pᵀ, by columns, to a few eps of itself: also where p is 0, or far below eps."""
    z = np.array([top, 0.0, -0.1, -20.0, -60.0, -np.inf])
    p = softmax(jnp.asarray(z, "float32"))
    exact = np.exp(z - top) / np.sum(np.exp(z - top))
    others = np.array([np.sum(np.delete(exact, i)) for i in range(6)])
    want = np.where(np.eye(6, dtype=bool), others[:, None], -exact[:, None])  # Pᵀ
    axis = ClassAxis((-1,))
    for above in (0.5, 0.5625):
        got = jax.vmap(lambda v: about_centred(v, p, axis, above=above))(jnp.eye(6))
        assert np.all(abs(got - want) <= 30 * EPS * abs(want))
    got = jax.vmap(lambda y: centred_transpose(y, p, axis))(jnp.eye(6)).T
    assert np.all(abs(got - want) <= 30 * EPS * abs(want))


# Eigenvalues and eigenvectors.

GAPS = (0, 5, 12, 20, 40, 60)


def exact_eigenvalues(p: np.ndarray) -> list:
    """Ascending, at p scaled to sum to 1, with 60 digits."""
    with mp.workdps(60):
        q = [mp.mpf(float(x)) for x in p]
        q = [x / sum(q) for x in q]
        matrix = mp.diag(q) - mp.matrix(q) * mp.matrix(q).T
        return sorted(mp.eigsy(matrix, eigvals_only=True))


@pytest.mark.parametrize("gap", GAPS)
def test_eigenvalues_to_a_few_eps_and_orthogonal_vectors(gap):
    z = np.random.default_rng(gap).normal(size=8).astype(np.float32)
    z[2] += gap
    J = SoftmaxJacobian.from_logits(z)
    values, vectors = (np.asarray(x, np.float64) for x in J.eigh())
    want = exact_eigenvalues(np.asarray(J.probs))
    assert values[0] == 0
    assert max(abs(float((got - exact) / exact)) for got, exact in zip(values[1:], want[1:])) <= 8 * EPS
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", GAPS)
def test_orthogonal_vectors_in_float64(gap, x64):
    z = np.random.default_rng(gap).normal(size=8)
    z[2] += gap
    vectors = np.asarray(SoftmaxJacobian.from_logits(z).eigh()[1])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), rtol=0, atol=1e-14)
