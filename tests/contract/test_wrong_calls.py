"""Wrong calls of every map, loss and linear head: refused before anything is traced, and the argument named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax.curvature import damped_solve
from tests.helpers import enable_x64, one_in
from tests.registry import CASES, HEADS
from tests.wrong_calls import (
    COMPLEX,
    COUNT,
    HARD,
    LABELS,
    LOGITS,
    MAP,
    MASK,
    NOT_NUMBERS,
    NUMBER,
    POSITIVE,
    SHAPELESS,
    SOFT,
    K,
    N,
    P,
    V,
    Z,
    assert_each_is_refused,
)

W = np.ones((K, 5), np.float32)
TARGETS = SOFT[:3] + SOFT[4:]  # None stands for 0
ONE_AXIS = (2, -3, 99, 0.5, "x", 1j)
AXIS = (*ONE_AXIS, (0, 0), (1, -1), (0, 5), (0, 0.5))
WHERE = (
    np.ones((N, K)),
    np.ones((N, K), int),
    np.ones((7, K), bool),
    np.ones((2, N, K), bool),
    "abc",
    [[True], [1, 2]],
)
TANGENT = (*MAP, np.ones(K), np.ones((N, K + 1)))
ALPHA = ("x", 1j, 0.5, float("nan"), np.ones(7), np.array([1.5, np.nan]))

MESH_AXIS = (3, 1.5, "nowhere", ("nowhere", 2), ("nowhere", "nowhere"), {"nowhere": 1})

on_mesh = {"axis_name": (None, MESH_AXIS)}
on_classes = {"axis": (-1, AXIS), "where": (MASK, WHERE), **on_mesh}


LINEAR = {
    "x": (V, (*LOGITS, 1.0)),
    "labels": (LABELS, HARD),
    "weights": (W, (*NOT_NUMBERS, 1j * W, W[1:], W[0])),
    "bias": (W[0], (*NOT_NUMBERS[:3], 1j * W[0], W[0, 1:])),
    "reduction": ("mean", ("average", 3, None)),
    "token_weights": (V[:, 0], (*NOT_NUMBERS[:3], 1j * V[:, 0], np.ones(7))),
    "label_smoothing": (0.1, (*NUMBER, -0.1, 1.5, float("nan"))),
    "class_weights": (W[0], (*NOT_NUMBERS[:3], 1j * W[0], W[0, 1:])),
    "ignore_index": (1, (1.5, "x", 1j)),
    "z_loss": (0.1, NUMBER),
    "logit_softcap": (30.0, (*POSITIVE[:3], 0.0, -1.0, float("nan"))),
    "chunk_size": (1, COUNT),
    "precision": ("highest", ("exact", 3)),
    "vocab_axis": (-1, (2, 0.5, "x")),
    "token_axes": (None, MESH_AXIS),
    "class_axes": (None, MESH_AXIS),
    **on_mesh,
}

INDICES = np.ones((N, K), int)  # of a dtype that class indices have, too
KINDS = {
    "label": (LABELS, HARD),
    "soft": (P, SOFT),
    "soft of classes": (P, (*SOFT, INDICES, INDICES[0])),
    "log": (Z, SOFT),
    "logits": (V, (*LOGITS, SHAPELESS)),
}
DIFFERENT = {  # where an argument may be more, or less, than its kind says
    js.entmax_loss: {"labels": (LABELS, (*SOFT, MASK, np.ones(7, int)))},
    js.multiclass_sparsemax_loss: {"labels": (LABELS, (*NOT_NUMBERS, np.ones(7, int)))},
    js.sparsemax_loss: {"labels": (P, (*NOT_NUMBERS, COMPLEX, SHAPELESS))},
    js.sum_squared_error: {"targets": (V, TARGETS)},
    js.squared_error: {"targets": (V, TARGETS)},
    js.l2_loss: {"targets": (V, TARGETS)},
    js.huber_loss: {"targets": (V, TARGETS)},
    js.log_cosh: {"targets": (V, TARGETS)},
}


def numbers_of(option) -> list[float]:
    """The wrong values of an option that are numbers out of its range."""
    some = isinstance(option.values[-1], float)
    return [x for x in option.wrong if some and isinstance(x, float) and not np.isnan(x)]


def of_head(head) -> dict:
    """Its arguments by the kinds and options of the registry."""
    first, *rest = head.parameters
    kinds = [f"{kind} of classes" if kind == "soft" and not head.elementwise else kind for kind in head.kinds]
    call = {first: (Z, LOGITS), **{name: KINDS[kind] for name, kind in zip(rest, kinds)}}
    for name, option in head.choices.items():
        value = option.values[-1]
        call[name] = (np.ones(K, np.float32) if isinstance(value, np.ndarray) else value, option.wrong)
    common = {name: wrong for name, wrong in on_classes.items() if name in head.parameters}
    return call | common | DIFFERENT.get(head.loss, {})


# function -> its arguments, each with a right value and the wrong ones
CALLS = {
    js.softmax: {"x": (Z, MAP), **on_classes},
    js.log_softmax: {"x": (Z, MAP), **on_classes},
    js.logsumexp: {"a": (Z, NOT_NUMBERS), "b": (V, (*NOT_NUMBERS[:3], SHAPELESS)), **on_classes},
    js.sparsemax: {"x": (Z, MAP), **on_classes},
    js.entmax15: {"x": (Z, MAP), **on_classes},
    js.entmax: {"x": (Z, MAP), "alpha": (1.5, (*ALPHA, float("inf"))), **on_classes},
    js.softmax_jvp: {"t": (V, TANGENT), "p": (P, LOGITS), "axis": (-1, ONE_AXIS), **on_mesh},
    js.softmax_vjp: {"g": (V, TANGENT), "p": (P, LOGITS), "axis": (-1, ONE_AXIS), **on_mesh},
    js.softmax_jacobian: {"x": (Z, (*MAP, 1.0)), **on_mesh},
    js.softmax_hessian: {"x": (Z, (*MAP, 1.0)), **on_mesh},
    js.softmax_second_derivative: {"u": (V, TANGENT), "v": (V, TANGENT), "p": (P, LOGITS), "axis": (-1, ONE_AXIS)},
    js.softmax_third_derivative: {"u": (V, TANGENT), "v": (V, TANGENT), "w": (V, TANGENT), "p": (P, LOGITS)},
    js.SoftmaxJacobian.from_logits: {
        "x": (Z, (*MAP, 1.0, np.ones((2, 0)))),
        "where": (MASK, WHERE),
        "alpha": (1.5, ALPHA),
        **on_mesh,
    },
    js.SoftmaxJacobian.from_probs: {"p": (P, (*LOGITS, 1.0, -P, 2 * P)), "alpha": (1.5, ALPHA), **on_mesh},
    **{head.loss: of_head(head) for head in HEADS},
    js.softcap_logits: {"logits": (Z, LOGITS), "cap": (30.0, POSITIVE)},
    js.linear_softmax_cross_entropy_loss: LINEAR,
    js.linear_softmax_cross_entropy_with_statistics: LINEAR,
    js.linear_softmax_log_probs: {
        name: given
        for name, given in (LINEAR | {"temperature": (2.0, POSITIVE)}).items()
        if name not in ("reduction", "token_weights", "label_smoothing", "class_weights", "z_loss")
    },
    js.linear_softmax_kl_divergence: {
        **{name: LINEAR[name] for name in ("x", "weights", "bias", "reduction", "token_weights", "chunk_size")},
        "target_x": (V, (*LOGITS, 1.0)),
        "target_weights": (W, (*NOT_NUMBERS, 1j * W, W[1:], W[:, 1:])),
        "target_bias": LINEAR["bias"],
        "temperature": (2.0, POSITIVE),
        "beta": (0.5, (*NUMBER, -0.1, 1.5)),
        "logit_softcap": LINEAR["logit_softcap"],
        "target_softcap": LINEAR["logit_softcap"],
        "precision": LINEAR["precision"],
        **{name: LINEAR[name] for name in ("vocab_axis", "axis_name", "token_axes", "class_axes")},
    },
    js.linear_softmax_top_k_kl_divergence: {
        "x": LINEAR["x"],
        "target_indices": (np.tile(np.arange(2), (*V.shape[:-1], 1)), (1.0, np.array(1), np.zeros((7, 2), int))),
        "target_log_probs": (np.full((*V.shape[:-1], 2), -1.0), (*NOT_NUMBERS, np.zeros((7, 2)))),
        **{name: LINEAR[name] for name in ("weights", "bias", "reduction", "token_weights", "chunk_size")},
        "temperature": (2.0, POSITIVE),
        "beta": (0.5, (*NUMBER, -0.1, 1.5)),
        **{name: LINEAR[name] for name in ("logit_softcap", "precision", "vocab_axis", "axis_name", "token_axes")},
        "class_axes": LINEAR["class_axes"],
    },
    js.weighted_mean: {"losses": (Z, LOGITS), "weights": (V, SOFT), "normalizer": (V, TARGETS)},
}


@pytest.mark.parametrize("f", CALLS, ids=lambda f: f.__qualname__)
def test_wrong_arguments(f):
    assert_each_is_refused(f, CALLS[f])


@pytest.mark.parametrize("f", CALLS, ids=lambda f: f.__qualname__)
def test_unknown_and_missing_arguments(f):
    right = {name: value for name, (value, _) in CALLS[f].items()}
    with pytest.raises(TypeError, match="colour"):
        f(**right, colour=1)
    with pytest.raises(TypeError, match=next(iter(right))):
        f(**dict(list(right.items())[1:]))


# What is known only when the compiled program runs.

J = js.SoftmaxJacobian.from_probs(jnp.array([0.75, 0.25]))
linear = functools.partial(js.linear_softmax_cross_entropy_loss, Z, LABELS, W)
TRACED = {
    "softcap": (lambda cap: js.softcap_logits(jnp.asarray(Z), cap), (0.0, -1.0)),
    "entmax": (lambda alpha: js.entmax(jnp.asarray(Z), alpha), (0.5,)),
    "solve": (lambda damping: J.solve(jnp.ones(2), damping), (-1.0,)),
    "logdet": (lambda damping: J.logdet(damping), (-1.0,)),
    "damped_solve": (lambda damping: damped_solve(lambda v: 3 * v, jnp.ones(2), damping).x, (-1.0,)),
    "temperature": (lambda t: js.logits_hessian(js.softmax_entropy, jnp.asarray(Z), logit_temperature=t).diagonal(),
                    (0.0, -1.0)),
    "cap": (lambda c: js.logits_hessian(js.softmax_entropy, jnp.asarray(Z), logit_softcap=c).diagonal(), (-1.0,)),
    "linear head, smoothing": (lambda s: linear(label_smoothing=s), (-0.1, 10.0)),
    "linear head, temperature": (lambda t: js.linear_softmax_kl_divergence(Z, Z, W, 2 * W, temperature=t), (-1.0,)),
    "linear head, class weight": (lambda w: linear(class_weights=jnp.full(5, w)), (-1.0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACED)
def test_traced_numbers_out_of_range_give_nan(name):
    f, wrong = TRACED[name]
    for value in wrong:
        assert np.all(np.isnan(jax.jit(f)(value)))
        with pytest.raises(ValueError):
            f(value)


OPTIONS = [(head, name) for head in HEADS for name, option in head.choices.items() if numbers_of(option)]


@pytest.mark.parametrize(("head", "name"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_traced_options_out_of_range_give_nan(head, name):
    """Loss and gradient of every example, and nothing else of what is in range."""
    args = tuple(np.asarray(a, np.int32 if a.dtype.kind == "i" else np.float32) for a in head.args)
    examples = args[0].shape[0] if args else 3
    z = jnp.asarray(np.cos(np.arange(examples * 4)).reshape(-1, 4), jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda z, value: jnp.sum(head.loss(z, *args, **{name: value}))))
    for value in numbers_of(head.choices[name]):
        assert np.all(np.isnan(f(z, value)[0])) and np.all(np.isnan(f(z, value)[1])), value
    with jax.debug_nans(True):
        f(z, float(head.choices[name].values[-1]))


def test_options_may_be_arrays_beside_traced_ones():
    """A concrete array is known inside jit as well: it switches off what it is 0 for."""
    option = jnp.zeros(())
    head = lambda z: js.softmax_cross_entropy_with_integer_labels(z, LABELS, label_smoothing=option, z_loss=option)
    np.testing.assert_array_equal(jax.jit(head)(Z), js.softmax_cross_entropy_with_integer_labels(Z, LABELS))
    np.testing.assert_array_equal(jax.jit(lambda: linear(label_smoothing=option))(), linear())


def test_class_weights_below_0():
    loss = js.softmax_cross_entropy_with_integer_labels
    weights = jnp.array([1.0, -1.0, 2.0])
    with pytest.raises(ValueError, match="class_weights must lie in"):
        loss(Z, LABELS, class_weights=weights)
    got = jax.jit(lambda w: loss(jnp.asarray(Z), jnp.array([1, 2]), class_weights=w))(weights)
    assert np.isnan(got[0]) and np.isfinite(got[1])


# What the session may have switched on or off.


def run_all(cases) -> None:
    for case in cases:
        args = case.cast("float32")
        value, gradient = jax.value_and_grad(lambda *a: jnp.sum(case.fn(*a)), case.argnums[0])(*args)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))
        assert value.dtype == gradient.dtype == jnp.float32, case.name


@pytest.mark.parametrize("case", one_in(2, CASES[::3]), ids=lambda case: case.name)
def test_float32_where_x64_is_on(case):
    """Strict promotion and rank promotion raise here, as in every test."""
    with enable_x64():
        run_all([case])


@pytest.mark.parametrize(
    "name",
    one_in(2, ["softmax_where", "label_cross_entropy_options", "softmax_kl_divergence", "poly_loss_cross_entropy"]),
)
def test_without_jit(name):
    with jax.disable_jit():
        run_all([case for case in CASES if case.name == name])
