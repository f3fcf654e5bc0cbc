"""One contract for every loss head: what its formulas say, under every option, mask, axis, dtype and extreme."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax as js
from jaxsoftmax import losses
from tests.helpers import assert_close, enable_x64, one_in
from tests.registry import HEADS
from tests.registry.samples import MASK, B, K, Z

over_heads = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
CLASS_HEADS = [h for h in HEADS if h.has_where and not h.logarithms]
MASKED_WITH_OPTIONS = [
    pytest.param(h, n, id=f"{h.name}-{'+'.join(h.options[n]) or 'plain'}", marks=[pytest.mark.slow] * (n < last))
    for h in HEADS
    if h.has_where
    for last in [len(h.options) - 1]
    for n in dict.fromkeys((1 % len(h.options), last))
]


def cast(arrays, dtype) -> tuple:
    """Floating arrays in `dtype`; indices as they are."""
    return tuple(jnp.asarray(a, None if a.dtype.kind == "i" else dtype) for a in arrays)


def differentiated(head, **options):
    """Losses, and the gradient of their sum in the logits, of the logits and the other arguments."""

    def both(z, *args):
        value, pullback = jax.vjp(lambda z: head.loss(z, *args, **options), z)
        return value, pullback(jnp.ones_like(value))[0]

    return jax.jit(both)


def value_and_gradient(head, z, args, **options):
    return differentiated(head, **options)(z, *args)


def pushed_gradient(head, z, args, **options):
    """That gradient by forward passes, one per logit."""

    def gradient(z, *args):
        basis = jnp.eye(z.size, dtype=z.dtype).reshape(-1, *z.shape)
        push = jax.vmap(lambda t: jnp.sum(jax.jvp(lambda z: head.loss(z, *args, **options), (z,), (t,))[1]))
        return push(basis).reshape(z.shape)

    return jax.jit(gradient)(z, *args)


@over_heads
@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_value_and_gradient_for_every_combination_of_options(head, step, x64):
    z, *args = cast([Z, *head.args], None)
    for options in [*head.options[:-1:step], head.options[-1]]:
        value, gradient = value_and_gradient(head, z, args, **options)
        right, want = head.expected(Z, *head.args, **options)
        assert_close(value, right)
        assert_close(gradient, want)
    assert_close(pushed_gradient(head, z, args, **options), want)


@pytest.mark.parametrize("head", [h for h in HEADS if h.minimum], ids=lambda head: head.name)
def test_minimum_at_its_target(head, x64):
    rng = np.random.default_rng(1)
    steps = np.concatenate([np.zeros((1, B, K)), 10.0 ** rng.uniform(-3, 1, (20, 1, 1)) * rng.normal(size=(20, B, K))])
    targets = np.stack([head.minimum(z)[0] for z in Z])
    value, gradient = value_and_gradient(
        head, jnp.asarray(Z + steps), (jnp.asarray(np.broadcast_to(targets, steps.shape)),)
    )
    value = np.asarray(value)
    smallest = np.stack([head.minimum(z)[1] for z in Z])
    smallest = smallest.reshape(smallest.shape + (1,) * (value.ndim - 1 - smallest.ndim))  # one for all its elements
    np.testing.assert_allclose(value[0], np.broadcast_to(smallest, value[0].shape), rtol=1e-13, atol=1e-15)
    assert np.all(abs(np.asarray(gradient)[0]) <= 1e-15 * np.maximum(1, abs(targets)))
    assert np.all(value >= value[0] - 1e-15)


@pytest.mark.parametrize("head", one_in(2, [h for h in HEADS if h.has_axis]), ids=lambda head: head.name)
def test_any_axis(head, x64):
    options = dict(head.options[-1])
    z, *args = cast([Z, *head.args], None)
    want = head.loss(z, *args, **options)
    classes = [a.ndim == 2 for a in args]

    def moved(x, axis):
        return jnp.moveaxis(x, -1, axis)

    first = head.loss(moved(z, 0), *(moved(a, 0) if c else a for a, c in zip(args, classes)), axis=0, **options)
    assert_close(first, want)
    for turn, axis in (((1, 0, 2), (0, -1)), ((2, 0, 1), (-1, 0))):
        turned = [x.reshape(B, 2, 2).transpose(turn) if c else x for x, c in zip((z, *args), [True, *classes])]
        assert_close(head.loss(*turned, axis=axis, **options), want)
    whole = [x[0].reshape(2, 2) if c else x[0] for x, c in zip((z, *args), [True, *classes])]
    assert_close(head.loss(*whole, axis=None, **options), want[0])


@pytest.mark.parametrize("head, which", MASKED_WITH_OPTIONS)
def test_masked_classes_leave_the_compressed_problem(head, which, x64):
    """Whatever stands behind the mask, with one option and with all of them."""
    options = head.options[which]
    junk = np.array([np.nan, np.inf, -np.inf, 1e30]).reshape(-1, 1, 1)
    mask = np.broadcast_to(MASK, (len(junk), B, K))
    z = np.where(MASK, Z, junk)
    args = [np.broadcast_to(a, (len(junk), B)) if a.ndim == 1 else np.where(MASK, a, junk) for a in head.args]
    value, reverse = value_and_gradient(head, jnp.asarray(z), cast(args, None), where=jnp.asarray(mask), **options)
    forward = pushed_gradient(head, jnp.asarray(z), cast(args, None), where=jnp.asarray(mask), **options)
    right, gradient = (x.astype(float) for x in head.expected_of_rest(Z, MASK, *head.args, **options))
    assert_close(value, np.stack([right] * len(junk)))
    for got in (reverse, forward):
        assert_close(got, np.stack([gradient] * len(junk)))
        assert np.all(np.asarray(got)[~mask] == 0)


@pytest.mark.parametrize("head", one_in(2, [h for h in HEADS if h.has_where]), ids=lambda head: head.name)
def test_masked_examples_are_nothing_at_every_order(head):
    options = dict(head.options[-1])
    z, *args = cast([np.where([[True], [False], [True]], Z, np.nan), *head.args], "float32")
    absent = jnp.array([True, False, True])

    def derivatives(z):
        def loss(z):
            return head.loss(z, *args, where=absent, **options)

        return loss(z), *jax.jvp(jax.grad(lambda z: jnp.sum(loss(z))), (z,), (jnp.ones_like(z),))

    for result in jax.jit(derivatives)(z):
        assert np.all(result[1] == 0) and np.all(np.isfinite(result))


@pytest.mark.parametrize("head", one_in(2, CLASS_HEADS), ids=lambda head: head.name)
def test_excluded_class_is_a_masked_class_at_every_order(head):
    """A logit of -inf under a label of 0 is as good as masked, in value, gradient and second derivative."""
    options = dict(head.options[-1])
    absent = {"soft": 0.0, "logits": -np.inf}
    args = [np.where(MASK, a, absent[kind]) if kind in absent else a for kind, a in zip(head.kinds, head.args)]

    def derivatives(z, where=None):
        def loss(z):
            return jnp.sum(head.loss(z, *cast(args, "float32"), where=where, **options))

        gradient, direction = jax.grad(loss), jnp.asarray(np.cos(Z), "float32")
        return jax.jit(lambda z: [loss(z), *jax.jvp(gradient, (z,), (direction,))])(jnp.asarray(z, "float32"))

    excluded = derivatives(np.where(MASK, Z, -np.inf))
    masked = derivatives(Z, jnp.asarray(MASK))
    for one, other in zip(excluded, masked):
        assert np.all(np.isfinite(one))
        np.testing.assert_allclose(one, other, rtol=0, atol=4e-7 * np.max(np.abs(other)))


@pytest.mark.parametrize("head", [h for h in CLASS_HEADS if h.args and h.args[0].ndim == 1], ids=lambda head: head.name)
@pytest.mark.parametrize("dtype", one_in(2, ["uint8", "int8", "uint32", "int32", "int64"]))
def test_labels_of_any_integer_dtype(head, dtype):
    """Outside [0, K), whatever it would wrap around to: NaN for that example alone. -1 is 255 in uint8."""
    with enable_x64() if dtype == "int64" else contextlib.nullcontext():
        bad = jnp.asarray(np.array([-1, 3, K]).astype(dtype)).at[2].set(jnp.iinfo(dtype).max)
        value, gradient = differentiated(head)(jnp.asarray(Z, "float32"), bad)
    assert np.isnan(value[0]) and np.isnan(value[2]) and np.isfinite(value[1])
    assert np.all(np.isnan(gradient[::2])) and np.all(np.isfinite(gradient[1]))


BINARY = (losses.sigmoid_binary_cross_entropy, losses.sigmoid_focal_loss, losses.sparsemax_loss)


@pytest.mark.parametrize("head", [h for h in HEADS if h.loss in BINARY], ids=lambda head: head.name)
def test_binary_losses_at_infinite_logits(head):
    """0 where the label agrees, with derivatives 0; +inf where it does not."""
    x, y = jnp.array([jnp.inf, -jnp.inf, jnp.inf, -jnp.inf]), jnp.array([1.0, 0.0, 0.0, 1.0])
    for options in head.options:
        value, gradient = value_and_gradient(head, x, (y,), **options)
        forward = pushed_gradient(head, x, (y,), **options)
        np.testing.assert_array_equal(value, [0, 0, jnp.inf, jnp.inf])
        assert np.all(gradient[:2] == 0) and not np.any(np.isnan(gradient)) and not np.any(np.isnan(forward))


def test_softcap(x64):
    z = jnp.asarray(np.concatenate([[-np.inf], np.linspace(-90, 90, 21)]))
    assert_close(losses.softcap_logits(z, 30.0)[1:], 30 * np.tanh(np.asarray(z[1:]) / 30))
    assert losses.softcap_logits(z, 30.0)[0] == -jnp.inf
    slope = jax.vmap(jax.grad(losses.softcap_logits), (0, None))(z, 30.0)
    assert_close(slope[1:], np.cosh(np.asarray(z[1:]) / 30) ** -2)
    assert slope[0] == 0
    assert losses.softcap_logits(z.astype("bfloat16"), 30.0).dtype == "bfloat16"
    with pytest.raises(ValueError, match="must be larger than 0.0, got 0"):
        losses.softcap_logits(z, 0)


def test_weighted_mean():
    """Σ w l / Σ w; nothing counted is 0 with gradient 0; what does not count may be anything."""
    l, w = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 3.0, 0.0])
    assert losses.weighted_mean(l, w) == 1.75
    assert losses.weighted_mean(l.at[2].set(jnp.nan), w) == 1.75
    np.testing.assert_allclose(jax.grad(losses.weighted_mean)(l.at[2].set(jnp.inf), w), [0.25, 0.75, 0])
    np.testing.assert_allclose(jax.grad(losses.weighted_mean, 1)(l, w), (l - 1.75) / 4)
    assert losses.weighted_mean(l, l > 1) == 3
    assert losses.weighted_mean(l, w, normalizer=jnp.ones(3)) == 7 / 3
    for nothing in (jnp.zeros(3), jnp.zeros(3, bool)):
        assert losses.weighted_mean(l, nothing) == 0
        np.testing.assert_array_equal(jax.grad(losses.weighted_mean)(l, nothing), 0)
    np.testing.assert_array_equal(jax.grad(losses.weighted_mean, 1)(l, jnp.zeros(3)), 0)
    assert losses.weighted_mean(jnp.zeros((0,)), jnp.zeros((0,))) == 0


@pytest.mark.optimized
@pytest.mark.parametrize("head", one_in(3, HEADS), ids=lambda head: head.name)
def test_half_precision_logits(head):
    """The loss is that of the same logits in float32; its gradient comes back in their dtype, rounded once."""

    @jax.jit
    def every(arguments):
        def value_and_gradient(z, *args):
            value, pullback = jax.vjp(lambda z: head.loss(z, *args, **head.options[-1]), z)
            return value, pullback(jnp.ones_like(value))[0]

        return {dtype: value_and_gradient(*arguments[dtype]) for dtype in arguments}

    results = every({dtype: cast([Z, *head.args], dtype) for dtype in ("float32", "bfloat16", "float16")})
    wide, exact = results.pop("float32")
    for dtype, (loss, gradient) in results.items():
        assert loss.dtype == jnp.float32 and gradient.dtype == dtype
        np.testing.assert_allclose(loss, wide, rtol=2e-7, atol=1e-9)
        once = np.asarray(exact.astype(dtype), "float64")
        assert np.all(abs(np.asarray(gradient, "float64") - once) <= float(jnp.finfo(dtype).eps) * abs(once))


TWICE = "softmax_entropy", "brier_loss", "softmax_cross_entropy", "softmax_kl_divergence"


@pytest.mark.optimized
@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_second_derivatives_in_half_precision(head):
    """Where a gradient uses the logits twice, the next one adds up in float32 as well, and is rounded once."""
    z, v = np.random.default_rng(11).normal(size=(2, 100, *Z.shape)) * np.array([4.0, 1.0])[:, None, None, None]

    def three(z, v, *args):
        total = lambda z: jnp.sum(head.loss(z, *args))
        gradient, tangent = jax.grad(total), lambda z: jax.jvp(total, (z,), (v,))[1]
        return jax.jvp(gradient, (z,), (v,))[1], jax.grad(lambda z: jnp.vdot(gradient(z), v))(z), jax.grad(tangent)(z)

    products = jax.jit(jax.vmap(three, (0, 0, *(None for _ in head.args))))
    narrow = cast([z, v, *head.args], "bfloat16")
    want = np.asarray(products(*cast(narrow, "float32"))[0], "float64")
    for got in products(*narrow):
        error = abs(np.asarray(got, "float64") - want) / np.max(abs(want), -1, keepdims=True)
        assert np.max(error) <= float(jnp.finfo("bfloat16").eps)


@pytest.mark.optimized
@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_every_entry_of_the_hessian(head):
    """In three compositions of the modes, by columns: a rare class beside the others keeps its digits."""
    z = np.array([[gap, 0.2, -0.3, -20.0] for gap in (0.0, 0.4, 12.0)])

    @jax.jit
    def hessians(z, *args):
        loss = lambda z: head.loss(z, *args)
        twice = jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.grad(loss)), jax.jacfwd(jax.jacfwd(loss))
        return [jax.vmap(hessian)(z) for hessian in twice]

    def at(dtype):
        return [np.asarray(H, "float64") for H in hessians(*cast([z, *(a[0] for a in head.args)], dtype))]

    with enable_x64():
        exact = at("float64")
    for got, want in zip(at("float32"), exact):
        assert np.all(abs(got - want) <= 1e-4 * abs(want))


@pytest.mark.optimized
@pytest.mark.parametrize("head", [h for h in HEADS if h.name in TWICE], ids=lambda head: head.name)
def test_curvature_along_everything_that_moves(head):
    """Forward over forward is forward over reverse: no code of a gradient is differentiated in place of its rule."""
    args = cast([np.array([1.5, 0.2, -0.3, -20.0]), *(a[0] for a in head.args)], "float32")  # p = 0.7 at the top
    direction, everything = tuple(map(jnp.cos, args)), tuple(range(len(args)))

    def along(f):
        return lambda *args: jax.jvp(f, args, direction)[1]

    @jax.jit
    def both(*args):
        moved = along(jax.grad(head.loss, everything))(*args)
        return along(along(head.loss))(*args), sum(map(jnp.vdot, moved, direction))

    assert_close(*both(*args))


def test_residuals():
    """The logits in their own dtype, the labels, and three numbers a row; no second array of their size."""
    z = jnp.ones((4, 5), jnp.bfloat16)
    loss = js.softmax_cross_entropy_with_integer_labels
    leaves = jax.tree.leaves(jax.vjp(lambda z: loss(z, jnp.zeros(4, jnp.int32)), z)[1])
    assert [(r.shape, r.dtype) for r in leaves if r.shape == (4, 5)] == [((4, 5), jnp.bfloat16)]
    assert all(r.size <= 4 for r in leaves if r.shape != (4, 5))


# In arrays of the logits' size, results and arguments left out. Brier's are 5 on some machines, and soft labels' 1:
# where XLA hands a fusion to YNNPACK, it writes out what that is to broadcast.
KEPT_IN_AN_HVP = {"softmax": 1, "softmax_cross_entropy": 3, "softmax_entropy": 2, "brier_loss": 6}


@pytest.mark.optimized
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="the CPU backend of JAX 0.6 makes no such kernels")
@pytest.mark.parametrize("name", KEPT_IN_AN_HVP)
def test_memory_of_second_order(name):
    z = jax.ShapeDtypeStruct((65536, 64), "float32")
    f, labels = getattr(js, name), [z] if name in ("softmax_cross_entropy", "brier_loss") else []
    ct = jax.eval_shape(f, z, *labels)

    def product(z, v, ct, *labels):
        return jax.jvp(lambda z: jax.vjp(lambda z: f(z, *labels), z)[1](ct), (z,), (v,))

    memory = jax.jit(product).lower(z, z, ct, *labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= (KEPT_IN_AN_HVP[name] + 0.1) * z.size * 4


@pytest.mark.parametrize("loss", [js.softmax_kl_divergence, js.jensen_shannon_divergence, js.softmax_entropy])
def test_a_temperature_per_example(loss):
    """As example by example: value, gradients in logits and temperature, Hessian; NaN where it is out of range."""
    z, other = jnp.cos(jnp.arange(12.0)).reshape(3, 4), jnp.sin(jnp.arange(12.0)).reshape(3, 4)
    z, others = z * 3, [] if loss is js.softmax_entropy else [other]
    temperatures = jnp.array([1.0, 0.5, 2.0])
    f = lambda z, t, *others: loss(z, *others, temperature=t)
    both = jax.value_and_grad(lambda z, t: jnp.sum(f(z, t, *others)), (0, 1))
    _, (by_z, by_t) = jax.jit(both)(z, temperatures)
    H = js.logits_hessian(loss, z, *others, temperature=temperatures).as_matrix()
    alone, values = jax.jit(jax.value_and_grad(f, (0, 1))), f(z, temperatures, *others)
    for i, t in enumerate(temperatures):
        row = [other[i] for other in others]
        assert_close((values[i], (by_z[i], by_t[i])), alone(z[i], t, *row))
        assert_close(H[i], js.logits_hessian(loss, z[i], *row, temperature=t).as_matrix())
    transposed = loss(z.T, *(other.T for other in others), 0, temperature=temperatures)
    assert_close(transposed, values)
    wrong = temperatures.at[1].set(-1.0)
    np.testing.assert_array_equal(np.isnan(jax.jit(f)(z, wrong, *others)), [False, True, False])
    with pytest.raises(ValueError, match="temperature must be larger than 0"):
        f(z, wrong, *others)


def test_label_smoothing_may_be_one_per_example(x64):
    """As example by example, with integer labels and soft ones; linear in it; none in the Hessian."""
    rng = np.random.default_rng(6)
    z, labels, smooth = rng.normal(size=(3, 4)), np.array([0, 2, 3]), np.array([0.0, 0.25, 1.0])
    ce = js.softmax_cross_entropy_with_integer_labels
    want = np.stack([ce(z[i], labels[i], label_smoothing=float(smooth[i])) for i in range(3)])
    loss = lambda z, smooth: ce(z, labels, label_smoothing=smooth)
    soft = lambda z, smooth: js.softmax_cross_entropy(z, np.eye(4)[labels], label_smoothing=smooth)
    for head in map(jax.jit, (loss, soft)):
        assert_close(head(z, smooth), want)
        by_smoothing = jax.jit(jax.jacrev(head, 1))(z, smooth)
        assert_close(by_smoothing, np.diag(head(z, np.ones(3)) - head(z, np.zeros(3))))
    H = js.logits_hessian(ce, jnp.asarray(z), labels, label_smoothing=smooth)
    assert_close(H.as_matrix(), jax.jit(jax.vmap(jax.hessian(ce)))(z, labels))


OPTIONS_OF_EXAMPLES = {
    "z_loss": lambda z, c, o: js.softmax_cross_entropy_with_integer_labels(z, c, z_loss=o),
    "epsilon": lambda z, c, o: js.poly_loss_cross_entropy(z, jax.nn.one_hot(c, 4), o),
}


@pytest.mark.parametrize("name", OPTIONS_OF_EXAMPLES)
def test_other_options_per_example(name):
    """As example by example: value, gradient in logits and option, Hessian; a shape that does not fit raises."""
    f, z, c, option = OPTIONS_OF_EXAMPLES[name], jnp.cos(jnp.arange(12.0)).reshape(3, 4), jnp.array([0, 3, 1]), 0.5
    options = jnp.array([0.5, 0.0, -0.25])
    both = jax.jit(jax.value_and_grad(lambda z, o, c: jnp.sum(f(z, c, o)), (0, 1)))
    _, gradients = both(z, options, c)
    assert_close(gradients, [jnp.stack(g) for g in zip(*(both(*each)[1] for each in zip(z, options, c)))])
    loss = {"z_loss": js.softmax_cross_entropy_with_integer_labels, "epsilon": js.poly_loss_cross_entropy}[name]
    target = c if name == "z_loss" else jax.nn.one_hot(c, 4)
    H = js.logits_hessian(loss, z, target, **{name: options}).as_matrix()
    assert_close(H, jax.vmap(jax.hessian(lambda z, o, c: f(z, c, o)))(z, options, c), scale=1.0)
    with pytest.raises(ValueError, match=name):
        f(z, c, jnp.full(2, option))


def test_temperatures_of_operators_per_example():
    z, t, c = jnp.cos(jnp.arange(12.0)).reshape(3, 4), jnp.array([0.5, 1.0, 3.0]), jnp.array([0, 3, 1])
    J = js.SoftmaxJacobian.from_logits(z, temperature=t).as_matrix()
    assert_close(J, jax.vmap(jax.jacobian(lambda z, t: js.softmax(z / t)))(z, t))
    loss = js.softmax_cross_entropy_with_integer_labels
    for cap in ({}, {"logit_softcap": 2.0}):
        at = lambda z: js.softcap_logits(z, 2.0) if cap else z
        H = js.logits_hessian(loss, z, c, logit_temperature=t, **cap).as_matrix()
        assert_close(H, jax.vmap(jax.hessian(lambda z, t, c: loss(at(z) / t, c)))(z, t, c), scale=1.0)
    with pytest.raises(ValueError, match="temperature"):
        js.SoftmaxJacobian.from_logits(z, temperature=t[:2])
    with pytest.raises(ValueError, match="logit_temperature must be larger than 0"):
        js.logits_hessian(loss, z, c, logit_temperature=-t)


def test_temperature_of_an_entropy():
    """The entropy of z / T, of its own digits: where logits are far from 0, and in the derivative by T."""
    z, t = np.array([1e6, 1e6 + 1, 1e6 - 0.5]), 3.0
    entropy = lambda z: -np.sum(np.exp(z) * z) / np.sum(np.exp(z)) + np.log(np.sum(np.exp(z)))
    f = lambda z, t: js.softmax_entropy(z, temperature=t)
    x = (z - z.max()) / t
    p = np.exp(x) / np.sum(np.exp(x))
    slope = p @ (x - p @ x) ** 2 / t  # ∂H/∂T = Var(z / T) / T
    np.testing.assert_allclose(f(jnp.asarray(z, "float32"), t), entropy(x), rtol=3e-7)
    assert_close(jax.grad(f, 1)(jnp.asarray(z, "float32"), t), slope)
    assert_close(jax.jacfwd(f, 1)(jnp.asarray(z, "float32"), t), slope)
    program = lambda **option: str(jax.make_jaxpr(functools.partial(js.softmax_entropy, **option))(jnp.ones((2, 3))))
    assert program() == program(temperature=1) == program(temperature=1.0)


@pytest.mark.parametrize("loss", [js.softmax_kl_divergence, js.jensen_shannon_divergence, js.softmax_entropy])
def test_derivatives_in_the_temperature_leave_excluded_classes_out(loss):
    """As without them, to second order; excluded by a mask or by a logit of -inf."""
    z, kept = jnp.array([[2.0, 1.0, -0.5, 3.0], [0.5, -1.0, 2.0, 1.0]]), jnp.array([True, False, True, True])
    count = 1 if loss is js.softmax_entropy else 2
    orders = lambda *rows, **where: jax.jvp(jax.grad(lambda t: loss(*rows, temperature=t, **where)), (2.5,), (1.0,))
    want = orders(*z[:count, kept])
    assert_close(orders(*z[:count], where=kept), want)
    assert_close(orders(*jnp.where(kept, z, -jnp.inf)[:count]), want)
