"""What comes out for infinite, missing and wrong values: one table, for every function, in value, in both modes and at
second order, compiled or not, in every dtype. The table stands in the docstring of `jaxsoftmax.losses`."""

import contextlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from tests.helpers import enable_x64, one_in
from tests.registry import HEADS
from tests.registry.heads import HARD, INF, L2, NAN, NO_LIMIT, SOFT, ZEROS, broken, certain, excluded, none, two

ULPS = {"float64": 1e-14, "float32": 5e-7, "bfloat16": 8e-3, "float16": 1e-3}
ce = js.softmax_cross_entropy_with_integer_labels

# Rows of a function: logits, its other argument, value, and gradient of a loss, or of half the sum of a map's squares.
# The rows of a head are in the registry.
ANY_MAP = [
    (certain, None, [1, 0, 0], ZEROS),
    (excluded, None, [0, 0.5, 0.5], ZEROS),
    *((z, None, NAN, "nan") for z in NO_LIMIT),
]
A_SPARSE_MAP = [*ANY_MAP, (two, None, NAN, "nan")]
huge = [3e38, -3e38, 0.0]

TABLE: dict[str, tuple[Callable, Sequence]] = {
    "softmax": (lambda z, _: js.softmax(z), ANY_MAP),
    "sparsemax": (lambda z, _: js.sparsemax(z), A_SPARSE_MAP),
    "entmax15": (lambda z, _: js.entmax15(z), A_SPARSE_MAP),
    **{
        f"entmax({alpha})": (lambda z, _, alpha=alpha: js.entmax(z, jnp.asarray(alpha, z.dtype)), A_SPARSE_MAP)
        for alpha in (1.0, 1.3, 3.0)
    },
    "log_softmax": (
        lambda z, _: js.log_softmax(z),
        [
            (excluded, None, [-INF, -L2, -L2], None),
            (certain, None, [0, -INF, -INF], None),
            (huge, None, [0, -INF, -3e38], None),
            *((z, None, NAN, None) for z in NO_LIMIT),
        ],
    ),
    "logsumexp": (
        lambda z, _: js.logsumexp(z, -1),
        [
            (excluded, None, L2, [0, 0.5, 0.5]),
            (certain, None, INF, [1, 0, 0]),
            (two, None, INF, [0.5, 0.5, 0]),
            (huge, None, 3e38, [1, 0, 0]),
            (none, None, -INF, None),
            (broken, None, NAN, "nan"),
        ],
    ),
    "options": (
        lambda z, c: ce(z, c, label_smoothing=0.1, z_loss=0.1, class_weights=jnp.ones(3, z.dtype)),
        [r for r in HARD if r[0] is not certain],
    ),
    "entmax_loss of soft labels": (lambda z, y: js.entmax_loss(z, y), SOFT),
    **{f"entmax_loss({alpha})": (lambda z, c, alpha=alpha: js.entmax_loss(z, c, alpha), HARD) for alpha in (1.0, 2.0)},
    **{
        head.name: (lambda z, y, f=head.loss, has=bool(head.kinds): f(z, y) if has else f(z), head.special)
        for head in HEADS
        if head.special
    },
}


def arguments(rows: list, dtype: str, zeros: int):
    """Each row, and beside them slices of zeros with an ordinary argument."""
    z = jnp.asarray(np.array([r[0] for r in rows] + [ZEROS] * zeros), dtype)
    other = rows[0][1]
    if other is None:
        return z, None
    if isinstance(other, int):
        return z, jnp.asarray(np.array([r[1] for r in rows] + [0] * zeros), "int32")
    return z, jnp.asarray(np.array([r[1] for r in rows] + [[1.0, 0.0, 0.0]] * zeros), dtype)


def everything(f, z, argument):
    """Value; gradient of each slice in reverse and in forward mode; its derivative along one direction, both ways."""

    def scalars(z):
        value = f(z, argument).astype(jnp.float64 if z.dtype == jnp.float64 else jnp.float32)
        return value if value.ndim == 1 else jnp.sum(value * value, -1) / 2

    def gradient(z):
        return jax.grad(lambda z: jnp.sum(scalars(z)))(z)

    columns = jnp.eye(z.shape[-1], dtype=z.dtype)
    push = jax.vmap(lambda e: jax.jvp(scalars, (z,), (jnp.broadcast_to(e, z.shape),))[1], out_axes=-1)
    along = jnp.broadcast_to(jnp.array([0.5, -1.0, 0.25], z.dtype), z.shape)
    value, (reverse, second) = f(z, argument), jax.jvp(gradient, (z,), (along,))
    return {"value": value, "reverse": reverse, "forward": push(columns), "second": second}


