"""Every curvature product against the dense matrix, and the solver against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxsoftmax as js
from jaxsoftmax import network
from jaxsoftmax.curvature import damped_solve, empirical_fisher_vp, fisher_vp, ggn_vp, hvp
from jaxsoftmax.losses.binary import sigmoid_binary_cross_entropy

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
        keys = jax.random.split(jax.random.key(0), 4)
        self.loss, (labels, self.reference) = loss, HEADS[loss]
        self.params = network.init(keys[0], WIDTHS)
        self.x, self.y = 2 * jax.random.normal(keys[1], (BATCH, WIDTHS[0])), labels(keys[2])
        self.flat, self.unravel = ravel_pytree(self.params)
        self.v = self.unravel(jax.random.normal(keys[3], self.flat.shape))
        self.arguments = f, self.loss, self.params, self.x, self.y

    def logits(self, flat):
        return f(self.unravel(flat), self.x)

    def mean(self, flat):
        return jnp.mean(self.reference(self.logits(flat), self.y))

    def assert_product(self, product, matrix, rtol=1e-13):
        wanted = matrix @ ravel_pytree(self.v)[0]
        assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, self.params)
        np.testing.assert_allclose(ravel_pytree(product)[0], wanted, rtol=0, atol=rtol * np.abs(wanted).max())

    def sandwich(self, middle):
        """Jᵀ diag(middle) J for middle (BATCH, 3, 3)."""
        J = jax.jit(jax.jacrev(self.logits))(self.flat)
        return np.einsum("bki,bkl,blj->ij", J, middle, J)


@pytest.fixture
def problem(request, x64):
    return Problem(request.param)


def with_problem(*heads):
    return pytest.mark.parametrize("problem", heads or HEADS, indirect=True, ids=lambda loss: loss.__name__)


@with_problem(js.softmax_cross_entropy_with_integer_labels, sigmoid_binary_cross_entropy)
def test_hvp_is_the_hessian_times_v(problem):
    dense = jax.jit(jax.hessian(problem.mean))(problem.flat)
    problem.assert_product(hvp(*problem.arguments, problem.v), dense)
    problem.assert_product(hvp(*problem.arguments, problem.v, batch_size=3), dense)


@with_problem()
def test_ggn_and_exact_fisher(problem):
    """H from jax.hessian of the reference; the Fisher matrix is JᵀHJ too, for all of these heads."""
    total = lambda z, y: jnp.sum(problem.reference(z, y))
    H = jax.jit(jax.vmap(jax.hessian(total)))(problem.logits(problem.flat), problem.y)
    values = problem.reference(problem.logits(problem.flat), problem.y).size
    dense = problem.sandwich(H) / values
    problem.assert_product(ggn_vp(*problem.arguments, problem.v), dense)
    problem.assert_product(ggn_vp(*problem.arguments, problem.v, batch_size=2), dense)
    problem.assert_product(fisher_vp(*problem.arguments, problem.v, batch_size=6), dense)


@with_problem(js.softmax_cross_entropy, js.squared_error)
def test_empirical_fisher_is_the_second_moment_of_the_gradients(problem):
    gradients = jax.jacrev(lambda flat: problem.reference(problem.logits(flat), problem.y).reshape(-1))(problem.flat)
    dense = gradients.T @ gradients / len(gradients)
    problem.assert_product(empirical_fisher_vp(*problem.arguments, problem.v), dense)
    problem.assert_product(empirical_fisher_vp(*problem.arguments, problem.v, batch_size=4), dense)


@with_problem(js.softmax_cross_entropy_with_integer_labels, js.sum_squared_error, sigmoid_binary_cross_entropy)
def test_sampled_fisher_agrees_within_its_standard_error(problem):
    """vᵀFv from 400 independent draws: the mean within 4 standard errors, which are small; batches change nothing."""
    v = ravel_pytree(problem.v)[0]

    @jax.jit
    def draws(keys):
        product = lambda key: fisher_vp(*problem.arguments, problem.v, key=key, num_samples=2)
        return jax.lax.map(lambda key: v @ ravel_pytree(product(key))[0], keys)

    forms = draws(jax.random.split(jax.random.key(1), 400))
    exact = v @ ravel_pytree(fisher_vp(*problem.arguments, problem.v))[0]
    error = jnp.std(forms, ddof=1) / 20
    assert 0 < error < 0.05 * exact
    assert abs(jnp.mean(forms) - exact) < 4 * error
    keyed = functools.partial(fisher_vp, *problem.arguments, problem.v, key=jax.random.key(2), num_samples=3)
    whole, batched = (ravel_pytree(keyed(batch_size=size))[0] for size in (None, 3))
    np.testing.assert_allclose(whole, batched, rtol=1e-12, atol=1e-14)


def test_fisher_is_the_expectation_over_the_model_and_ignores_the_labels(x64):
    """Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ, summed over the classes in turn."""
    problem = Problem(js.softmax_cross_entropy_with_integer_labels)
    z = problem.logits(problem.flat)
    per_label = jnp.stack([jax.nn.softmax(z) - jax.nn.one_hot(jnp.full(BATCH, c), 3) for c in range(3)])
    middle = np.einsum("bc,cbk,cbl->bkl", jax.nn.softmax(z), per_label, per_label)
    dense = problem.sandwich(middle) / BATCH
    problem.assert_product(fisher_vp(*problem.arguments, problem.v), dense)
    problem.assert_product(fisher_vp(*problem.arguments[:-1], jnp.zeros(BATCH, int), problem.v), dense)


def test_linear_network_in_closed_form(x64):
    """l = ‖Wx - y‖²: Hessian, Gauss-Newton and Fisher are all 2 I⊗E[xxᵀ], whatever the labels."""
    problem = Problem(js.sum_squared_error)
    params, V = jnp.ones((3, 5)), jax.random.normal(jax.random.key(5), (3, 5))
    linear = lambda W, x: x @ W.T
    wanted = 2 * V @ (problem.x.T @ problem.x / BATCH)
    for product in (hvp, ggn_vp, fisher_vp):
        found = product(linear, js.sum_squared_error, params, problem.x, problem.y, V)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_softmax_regression_in_closed_form(x64):
    """l = cross-entropy of Wx: the Hessian is E[(diag(p) - ppᵀ) ⊗ xxᵀ]."""
    problem = Problem(js.softmax_cross_entropy_with_integer_labels)
    W, V = 0.1 * jnp.ones((3, 5)), jax.random.normal(jax.random.key(5), (3, 5))
    linear = lambda W, x: x @ W.T
    p = jax.nn.softmax(problem.x @ W.T)
    J = np.einsum("bk,kl->bkl", p, np.eye(3)) - np.einsum("bk,bl->bkl", p, p)
    wanted = np.einsum("bkl,bi,bj,lj->ki", J, problem.x, problem.x, V) / BATCH
    for product in (hvp, ggn_vp, fisher_vp):
        np.testing.assert_allclose(product(linear, problem.loss, W, problem.x, problem.y, V), wanted, rtol=1e-12)


def test_sequences_any_tree_and_options():
    """Logits (B, T, K), inputs and parameters as dicts, a head with an option bound to it, inside jit."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"W": jax.random.normal(keys[0], (4, 3)), "b": jnp.zeros(3)}
    x, y = {"tokens": jax.random.normal(keys[1], (6, 2, 4))}, jax.random.randint(keys[2], (6, 2), 0, 3)
    model = lambda p, x: jnp.einsum("btd,dk->btk", x["tokens"], p["W"]) + p["b"][None, None]
    smooth = functools.partial(js.softmax_cross_entropy_with_integer_labels, label_smoothing=0.1)
    flat, unravel = ravel_pytree(params)
    dense = jax.hessian(lambda flat: jnp.mean(smooth(model(unravel(flat), x), y)))(flat)
    for product in (hvp, ggn_vp):
        for batch_size in (None, 4):
            vector = jax.jit(lambda v, b=batch_size, p=product: p(model, smooth, params, x, y, v, batch_size=b))(params)
            np.testing.assert_allclose(ravel_pytree(vector)[0], dense @ flat, atol=2e-6)


