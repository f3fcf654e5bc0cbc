"""A class axis split over a mesh, inside `jax.shard_map`: as on one device, with few and small reductions between.

Each case is a function of arrays and of `axis_name`, None for one device. `Split` says of each array, and of the
result, along which axis its classes lie, if any.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js
from tests import registry
from tests.helpers import DERIVATIVE_RTOL, VALUE_RTOL, assert_close, enable_x64, one_in, only, shard_map
from tests.meshes import mesh_of

B, K = 4, 8
_rng = np.random.default_rng(11)
Z = _rng.normal(size=(B, K)) * 1.5
Z[0, 3] += 6.0  # sure of itself
Z[1, :4] -= 9.0  # one block far below the other
X = _rng.normal(size=(B, K))
Y = np.exp(X) / np.exp(X).sum(-1, keepdims=True)
PROBS = np.exp(Z) / np.exp(Z).sum(-1, keepdims=True)
LABELS = np.array([3, 0, 7, 4], np.int32)  # in every block of two and of four
MASK = _rng.random((B, K)) > 0.3
MASK[range(B), LABELS] = True
MASK[1] = False
MASK[2, :4] = False  # one block without any class
WEIGHTS = _rng.random(K) + 0.5
ORDERS = np.array([1.2, 1.5, 1.8, 2.5])

CLASSES, WHOLE, ONLY = P("batch", "classes"), P("batch"), P("classes")


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One function with sample arguments.

    Args:
      fn: (*args, labels, mask, axis_name) -> result.
      specs: how each of the args is split over the mesh axes "batch" and "classes".
      out: how the result is.
      reductions: how many all-reduces the value may compile to; None where it iterates.
    """

    name: str
    fn: Callable
    args: tuple[np.ndarray, ...]
    specs: tuple[P, ...]
    out: P
    reductions: int | None = 3
    kinks: bool = False

    def on(self, axis_name, **names):
        """The function of the args; over a mesh, wrapped in `shard_map`."""

        def call(*args):
            *args, labels, mask = args
            return self.fn(*args, labels, mask, axis_name=axis_name)

        if axis_name is None:
            return lambda *args: call(*args, LABELS, MASK)
        mesh, check = names["mesh"], names.get("check", {})
        translate = functools.partial(renamed, batch=names["batch"], classes=axis_name)
        specs = tuple(map(translate, (*self.specs, WHOLE, CLASSES)))
        split = shard_map(call, mesh=mesh, in_specs=specs, out_specs=translate(self.out), **check)
        return lambda *args: split(*args, LABELS, MASK)


def renamed(spec: P, batch, classes) -> P:
    return P(*({"batch": batch, "classes": classes}[axis] for axis in spec))


def case(name, fn, *args, out=WHOLE, specs=None, **options):
    specs = tuple(CLASSES if a.ndim == 2 else ONLY if len(a) == K else WHOLE for a in args) if specs is None else specs
    return Split(name, fn, args, specs, out, **options)


def plain(fn, *args, **options):
    """A case of a function that has no labels and no mask."""
    return case(fn.__name__, lambda *a, axis_name: fn(*a[:-2], axis_name=axis_name), *args, **options)


ce = js.softmax_cross_entropy_with_integer_labels


def options(z, w, epsilon, labels, mask, axis_name):
    return ce(
        z,
        labels,
        where=mask,
        label_smoothing=epsilon[0],
        class_weights=w,
        ignore_index=4,
        z_loss=epsilon[0] / 8,
        axis_name=axis_name,
    )


EPSILON = np.full((1,), 0.1)

OTHERS = {"soft": Y, "logits": X, "log": np.log(Y)}  # what a head takes beside the logits, where it is no label
WITH_AXIS_NAME = [head for head in registry.HEADS if "axis_name" in head.parameters]


def of_head(head):
    def fn(z, *rest, axis_name):
        *others, labels, mask = rest
        return head.loss(z, *(others or [labels] if head.kinds else []), axis_name=axis_name)

    others = [OTHERS[kind] for kind in head.kinds if kind != "label"]
    reductions = None if head.kinks else 3
    logits = np.log(PROBS) if head.logarithms else Z
    return case(head.name, fn, logits, *others, reductions=reductions, kinks=head.kinks)


