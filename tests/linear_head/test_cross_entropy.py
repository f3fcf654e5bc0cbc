"""The fused linear head against the plain head on full logits: values, both modes, orders, options, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from jaxsoftmax import softmax_cross_entropy_with_integer_labels
from jaxsoftmax.linear_head import (
    linear_softmax_cross_entropy_loss,
    linear_softmax_cross_entropy_with_statistics,
    linear_softmax_kl_divergence,
)
from jaxsoftmax.linear_head.plan import Plan
from tests.helpers import one_in, shard_map

N, D, V, CHUNK = 7, 3, 11, 3  # ragged: two whole chunks and one token
OPTIONS = {
    "plain": {},
    "weighted": {"ignore_index": 4, "class_weights": True},
    "everything": {
        "ignore_index": 4,
        "class_weights": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "logit_softcap": 2.0,
    },
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def arguments(dtype=jnp.float64, std=1.0):
    """x, weights, bias and token weights, one of them 0; labels, two of them 4."""
    keys = jax.random.split(jax.random.key(1), 6)
    x, weights = jax.random.normal(keys[0], (N, D), dtype), std * jax.random.normal(keys[1], (D, V), dtype)
    bias, token_weights = jax.random.normal(keys[2], (V,), dtype), jax.random.uniform(keys[3], (N,), dtype, 0.5, 1.5)
    labels = jax.random.randint(keys[4], (N,), 0, V).at[2].set(4).at[5].set(4)
    class_weights = jax.random.uniform(keys[5], (V,), dtype, 0.5, 2.0)
    return (x, weights, bias, token_weights.at[1].set(0.0)), labels, class_weights


def with_class_weights(options, class_weights):
    return {**options, "class_weights": class_weights} if "class_weights" in options else options


def fused(labels, x, weights, bias, token_weights, reduction="sum", **options):
    options = {"chunk_size": CHUNK, **options}
    return linear_softmax_cross_entropy_loss(
        x, labels, weights, bias=bias, token_weights=token_weights, reduction=reduction, **options
    )


def full(labels, x, weights, bias, token_weights, reduction="sum", logit_softcap=None, **options):
    """The equations as they stand."""
    z = x @ weights + bias[None]
    if logit_softcap is not None:
        z = logit_softcap * jnp.tanh(z / logit_softcap)
    losses = token_weights * softmax_cross_entropy_with_integer_labels(z, labels, **options)
    if reduction == "none":
        return losses
    counted = token_weights * (options["class_weights"][labels] if "class_weights" in options else 1.0)
    if "ignore_index" in options:
        counted = jnp.where(labels == options["ignore_index"], 0.0, counted)
    return losses.sum() / (counted.sum() if reduction == "mean" else 1.0)


def scalar(head, labels, **options):
    """A function whose cotangents differ from token to token and from 1."""
    return lambda *args: jnp.sum(jnp.sin(0.7 * head(labels, *args, **options)))


def assert_close(got, wanted, ulps=1e3):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a,
            b,
            rtol=0,
            atol=ulps * jnp.finfo(a.dtype).eps * max(1.0, np.max(np.abs(np.asarray(b, np.float64)))),
            err_msg=str(a.dtype),
        ),
        got,
        wanted,
    )


def orders(f, args, tangents):
    """Value, gradient, tangent, and the Hessian-vector product in all four compositions."""
    every = tuple(range(len(args)))
    push = lambda f: lambda *args: jax.jvp(f, args, tangents)[1]
    pull = lambda f: jax.grad(f, every)
    inner = lambda f: lambda *args: sum(jnp.vdot(a, b) for a, b in zip(pull(f)(*args), tangents))
    return {
        "value and gradient": jax.value_and_grad(f, every)(*args),
        "tangent": push(f)(*args),
        "forward over reverse": push(pull(f))(*args),
        "reverse over forward": pull(push(f))(*args),
        "reverse over reverse": pull(inner(f))(*args),
        "forward over forward": push(push(f))(*args),
    }


SLOW = pytest.mark.slow
CASES = [
    ("plain", "mean"),
    pytest.param("plain", "none", marks=SLOW),
    pytest.param("weighted", "mean", marks=SLOW),
    pytest.param("everything", "none", marks=SLOW),
    pytest.param("everything", "mean", marks=SLOW),
]


def assert_equal_to_full_logits(compute, head, options, reduction):
    """`compute(f, args, tangents)` of a head and of full logits."""
    args, labels, class_weights = arguments()
    options = {**with_class_weights(OPTIONS[options], class_weights), "reduction": reduction}
    tangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), args)
    got, wanted = (
        jax.jit(functools.partial(compute, scalar(head, labels, **options)))(args, tangents) for head in (head, full)
    )
    assert_close(got, wanted)


def first_orders(f, args, tangents):
    """Value and gradient, alone and with a Hessian-vector product: the two take different passes."""
    value_and_gradient = jax.value_and_grad(f, tuple(range(len(args))))
    return value_and_gradient(*args), jax.jvp(value_and_gradient, args, tangents)


@pytest.mark.parametrize("options,reduction", CASES)
def test_equals_full_logits_in_every_order(options, reduction, x64):
    assert_equal_to_full_logits(orders, fused, options, reduction)


@pytest.mark.parametrize("options,reduction", [("weighted", "mean"), ("everything", "none")])
def test_equals_full_logits(options, reduction, x64):
    assert_equal_to_full_logits(first_orders, fused, options, reduction)


def test_third_order(x64):
    """A Hessian-vector product's own derivatives, in forward and reverse mode: what a lost residual would spoil."""
    (x, *rest), labels, _ = arguments()
    weights, others = rest[0], rest[1:]
    t = jnp.sin(jnp.arange(weights.size, dtype=weights.dtype)).reshape(weights.shape)

    def third(head):
        f = lambda weights: scalar(head, labels)(x, weights, *others)
        pulled = lambda w: jax.vjp(jax.grad(f), w)[1](t)[0]
        pushed = lambda w: jnp.vdot(jax.jvp(jax.grad(f), (w,), (t,))[1], t)
        return jax.jvp(pulled, (weights,), (t,))[1], jax.grad(pushed)(weights)

    assert_close(jax.jit(lambda: third(fused))(), jax.jit(lambda: third(full))())


