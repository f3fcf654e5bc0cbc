"""Wrong calls of operators, curvature, estimators, networks, training and matrix calculus, as in test_wrong_calls.py.

What takes a function of the caller's may trace it before it finds a misfit, but the error is this package's own.
"""

import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsoftmax as js
from jaxsoftmax import curvature, linear_head, matrix_calculus, network, plotting
from jaxsoftmax.curvature import LastLayerLaplace, estimators, gauss_newton, last_layer_laplace
from jaxsoftmax.curvature.krylov import extreme_singular_values
from jaxsoftmax.matrix_calculus import identities
from jaxsoftmax.network import Layer
from jaxsoftmax.operators.base import SymmetricOperator
from jaxsoftmax.training import TrainState, make_train_step
from tests.contract import test_wrong_calls
from tests.wrong_calls import (
    COMPLEX,
    COUNT,
    FUNCTION,
    HARD,
    KEY,
    LABELS,
    LOGITS,
    MAP,
    NOT_NUMBERS,
    NUMBER,
    POSITIVE,
    VECTOR,
    K,
    N,
    P,
    V,
    Z,
    assert_each_is_refused,
)

KEY0 = jax.random.key(0)
loss = js.softmax_cross_entropy_with_integer_labels

T = 4  # queries and keys of attention
OF_HEADS = np.ones((T, 2, 3), np.float32)
BAD_HEADS = (*MAP, np.ones(3), np.ones((T, 2, 3), int), np.ones((T, 2, 4), np.float32))

# Operators: functions of the method's arguments.

DAMPING = (*MAP, 0.0, -1.0, float("nan"), np.ones(7))
SHAPE = ((2,), (3, 2.5, "ab", (-1,), (1.5,), None))
OPERATORS = {  # made where a test asks for one
    "SoftmaxJacobian": functools.cache(lambda: js.SoftmaxJacobian.from_logits(Z)),
    "Hessian": functools.cache(lambda: js.logits_hessian(js.brier_loss, Z, P)),
    "GGN": functools.cache(lambda: js.logits_ggn(loss, Z, LABELS)),
    "capped GGN": functools.cache(lambda: js.logits_ggn(loss, Z, LABELS, logit_softcap=5.0)),
}
METHODS = {
    "mv": {"v": (V, VECTOR)},
    "quadratic_form": {"v": (V, VECTOR)},
    "solve": {"v": (V, VECTOR), "damping": (0.5, DAMPING)},
    "logdet": {"damping": (0.5, DAMPING)},
    "factor_rmv": {"v": (V, VECTOR)},
    "factor_mv": {"u": (V, (*MAP, np.ones((N, K + 2)), np.ones((7, K))))},
}
OF_JACOBIAN = {
    "pinv_mv": {"v": (V, VECTOR)},
    "scaled": {"weight": (2.0, (*NOT_NUMBERS, 1j, np.ones(7)))},
    "sample": {"key": (KEY0, KEY), "shape": SHAPE},
    "sample_pinv": {"key": (KEY0, KEY), "shape": SHAPE},
    "sample_inverse": {"key": (KEY0, KEY), "damping": (0.5, DAMPING), "shape": SHAPE},
    "__matmul__": {"x": (V[0], (*MAP, np.ones(K + 1), np.ones((K + 1, 2))))},
    "__rmatmul__": {"x": (V[0], (*MAP, np.ones(K + 1), np.ones((2, K + 1))))},
}
ON_OPERATORS = [(name, method, METHODS[method]) for name in OPERATORS for method in METHODS]
ON_OPERATORS += [("SoftmaxJacobian", method, OF_JACOBIAN[method]) for method in OF_JACOBIAN]

# Networks: x (2, 3) -> 2 -> 3 logits.

