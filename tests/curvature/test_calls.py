"""How curvature products are called: any loss, options cut as the data, nothing remembered, reuse, derivatives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoftmax as js
from jaxsoftmax import network
from jaxsoftmax.curvature import damped_solve, empirical_fisher_vp, estimators, fisher_vp, ggn_vp, hvp, linearized
from tests.helpers import assert_close, one_in
from tests.meshes import KINDS, around, mesh_of, placed

CE = js.softmax_cross_entropy_with_integer_labels
N, K = 7, 3
PRODUCTS = hvp, ggn_vp, fisher_vp, empirical_fisher_vp
over_products = pytest.mark.parametrize("product", PRODUCTS)


def f(W, x):
    return x @ W.T


@jax.jit
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    x, labels = jax.random.normal(keys[0], (N, 4)), jax.random.permutation(keys[1], jnp.arange(N) % K)
    return jax.random.normal(keys[2], (K, 4)), x, labels, jax.random.normal(keys[3], (K, 4))


LOSSES = {
    "lambda": lambda z, y: CE(z, y),
    "jitted": jax.jit(CE),
    "partial of lambda": functools.partial(lambda z, y, scale: scale * CE(z, y), scale=1.0),
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "by hand": lambda z, y: jax.nn.logsumexp(z, -1) - jnp.sum(z * jax.nn.one_hot(y, K), -1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_any_loss(name, x64):
    W, x, labels, v = problem()
    p = jax.nn.softmax(f(W, x))
    J = np.einsum("bk,kl->bkl", p, np.eye(K)) - np.einsum("bk,bl->bkl", p, p)
    wanted = np.einsum("bkl,bi,bj,lj->ki", J, x, x, v) / N
    for product, batch_size in ((hvp, 3), (ggn_vp, None)):
        found = jax.jit(functools.partial(product, f, LOSSES[name], batch_size=batch_size))(W, x, labels, v)
        assert_close(found, wanted)


def test_gauss_newton_of_a_loss_without_name(x64):
    """Any function of any function: (1 + Σ z⁴), whose Hessian is diagonal."""
    W, x, labels, v = problem()
    product = functools.partial(ggn_vp, lambda W, x: jnp.tanh(f(W, x)), lambda z, _: 1 + jnp.sum(z**4, -1))
    found = jax.jit(product)(W, x, labels, v)
    z = np.tanh(f(W, x))
    middle = (1 - z**2) * 12 * z**2 * (1 - z**2) * f(v, x)
    assert_close(found, middle.T @ np.asarray(x) / N)


class Scaled:
    """A model with an attribute, which may change between two calls."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, w, x):
        return self.factor * w * x


FACTOR = [1.0]


@over_products
def test_nothing_is_remembered_between_calls(product):
    w, x, labels = jnp.array([[1.0, 0.0]]), jnp.ones((1, 1)), jnp.zeros(1, int)
    model, call = (
        Scaled(1.0),
        lambda model, loss=CE: np.asarray(jax.jit(lambda w: product(model, loss, w, x, labels, w))(w)),
    )
    first = call(model)
    model.factor = 2.0
    np.testing.assert_array_equal(call(model), call(Scaled(2.0)))
    assert np.any(first != call(model))
    if product is fisher_vp:
        return
    loss = lambda z, y: FACTOR[0] * CE(z, y)
    one = call(model, loss)
    FACTOR[0] = 3.0
    two = call(model, loss)
    FACTOR[0] = 1.0
    assert_close(two, (9 if product is empirical_fisher_vp else 3) * one)


def assert_parts_are_the_whole(product, losses, labels, batch_size):
    """`losses`: for each name a loss, or a loss with labels of its own."""
    W, x, _, v = problem()

    @jax.jit
    def found():
        of = lambda loss, labels, size: product(f, loss, W, x, labels, v, batch_size=size)
        pairs = {name: loss if isinstance(loss, tuple) else (loss, labels) for name, loss in losses.items()}
        return {name: (of(*pair, batch_size), of(*pair, None)) for name, pair in pairs.items()}

    for name, pair in found().items():
        np.testing.assert_allclose(*pair, rtol=1e-12, atol=1e-14, err_msg=name)


