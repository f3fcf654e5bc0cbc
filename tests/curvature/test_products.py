"""Every curvature product against the dense matrix, and the solver against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxsoftmax as js
from jaxsoftmax import curvature, network
from jaxsoftmax.curvature import damped_solve, empirical_fisher_vp, fisher_vp, ggn_vp, hvp
from jaxsoftmax.losses.binary import sigmoid_binary_cross_entropy
from tests.helpers import assert_close, enable_x64
from tests.meshes import mesh_of

BATCH, WIDTHS = 7, (5, 4, 3)
f = network.forward


def integer_labels(key):
    return jax.random.randint(key, (BATCH,), 0, 3)


def soft_labels(key):
    return jax.random.dirichlet(key, jnp.ones(3), (BATCH,))


def targets(key):
    return jax.random.normal(key, (BATCH, 3))


def bits(key):
    return jax.random.bernoulli(key, 0.5, (BATCH, 3)).astype(float)


# head: its labels, and the same loss from elsewhere
HEADS = {
    js.softmax_cross_entropy_with_integer_labels: (integer_labels, optax.softmax_cross_entropy_with_integer_labels),
    js.softmax_cross_entropy: (soft_labels, optax.softmax_cross_entropy),
    js.sum_squared_error: (targets, lambda z, y: jnp.sum((z - y) ** 2, -1)),
    js.l2_loss: (targets, lambda z, y: (z - y) ** 2 / 2),
    js.squared_error: (targets, lambda z, y: (z - y) ** 2),
    sigmoid_binary_cross_entropy: (bits, lambda z, y: jnp.logaddexp(0.0, z) - y * z),
}


class Problem:
    """A small network in float64, with the dense matrices of the reference loss."""

    def __init__(self, loss):
        self.loss, (labels, self.reference) = loss, HEADS[loss]

        @jax.jit
        def drawn():
            keys = jax.random.split(jax.random.key(0), 4)
            params = network.init(keys[0], WIDTHS)
            v = jax.tree.map(lambda leaf: jax.random.normal(keys[3], leaf.shape), params)
            return params, 2 * jax.random.normal(keys[1], (BATCH, WIDTHS[0])), labels(keys[2]), v

        self.params, self.x, self.y, self.v = drawn()
        self.flat, self.unravel = ravel_pytree(self.params)

    def logits(self, flat):
        return f(self.unravel(flat), self.x)

    def losses(self, flat):
        return self.reference(self.logits(flat), self.y).reshape(-1)

    def sandwich(self, middle):
        """Jᵀ diag(middle) J for middle (BATCH, 3, 3)."""
        J = jax.jacrev(self.logits)(self.flat)
        return jnp.einsum("bki,bkl,blj->ij", J, middle, J)

    def gauss_newton(self):
        """E[JᵀHJ], H from jax.hessian of the reference."""
        z = self.logits(self.flat)
        H = jax.vmap(jax.hessian(lambda z, y: jnp.sum(self.reference(z, y))))(z, self.y)
        return self.sandwich(H) / self.reference(z, self.y).size

    def assert_products(self, dense, *products):
        """All of `products`, each a function and its options, are `dense()` times v."""

        @jax.jit
        def all_of_them():
            at = f, self.loss, self.params, self.x, self.y, self.v
            return dense() @ ravel_pytree(self.v)[0], [product(*at, **options) for product, options in products]

        wanted, found = all_of_them()
        for product in found:
            assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, self.params)
            assert_close(ravel_pytree(product)[0], wanted, 1e-13)


@pytest.fixture
def problem(request, x64):
    return Problem(request.param)


def with_problem(*heads, slow=()):
    heads = [*heads, *(pytest.param(head, marks=pytest.mark.slow) for head in slow)]
    return pytest.mark.parametrize("problem", heads, indirect=True, ids=lambda loss: loss.__name__)


@with_problem(js.softmax_cross_entropy_with_integer_labels, slow=[sigmoid_binary_cross_entropy])
def test_hvp_is_the_hessian_times_v(problem):
    dense = lambda: jax.hessian(lambda flat: jnp.mean(problem.losses(flat)))(problem.flat)
    problem.assert_products(dense, (hvp, {}), (hvp, {"batch_size": 3}))


@with_problem(js.softmax_cross_entropy, sigmoid_binary_cross_entropy, slow=[*HEADS][:1] + [*HEADS][2:5])
def test_ggn_and_exact_fisher(problem):
    """The Fisher matrix is JᵀHJ too, for all of these heads."""
    products = (ggn_vp, {}), (ggn_vp, {"batch_size": 2}), (fisher_vp, {"batch_size": 6})
    problem.assert_products(problem.gauss_newton, *products)


@with_problem(js.softmax_cross_entropy, js.squared_error)
def test_empirical_fisher_is_the_second_moment_of_the_gradients(problem):
    def dense():
        gradients = jax.jacrev(problem.losses)(problem.flat)
        return gradients.T @ gradients / len(gradients)

    problem.assert_products(dense, (empirical_fisher_vp, {}), (empirical_fisher_vp, {"batch_size": 4}))


def test_fisher_is_the_expectation_over_the_model_and_ignores_the_labels(x64):
    """Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ, summed over the classes in turn."""
    problem = Problem(js.softmax_cross_entropy_with_integer_labels)

    def dense():
        z = problem.logits(problem.flat)
        per_label = jnp.stack([jax.nn.softmax(z) - jax.nn.one_hot(jnp.full(BATCH, c), 3) for c in range(3)])
        return problem.sandwich(jnp.einsum("bc,cbk,cbl->bkl", jax.nn.softmax(z), per_label, per_label)) / BATCH

    others = functools.partial(lambda f, loss, params, x, y, v: fisher_vp(f, loss, params, x, (y + 1) % 3, v))
    problem.assert_products(dense, (fisher_vp, {}), (others, {}))


def test_sequences_any_tree_and_options():
    """Logits (B, T, K), inputs and parameters as dicts, a head with an option bound to it, inside jit."""
    model = lambda p, x: jnp.einsum("btd,dk->btk", x["tokens"], p["W"]) + p["b"][None, None]
    smooth = functools.partial(js.softmax_cross_entropy_with_integer_labels, label_smoothing=0.1)

    @jax.jit
    def everything():
        keys = jax.random.split(jax.random.key(0), 3)
        params = {"W": jax.random.normal(keys[0], (4, 3)), "b": jnp.zeros(3)}
        x, y = {"tokens": jax.random.normal(keys[1], (6, 2, 4))}, jax.random.randint(keys[2], (6, 2), 0, 3)
        flat, unravel = ravel_pytree(params)
        dense = jax.hessian(lambda flat: jnp.mean(smooth(model(unravel(flat), x), y)))(flat)
        calls = (hvp, None), (ggn_vp, 4)
        products = [product(model, smooth, params, x, y, params, batch_size=size) for product, size in calls]
        return dense @ flat, [ravel_pytree(product)[0] for product in products]

    wanted, found = everything()
    for product in found:
        np.testing.assert_allclose(product, wanted, atol=2e-6)


def test_no_examples_and_trees_with_none():
    params, model = {"W": jnp.ones((3, 5)), "b": None}, lambda params, x: x @ params["W"].T
    loss = js.softmax_cross_entropy_with_integer_labels
    for product in (hvp, ggn_vp):
        found = jax.jit(functools.partial(product, model, loss, batch_size=2))(
            params, jnp.ones((0, 5)), jnp.zeros(0, int), params
        )
        assert found["b"] is None and not jnp.any(found["W"])


def test_half_precision_parameters():
    """bfloat16 in, bfloat16 out; sums over batches are float32, so 512 of them lose nothing."""
    linear = lambda w, x: x * w[None]
    w, v, x = jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16), jnp.ones((512, 1), jnp.bfloat16)
    product = jax.jit(functools.partial(ggn_vp, linear, js.l2_loss, batch_size=1))(w, x, jnp.zeros((512, 1)), v)
    assert product.dtype == jnp.bfloat16
    assert product[0] == 1.0


# damped_solve


def spd(n, condition, seed=0):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return (Q * np.geomspace(1, condition, n)) @ Q.T, rng.standard_normal(n)


def split(b):
    """A vector as a tree."""
    return {"first": b[:4].reshape(2, 2), "rest": (b[4:],)}


def tree_product(A):
    """v -> A v over the trees of `split`."""
    return lambda v: split(A @ jnp.concatenate([v["first"].reshape(-1), v["rest"][0]]))


def test_solution_meets_its_stopping_rule(x64):
    A, b = spd(20, 1e4)

    @functools.partial(jax.jit, static_argnums=1)
    def solve(tol, max_steps=500):
        solution = damped_solve(tree_product(A), split(b), 0.1, tol=tol, max_steps=max_steps)
        return solution._replace(x=ravel_pytree(solution.x)[0])

    for tol in (1e-2, 1e-6, 1e-10):
        solution = solve(tol)
        x = np.asarray(solution.x)
        residual = np.linalg.norm(b - A @ x - 0.1 * x) / np.linalg.norm(b)
        assert solution.converged and residual <= 1.01 * tol
        assert_close(solution.residual, residual, rtol=0.01)
    fewer = solve(1e-6, int(solve(1e-6).steps) - 1)
    assert not fewer.converged and fewer.residual > 1e-6 and fewer.steps == solve(1e-6).steps - 1
    assert_close(x, np.linalg.solve(A + 0.1 * np.eye(20), b), rtol=1e-9)  # the last tolerance, times the condition


def test_distinct_eigenvalues_bound_the_steps(x64):
    """Conjugate gradients end after as many steps as A has distinct eigenvalues, and do not begin at the solution."""
    diagonal = jnp.repeat(jnp.array([1.0, 10.0, 100.0]), 5)
    b = jnp.asarray(spd(15, 1.0)[1])
    solve = jax.jit(lambda **options: damped_solve(lambda v: diagonal * v, b, 1.0, tol=1e-12, **options))
    solution = solve()
    assert solution.steps == 3
    assert_close(solution.x, b / (diagonal + 1))
    again = solve(start=solution.x)
    assert again.steps == 0 and again.converged


def test_solver_at_the_edges(x64):
    solve = jax.jit(lambda d, b, damping=0.0, tol=1e-5: damped_solve(lambda v: d * v, b, damping, tol=tol))
    zero = solve(jnp.ones(3), jnp.zeros(3), 1.0)
    assert zero.steps == 0 and zero.converged and zero.residual == 0 and not jnp.any(zero.x)
    indefinite = solve(jnp.array([1.0, -1.0, 0.0]), jnp.array([1.0, 1.0, 0.0]))
    assert not indefinite.converged and jnp.all(jnp.isfinite(indefinite.x)) and indefinite.steps == 1
    exact = solve(jnp.full(3, 2.0), jnp.ones(3), tol=0.0)
    assert exact.converged and jnp.all(exact.x == 0.5)
    nothing = solve(jnp.ones(0), jnp.ones(0))
    assert nothing.converged and nothing.x.shape == (0,)
    for unknown in (jnp.nan, jnp.inf):
        for d, b in ((1.0, unknown), (unknown, 1.0), (-unknown, 1.0)):
            assert not solve(jnp.array([1.0, d, 2.0]), jnp.array([1.0, b, 1.0])).converged


def test_products_that_a_solution_takes():
    """One for each step, one for the scale and one for the residual; with a start, two for the residual."""
    d, calls = jnp.array([1.0, 2.0, 3.0, 4.0]), []

    def product(v):
        jax.debug.callback(lambda: calls.append(None))
        return d * v

    for start, more in ((None, 2), (jnp.ones(4), 3)):
        calls.clear()
        solution = jax.jit(lambda start: damped_solve(product, jnp.ones(4), 0.0, start=start))(start)
        jax.effects_barrier()
        assert solution.steps == 4 - (start is not None) and len(calls) == solution.steps + more


@pytest.mark.optimized
def test_memory_does_not_grow_with_the_data():
    params = network.init(jax.random.key(0), (32, 64, 10))
    loss = js.softmax_cross_entropy_with_integer_labels

    def temporaries(count, batch_size):
        x, y = jax.ShapeDtypeStruct((count, 32), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
        product = jax.jit(lambda params, x, y, v: ggn_vp(f, loss, params, x, y, v, batch_size=batch_size))
        return product.lower(params, x, y, params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096, 64) < 1.1 * temporaries(1024, 64)
    assert temporaries(4096, None) > 3 * temporaries(1024, None)


@pytest.mark.optimized
def test_dense_is_the_matrix():
    """Of a product that XLA's CPU backend in JAX 0.10.2 makes wrong where `jax.vmap` batches it."""
    keys = jax.random.split(jax.random.key(0), 3)
    params, x = network.init(keys[0], (3, 16, 5)), jax.random.normal(keys[1], (64, 3))
    labels = jax.random.randint(keys[2], (64,), 0, 5)
    loss = js.softmax_cross_entropy_with_integer_labels
    got = curvature.dense(functools.partial(ggn_vp, f, loss, params, x, labels), params)
    with enable_x64():
        wide, inputs = jax.tree.map(lambda leaf: np.asarray(leaf, float), params), np.asarray(x, float)
        flat, unravel = ravel_pytree(wide)
        J = np.asarray(jax.jacrev(lambda theta: f(unravel(theta), inputs))(flat))
    z = np.asarray(f(params, x), float)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    H = p[:, :, None] * np.eye(5) - p[:, :, None] * p[:, None]
    np.testing.assert_allclose(got, np.einsum("nka,nkl,nlb->ab", J, H, J) / 64, atol=1e-6)