PARAMS = Layer(np.ones((2, K), np.float32)), Layer(np.ones((K, 2), np.float32), np.ones(K, np.float32))
WEIGHTS = np.ones((K, K), np.float32)
BAD_LAYERS = [
    Layer(WEIGHTS[0]),
    Layer("abc"),
    Layer(WEIGHTS.tolist()),
    Layer(np.ones((K, K), int)),
    Layer(1j * WEIGHTS),
]
BAD_LAYERS += [Layer(WEIGHTS, WEIGHTS[0, 1:]), Layer(WEIGHTS, np.ones(K, int))]
BAD_PARAMS = (None, (), "abc", 1.0, {"W": WEIGHTS}, (WEIGHTS,), (Layer(WEIGHTS), Layer(WEIGHTS[:, 1:])))
BAD_PARAMS += tuple((layer,) for layer in BAD_LAYERS)
INPUTS = (Z, (*MAP, 1.0, np.ones((N, K + 1))))
LOSS = (loss, (*FUNCTION, lambda z, y: jnp.mean(loss(z, y))))
NETWORK = {
    "params": (PARAMS, BAD_PARAMS),
    "x": INPUTS,
    "activation": (jnp.tanh, (*FUNCTION, jnp.sum, lambda a: a[..., :1])),
}
TRAINED = {"params": NETWORK["params"], "x": INPUTS, "targets": (LABELS, HARD), "loss": LOSS} | NETWORK

# Curvature: f(θ, x), θ = {"w": (3,)}.

THETA = {"w": np.ones(K, np.float32)}
BAD_TREE = (None, (), np.ones(K), {"w": np.ones(K + 1)}, {"w": "abc"}, {"w": COMPLEX[0]}, {"v": np.ones(K)})
BAD_THETA = (None, {}, {"w": "abc"}, {"w": [1.0, 2.0]}, {"w": np.ones(K, int)}, {"w": COMPLEX[0]})


def model(params, x):
    return x * jnp.broadcast_to(params["w"], x.shape)


MODEL = (model, (*FUNCTION, lambda params, x: (x, x), lambda params, x: x.astype(int)))
CURVATURE = {
    "f": MODEL,
    "loss": LOSS,
    "params": (THETA, BAD_THETA),
    "x": (Z, ()),
    "labels": (LABELS, HARD),
    "v": (THETA, BAD_TREE),
    "batch_size": (1, COUNT),
}
HEAD = (loss, (*LOSS[1], lambda z, y: loss(z, y)))
LIKELIHOOD = (loss, (*HEAD[1], js.focal_loss_with_integer_labels))
PRODUCT = (lambda v: v, (*FUNCTION, lambda v: {"other": v["w"]}, lambda v: {"w": v["w"][1:]}))
LIKE = (THETA, (*BAD_THETA[:3], *BAD_THETA[4:], (), "abc"))  # numbers count as arrays
ESTIMATE = {"product": PRODUCT, "like": (THETA, (*LIKE[1], {"w": np.ones(0)})), "key": (KEY0, KEY)}
FEATURES = (np.ones((N, 2), np.float32), (*MAP, 1.0, np.ones((N, 5))))
OPTIMIZER = (optax.sgd(0.1), (None, "sgd", 0.1, optax.sgd))


def damped(**options):
    """One update of `gauss_newton`, which is when some of its arguments are used."""
    optimizer = gauss_newton(model, loss, **options)
    gradient = jax.tree.map(jnp.ones_like, THETA)
    value_fn = lambda params: jnp.mean(loss(model(params, Z), LABELS))
    extra = {"batch": (Z, LABELS), "value": value_fn(THETA), "value_fn": value_fn}
    return lambda **given: optimizer.update(gradient, optimizer.init(THETA), THETA, **(extra | given))


def update(batch, value_fn):
    return damped()(batch=batch, value_fn=value_fn)


def differential(X, dX):
    return matrix_calculus.differential(lambda X: X["w"] ** 2)(X, dX)


# Methods, and what they are called on.


@functools.cache
def fisher():
    return js.logits_fisher(loss, Z, LABELS)