@over_products
def test_options_are_cut_as_the_data(product, x64):
    mask, weights = jnp.arange(N * K).reshape(N, K) % 4 != 0, jnp.array([1.0, 2.0, 0.5])
    loss = functools.partial(CE, where=mask, class_weights=weights)
    assert_parts_are_the_whole(product, {"mask and weights": loss}, problem()[2], 3)


@pytest.mark.parametrize(
    ("product", "batch_size"),
    [(ggn_vp, 3), *(pytest.param(product, size, marks=pytest.mark.slow) for product in PRODUCTS for size in (1, 3, 4))],
)
def test_every_option_is_cut_as_the_data(product, batch_size, x64):
    labels, key = problem()[2], jax.random.key(5)
    losses = {
        "mask over classes": functools.partial(CE, where=jnp.arange(N * K).reshape(N, K) % 4 != 0),
        "mask over examples": functools.partial(CE, where=jnp.arange(N) % 3 != 0),
        "one mask for all": functools.partial(CE, where=jnp.array([[True, True, False]])),
        "class weights": functools.partial(
            CE, class_weights=jnp.array([1.0, 2.0, 0.5]), ignore_index=1, label_smoothing=0.1
        ),
        "positive weights": (
            functools.partial(js.sigmoid_binary_cross_entropy, pos_weight=uniforms(key)),
            jnp.sqrt(uniforms(key)),
        ),
    }
    if product is not fisher_vp:  # labels may be a tree, for a loss that takes one
        data = {"labels": labels, "weight": jnp.arange(1.0, N + 1)}
        losses["tree of labels"] = lambda z, data: data["weight"] * CE(z, data["labels"]), data
    assert_parts_are_the_whole(product, losses, labels, batch_size)


@over_products
def test_one_linearization_serves_many_products(product, x64):
    """The reused product is the product, without the nonlinear part of the network: no tanh in it."""
    params = network.init(jax.random.key(0), (4, 5, K))
    _, x, labels, _ = problem()
    bound = functools.partial(product, network.forward, CE, params, x, labels)
    reused, whole = jax.jit(lambda: linearized(bound, params))(), jax.jit(bound)
    text = str(jax.make_jaxpr(lambda product, v: product(v))(reused, params))
    assert "tanh" not in text and "tanh" in str(whole.trace(params).jaxpr)
    apply = jax.jit(lambda product, v: product(v))
    for v in (params, jax.tree.map(jnp.cos, params)):
        for found, wanted in zip(jax.tree.leaves(apply(reused, v)), jax.tree.leaves(whole(v))):
            assert_close(found, wanted)


# damped_solve


def matrix(theta):
    B = jnp.sin(theta[:, None] * jnp.arange(1.0, 5.0)[None])
    return B.T @ B + 0.5 * jnp.eye(4)


def solved(theta, b, damping, **options):
    A = matrix(theta)
    return damped_solve(lambda v: {"v": A @ v["v"]}, {"v": b}, damping, tol=1e-13, max_steps=50, **options).x["v"]


def dense(theta, b, damping):
    return jnp.linalg.solve(matrix(theta) + damping * jnp.eye(4), b)


@pytest.mark.parametrize("options", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["options", "plain"])
def test_solutions_differentiate_in_both_modes(options, x64):
    """At the scale 1 and at one where squares underflow: forward, reverse, and forward over reverse."""

    @jax.jit
    def derivatives(scale, theta, b, damping, direction):
        given = {"start": {"v": scale * jnp.ones(4)}, "preconditioner": lambda r: {"v": r["v"] / 3}} if options else {}
        ours = lambda *arguments: solved(*arguments, **given)

        def both(g):
            at, along = (theta, scale * b, damping), (direction[0], scale * direction[1], direction[2])
            gradient = jax.grad(lambda *at: jnp.sum(jnp.sin(b) * g(*at)), (0, 1, 2))
            return jax.jvp(g, at, along), jax.jvp(gradient, at, along)

        return both(ours), both(dense)

    arguments = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array(0.2)
    for scale in (1.0, 1e-200):
        pairs = derivatives(scale, *arguments, jax.tree.map(jnp.cos, arguments))
        for found, wanted in zip(*map(jax.tree.leaves, pairs)):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10 * np.abs(wanted).max())