def test_third_order_counts_tokens_of_weight_zero(x64):
    """Along a direction that moves the token weights as well, a token of weight 0 has a third derivative."""
    (x, weights, bias, a), labels, _ = arguments()
    t = jnp.sin(jnp.arange(weights.size, dtype=weights.dtype)).reshape(weights.shape)

    def third(head):
        f = lambda weights, a: head(labels, x, weights, bias, a)
        second = lambda weights, a: jax.jvp(lambda w: jax.grad(f)(w, a), (weights,), (t,))[1]
        return jax.jvp(second, (weights, a), (t, jnp.ones_like(a)))[1]

    assert (a == 0).any()
    assert_close(jax.jit(lambda: third(fused))(), jax.jit(lambda: third(full))())


@pytest.mark.parametrize(
    "argnums", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), (0, 3), pytest.param((1, 2), marks=SLOW)]
)
def test_part_of_the_arguments(argnums, x64):
    """Frozen head, frozen body, mixed second derivatives."""
    args, labels, _ = arguments()
    got, wanted = (
        jax.jit(jax.jacfwd(jax.grad(scalar(head, labels, reduction="mean"), argnums), 1))(*args)
        for head in (fused, full)
    )
    assert_close(got, wanted)


@pytest.mark.parametrize("name", one_in(2, ["class_weights", "label_smoothing", "logit_softcap", "z_loss"]))
def test_differentiable_in_options(name, x64):
    args, labels, class_weights = arguments()
    options = {"class_weights": class_weights, "label_smoothing": 0.1, "z_loss": 0.1, "logit_softcap": 3.0}

    def derivatives(head):
        f = lambda value, weights: head(labels, args[0], weights, *args[2:], **{**options, name: value})
        gradient = jax.grad(f)
        t = jnp.ones_like(args[1])
        return gradient(options[name], args[1]), jax.jvp(lambda w: gradient(options[name], w), (args[1],), (t,))[1]

    assert_close(jax.jit(lambda: derivatives(fused))(), jax.jit(lambda: derivatives(full))())