def check(name: str, dtype: str = "float32", wrap: Callable = jax.jit, zeros: int = 1) -> None:
    f, rows = TABLE[name]
    z, argument = arguments(rows, dtype, zeros)
    got = {q: np.asarray(x, np.float64) for q, x in wrap(lambda z, a: everything(f, z, a))(z, argument).items()}
    tolerance = {"rtol": ULPS[dtype], "atol": ULPS[dtype]}
    for i, (logits, other, value, gradient) in enumerate(rows):
        told = f"{name} of {logits}, {other}: "
        if value != "same":
            np.testing.assert_allclose(
                got["value"][i], np.broadcast_to(value, got["value"][i].shape), err_msg=told, **tolerance
            )
        for q in ("reverse", "forward", "second"):
            x = got[q][i]
            if gradient == "nan":
                assert np.all(np.isnan(x)), f"{told}{q} {x}"
            elif gradient is not None:
                assert not np.any(np.isnan(x)), f"{told}{q} {x}"
                if isinstance(gradient, list) and q != "second":
                    np.testing.assert_allclose(x, gradient, err_msg=told + q, **tolerance)
    for q, x in got.items():  # the slices of zeros know nothing of the others
        assert np.all(np.isfinite(x[len(rows) :])), q
        np.testing.assert_array_equal(x[len(rows) :], np.broadcast_to(x[-1], x[len(rows) :].shape))


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    check(name)


@pytest.mark.parametrize("dtype", one_in(3, ["bfloat16", "float16", "float64"]))
@pytest.mark.parametrize("name", ["softmax", "softmax_cross_entropy_with_integer_labels", "poly_loss_cross_entropy"])
def test_table_in_other_dtypes(name, dtype):
    with enable_x64() if dtype == "float64" else contextlib.nullcontext():
        check(name, dtype)


@pytest.mark.parametrize("name", one_in(2, ["softmax", "softmax_cross_entropy"]))
def test_table_without_jit(name):
    check(name, wrap=lambda f: f)


WITHOUT = re.compile("sparsemax|entmax|logsumexp|options")


@pytest.mark.parametrize("name", one_in(3, [name for name in TABLE if not WITHOUT.search(name)]))
def test_several_of_plus_infinity_have_equal_shares(name):
    """As logits that are equal have, beside classes that are excluded."""
    f, rows = TABLE[name]
    of = jax.jit(lambda z, a: everything(f, z, a))
    _, argument = arguments([rows[-1]], "float32", 0)
    got, want = (of(jnp.array([z], "float32"), argument) for z in (two, [0.0, 0.0, -INF]))
    for q in want:
        np.testing.assert_allclose(got[q], want[q], rtol=1e-6, atol=1e-6, err_msg=q)


# Masks.

KEPT = np.array([[True, False, True], [False, False, False], [True, True, True]])
Z = np.array([[0.5, 0.0, -1.0], [0.0, 0.0, 0.0], [0.3, 1.0, -2.0]])
HARD_LABELS, WEIGHTS = np.array([0, 1, 2]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])

ARGUMENTS: dict[str, Callable] = {
    "label": lambda z: HARD_LABELS,
    "soft": lambda z: jnp.asarray(WEIGHTS, z.dtype),
    "logits": lambda z: -z,
    "log": lambda z: -z,
}


def masked(head, **options) -> Callable:
    return lambda z, w: head.loss(z, *(ARGUMENTS[kind](z) for kind in head.kinds), where=w, **options)


MASKED: dict[str, Callable] = {
    "softmax": lambda z, w: js.softmax(z, where=w),
    "log_softmax": lambda z, w: jnp.where(w, js.log_softmax(z, where=w), 0),
    "logsumexp": lambda z, w: jnp.where(jnp.any(w, -1), js.logsumexp(z, -1, where=w), 0),
    "sparsemax": lambda z, w: js.sparsemax(z, where=w),
    "entmax15": lambda z, w: js.entmax15(z, where=w),
    "options": masked(HEADS[0], label_smoothing=0.1, z_loss=0.1),
    **{head.name: masked(head) for head in HEADS if head.has_where},
}