def test_solutions_are_batched(x64):
    theta, b, damping = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([0.1, 0.2])
    b = jnp.stack([b, jnp.zeros(4)])
    found, wanted = (jax.jit(jax.vmap(g, (None, 0, 0)))(theta, b, damping) for g in (solved, dense))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_solutions_over_trees_differentiate_where_only_a_part_is_asked(x64):
    """One leaf of b varies, one of x is used, the matrix of one leaf varies: JAX's linear solve alone refuses."""

    def part(c, t):
        product = lambda v: {"a": t * v["a"] + 0.1 * v["b"], "b": 0.1 * v["a"] + v["b"]}
        return damped_solve(product, {"a": c, "b": jnp.ones(2)}, 0.5, tol=1e-13).x["b"]

    wanted = lambda c, t: (1 - 0.1 * (c - 0.1 / 1.5) / (t + 0.5 - 0.01 / 1.5)) / 1.5
    arguments = jnp.array([1.0, 2.0]), jnp.array(2.0)
    derivatives = lambda g: (jax.jacfwd(g, 1)(*arguments), jax.jacrev(g, (0, 1))(*arguments))
    for a, b in zip(*map(jax.tree.leaves, jax.jit(lambda: (derivatives(part), derivatives(wanted)))())):
        assert_close(a, b, rtol=1e-10)


def test_no_key_is_used_twice():
    W, x, labels, v = problem()
    product = lambda v: 2 * v
    calls = {
        "fisher": lambda key: fisher_vp(f, CE, W, x, labels, v, key=key, num_samples=2, batch_size=3),
        "trace": lambda key: estimators.hutchinson_trace(product, W, key, 4),
        "diagonal": lambda key: estimators.hutchinson_diagonal(product, W, key, 4),
        "hutch++": lambda key: estimators.hutchpp_trace(product, W, key, 6),
        "eigenpairs": lambda key: estimators.top_eigenpairs(product, W, key, 2),
        "density": lambda key: estimators.spectral_density(product, W, key, 4),
    }
    twice = lambda key: jax.random.bits(key) + jax.random.bits(key)
    with jax.debug_key_reuse(True):
        for call in calls.values():
            jax.jit(call).trace(jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(twice).trace(jax.random.key(0))


# On a mesh


def sharded_problem(kind):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"W1": jax.random.normal(keys[0], (8, 16)), "W2": jax.random.normal(keys[1], (16, 8))}
    x, labels = jax.random.normal(keys[2], (24, 8)), jax.random.randint(keys[3], (24,), 0, 8)
    v = jax.tree.map(jnp.cos, params)
    if kind is None:
        return params, x, labels, v
    weights = {"W1": (None, "model"), "W2": ("model", None)}
    return placed(mesh_of(kind, data=4, model=2), (params, x, labels, v), (weights, ("data",), ("data",), weights))


def mlp(params, x):
    """Weights that are sharded are gathered first, where the mesh leaves that to the program."""
    specs = [jax.typeof(W).sharding.spec for W in params.values()]
    if any(name is not None for spec in specs for name in spec):
        params = {name: jax.sharding.reshard(W, jax.sharding.PartitionSpec()) for name, W in params.items()}
    return jnp.tanh(x @ params["W1"]) @ params["W2"]


def everything(params, x, labels, v):
    """Products and solutions by name; of each way through the examples one, then all."""
    at, key = (mlp, CE, params, x, labels), jax.random.key(1)
    mask = functools.partial(CE, where=labels != 2)
    yield "batches and a rest", lambda: ggn_vp(*at, v, batch_size=16)
    yield "sampled, masked", lambda: fisher_vp(mlp, mask, params, x, labels, v, key=key, num_samples=3, batch_size=8)
    yield "solved", lambda: damped_solve(functools.partial(ggn_vp, *at), v, 0.1, tol=1e-6).x
    yield "masked", lambda: ggn_vp(mlp, mask, params, x, labels, v, batch_size=8)
    yield "sampled", lambda: fisher_vp(*at, v, key=key, num_samples=3)
    for product in PRODUCTS:
        for size in (None, 8, 16):
            yield f"{product.__name__} {size}", functools.partial(product, *at, v, batch_size=size)


@pytest.mark.parametrize(
    ("kind", "count"),
    [(KINDS[-1], 2), *(pytest.param(kind, None, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_on_a_mesh_products_and_solves_are_those_of_one_device(kind, count):
    found = jax.jit(lambda *arguments: {name: of() for name, of in itertools.islice(everything(*arguments), count)})
    wanted = found(*sharded_problem(None))
    arguments = sharded_problem(kind)
    with around(arguments[1].sharding.mesh):
        found = found(*arguments)
    for name in wanted:
        a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[name])]) for tree in (found, wanted))
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=str(name))