HEADS = [
    *map(of_head, WITH_AXIS_NAME),
    case("logsumexp", lambda z, c, m, axis_name: js.logsumexp(z, -1, axis_name=axis_name), Z),
    case("sumexp_mask", lambda z, b, c, m, axis_name: jnp.exp(js.logsumexp(z, -1, b, where=m, axis_name=axis_name)), Z,
         PROBS),
    case("cross_entropy_options", options, Z, WEIGHTS, EPSILON, specs=(CLASSES, ONLY, P()), reductions=4),
    case("soft_mask", lambda z, y, c, m, axis_name: js.softmax_cross_entropy(z, y, -1, m, axis_name=axis_name), Z, Y),
    case("entmax_orders", lambda z, a, c, m, axis_name: js.entmax_loss(z, c, a, axis_name=axis_name), Z, ORDERS,
         specs=(CLASSES, WHOLE), reductions=None, kinks=True),
    case("entmax_soft", lambda z, y, a, c, m, axis_name: js.entmax_loss(z, y, a, axis_name=axis_name), Z, Y, ORDERS,
         specs=(CLASSES, CLASSES, WHOLE), reductions=None, kinks=True),
]  # fmt: skip
MAPS = [
    plain(js.softmax, Z, out=CLASSES),
    plain(js.log_softmax, Z, out=CLASSES),
    case("softmax_mask", lambda z, c, m, axis_name: js.softmax(z, where=m, axis_name=axis_name), Z, out=CLASSES),
    plain(js.softmax_jvp, X, PROBS, out=CLASSES),
    plain(js.softmax_second_derivative, X, Y, PROBS, out=CLASSES, reductions=8),
    case("third", lambda u, v, p, c, m, axis_name: js.softmax_third_derivative(u, v, v, p, axis_name=axis_name), X, Y,
         PROBS, out=CLASSES, reductions=8),
    plain(js.sparsemax, Z, out=CLASSES, reductions=None, kinks=True),
    case("entmax", lambda z, a, c, m, axis_name: js.entmax(z, a, where=m, axis_name=axis_name), Z, ORDERS,
         specs=(CLASSES, WHOLE), out=CLASSES, reductions=None, kinks=True),
]  # fmt: skip


def of_jacobian(name, method, *args, out=CLASSES, **build):
    """A method of the operator at logits z."""

    def fn(z, *rest, axis_name):
        return method(js.SoftmaxJacobian.from_logits(z, axis_name=axis_name, **build), *rest[:-2])

    return case(f"J_{name}", fn, Z, *args, out=out, reductions=8)


J = [
    of_jacobian("mv", lambda J, v: J.mv(v), X),
    of_jacobian("solve", lambda J, v: J.solve(v, 0.1), X),
    of_jacobian("pinv", lambda J, v: J.pinv_mv(v), X),
    of_jacobian("factor", lambda J, u: J.factor_rmv(J.factor_mv(u)), X),
    of_jacobian("null_space", lambda J, v: J.null_space().mv(v), X),
    of_jacobian("diagonal", lambda J: J.diagonal()),
    of_jacobian("quadratic_form", lambda J, v: J.quadratic_form(v), X, out=WHOLE),
    of_jacobian(
        "numbers",
        lambda J: (
            J.trace() + 2 * J.frobenius_norm() + 3 * J.logdet(0.1) + 4 * J.pseudo_logdet() + J.rank().astype(J.dtype)
        ),
        out=WHOLE,
    ),
]


def hessian(name, loss, *args, labels=True, **options):
    """Products, solution and norms of a loss Hessian at logits z; with the labels unless `args` are targets."""

    def fn(z, v, *rest, axis_name):
        *targets, classes, mask = rest
        where = {"where": mask} if "where" in options else {}
        H = js.logits_hessian(
            loss, z, *targets, *([classes] if labels else []), axis_name=axis_name, **{**options, **where}
        )
        numbers = H.frobenius_norm() + H.logdet(30.0) + H.trace() + H.quadratic_form(v)
        return H.mv(v) + 10 * H.solve(v, 30.0) + H.diagonal() + numbers[:, None]

    return case(f"hessian_{name}", fn, Z, X, *args, out=CLASSES, reductions=None)