def test_slabs(monkeypatch, x64):
    """Slabs of 4 columns: two whole ones and a rest of 3."""
    monkeypatch.setattr("jaxsoftmax.linear_head.stream.plan", lambda *_: Plan(CHUNK, 4))
    args, labels, _ = arguments()
    both = lambda head: lambda args: jax.jvp(jax.grad(scalar(head, labels), (0, 1)), args, jax.tree.map(jnp.cos, args))
    got, (wanted, along) = (jax.jit(both(head))(args) for head in (fused, full))
    assert_close(got, (wanted, along))
    x, weights, *rest = args
    grad = jax.jit(jax.grad(lambda *args: scalar(fused, labels, vocab_axis=0)(*args), 1))
    assert_close(grad(x, weights.T, *rest).T, wanted[1])


def test_labels_out_of_range_and_masks(x64):
    (x, weights, _, _), _, _ = arguments()
    labels = jnp.array([0, -1, V, 3, 4, 5, 6])
    loss = functools.partial(linear_softmax_cross_entropy_loss, labels=labels, weights=weights, chunk_size=CHUNK)
    losses = loss(x, reduction="none")
    assert np.isnan(losses).tolist() == [False, True, True, False, False, False, False]
    gradient = jax.jit(jax.grad(lambda x: loss(x, token_weights=jnp.array([1.0, 1, 0, 1, 1, 1, 1]))))(x)
    assert np.isnan(gradient).any(1).tolist() == [False, True, False, False, False, False, False]
    bad, clean = x.at[1].set(jnp.nan).at[2].set(jnp.inf), jnp.array([0, -1, -1, 3, 4, 5, 6])
    ignoring = functools.partial(linear_softmax_cross_entropy_loss, ignore_index=-1, chunk_size=CHUNK)
    for reduction in ("none", "mean"):
        f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(ignoring(x, clean, weights, reduction=reduction))))
        (got, gradient), wanted = f(bad), f(x)
        np.testing.assert_array_equal(got, wanted[0])
        np.testing.assert_array_equal(gradient, wanted[1])
        assert not np.asarray(gradient)[1:3].any()


def test_nothing_counted():
    x, weights, labels = jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.zeros(4, jnp.int32)
    loss = functools.partial(linear_softmax_cross_entropy_loss, labels=labels, weights=weights, reduction="mean")
    for f in (functools.partial(loss, ignore_index=0), functools.partial(loss, token_weights=jnp.zeros(4))):
        value, gradient = jax.jit(jax.value_and_grad(f))(x)
        assert value == 0 and not gradient.any()


def test_skipped_tokens_run_no_chunk(x64):
    """NaN weights stand for work: no chunk runs where no token counts, and the loop stops after those that do."""
    (x, weights, bias, _), labels, _ = arguments()
    value, gradient = jax.jit(jax.value_and_grad(lambda w: fused(labels, x, w, bias, jnp.zeros(N))))(weights * jnp.nan)
    assert value == 0 and not gradient.any()
    few = jnp.zeros(N).at[6].set(2.0).at[3].set(1.0)
    got, wanted = (
        jax.jit(jax.grad(functools.partial(h, labels), (0, 1)))(x, weights, bias, few) for h in (fused, full)
    )
    assert_close(got, wanted)
    each = lambda h, x: h(labels, x, weights, bias, None, reduction="none")[3:].sum()  # cotangents 0, token weights 1
    got = jax.jit(jax.grad(functools.partial(each, fused)))(x.at[:3].set(jnp.nan))
    plain = jax.grad(lambda x: full(labels, x, weights, bias, jnp.ones(N), reduction="none")[3:].sum())
    assert_close(got, jax.jit(plain)(x))


def test_transformations(x64):
    """vmap over an ensemble of weights, leading axes, scan and remat."""
    (x, weights, bias, a), labels, _ = arguments()
    ensemble = jnp.stack([weights, 2 * weights, -weights])
    f = lambda w: fused(labels, x, w, bias, a)
    grad = jax.jit(jax.grad(lambda w: full(labels, x, w, bias, a)))
    one_by_one = np.stack([grad(w) for w in ensemble])
    assert_close(jax.jit(jax.vmap(jax.grad(f)))(ensemble), one_by_one)
    assert_close(jax.jit(jax.grad(jax.checkpoint(f)))(weights), one_by_one[0])
    scanned = jax.jit(lambda: jax.lax.scan(lambda c, w: (c, jax.grad(f)(w)), 0, ensemble)[1])()
    assert_close(scanned, one_by_one)
    hvp = lambda f: jax.vmap(lambda w: jax.jvp(jax.grad(f), (w,), (weights,))[1])
    assert_close(jax.jit(hvp(f))(ensemble), jax.jit(hvp(lambda w: full(labels, x, w, bias, a)))(ensemble))
    loss = functools.partial(linear_softmax_cross_entropy_loss, weights=weights, reduction="none", chunk_size=2)
    assert_close(loss(x[:6].reshape(2, 3, D), labels[:6].reshape(2, 3)), loss(x[:6], labels[:6]).reshape(2, 3))