def test_half_precision_parameters():
    """bfloat16 in, bfloat16 out; sums over batches are float32, so 512 of them lose nothing."""
    linear = lambda w, x: x * w[None]
    w, v, x = jnp.ones(1, jnp.bfloat16), jnp.ones(1, jnp.bfloat16), jnp.ones((512, 1), jnp.bfloat16)
    product = ggn_vp(linear, js.l2_loss, w, x, jnp.zeros((512, 1)), v, batch_size=1)
    assert product.dtype == jnp.bfloat16
    assert product[0] == 1.0


def call(product, **changes):
    arguments = {
        "f": f,
        "loss": js.softmax_cross_entropy_with_integer_labels,
        "params": network.init(jax.random.key(0), (5, 3)),
        "x": jnp.ones((7, 5)),
        "labels": jnp.zeros(7, int),
    }
    arguments |= {"v": arguments["params"]} | changes
    return product(**arguments)


@pytest.mark.parametrize("product", [hvp, ggn_vp, fisher_vp, empirical_fisher_vp])
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"f": 3}, TypeError, "f must be a function, got int"),
        ({"loss": "mse"}, TypeError, "loss must be a function, got str"),
        ({"params": object(), "v": 0.0}, TypeError, "params must be a pytree of floating-point arrays"),
        ({"params": {"W": jnp.arange(3)}}, TypeError, "params must be a pytree of floating-point arrays"),
        ({"v": jnp.ones(18)}, TypeError, "v must have the structure of params"),
        ({"v": network.init(jax.random.key(0), (4, 3))}, ValueError, "each array of v must have the shape of params"),
        ({"f": lambda p, x: (x, x)}, TypeError, "f must return one floating-point array of logits"),
        ({"loss": lambda z, y: jnp.mean(z)}, ValueError, r"loss must return one value per example \(7,\)"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer"),
    ],
)
def test_products_refuse(product, changes, error, message):
    with pytest.raises(error, match=message):
        call(product, **changes)