@pytest.mark.parametrize("name", one_in(4, MASKED))
def test_what_stands_behind_a_mask_is_nothing(name):
    """NaN and inf behind a mask, a fully masked slice among them: the same bits, derivatives 0, no NaN on the way."""
    f = jax.jit(lambda z: everything(lambda z, _: MASKED[name](z, jnp.asarray(KEPT)), z, None))
    clean = {q: np.asarray(x) for q, x in f(jnp.asarray(Z, "float32")).items()}
    assert all(np.all(np.isfinite(x)) for x in clean.values())
    for q in ("reverse", "forward", "second"):
        assert np.all(clean[q][~KEPT] == 0), q
    assert np.all(clean["value"][1] == 0)
    for behind in (NAN, INF, -INF, 3e38):
        z = jnp.asarray(np.where(KEPT, Z, behind), "float32")
        with jax.debug_nans(True):
            got = f(z)
        for q, x in got.items():
            np.testing.assert_array_equal(x, clean[q])


@pytest.mark.parametrize("loss", [ce, js.focal_loss_with_integer_labels, js.entmax_loss], ids=lambda f: f.__name__)
def test_label_on_a_masked_class(loss):
    value, gradient = jax.jit(jax.value_and_grad(loss))(Z[0].astype("float32"), 1, where=KEPT[0])
    assert value == INF and not np.any(np.isnan(gradient))


def test_an_ignored_example_may_hold_anything():
    z, labels = jnp.array([[NAN, INF, 0.0], [0.0, 1.0, 2.0]]), jnp.array([-100, 1])
    loss, gradient = jax.value_and_grad(lambda z: ce(z, labels, ignore_index=-100).sum())(z)
    np.testing.assert_allclose(loss, ce(z[1], 1), rtol=1e-6)
    assert np.all(np.asarray(gradient[0]) == 0)


# Empty axes.


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sparsemax", "entmax15", "entmax"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_maps_of_nothing(name, shape):
    f = getattr(js, name)
    value, gradient = jax.jit(lambda z: (f(z), jax.grad(lambda z: jnp.sum(f(z)))(z)))(np.zeros(shape, np.float32))
    assert value.shape == gradient.shape == shape


OVER_CLASSES = [head for head in HEADS if not head.elementwise]


def loss_and_gradient(head, z, label):
    """With the first class, or `label` for every class, or the same logits as the argument."""
    arguments = {"label": jnp.zeros(z.shape[:-1], "int32"), "soft": jnp.full_like(z, label), "logits": z, "log": z}
    f = lambda z: head.loss(z, *(arguments[kind] for kind in head.kinds))
    value, pullback = jax.vjp(f, z)
    return value, pullback(jnp.ones_like(value))[0]


@pytest.mark.parametrize("head", [h for h in OVER_CLASSES if not h.absolute], ids=lambda head: head.name)
def test_one_class(head):
    """p = 1, so loss and gradient are 0, of any logit."""
    loss, gradient = jax.jit(lambda z: loss_and_gradient(head, z, 1))(jnp.array([[0.0], [-3e4], [1e30]]))
    assert np.all(np.asarray(loss) == 0) and np.all(np.asarray(gradient) == 0)


def test_maps_of_one_class():
    z = jnp.array([[0.0], [-3e4], [1e30]])
    for p in (js.softmax(z), js.sparsemax(z), js.entmax(z, 3.0), jnp.exp(js.log_softmax(z))):
        np.testing.assert_array_equal(p, 1)


# Many slices: XLA's CPU backend makes other kernels there, whose minimum and maximum drop NaN.

OF_MANY = ["log_softmax", "logsumexp", "softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"]


@pytest.mark.optimized
@pytest.mark.parametrize("name", one_in(2, [*OF_MANY, "softmax_entropy", "softmax_kl_divergence", "brier_loss"]))
def test_table_in_a_large_batch(name):
    check(name, zeros=5000)


MAPS = js.sparsemax, js.entmax15, lambda z: js.entmax(z, 1.3), lambda z: js.entmax(z, 3.0)


@pytest.mark.optimized
@pytest.mark.parametrize("function", MAPS)
def test_sparse_maps_keep_a_nan_in_its_slice_of_a_large_batch(function):
    z = np.zeros((5000, 3), "float32")
    z[7, 1], z[9, :2], z[11] = np.nan, np.inf, -np.inf
    p = np.asarray(jax.jit(function)(jnp.asarray(z)))
    wrong = np.isin(np.arange(5000), (7, 9, 11))
    assert np.all(np.isnan(p[wrong])) and not np.any(np.isnan(p[~wrong]))
    labels = jnp.zeros(5000, int)
    losses = np.asarray(jax.jit(js.multiclass_sparsemax_loss)(jnp.asarray(z), labels))
    np.testing.assert_array_equal(np.isnan(losses), wrong)
