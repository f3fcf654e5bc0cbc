"""Wrong calls of every map, loss and linear head: refused before anything is traced, and the argument named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
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
ALPHA = ("x", 1j, 0.5, float("nan"), np.ones(7))

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
    "vocab_axis": (-1, (2, 0.5, "x")),
    "token_axes": (None, MESH_AXIS),
    "class_axes": (None, MESH_AXIS),
    **on_mesh,
}

KINDS = {
    "label": (LABELS, HARD),
    "soft": (P, SOFT),
    "log": (Z, SOFT),
    "logits": (V, (*LOGITS, SHAPELESS)),
}
DIFFERENT = {  # where an argument may be more, or less, than its kind says
    js.entmax_loss: {"labels": (P, (*SOFT, MASK))},
    js.multiclass_sparsemax_loss: {"labels": (LABELS, (*NOT_NUMBERS, np.ones(7, int)))},
    js.sparsemax_loss: {"labels": (P, (*NOT_NUMBERS, COMPLEX, SHAPELESS))},
    js.sum_squared_error: {"targets": (V, TARGETS)},
    js.squared_error: {"targets": (V, TARGETS)},
    js.l2_loss: {"targets": (V, TARGETS)},
    js.huber_loss: {"targets": (V, TARGETS)},
    js.log_cosh: {"targets": (V, TARGETS)},
}


def of_head(head) -> dict:
    """Its arguments by the kinds and options of the registry."""
    first, *rest = head.parameters
    call = {first: (Z, LOGITS), **{name: KINDS[kind] for name, kind in zip(rest, head.kinds)}}
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
    js.linear_softmax_kl_divergence: {
        **{name: LINEAR[name] for name in ("x", "weights", "bias", "reduction", "token_weights", "chunk_size")},
        "target_x": (V, (*LOGITS, 1.0)),
        "target_weights": (W, (*NOT_NUMBERS, 1j * W, W[1:], W[:, 1:])),
        "target_bias": LINEAR["bias"],
        "temperature": (2.0, POSITIVE),
        **{name: LINEAR[name] for name in ("vocab_axis", "axis_name", "token_axes", "class_axes")},
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
