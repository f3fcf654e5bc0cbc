"""The registry of public differentiable functions: samples, formulas, and what each of them has.

A new loss head is a row of `heads.TABLE`, a new map enters `FUNCTIONS` and `CASES`. The tests by transformation,
option, mask, special value, dtype and accuracy run over them, and those of wrong calls over the heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax as js
from tests.registry import formulas as exact
from tests.registry.heads import HEADS, Head
from tests.registry.samples import LABELS, LOGP, MASK, WEIGHTS, P, V, Y, Z

DAMPING = 0.125


# Accuracy: what is measured against formulas.


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A public function of logits (N, K) and more arguments, and its formula.

    Args:
      call: (logits, *args) -> values (N,), (N, K) or (N, K, K).
      formula: of tests/registry/formulas.py, (z, n, *args) -> a number or a list.
      kinds: what the other arguments are: "label", "soft" labels, other "logits", "log" probabilities or a "vector".
      order: of the highest derivative that is measured.
      product: linear in its vectors, and measured in |J||v|.
      absolute, elementwise, many, support, logarithms, terms, peers: as of a head.
      loss: whether half precision gives float32.
    """

    call: Callable
    formula: Callable
    kinds: tuple[str, ...] = ()
    order: int = 2
    product: bool = False
    absolute: bool = False
    elementwise: bool = False
    many: bool = True
    loss: bool = True
    support: bool = False
    logarithms: bool = False
    terms: tuple[Callable, ...] = ()
    peers: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


def on_operator(method: str, *options) -> Callable:
    """A method of the operator at the logits; its vectors come after the logits."""
    return lambda z, *args: getattr(js.SoftmaxJacobian.from_logits(z), method)(*args, *options)


def bind(f: Callable, *options) -> Callable:
    """`f` with these arguments after its own."""
    return lambda *args: f(*args, *options)


def of_head(head: Head, which: int) -> Function:
    """A head with its first (defaults) or last set of options."""

    def call(z, *args):
        wide = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
        options = {
            name: jnp.asarray(x, wide) if isinstance(x, np.ndarray) else x
            for name, x in head.options_for(z.shape[-1])[which].items()
        }
        return head.loss(z, *args, **options)

    def formula(z, n, *args, of=head.formula):
        options = {
            name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in head.options_for(len(z))[which].items()
        }
        return of(z, n, *args, **options)

    shared = ("kinds", "absolute", "elementwise", "many", "support", "logarithms", "peers")
    return Function(
        call,
        formula,
        terms=tuple(functools.partial(formula, of=term) for term in head.terms),
        **{name: getattr(head, name) for name in shared},
    )


Map = functools.partial(Function, loss=False)
Product = functools.partial(Function, product=True, order=0, many=False, loss=False)
Scalar = functools.partial(Function, order=1, many=False, loss=False)

FUNCTIONS: dict[str, Function] = {
    "softmax": Map(js.softmax, exact.softmax, peers={"jax.nn": jax.nn.softmax}),
    "log_softmax": Map(js.log_softmax, exact.log_softmax, peers={"jax.nn": jax.nn.log_softmax}),
    "logsumexp": Map(
        lambda z: js.logsumexp(z, -1),
        exact.logsumexp,
        absolute=True,
        peers={"jax.nn": lambda z: jax.nn.logsumexp(z, -1)},
    ),
    "sparsemax": Map(js.sparsemax, lambda z, n: exact.entmax(z, n, 1), order=1, many=False),
    "entmax15": Map(js.entmax15, lambda z, n: exact.entmax(z, n, 2), many=False),
    "entmax(1.25)": Map(lambda z: js.entmax(z, 1.25), lambda z, n: exact.entmax(z, n, 4), many=False),
    "softmax_jvp": Product(lambda z, v: js.softmax_jvp(v, js.softmax(z)), exact.jacobian_product, ("vector",)),
    "softmax_vjp": Product(lambda z, v: js.softmax_vjp(v, js.softmax(z)), exact.jacobian_product, ("vector",)),
    "softmax_jacobian": Scalar(js.softmax_jacobian, exact.dense_jacobian, order=0),
    "second_derivative": Product(
        lambda z, u, v: js.softmax_second_derivative(u, v, js.softmax(z)),
        exact.second_derivative,
        ("vector", "vector"),
    ),
    "third_derivative": Product(
        lambda z, u, v, w: js.softmax_third_derivative(u, v, w, js.softmax(z)),
        exact.third_derivative,
        ("vector", "vector", "vector"),
    ),
    "J.mv": Product(on_operator("mv"), exact.jacobian_product, ("vector",)),
    "J.solve": Product(on_operator("solve", DAMPING), bind(exact.solve, DAMPING), ("vector",)),
    "J.pinv_mv": Product(on_operator("pinv_mv"), exact.pinv_product, ("vector",), support=True),
    "J.factor_mv": Product(on_operator("factor_mv"), exact.factor_product, ("vector",), support=True),
    "J.factor_rmv": Product(on_operator("factor_rmv"), exact.factor_transposed_product, ("vector",), support=True),
    "J.quadratic_form": Scalar(on_operator("quadratic_form"), exact.quadratic_form, ("vector",)),
    "J.trace": Scalar(on_operator("trace"), exact.trace),
    "J.frobenius_norm": Scalar(on_operator("frobenius_norm"), exact.frobenius_norm),
    "J.spectral_norm": Scalar(on_operator("spectral_norm"), exact.spectral_norm, order=0),
    "J.logdet": Scalar(on_operator("logdet", DAMPING), bind(exact.logdet, DAMPING)),
    "J.pseudo_logdet": Scalar(on_operator("pseudo_logdet"), exact.pseudo_logdet, support=True),
    "softcap_logits": Function(
        bind(js.softcap_logits, 30.0),
        bind(exact.softcap, 30),
        absolute=True,
        elementwise=True,
        many=False,
        loss=False,
    ),
}
FUNCTIONS |= {head.name: of_head(head, 0) for head in HEADS}
FUNCTIONS |= {f"{head.name}(options)": of_head(head, -1) for head in HEADS if head.choices}