@pytest.mark.parametrize("options", one_in(2, [{}, {"label_smoothing": 0.1}], 1))
def test_tokens_over_a_mesh(options, x64):
    """Inside shard_map with its replication checks on, with devices that run different numbers of chunks."""
    (x, weights, bias, a), labels, class_weights = arguments()
    x, a, labels = (jnp.concatenate([part, part[:1]]) for part in (x, a, labels))

    def every(head):
        return lambda labels, *args: head(labels, *args[:4], class_weights=args[4], **options)

    mesh, rows, whole = jax.make_mesh((4,), ("tokens",), devices=jax.devices()[:4]), P("tokens"), P()
    specs = rows, rows, whole, whole, rows, whole
    ours = every(functools.partial(fused, chunk_size=1))
    total = lambda *args: jax.lax.psum(ours(*args), "tokens")
    sharded = shard_map(total, mesh=mesh, in_specs=specs, out_specs=whole)
    arrays = labels, x, weights, bias, a, class_weights
    placed = [jax.device_put(v, jax.sharding.NamedSharding(mesh, spec)) for v, spec in zip(arrays, specs)]

    def push(f, labels, *args):
        """Value and gradient, and their derivative."""
        of = jax.value_and_grad(lambda *args: f(labels, *args), (0, 1, 2, 3, 4))
        return jax.jit(lambda *args: jax.jvp(of, args, tuple(map(jnp.cos, args))))(*args)

    assert_close(jax.device_get(push(sharded, *placed)), jax.device_get(push(every(full), *arrays)))


def test_statistics(x64):
    (x, weights, bias, _), labels, _ = arguments()
    labels = labels.at[0].set(jnp.argmax(x[0] @ weights + bias))
    call = functools.partial(linear_softmax_cross_entropy_with_statistics, bias=bias, chunk_size=CHUNK)
    (value, facts), _ = jax.value_and_grad(lambda x: call(x, labels, weights), has_aux=True)(x)
    logp = jax.nn.log_softmax(x @ weights + bias[None])
    assert_close(value, -jnp.sum(logp[jnp.arange(N), labels]))
    assert_close(facts.logsumexp, jax.nn.logsumexp(x @ weights + bias[None], 1))
    assert_close(facts.entropy, -jnp.sum(jnp.exp(logp) * logp, 1))
    assert_close(facts.probability, jnp.exp(logp.max(1)))
    np.testing.assert_array_equal(facts.prediction, logp.argmax(1))
    np.testing.assert_array_equal(facts.correct, logp.argmax(1) == labels)
    assert facts.correct[0]
    hvp = lambda f: jax.jit(lambda w: jax.jvp(jax.grad(f), (w,), (w,)))(weights)
    plain = functools.partial(linear_softmax_cross_entropy_loss, x, labels, bias=bias)
    assert_close(hvp(lambda w: call(x, labels, w)[0]), hvp(lambda w: plain(w)))


@pytest.mark.parametrize("size", one_in(2, [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)]))
def test_nothing_in_it(size):
    """No tokens, no features, no classes: gradients 0, the loss that of the logits."""
    n, d, vocab = size
    x, labels, weights = jnp.ones((n, d)), jnp.zeros(n, jnp.int32), jnp.ones((d, vocab))
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": 1, "class_weights": jnp.ones(vocab)}
    for head in (
        functools.partial(linear_softmax_cross_entropy_loss, x, labels),
        functools.partial(linear_softmax_cross_entropy_loss, x, labels, bias=jnp.zeros(vocab), **options),
        lambda w: linear_softmax_kl_divergence(x, x, w, w),
    ):
        gradient = jax.grad(head)
        value, first, second = jax.jit(lambda w: (head(w), *jax.jvp(gradient, (w,), (w,))))(weights)
        assert n == 0 and value == 0 or vocab == 0 or np.isfinite(value)
        assert first.shape == weights.shape and not np.any(first) and not np.any(second)
    assert linear_softmax_cross_entropy_loss(x, labels, weights, reduction="none").shape == (n,)
    _, facts = linear_softmax_cross_entropy_with_statistics(x, labels, weights)
    assert facts.entropy.shape == (n,)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "bfloat16", "float16"])