@functools.cache
def posterior(targets="labels"):
    targets, of = (LABELS, loss) if targets == "labels" else (V, js.l2_loss)
    return last_layer_laplace(PARAMS[1], np.ones((N, 2), np.float32), targets, of)


@functools.cache
def density():
    return estimators.spectral_density(lambda v: v, THETA, KEY0, num_steps=2)


OWNERS = {
    SymmetricOperator.sample_targets: fisher,
    SymmetricOperator.sample_scores: fisher,
    LastLayerLaplace.predictive: lambda: posterior("numbers"),
    LastLayerLaplace.logits: posterior,
    LastLayerLaplace.probabilities: posterior,
    LastLayerLaplace.log_evidence: posterior,
    LastLayerLaplace.with_best_prior: posterior,
    estimators.SpectralDensity.mean_of: density,
    estimators.SpectralDensity.density: density,
}


PICTURE = {"x": (Z[0], (*MAP, 1.0, Z, np.ones(0))), "alpha": (1.5, (*NUMBER, 0.5, float("nan")))}
SIZES = {name: (8, COUNT[1:]) for name in ("num_tokens", "features", "vocab")}
SIZES |= {"itemsize": (4, COUNT), "platform": ("cpu", (None, 3))}
HEADS = {"loss": HEAD, "logits": (Z, (*LOGITS, 1.0)), "labels": (LABELS, HARD)}
HEADS |= {
    "logit_softcap": (30.0, (*POSITIVE[:3], *POSITIVE[4:])),
    "logit_temperature": (2.0, (*POSITIVE[:3], *POSITIVE[4:])),
}