# The Fisher information with options.


def integers(key):
    return jax.random.permutation(key, jnp.arange(N) % K)  # every class is there


def masses(key):
    return 3 * jax.random.dirichlet(key, jnp.ones(K), (N,))


def uniforms(key):
    return jax.random.uniform(key, (N, K))


FISHER = {
    "ignore_index": (functools.partial(CE, ignore_index=1), integers),
    "class_weights": (functools.partial(CE, class_weights=np.array([1.0, 5.0, 0.2])), integers),
    "label_smoothing": (functools.partial(CE, label_smoothing=0.3), integers),
    "smoothed class weights": (
        functools.partial(CE, label_smoothing=0.3, class_weights=np.array([1.0, 5.0, 0.2])),
        integers,
    ),
    "z_loss": (functools.partial(CE, z_loss=0.1), integers),
    "mask over classes": (functools.partial(CE, where=np.arange(N * K).reshape(N, K) % 4 != 0), integers),
    "mask over examples": (functools.partial(CE, where=np.arange(N) % 3 != 0), integers),
    "soft labels of mass 3": (js.softmax_cross_entropy, masses),
    "pos_weight": (functools.partial(js.sigmoid_binary_cross_entropy, pos_weight=5.0), uniforms),
    "KL at a temperature": (functools.partial(js.softmax_kl_divergence, temperature=2.0), uniforms),
    "l2_loss": (js.l2_loss, uniforms),
    "squared_error": (js.squared_error, uniforms),
    "sum_squared_error": (js.sum_squared_error, uniforms),
}


@pytest.mark.parametrize("name", one_in(3, FISHER, 2))
def test_sampled_fisher_with_options_agrees_within_its_standard_error(name, x64):
    """Entries of F from independent estimates, each within 5 standard errors of the exact one, which are small."""
    loss, labels = FISHER[name]
    W, x, _, v = problem()
    labels = labels(jax.random.key(7))

    @jax.jit
    def products(keys):
        sampled = lambda key: fisher_vp(f, loss, W, x, labels, v, key=key, num_samples=20)
        return fisher_vp(f, loss, W, x, labels, v), jax.lax.map(sampled, keys)

    exact, estimates = jax.tree.map(np.asarray, products(jax.random.split(jax.random.key(1), 400)))
    error = estimates.std(0, ddof=1) / 20
    assert np.all(np.abs(estimates.mean(0) - exact) <= 5 * error + 1e-15)
    assert 0 < np.linalg.norm(error) < 0.1 * np.linalg.norm(exact)


def test_draws_do_not_depend_on_the_batches(x64):
    W, x, labels, v = problem()
    sampled = functools.partial(fisher_vp, f, CE, W, x, labels, v, key=jax.random.key(2), num_samples=3)
    assert_close(*jax.jit(lambda: (sampled(), sampled(batch_size=3)))())


def test_fisher_counts_observations(x64):
    """An example of weight 3 is three of weight 1; smoothing, z-loss and drawn labels have no part."""
    W, x, labels, v = problem()
    weights = jnp.array([3.0, 1.0, 2.0])
    copies = np.repeat(np.arange(N), np.asarray(weights)[np.asarray(labels)].astype(int))

    @jax.jit
    def products():
        of = lambda **options: fisher_vp(f, functools.partial(CE, **options), W, x, labels, v)
        copied = fisher_vp(f, CE, W, x[copies], labels[copies], v) * len(copies) / N
        return of(class_weights=weights), copied, of(), of(label_smoothing=0.2), of(z_loss=0.5)

    weighted, copied, plain, *others = products()
    assert_close(weighted, copied)
    for other in others:
        assert_close(other, plain)


def test_fisher_of_capped_logits(x64):
    logits, label, cap = jnp.array([3.0, -1.0, 0.5]), jnp.array(0), 2.0

    @jax.jit
    def sampled_and_exact():
        F = js.logits_fisher(CE, logits, label, logit_softcap=cap, logit_temperature=1.5)
        g = F.sample_scores(jax.random.key(0), (200_000,))
        return g.T @ g / len(g), F.as_matrix()

    np.testing.assert_allclose(*sampled_and_exact(), atol=5 * 0.2 / np.sqrt(200_000))