def test_narrow_weights(dtype):
    x, labels, weights = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), jnp.ones((3, 4)).astype(dtype)
    loss, gradient = jax.jit(jax.value_and_grad(linear_softmax_cross_entropy_loss, 2))(x, labels, weights)
    np.testing.assert_allclose(loss, 2 * np.log(4), rtol=1e-6)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), np.tile([-1.5, 0.5, 0.5, 0.5], (3, 1)))


def test_narrow_labels():
    """-100 and -1 are no uint8 and no uint4: nothing is ignored."""
    x, weights = jnp.ones((1, 3)), jnp.ones((3, 300))
    for label, dtype, index in ((156, jnp.uint8, -100), (15, jnp.uint4, -1)):
        loss = linear_softmax_cross_entropy_loss(x, jnp.array([label], dtype), weights, ignore_index=index)
        np.testing.assert_allclose(loss, np.log(300), rtol=1e-6)


def test_symbolic_number_of_tokens():
    (x, weights, _, _), labels, _ = arguments(jnp.float32)
    (n,) = export.symbolic_shape("n")
    head = functools.partial(linear_softmax_cross_entropy_loss, ignore_index=4, reduction="mean")
    f = jax.value_and_grad(lambda x, labels, weights: head(x, labels, weights), (0, 2))
    shapes = (jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in (x, labels))
    exported = export.export(jax.jit(f))(*shapes, jax.ShapeDtypeStruct(weights.shape, weights.dtype))
    assert_close(exported.call(x, labels, weights), f(x, labels, weights), ulps=16)
    with pytest.raises(TypeError, match="only the number of tokens may be symbolic"):
        export.export(jax.jit(f))(x, labels, jax.ShapeDtypeStruct((weights.shape[0], n), weights.dtype))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"x": np.ones((4, 2), int)}, TypeError, "x must have a floating-point dtype"),
        ({"weights": jnp.ones((2, 3), "float8_e8m0fnu")}, TypeError, "float8_e8m0fnu"),
        ({"labels": np.zeros(3, int)}, ValueError, "labels must have the shape of x"),
        ({"labels": np.zeros(4)}, TypeError, "labels must have an integer dtype"),
        ({"weights": np.ones((3, 2), np.float32)}, ValueError, "vocab_axis=0"),
        ({"bias": np.ones(2, np.float32)}, ValueError, "bias must have the shape of the classes"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"token_weights": np.ones(3, np.float32)}, ValueError, "token_weights has shape"),
        ({"class_weights": np.ones(2, np.float32)}, ValueError, "class_weights"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"vocab_axis": 2}, ValueError, "vocab_axis"),
    ],
)
def test_errors(change, error, message):
    good = {"x": np.ones((4, 2), np.float32), "labels": np.zeros(4, int), "weights": np.ones((2, 3), np.float32)}
    with pytest.raises(error, match=message):
        linear_softmax_cross_entropy_loss(**{**good, **change})


def test_infinite_logits():
    """One of +inf is the one-hot limit; where no word is left, or several are +inf, the token is NaN."""
    x, w = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -1.0, 0.25], [1.0, 0.3, -0.5]])
    for bias in ([np.inf, 0.0, 0.0], [-np.inf, 0.0, 0.0], [-np.inf] * 3, [np.inf, np.inf, 0.0], [np.nan, 0.0, 0.0]):
        bias = jnp.array(bias)
        fused = lambda bias: linear_softmax_cross_entropy_loss(x, jnp.array([0]), w, bias=bias)
        plain = lambda bias: jnp.sum(softmax_cross_entropy_with_integer_labels(x @ w + bias[None], jnp.array([0])))
        wanted = (jnp.nan, jnp.full(3, jnp.nan)) if bias[1] == jnp.inf else jax.value_and_grad(plain)(bias)
        for got, want in zip(jax.value_and_grad(fused)(bias), wanted):
            np.testing.assert_allclose(got, want, rtol=1e-6)