CALLS = {
    SymmetricOperator.sample_targets: {"key": (KEY0, KEY), "shape": SHAPE},
    SymmetricOperator.sample_scores: {"key": (KEY0, KEY), "shape": SHAPE},
    js.logits_hessian: HEADS,
    js.logits_ggn: HEADS,
    js.logits_fisher: HEADS | {"loss": LIKELIHOOD},
    network.init: {
        "key": (KEY0, KEY),
        "sizes": ((3, 2), (5, None, "ab", (), (3,), (3, 0), (3, -1), (3, 1.5), 3.5)),
        "dtype": (jnp.float32, (int, "abc", complex, 3)),
    },
    network.forward: NETWORK,
    network.jacobians: NETWORK,
    network.backprop: TRAINED | {"layout": ("numerator", ("rows", 1, None))},
    network.derivatives: TRAINED | {"layout": ("numerator", ("rows", 1, None))},
    network.per_example_gradients: TRAINED,
    network.per_example_gradient_norms: TRAINED,
    network.gradient_flow: TRAINED | {"num_steps": (1, COUNT)},
    plotting.visualize_gradient_flow: TRAINED,
    js.visualize_jacobian: PICTURE | {"class_names": ("abc", (5, ["a", "b"]))},
    js.visualize_spectrum: PICTURE,
    js.verify.largest_eigenvalue_bound: {"alpha": PICTURE["alpha"], "num_classes": (3, COUNT)},
    js.verify.logit_regimes: {"num_classes": (3, (*COUNT, 1))},
    js.verify_jacobian_properties: {
        "x": (Z[0], (*MAP, 1.0, np.ones((2, 0)), np.ones((0, 3)))),
        "alpha": PICTURE["alpha"],
        "step": (0.05, (*NUMBER, -1.0, float("nan"))),
    },
    extreme_singular_values: {
        "f": (jnp.sin, (*FUNCTION, jnp.sum)),
        "x": (Z[0], (*MAP, 1.0, Z)),
        "key": (KEY0, KEY),
        "num_steps": (2, COUNT),
    },
    js.dot_product_attention: {
        "query": (OF_HEADS, BAD_HEADS),
        "key": (OF_HEADS, BAD_HEADS),
        "value": (OF_HEADS, BAD_HEADS),
        "bias": (np.zeros((T, T), np.float32), (*NOT_NUMBERS[:3], 1j * np.zeros((T, T)), np.zeros((T + 1, T)))),
        "mask": (np.ones((T, T), bool), (*NOT_NUMBERS[:3], np.ones((T, T)), np.ones((T + 1, T), bool))),
        "scale": (1.0, ("x", 1j, np.ones((2, 2)))),
        "local_window_size": (1, (-1, 1.5, "x", (1, 2, 3))),
        "logit_softcap": (30.0, (*NUMBER[:3], 0.0, -1.0, float("nan"))),
        "segment_ids": (np.zeros(T, int), ("x", np.zeros(T), np.zeros(T + 1, int))),
    },
    curvature.hvp: CURVATURE,
    curvature.ggn_vp: CURVATURE,
    curvature.fisher_vp: CURVATURE | {"loss": LIKELIHOOD, "key": (KEY0, KEY[:1] + KEY[2:]), "num_samples": (2, COUNT)},
    curvature.empirical_fisher_vp: CURVATURE,
    curvature.dense: {"product": PRODUCT[:1] + (FUNCTION,), "like": (THETA, BAD_THETA)},
    curvature.linearized: {"product": PRODUCT[:1] + (FUNCTION,), "like": (THETA, BAD_THETA)},
    curvature.damped_solve: {
        "product": PRODUCT,
        "b": LIKE,
        "damping": (1.0, (*NUMBER, -1.0, float("nan"))),
        "preconditioner": (lambda r: r, (*FUNCTION[:2], *PRODUCT[1][-2:])),
        "start": (THETA, BAD_TREE[1:]),
        "tol": (0.1, (*NUMBER, -1.0, float("nan"))),
        "max_steps": (3, COUNT),
    },
    gauss_newton: {
        "f": (model, FUNCTION),
        "loss": (loss, FUNCTION),
        "learning_rate": (1.0, NUMBER),
        "damping": (1.0, (*NUMBER, -1.0, float("nan"))),
        "adapt": (1.5, (*NUMBER, 0.5, float("nan"))),
        "tol": (0.1, (*NUMBER, -1.0, float("nan"))),
        "max_steps": (3, COUNT),
        "warm_start": (0.5, NUMBER),
        "batch_size": (1, COUNT),
    },
    update: {"batch": ((Z, LABELS), (None, 1.0, (Z,), (Z, LABELS, Z))), "value_fn": (lambda params: 0.0, FUNCTION)},
    last_layer_laplace: {
        "layer": (PARAMS[1], (None, PARAMS, WEIGHTS, *BAD_LAYERS[:-1])),
        "features": FEATURES,
        "labels": (LABELS, HARD),
        "loss": (loss, (*FUNCTION, js.softmax, lambda z, y: loss(z, y))),
        "prior_precision": (1.0, POSITIVE),
        "batch_size": (1, COUNT),
    },
    LastLayerLaplace.predictive: {"features": FEATURES},
    LastLayerLaplace.logits: {"features": FEATURES},
    LastLayerLaplace.probabilities: {"features": FEATURES, "key": (KEY0, KEY[:1] + KEY[2:]), "num_samples": (2, COUNT)},
    LastLayerLaplace.log_evidence: {"prior_precision": (1.0, (*POSITIVE[:3], *POSITIVE[4:]))},
    LastLayerLaplace.with_best_prior: {"num_steps": (2, COUNT[1:])},
    TrainState.create: {"params": (THETA, ({"w": "abc"}, "abc")), "optimizer": OPTIMIZER},
    make_train_step: {"loss_fn": (loss, FUNCTION), "optimizer": OPTIMIZER},
    estimators.hutchinson_trace: ESTIMATE | {"num_samples": (2, COUNT)},
    estimators.hutchinson_diagonal: ESTIMATE | {"num_samples": (2, COUNT)},
    estimators.hutchpp_trace: ESTIMATE | {"num_samples": (3, (*COUNT, 2))},
    estimators.top_eigenpairs: ESTIMATE | {"num_pairs": (2, (*COUNT, 4)), "num_steps": (5, (*COUNT, 1))},
    estimators.spectral_density: ESTIMATE | {"num_steps": (2, COUNT), "num_probes": (1, COUNT)},
    estimators.SpectralDensity.mean_of: {"f": (jnp.sin, FUNCTION)},
    estimators.SpectralDensity.density: {"grid": (Z[0], (*MAP, 1.0, Z)), "width": (0.5, POSITIVE)},
    matrix_calculus.frobenius: {"A": (Z, (*MAP, Z[0], Z[:, 1:])), "B": (Z, (*MAP, Z[0], Z[:, 1:]))},
    matrix_calculus.numerator_layout: {
        "derivatives": ({"w": Z}, ("abc", {"w": "abc"}, [1.0, "x"], 1.0)),
        "out_ndim": (1, (-1, 1.5, "x", None, 3)),
    },
    matrix_calculus.denominator_layout: {"derivatives": (Z, ("abc", {"w": "abc"}))},
    matrix_calculus.differential: {"f": (jnp.sin, FUNCTION)},
    differential: {"X": (THETA, ({"w": "abc"}, {"w": COMPLEX})), "dX": (THETA, BAD_TREE)},
    identities.IDENTITIES["trace"].sample: {"key": (KEY0, KEY), "dtype": (float, (int, "abc", complex, 3))},
    identities.IDENTITIES["trace"].error: {"key": (KEY0, KEY), "dtype": (float, (int, "abc", complex, 3))},
    linear_head.default_chunk_size: SIZES,
    linear_head.predict_temp_bytes: SIZES | {"chunk_size": (8, COUNT)},
}
ALSO = {"targets": "labels"}  # the loss's own name for its argument