def test_dense_keeps_rows_and_columns_apart():
    matrix = jnp.arange(9.0).reshape(3, 3)
    product = lambda v: ravel_pytree(v)[1](matrix @ ravel_pytree(v)[0])
    np.testing.assert_array_equal(curvature.dense(product, {"a": jnp.ones(1), "b": jnp.ones(2)}), matrix)
    with pytest.raises(TypeError, match="product must be a function"):
        curvature.dense(matrix, jnp.ones(3))
    with pytest.raises(ValueError, match=r"product\(v\)"):
        curvature.dense(lambda v: v[:2], jnp.ones(3))


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX 0.6 has it elsewhere, without types")
def test_each_device_solves_its_own_system():
    """Loops start with what varies over the mesh as their vectors do."""
    mesh = mesh_of(systems=2)
    d, b = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([[1.0, 1.0, 2.0], [1.0, 0.0, 1.0]])

    def alone(d, b):
        return damped_solve(lambda v: d * v, b, 0.5, start=b, preconditioner=lambda v: v / d).x

    def summed(d, b):
        return jnp.sum(alone(d, b) ** 2)

    spec = jax.sharding.PartitionSpec("systems")
    for f in (alone, jax.grad(summed)):
        got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec))(d, b)
        np.testing.assert_allclose(got, jnp.concatenate([f(d[i : i + 1], b[i : i + 1]) for i in (0, 1)]), rtol=1e-5)