def hessian_of_head(head):
    others = [OTHERS[kind] for kind in head.kinds if kind != "label"]
    through = {js.brier_loss: {"logit_softcap": 3.0}, js.softmax_cross_entropy: {"logit_temperature": 2.0}}
    where = {"where": MASK} if head.has_where else {}
    return hessian(
        head.name, head.loss, *others, labels=head.kinds == ("label",), **through.get(head.loss, {}), **where
    )


HESSIANS = [
    hessian("options", ce, label_smoothing=0.1, z_loss=0.1, ignore_index=4, logit_softcap=3.0, where=MASK),
    *(hessian_of_head(head) for head in WITH_AXIS_NAME if head.hessian),
]
CASES = HEADS + MAPS + J + HESSIANS


@functools.cache
def meshes():
    return mesh_of(rows=2, columns=2)


TWO = dict(axis_name="columns", batch="rows")
FOUR = dict(axis_name=("rows", "columns"), batch=None)
REPRESENTATIVES = "cross_entropy_options softmax_cross_entropy softmax_kl_divergence log_softmax entmax J_solve"
FEW = [c for c in CASES if c.name in REPRESENTATIVES.split()]
OF_EACH_KIND = REPRESENTATIVES.split() + ["J_numbers", "hessian_focal_loss_with_integer_labels"]