def test_fisher_refuses():
    with pytest.raises(TypeError, match="loss must be a head with a closed form .*softmax_cross_entropy"):
        call(fisher_vp, loss=lambda z, y: jnp.sum(z, -1))
    with pytest.raises(TypeError, match="loss must be a likelihood .*got focal_loss_with_integer_labels"):
        call(fisher_vp, loss=js.focal_loss_with_integer_labels)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        call(fisher_vp, key=jax.random.key(0), num_samples=0)


def test_batches_must_have_one_length():
    loss = lambda z, y: jnp.sum(z, -1)
    with pytest.raises(ValueError, match="lead with one batch axis"):
        call(ggn_vp, loss=loss, labels=jnp.zeros(6), batch_size=2)


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
    for tol in (1e-2, 1e-6, 1e-10):
        solution = damped_solve(tree_product(A), split(b), 0.1, tol=tol, max_steps=500)
        x = ravel_pytree(solution.x)[0]
        residual = np.linalg.norm(b - A @ x - 0.1 * x) / np.linalg.norm(b)
        assert solution.converged and residual <= 1.01 * tol
        np.testing.assert_allclose(solution.residual, residual, rtol=0.01, atol=1e-13)
        fewer = damped_solve(tree_product(A), split(b), 0.1, tol=tol, max_steps=int(solution.steps) - 1)
        assert not fewer.converged and fewer.residual > tol and fewer.steps == solution.steps - 1
    np.testing.assert_allclose(x, np.linalg.solve(A + 0.1 * np.eye(20), b), rtol=1e-6)


def test_distinct_eigenvalues_bound_the_steps(x64):
    """Conjugate gradients end after as many steps as A has distinct eigenvalues; with M = A + λI, after one."""
    diagonal = jnp.repeat(jnp.array([1.0, 10.0, 100.0]), 5)
    b = jnp.asarray(spd(15, 1.0)[1])
    product = lambda v: diagonal * v
    assert damped_solve(product, b, 1.0, tol=1e-12).steps == 3
    solution = damped_solve(product, b, 1.0, tol=1e-12, preconditioner=lambda r: r / (diagonal + 1))
    assert solution.steps == 1
    np.testing.assert_allclose(solution.x, b / (diagonal + 1), rtol=1e-14)
    again = damped_solve(product, b, 1.0, tol=1e-12, start=solution.x)
    assert again.steps == 0 and again.converged


def test_solver_at_the_edges(x64):
    zero = damped_solve(lambda v: v, jnp.zeros(3), 1.0)
    assert zero.steps == 0 and zero.converged and zero.residual == 0 and not jnp.any(zero.x)
    indefinite = damped_solve(lambda v: jnp.array([1.0, -1.0]) * v, jnp.ones(2), 0.0)
    assert not indefinite.converged and jnp.all(jnp.isfinite(indefinite.x)) and indefinite.steps == 1
    exact = damped_solve(lambda v: 2 * v, jnp.ones(3), 0.0, tol=0.0)
    assert exact.converged and jnp.all(exact.x == 0.5)


def test_solver_with_a_network_inside_jit(x64):
    problem = Problem(js.softmax_cross_entropy_with_integer_labels)
    G = problem.sandwich(
        jax.vmap(jax.hessian(lambda z, y: problem.reference(z, y)))(problem.logits(problem.flat), problem.y)
    )
    product = functools.partial(ggn_vp, *problem.arguments)
    solution = jax.jit(lambda b, damping: damped_solve(product, b, damping, tol=1e-11))(problem.v, 0.01)
    wanted = np.linalg.solve(G / BATCH + 0.01 * np.eye(len(G)), ravel_pytree(problem.v)[0])
    np.testing.assert_allclose(ravel_pytree(solution.x)[0], wanted, rtol=1e-8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((jnp.eye(2), jnp.ones(2), 1.0), TypeError, "product must be a function"),
        ((lambda v: v, jnp.arange(2), 1.0), TypeError, "b must be a pytree of floating-point arrays"),
        ((lambda v: v, jnp.ones(2), -1.0), ValueError, "damping must lie in"),
        ((lambda v: v[:1], jnp.ones(2), 1.0), ValueError, r"each array of product\(v\) must have the shape of b"),
    ],
)
def test_solver_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        damped_solve(*arguments)


def test_solver_refuses_options():
    with pytest.raises(TypeError, match="start must have the structure of b"):
        damped_solve(lambda v: v, jnp.ones(2), 1.0, start={"a": 1.0})
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        damped_solve(lambda v: v, jnp.ones(2), 1.0, max_steps=0)
    with pytest.raises(ValueError, match="tol must lie in"):
        damped_solve(lambda v: v, jnp.ones(2), 1.0, tol=-1e-3)