# Transformations: functions of floating-point arguments alone, batched along axis 0 or not.


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One function with sample arguments, float64 numpy arrays or integer labels.

    Along a leading axis of length 3 it works example by example unless `batched` is False.
    """

    name: str
    fn: Callable
    args: tuple[np.ndarray, ...]
    batched: bool = True
    is_loss: bool = False
    kinks: bool = False

    @property
    def argnums(self) -> tuple[int, ...]:
        """The arguments to differentiate in."""
        return tuple(i for i, a in enumerate(self.args) if a.dtype.kind == "f")

    def cast(self, dtype) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(a, dtype if a.dtype.kind == "f" else None) for a in self.args)


ce = js.softmax_cross_entropy_with_integer_labels
Whole = functools.partial(Case, batched=False)
OfLoss = functools.partial(Case, is_loss=True)

CASES = [
    Case("softmax", js.softmax, (Z,)),
    Whole("softmax_where", lambda z: js.softmax(z, where=MASK), (Z,)),
    Whole("softmax_axis0", lambda z: js.softmax(z, axis=0), (Z,)),
    Whole("softmax_axis_none", lambda z: js.softmax(z, axis=None), (Z,)),
    Case("log_softmax", js.log_softmax, (Z,)),
    Whole("log_softmax_axes", lambda z: js.log_softmax(z, axis=(0, 1)), (Z,)),
    Whole("log_softmax_where", lambda z: jnp.where(MASK, js.log_softmax(z, where=MASK), 0.0), (Z,)),
    Case("logsumexp", lambda z: js.logsumexp(z, -1), (Z,)),
    Whole("logsumexp_all", lambda z: js.logsumexp(z, keepdims=True), (Z,)),
    Case("logsumexp_b", lambda z, b: js.logsumexp(z, -1, b=b, return_sign=True)[0], (Z, V)),
    Whole("logsumexp_where", lambda z: js.logsumexp(z, -1, where=MASK), (Z,)),
    Case("dot_product_attention", js.dot_product_attention, tuple(x.reshape(-1, 2, 1, 2) for x in (Z, V, Y))),
    Case("sparsemax", js.sparsemax, (Z,), kinks=True),
    Case("entmax15", js.entmax15, (Z,), kinks=True),
    Case("entmax", js.entmax, (Z, np.array([1.25, 1.5, 1.75])), kinks=True),
    Case("softmax_vjp", js.softmax_vjp, (V, P)),
    Case("softmax_jvp", js.softmax_jvp, (V, P)),
    Case("softmax_jacobian", js.softmax_jacobian, (Z,)),
    Case("softmax_hessian", js.softmax_hessian, (Z,)),
    Case("softmax_second_derivative", js.softmax_second_derivative, (V, Y, P)),
    Case("softmax_third_derivative", lambda u, v, p: js.softmax_third_derivative(u, v, v, p), (V, Y, P)),
    OfLoss(
        "cross_entropy_where",
        lambda z, y: js.softmax_cross_entropy(z, y, where=MASK),
        (Z, MASK * Y),
        False,
    ),
    OfLoss("label_cross_entropy_axis0", lambda z: ce(z, np.array([0, 2, 1, 1], np.int32), axis=0), (Z,), False),
    OfLoss(
        "label_cross_entropy_options",
        lambda z, w: ce(z, LABELS, label_smoothing=0.125, class_weights=w, ignore_index=3, z_loss=0.0625),
        (Z, WEIGHTS),
        False,
    ),
    *(OfLoss(h.name, h.loss, (LOGP if h.logarithms else Z, *h.args), kinks=h.kinks) for h in HEADS),
]


def case_id(case) -> str:
    return getattr(case, "name", case)