def over(cases, default=OF_EACH_KIND):
    """A test of each case, slow but for those of the default names."""
    cases = only([case for case in cases if case.name in default], cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def total(fn):
    """A scalar that every entry of the result takes part in with a weight of its own."""

    def scalar(*args):
        out = fn(*args)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return scalar


def everywhere(args):
    return tuple(range(len(args)))


def assert_as_on_one_device(case, place):
    args = tuple(map(jnp.asarray, case.args))

    def both(fn):
        return jax.jit(lambda *a: (fn(*a), jax.grad(total(fn), everywhere(a))(*a)))

    value, gradient = both(case.on(mesh=meshes(), **place))(*args)
    wanted, right = both(case.on(None))(*args)
    assert_close(value, wanted, VALUE_RTOL["float64"])
    assert_close(gradient, right)


@over(CASES)
def test_value_and_gradient_are_those_of_one_device(case, x64):
    assert_as_on_one_device(case, TWO)


@over(CASES[::3], [])
def test_classes_split_over_two_axes_of_the_mesh(case, x64):
    assert_as_on_one_device(case, FOUR)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_that_are_not_split_are_refused(case):
    """The same on every device, all classes would count twice: the types say it."""

    def call(*args):
        *args, labels, mask = args
        return case.fn(*args, labels, mask, axis_name=("rows", "columns"))

    args = tuple(jnp.asarray(a, jnp.float32) for a in case.args)
    for named in (None, "rows"):  # over no axis, and over one of the two
        specs = tuple(renamed(spec, None, named) for spec in (*case.specs, WHOLE, CLASSES))
        split = shard_map(call, mesh=meshes(), in_specs=specs, out_specs=P())
        shared = "rows.*columns" if named is None else "columns"
        with pytest.raises(ValueError, match=rf"axis_name=.* is the same on every device along .*{shared}.*in_specs"):
            jax.eval_shape(split, *args, LABELS, MASK)


@over(FEW, ["cross_entropy_options", "entmax"])
def test_forward_mode_and_hessian_products(case, x64):
    args = tuple(map(jnp.asarray, case.args))
    tangents = tuple(jnp.cos(1 + jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in args)

    def products(fn):
        def all_at_once(*a):
            gradient = jax.grad(total(fn), everywhere(a))
            along = lambda *a: jax.jvp(total(fn), a, tangents)[1]
            out = jax.jvp(fn, a, tangents)[1], jax.jvp(gradient, a, tangents)[1]
            return out if jax.__version_info__ < (0, 7) else (*out, jax.grad(along, everywhere(a))(*a))

        return jax.jit(all_at_once)

    got = products(case.on(mesh=meshes(), **TWO))(*args)
    assert_close(got, products(case.on(None))(*args), 10 * DERIVATIVE_RTOL["float64"])


@over(FEW + HESSIANS[:1], ["softmax_kl_divergence", "J_solve"])
def test_without_the_checks_of_shard_map(case, x64):
    """With check_vma=False the cotangent of a shared result reaches the devices in shares, in both modes."""
    args = tuple(map(jnp.asarray, case.args))
    unchecked = {"check_vma" if hasattr(jax, "shard_map") else "check_rep": False}

    def both(fn):
        gradient = jax.grad(total(fn), everywhere(args))
        return jax.jit(lambda *a: (gradient(*a), jax.jvp(fn, a, tuple(map(jnp.sin, a)))[1]))

    got = both(case.on(mesh=meshes(), check=unchecked, **TWO))(*args)
    assert_close(got, both(case.on(None))(*args))


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="its XLA does not merge equal reductions")
@pytest.mark.parametrize("case", one_in(3, [c for c in CASES if c.reductions is not None]), ids=lambda case: case.name)
def test_what_crosses_the_mesh(case):
    """At most so many all-reduces, of one number per example; nothing is gathered. A mask over classes adds one."""
    args = tuple(jnp.asarray(a, jnp.float32) for a in case.args)
    text = jax.jit(case.on(mesh=meshes(), **TWO)).lower(*args).compile().as_text()
    reductions = re.findall(r"= (\(?[a-z].*?) all-reduce(?:-start)?\(", text)
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    assert len(reductions) <= case.reductions + ("mask" in case.name)
    per_example = {f"{B // 2},1", f"{B // 2}"}
    assert all(set(re.findall(r"\[([\d,]*)\]", shapes)) <= per_example for shapes in reductions), reductions


@pytest.mark.parametrize(
    "name",
    one_in(
        2, [ce.__name__, "softmax", "softmax_entropy", "log_softmax", "brier_loss", "focal_loss_with_integer_labels"]
    ),
)
def test_digits_of_a_sure_model(name):
    """A logit 20 above the others, in either block: every entry of value and gradient to a few eps of itself."""
    (case,) = (c for c in CASES if c.name == name)
    z = np.where(np.arange(K) == LABELS[:, None], 20.0, _rng.normal(size=(B, K)))
    args = tuple(jnp.asarray(a, jnp.float32) for a in (z, *case.args[1:]))

    def both(fn):
        return jax.jit(lambda *a: (fn(*a), jax.grad(total(fn))(*a)))

    got = both(case.on(mesh=meshes(), **TWO))(*args)
    with enable_x64():
        right = jax.tree.map(np.asarray, both(case.on(None))(*(np.asarray(a, np.float64) for a in args)))
    for a, b in zip(got, right):
        np.testing.assert_allclose(a, b, rtol=1e-5)


INF = np.inf
SPECIAL = np.array(
    [
        [-INF, 1.0, 2.0, 0.5],
        [2.0, 1.0, -INF, 0.5],
        [INF, 1.0, 2.0, 0.5],
        [0.0, 1.0, INF, 0.5],
        [INF, 1.0, INF, 0.5],
        [-INF, -INF, -INF, -INF],
        [-INF, -INF, 1.0, 0.5],
        [np.nan, 1.0, 2.0, 0.5],
    ]
)
SPECIAL_LABELS = np.array([0, 0, 0, 0, 2, 1, 3, 3])


def with_labels(loss, labels):
    return lambda z, **where: loss(z, labels, **where)


OF_SPECIAL = {
    "softmax": js.softmax,
    "log_softmax": js.log_softmax,
    "logsumexp": functools.partial(js.logsumexp, axis=-1),
    "entropy": js.softmax_entropy,
    "sparsemax": js.sparsemax,
    "cross_entropy": with_labels(ce, SPECIAL_LABELS),
    "cross_entropy_minus_1": with_labels(ce, SPECIAL_LABELS - 1),
    "cross_entropy_plus_1": with_labels(ce, SPECIAL_LABELS + 1),
    "focal": with_labels(js.focal_loss_with_integer_labels, SPECIAL_LABELS),
    "entmax_minus_1": with_labels(js.entmax_loss, SPECIAL_LABELS - 1),
}


@pytest.mark.parametrize("name", one_in(2, OF_SPECIAL))
def test_special_values(name):
    """Value and gradient at infinite, missing and NaN logits, with labels from -1 to K, as on one device."""
    fn, spec = OF_SPECIAL[name], P(None, ("rows", "columns"))
    z = jnp.asarray(SPECIAL, jnp.float32)

    def both(fn):
        return jax.jit(lambda z: (fn(z), jax.grad(lambda z: jnp.sum(fn(z)))(z)))

    out = spec if jax.eval_shape(fn, z).ndim == 2 else P()
    on_blocks = functools.partial(fn, axis_name=("rows", "columns"))
    got = both(shard_map(on_blocks, mesh=meshes(), in_specs=spec, out_specs=out))(z)
    for a, b in zip(got, both(fn)(z)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_samples_have_the_covariance():
    mesh, z = meshes(), jnp.asarray(Z[:1], jnp.float32)

    def draw(z, key):
        J = js.SoftmaxJacobian.from_logits(z, axis_name="columns")
        return J.sample(key, (4000,)), J.sample_inverse(key, 0.5, (4000,))

    specs = P(None, "columns"), P()
    out = P(None, None, "columns")
    samples = jax.jit(shard_map(draw, mesh=mesh, in_specs=specs, out_specs=(out, out)))(z, jax.random.key(0))
    right = np.asarray(js.SoftmaxJacobian.from_logits(z).as_matrix()[0])
    for got, wanted in zip(samples, (right, np.linalg.inv(right + 0.5 * np.eye(K)))):
        np.testing.assert_allclose(np.cov(np.asarray(got)[:, 0].T), wanted, atol=0.12)


@pytest.mark.parametrize(
    "method", ["as_matrix", "eigvalsh", "eigh", "spectral_norm"] + [lambda J: J.null_space().as_matrix()]
)
def test_what_needs_all_classes_says_so(method):
    def call(z):
        J = js.SoftmaxJacobian.from_logits(z, axis_name="columns")
        return method(J) if callable(method) else getattr(J, method)()

    split = shard_map(call, mesh=meshes(), in_specs=P(None, "columns"), out_specs=P())
    with pytest.raises(TypeError, match=r"all classes.*all_gather.*shard_map"):
        jax.eval_shape(split, jnp.zeros((B, K)))


@pytest.mark.parametrize("dense", [js.softmax_jacobian, js.softmax_hessian])
def test_dense_derivatives_need_all_classes(dense):
    split = shard_map(
        functools.partial(dense, axis_name="columns"), mesh=meshes(), in_specs=P(None, "columns"), out_specs=P()
    )
    with pytest.raises(TypeError, match=f"{dense.__name__} needs all classes.*all_gather.*products"):
        jax.eval_shape(split, jnp.zeros((B, K)))


def test_what_works_element_by_element_takes_no_axis_name():
    zeros = jnp.zeros((B, K))
    with pytest.raises(TypeError, match="axis_name='columns' .* sigmoid_binary_cross_entropy works element by element"):
        js.logits_hessian(js.sigmoid_binary_cross_entropy, zeros, zeros, axis_name="columns")


@pytest.mark.parametrize(
    ("axis_name", "error", "text"),
    [
        ("columns", ValueError, "axis_name='columns' .*shard_map"),
        (("rows", "rows"), ValueError, "twice"),
        (3, TypeError, "axis_name must be .* got 3"),
    ],
)
def test_wrong_axis_names(axis_name, error, text):
    for call in (js.softmax, js.softmax_entropy, js.SoftmaxJacobian.from_logits):
        with pytest.raises(error, match=text):
            call(jnp.zeros((2, 4)), axis_name=axis_name)
