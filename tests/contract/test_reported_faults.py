"""Right where other projects had public reports of a fault. A case stands for a kind, over all functions it touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxsoftmax as js
from jaxsoftmax._core import classes
from tests.helpers import assert_close, enable_x64, one_in
from tests.registry import CASES, HEADS, case_id
from tests.registry.samples import MASK as KEPT
from tests.registry.samples import Z

INF, NAN = np.inf, np.nan
ce = js.softmax_cross_entropy_with_integer_labels


# logsumexp with factors b.


def lse(a, b, **options):
    return js.logsumexp(jnp.asarray(a), b=jnp.asarray(b), **options)


W = np.exp(85.0) * 1e-37


@pytest.mark.parametrize(
    "a, b, value, da, db",
    [
        ([100.0, 0.0], [0.0, 1.0], 0.0, [0, 1], None),  # a term of factor 0, however large
        ([1.0, 2.0], [1.0, 0.0], 1.0, [1, 0], [1, np.e]),
        ([1.0, NAN], [1.0, 0.0], 1.0, [1, 0], None),
        ([1.0, INF], [1.0, 0.0], 1.0, [1, 0], None),
        ([INF, 2.0], [1.0, 1.0], INF, [1, 0], None),
        ([85.0, 0.0], [1e-37, 1.0], np.log1p(W), [W / (1 + W), 1 / (1 + W)], [1e37 * W / (1 + W), 1 / (1 + W)]),
        ([0.0, 0.0], [0.0, 0.0], -INF, [0, 0], None),
    ],
)
def test_factors(a, b, value, da, db):
    gradients = jax.jit(lambda a, b: (jax.grad(lse, (0, 1))(a, b), jax.jacfwd(lse)(a, b), jax.hessian(lse)(a, b)))
    a, b = jnp.asarray(a), jnp.asarray(b)
    (by_a, by_b), forward, second = gradients(a, b)
    np.testing.assert_allclose(lse(a, b), value, rtol=1e-5)
    np.testing.assert_allclose(by_a, da, rtol=2e-5)
    np.testing.assert_allclose(forward, da, rtol=2e-5)
    np.testing.assert_allclose(second, np.diag(da) - np.outer(da, da), atol=1e-5)
    if db is not None:
        np.testing.assert_allclose(by_b, db, rtol=2e-5)


def test_factors_behind_a_mask():
    a, b, here = jnp.array([1.0, NAN]), jnp.array([2.0, NAN]), jnp.array([True, False])
    value, (da, db) = jax.jit(jax.value_and_grad(lse, (0, 1)))(a, b, where=here)
    np.testing.assert_allclose(value, 1 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose([da, db], [[1, 0], [0.5, 0]])
    assert lse(a, b, where=~here & here) == -INF


def test_signs():
    """The largest term negative, the sum not; the sign beside an infinite one."""
    np.testing.assert_allclose(
        lse([3.06409428, 0.37251854, 3.87471931], [1.88190708, 2.84174795, -0.85016884]), 1.2452165, rtol=1e-5
    )
    for factor in (1.0, -1.0):
        np.testing.assert_array_equal(lse([INF], [factor], return_sign=True), [INF, factor])


def test_complex_terms_and_factors():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3)) for _ in range(2))
    here = np.array([[True, False, True], [False] * 3])
    a[~here] = NAN
    for terms, factors in ((a, b), (a, b.real), (a.real, b), (a, None)):
        total = np.sum(np.where(here, np.exp(terms) * (1 if factors is None else factors), 0), -1)
        narrow = [
            x if x is None else jnp.asarray(x, "complex64" if np.iscomplexobj(x) else "float32")
            for x in (terms, factors)
        ]
        f = lambda a, b, **options: js.logsumexp(a, -1, b=b, where=jnp.asarray(here), **options)
        np.testing.assert_allclose(jnp.exp(f(*narrow)), total, rtol=1e-5)
        size, phase = f(*narrow, return_sign=True)
        np.testing.assert_allclose(phase * jnp.exp(size).astype("complex64"), total, rtol=1e-5)
        real = lambda a: jnp.sum(jnp.where(jnp.asarray(here.any(-1)), f(a, narrow[1], return_sign=True)[0], 0.0))
        gradient = np.asarray(jax.grad(real)(narrow[0]))
        assert np.all(gradient[~here] == 0) and np.all(np.isfinite(gradient[here]))


# No NaN on the way to a finite result: jax.debug_nans(True) must not stop there, op by op or compiled.


@pytest.mark.parametrize("case", one_in(6, CASES), ids=case_id)
@pytest.mark.parametrize("order", one_in(2, [1, 2]))
def test_debug_nans(case, order):
    args = case.cast("float32")
    derivative = value_and_gradient(case)
    with jax.debug_nans(True), jax.disable_jit():
        if order == 1:
            derivative(*args)
        else:
            first, rest = args[0], args[1:]
            jax.jvp(lambda z: derivative(z, *rest), (first,), (jnp.cos(first),))


def value_and_gradient(case):
    return jax.value_and_grad(lambda *args: jnp.sum(case.fn(*args)), case.argnums)


# jax.export: symbolic batches, and every platform from one that has only a CPU.


@pytest.mark.parametrize("case", one_in(6, [case for case in CASES if case.batched], 1), ids=case_id)
def test_export_with_symbolic_batch(case):
    (b,) = export.symbolic_shape("b")
    specs = [jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in case.cast("float32")]
    f = jax.jit(lambda *args: (case.fn(*args), value_and_gradient(case)(*args)))
    exported = export.export(f, platforms=["cpu", "cuda", "tpu"])(*specs)
    assert exported.out_avals[0].shape[0] == b
    if case.name in CALLED:
        args = case.cast("float32")
        for got, want in zip(jax.tree.leaves(exported.call(*args)), jax.tree.leaves(f(*args))):
            assert_close(got, want)


CALLED = ("softmax_cross_entropy_with_integer_labels", "entmax", "softmax_kl_divergence")


@pytest.mark.parametrize("name", one_in(2, ["softmax", "entmax_loss", "softmax_cross_entropy_with_integer_labels"]))
def test_export_with_symbolic_classes(name):
    (case,) = (case for case in CASES if case.name == name)
    k, args = export.symbolic_shape("k")[0], case.cast("float32")
    specs = [jax.ShapeDtypeStruct(tuple(k if n == Z.shape[1] else n for n in a.shape), a.dtype) for a in args]
    exported = export.export(jax.jit(value_and_gradient(case)))(*specs)
    assert_close(exported.call(*args)[0], value_and_gradient(case)(*args)[0])


@pytest.mark.parametrize("size", ["batch", "classes"])
def test_export_of_operators(size):
    n = export.symbolic_shape("n")[0]
    z = jax.ShapeDtypeStruct((n, 4) if size == "batch" else (3, n), "float32")

    def products(z):
        J = js.SoftmaxJacobian.from_logits(z)
        H = js.logits_hessian(js.softmax_entropy, z)
        return J.mv(z), J.solve(z, 0.5), J.logdet(0.5), J.spectral_norm(), H.mv(z), H.diagonal()

    exported = export.export(jax.jit(products))(z)
    for got, want in zip(exported.call(jnp.asarray(Z, "float32")), products(jnp.asarray(Z, "float32"))):
        assert_close(got, want)


# `where`: of classes if it broadcasts to the logits, of examples if it has their shape. Where both hold, optax decides.


@pytest.mark.parametrize("head", [head for head in HEADS if head.has_where], ids=lambda head: head.name)
def test_masks_of_classes_and_of_examples(head):
    z = jnp.asarray(np.stack([Z, -Z]), "float32")
    args = [jnp.asarray(np.stack([a, a]), "int32" if a.dtype.kind == "i" else "float32") for a in head.args]
    classes = jnp.asarray(KEPT)  # (T, V) on (B, T, V)
    examples = jnp.array([[True, False, True], [False, True, True]])
    masks = [classes[0], classes, jnp.ones((2, 1, 1), bool), examples, examples[0]]
    loss = lambda where: head.loss(z, *args, where=where)
    spelled = [jnp.broadcast_to(mask, z.shape) for mask in [*masks[:3], examples[..., None], examples[0, :, None]]]
    got = [*map(loss, masks)]  # not in one jit: all are one compiled function
    np.testing.assert_array_equal(got, [*map(loss, spelled)])
    assert np.all(np.asarray(got[3])[~np.asarray(examples)] == 0)
    with pytest.raises(ValueError, match=r"where has shape \(5,\), .*\(2, 3, 4\).*\(2, 3\)"):
        loss(jnp.ones(5, bool))


def test_masks_that_could_be_either_as_in_optax():
    z = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0], [2.0, 1.0, 0.0]])
    where, y, q = jnp.array([True, True, False]), jax.nn.softmax(-z), jax.nn.log_softmax(z)
    for name, *arguments in (
        ("softmax_cross_entropy", z, y),
        ("softmax_cross_entropy_with_integer_labels", z, jnp.array([0, 1, 0])),
        ("kl_divergence", q, y),
        ("kl_divergence_with_log_targets", q, jnp.log(y)),
    ):
        ours, theirs = (jax.jit(getattr(package, name))(*arguments, where=where) for package in (js, optax.losses))
        assert_close(ours, theirs)
    assert js.brier_loss(z, y, where=where)[2] == 0


# Labels of narrow types are compared as integers.


@pytest.mark.parametrize("dtype", ["uint4", "int4", "uint8", "int8", "uint16", "uint32", "int32"])
def test_labels_of_narrow_types(dtype):
    low, high = int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)
    numbers = [low, 0, 3, high]
    labels = jnp.asarray(np.array(numbers), dtype)
    for index in (-1, -100, 15, 156, 255, high + 1, low, high):
        np.testing.assert_array_equal(classes.labels_equal(labels, index), np.array(numbers) == index)
    for num_classes in (3, 16, 300, 70000):
        kept = [n if 0 <= n < num_classes else -1 for n in numbers]
        np.testing.assert_array_equal(classes.labels(labels, num_classes), kept)


def test_ignored_labels_of_narrow_types():
    z = jnp.zeros((1, 300))
    np.testing.assert_allclose(ce(z, jnp.array([7], "uint8"), ignore_index=-100), np.log(300.0), rtol=1e-6)
    np.testing.assert_allclose(ce(z, jnp.array([156], "uint8"), ignore_index=-100), np.log(300.0), rtol=1e-6)
    np.testing.assert_allclose(ce(z, jnp.array([15], "uint4"), ignore_index=-1), np.log(300.0), rtol=1e-6)
    assert ce(z, jnp.array([15], "uint4"), ignore_index=15) == 0


# Extremes: what is finite has a finite loss and derivatives, and nothing is lost on the way.


@jax.jit
def values_and_derivatives(z):
    """Of functions that meet huge logits: values, and gradients with their derivatives along (1, 2, 3)."""
    small, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.25, 0.25, 0.5])
    functions = [
        lambda z: js.softmax_kl_divergence(z, small),
        lambda z: js.softmax_kl_divergence(small, z),
        lambda z: js.softmax_kl_divergence(z, -z),
        lambda z: js.jensen_shannon_divergence(z, small),
        lambda z: js.sigmoid_focal_loss(z, y).sum(),
        *(lambda z, c=c: js.focal_loss_with_integer_labels(z, c) for c in (0, 2)),
        lambda z: js.natural_gradient_norm(z, 1),
    ]
    return [f(z) for f in functions], [(jax.grad(f)(z), jax.jvp(jax.grad(f), (z,), (small,))[1]) for f in functions]


@pytest.mark.parametrize("x", [[1e38, 0.0, -1e38], [2e38, -2e38, 0.0], [3e38, 1.0, 0.0]])
def test_huge_logits(x):
    x = jnp.array(x)
    assert np.all(js.entmax(x, 3.0) == js.softmax(x))
    values, derivatives = values_and_derivatives(x)
    assert not np.any(np.isnan(values)) and not np.any(np.isnan(derivatives))
    p, q = np.asarray(jax.nn.softmax(x), float), np.asarray(jax.nn.softmax(jnp.array([1.0, 2.0, 3.0])), float)
    wanted = np.sum(q * (np.log(q) - (np.asarray(x, float) - float(x[0]))))
    if np.ptp(np.asarray(x, float)) < 3.4e38:  # else a difference of logits overflows
        np.testing.assert_allclose(values[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(derivatives[0][0], p - q, atol=1e-6)
    np.testing.assert_allclose(values[5], 0.0)


def test_entmax_beside_an_infinite_logit():
    for alpha in (1.25, 1.5, 2.0, 3.0):
        np.testing.assert_array_equal(js.entmax(jnp.array([INF, 1e38, 0.0]), alpha), [1, 0, 0])


def test_kl_gradient_where_log1p_is_off():
    """In float64 of older XLA, near -0.41."""
    with enable_x64():
        x, z = jnp.array([0.0, -20.0]), jnp.array([0.0, -0.3466])
        got = jax.jit(jax.grad(js.softmax_kl_divergence))(x, z)[0]
        np.testing.assert_allclose(got, 0.414207152253845805, rtol=1e-15)


@pytest.mark.parametrize("head", one_in(3, HEADS), ids=lambda head: head.name)
@pytest.mark.parametrize("shape", one_in(2, [(0, 4), (2, 0, 4), (3, 0)]))
def test_heads_of_nothing(head, shape):
    """No example: no loss. No class: an index has none to name, so NaN; a sum over none is 0."""
    z = jnp.zeros(shape)
    args = [jnp.zeros(shape[:-1], "int32") if a.dtype.kind == "i" else z for a in head.args]
    loss, gradient = jax.jit(lambda z: (head.loss(z, *args), jax.grad(lambda z: jnp.sum(head.loss(z, *args)))(z)))(z)
    assert gradient.shape == shape and loss.shape == (shape if head.elementwise else shape[:-1])
    assert np.all(np.isnan(loss) if "label" in head.kinds else loss == 0) or 0 in shape[:-1]
    if head.hessian and shape[-1] == 0:
        with pytest.raises(ValueError, match="at least one class"):
            js.logits_hessian(head.loss, z, *args)
    elif head.hessian:
        assert js.logits_hessian(head.loss, z, *args).mv(z).shape == shape


# Reports of 2019 to 2026, by their place: each with what it asked for.


def both_ways(f, *args, argnums=0):
    """A derivative by reverse mode, after a check that forward mode has the same."""
    reverse, forward = jax.jit(lambda *args: [mode(f, argnums)(*args) for mode in (jax.jacrev, jax.jacfwd)])(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), reverse, forward)
    return reverse


@pytest.mark.parametrize("loss", [js.softmax_cross_entropy, js.safe_softmax_cross_entropy])
def test_no_tangent_beside_an_excluded_class(loss):
    """optax 1762: the tangent along nothing is 0, and no Jacobian has a NaN."""
    z, y = jnp.array([-INF, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    assert jax.jvp(loss, (z, y), (jnp.zeros(3), jnp.zeros(3)))[1] == 0
    by_z, by_y = both_ways(loss, z, y, argnums=(0, 1))
    np.testing.assert_allclose(by_z, [0, -0.5, 0.5], atol=1e-7)
    np.testing.assert_allclose(by_y, [0, np.log(2), np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("loss", [js.kl_divergence, js.generalized_kl_divergence])
@pytest.mark.parametrize("first", [-2.0, -INF])
def test_targets_of_probability_0(loss, first):
    """optax 1786, torch 89558, torchmetrics 1029: in the targets too, also where the prediction is -inf."""
    q, t = jnp.array([first, -0.5, -1.5]), jnp.array([0.0, 0.4, 0.6])
    by_q, by_t = both_ways(loss, q, t, argnums=(0, 1))
    assert np.isfinite(loss(q, t)) and np.all(np.isfinite(by_q)) and np.all(np.isfinite(by_t))
    one = 1 if loss is js.kl_divergence else 0
    assert_close(by_t[1:], np.log(np.asarray(t[1:])) + one - np.asarray(q[1:]))
    assert np.isinf(loss(q, jnp.array([0.1, 0.4, 0.5]))) == np.isinf(first)


def test_log_targets_of_probability_0():
    """optax 1786."""
    q, t = jnp.array([-INF, -0.5, -1.5]), jnp.log(jnp.array([0.0, 0.4, 0.6]))
    by_q, by_t = both_ways(js.kl_divergence_with_log_targets, q, t, argnums=(0, 1))
    assert np.isfinite(js.kl_divergence_with_log_targets(q, t)) and by_q[0] == by_t[0] == 0
    np.testing.assert_allclose(by_q[1:], [-0.4, -0.6], rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_losses_of_what_is_sure(gamma):
    """optax 1267, keras-retinanet 706: the gradient of a right answer is 0 at every gamma, of a wrong one it is 1."""
    binary = lambda x: js.sigmoid_focal_loss(x, jnp.ones(()), gamma=gamma)
    assert [both_ways(binary, x) for x in (1000.0, -1000.0)] == [0, -1]
    assert both_ways(jax.grad(binary), 1000.0) == 0
    z = jnp.array([1000.0, 0.0, 1.0])
    for label, right in ((0, [0, 0, 0]), (2, [1, 0, -1])):
        f = lambda z, label=label: js.focal_loss_with_integer_labels(z, label, gamma=gamma)
        np.testing.assert_allclose(both_ways(f, z), right, atol=1e-6)
        assert np.all(np.isfinite(both_ways(jax.grad(f), z)))


def test_entropy_of_what_a_mask_leaves():
    """jax 17070, 17117; trl 7263: what is masked, or excluded, is large or has probability 0."""
    kept, z = jnp.array([True, True, False]), jnp.array([1.0, 2.0, 100.0])
    short = both_ways(js.softmax_entropy, z[:2])
    np.testing.assert_allclose(both_ways(lambda z: js.softmax_entropy(z, where=kept), z), [*short, 0], atol=1e-6)
    for dtype in ("float16", "float32"):
        excluded = jnp.where(kept, z, -INF).astype(dtype)
        np.testing.assert_allclose(js.softmax_entropy(excluded), js.softmax_entropy(z[:2]), rtol=1e-3)
        np.testing.assert_allclose(jax.grad(js.softmax_entropy)(excluded)[:2], short, atol=1e-3)


def test_ignored_index_that_is_no_class():
    """chainer 5127: all examples ignored are 0; optax 1185: not ignored it is NaN."""
    z, none = jnp.asarray(Z, "float32"), jnp.array([4, 4, 4])
    np.testing.assert_array_equal(ce(z, none, ignore_index=4), 0)
    assert np.all(np.isnan(ce(z, none)))


def test_maps_to_the_simplex():
    """keras 23425: entries sum to 1; entmax 13: one axis more, the same gradients; entmax 23: α = 1 is softmax."""
    np.testing.assert_allclose(js.sparsemax(jnp.array([0.0, 0.5, 1.0])), [0, 0.25, 0.75])
    a = jnp.array([[-2, 0, 0.5], [0.1, 2, -0.4]])
    for f in (js.sparsemax, js.entmax15, js.softmax):
        gradient = jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2)))
        assert_close(gradient(a[:, None])[:, 0], gradient(a))
        np.testing.assert_allclose(f(a).sum(-1), 1, rtol=1e-6)
    for alpha in (1.0, 1 + 1e-5):
        np.testing.assert_allclose(js.entmax(a, alpha), js.softmax(a), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_rows_in_half_precision(dtype):
    """executorch 20090, candle 3727, last 43: 65,536 equal logits, whose sum no half precision counts."""
    z, eps = jnp.zeros(65536, dtype), float(jnp.finfo(dtype).eps)
    wide = lambda x: np.asarray(x, np.float64)
    np.testing.assert_allclose(wide(js.softmax(z)).sum(), 1, rtol=eps)
    np.testing.assert_allclose(wide(js.logsumexp(z)), np.log(65536), rtol=eps)
    np.testing.assert_allclose(wide(jax.grad(js.logsumexp)(z)) * 65536, 1, rtol=eps)
    np.testing.assert_allclose(wide(ce(z, 0)), np.log(65536), rtol=1e-6)


def test_fused_head_with_weights_behind_it():
    """Liger 968, 1298: reduction="none", and each token's loss with a weight of its own, ignored ones among them."""
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), "float32") for s in ((4, 5), (5, 7), (7,)))
    labels, c = jnp.array([1, -100, 3, 4]), jnp.array([0.5, 2.0, -1.0, 0.0])
    fused = lambda x, w, b: (
        c @ js.linear_softmax_cross_entropy_loss(x, labels, w, bias=b, reduction="none", ignore_index=-100)
    )
    plain = lambda x, w, b: c @ ce(x @ w + b[None], labels, ignore_index=-100)
    for got, want in zip(*(jax.grad(f, (0, 1, 2))(x, w, b) for f in (fused, plain))):
        assert_close(got, want)


def test_many_axes():
    """jax 39257: eight axes, on which XLA of JAX 0.10.2 and 0.11.0 crashed elsewhere."""
    a = jnp.cos(jnp.arange(2.0 * 3 * 2**6)).reshape(2, 3, *[2] * 6)
    np.testing.assert_allclose(js.softmax(a, axis=(1, 3)).sum((1, 3)), 1, rtol=1e-6)
    got = ce(a, jnp.ones((2, *[2] * 6), int), axis=1)
    assert_close(got, -jax.nn.log_softmax(a, 1)[:, 1])