@pytest.mark.parametrize(("operator", "method", "call"), ON_OPERATORS, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments_of_methods(operator, method, call):
    f = getattr(OPERATORS[operator](), method)
    also = {"x": "factor of @"}
    if method.startswith("__"):
        assert_each_is_refused(lambda x: f(x), call, also=also)
    else:
        assert_each_is_refused(f, call)


@pytest.mark.parametrize("f", CALLS, ids=lambda f: f.__qualname__)
def test_wrong_arguments(f):
    bound = getattr(OWNERS[f](), f.__name__) if f in OWNERS else f
    assert_each_is_refused(bound, CALLS[f], own_frames_only=False, also=ALSO)


# A tuple or a table of results, or what is checked where its parts are.
NOT_CALLED = {"GradientFlow", "Layer", "Derivatives", "Estimate", "SpectralDensity", "Solution", "GaussNewtonState"}
NOT_CALLED |= {"DiagonalPlusLowRank", "TokenStatistics", "JacobianReport", "Property", "IDENTITIES", "Identity"}
NOT_CALLED |= {"custom_vjp", "Comparison", "DerivativeReport", "compare_derivatives", "Curvature", "curvature_of"}


def test_every_public_name_is_registered():
    called = {*test_wrong_calls.CALLS, *CALLS, SymmetricOperator, LastLayerLaplace, estimators.SpectralDensity}
    owners = [getattr(f, "__self__", None) for f in called]
    called |= {owner if isinstance(owner, type) else type(owner) for owner in owners}
    missing = []
    for _, name, _ in pkgutil.walk_packages(js.__path__, "jaxsoftmax."):
        module = importlib.import_module(name)
        if "._" in name:
            continue
        names = [n for n in getattr(module, "__all__", ()) if n not in NOT_CALLED]
        missing += [f"{name}.{n}" for n in names if getattr(module, n) not in called]
    missing += [n for n in js.__all__ if n not in NOT_CALLED and getattr(js, n) not in called]
    assert not missing
