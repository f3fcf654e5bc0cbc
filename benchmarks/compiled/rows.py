"""What is compared: every public function beside its twin in jax.nn or optax, or beside the plain formula.

A function more is one line more in PAIRS.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax.losses as theirs

import jaxsoftmax as js
from benchmarks.compiled import textbook
from jaxsoftmax import losses

SIZES = (65536, 64), (8192, 4096), (8192, 32768)
DTYPES = "float32", "bfloat16"
MODES = "value", "VJP", "JVP", "HVP", "value+VJP"


def of_logits(size: tuple[int, ...], dtype: str, *kinds: str) -> tuple:
    """Shapes of the logits and of what comes after them."""
    shapes = {
        "label": (size[:-1], "int32"),
        "mask": (size, "bool"),
        "examples": (size[:-1], "bool"),
        "weights": (size[-1:], dtype),
    }
    return tuple(jax.ShapeDtypeStruct(*shapes.get(kind, (size, dtype))) for kind in ("logits", *kinds))


def of_linear_head(size: tuple[int, ...], dtype: str) -> tuple:
    """Shapes of N tokens with D features, their labels, and the weights of V classes, for size (N, D, V)."""
    n, d, v = size
    struct = jax.ShapeDtypeStruct
    return struct((n, d), dtype), struct((n,), "int32"), struct((d, v), dtype)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A function and its twin.

    Args:
      name: as on the command line.
      ours, theirs: functions of the same arguments.
      kinds: what the arguments after the logits are: "label", "soft", "logits", "log", "vector", "mask", …
      modes: what is compared of MODES.
      sizes: of the logits, where they are not SIZES.
      arguments: (size, dtype, *kinds) -> shapes of the arguments.
      wrt: positions of the arguments that derivatives are taken in.
      rounds: (chip, size) -> how often a loop runs whose end depends on numbers, for standard normal logits.
    """

    name: str
    ours: Callable
    theirs: Callable
    kinds: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    sizes: tuple[tuple[int, ...], ...] = SIZES
    arguments: Callable[..., tuple] = of_logits
    wrt: tuple[int, ...] = (0,)
    rounds: Callable[[str, tuple[int, ...]], int] = lambda chip, size: 1


def pair(name: str, ours: Callable, theirs: Callable, *kinds: str, **more: Any) -> Pair:
    return Pair(name, ours, theirs, kinds, **more)


product = functools.partial(pair, modes=("value",))
dense = functools.partial(pair, modes=("value",))
CE = losses.softmax_cross_entropy_with_integer_labels


def masked(f: Callable) -> Callable:
    """`f` whose last argument is the mask."""
    return lambda *args: f(*args[:-1], where=args[-1])


def last(f: Callable) -> Callable:
    return lambda z: f(z, axis=-1)


def method(name: str, *options: Any) -> Callable:
    """Of J at the logits."""
    return lambda z, *v: getattr(js.SoftmaxJacobian.from_logits(z), name)(*v, *options)


def hessian(loss: Callable) -> Callable:
    """(z, *args, v) -> H v, by the operator."""
    return lambda z, *rest: js.logits_hessian(loss, z, *rest[:-1]).mv(rest[-1])


def hvp(loss: Callable) -> Callable:
    """(z, *args, v) -> H v, forward over reverse."""

    def call(z, *rest):
        *args, v = rest
        gradient = jax.grad(lambda z: jnp.sum(loss(z, *args)))
        return jax.jvp(gradient, (z,), (v,))[1]

    return call


from_p = lambda f: lambda z, *v: f(*v, jax.nn.softmax(z))


def newton(chip: str, size: tuple[int, ...]) -> int:
    """Rounds of entmax's solver behind those that are written out, on a GPU up to 16,384 classes."""
    return 0 if chip == "h100" and size[-1] <= 16384 else 7


PAIRS: list[Pair] = [
    # Maps.
    pair("softmax", js.softmax, jax.nn.softmax),
    pair("softmax_where", masked(js.softmax), masked(jax.nn.softmax), "mask"),
    pair("log_softmax", js.log_softmax, jax.nn.log_softmax),
    pair("log_softmax_where", masked(js.log_softmax), masked(jax.nn.log_softmax), "mask"),
    pair("logsumexp", last(js.logsumexp), last(jax.nn.logsumexp)),
    pair("softcap_logits", lambda z: js.softcap_logits(z, 30.0), textbook.softcap),
    pair("sparsemax", js.sparsemax, textbook.sparsemax, rounds=newton),
    pair("entmax15", js.entmax15, textbook.entmax15, rounds=newton),
    product("entmax(1.25)", lambda z: js.entmax(z, 1.25), textbook.entmax, rounds=newton),
    # Derivatives of softmax, as products and dense.
    pair("softmax_jvp", from_p(js.softmax_jvp), textbook.mv, "vector"),
    product("second_derivative", from_p(js.softmax_second_derivative), from_p(textbook.second_derivative), *2 * ["v"]),
    product("third_derivative", from_p(js.softmax_third_derivative), from_p(textbook.third_derivative), *3 * ["v"]),
    dense("softmax_jacobian", js.softmax_jacobian, textbook.jacobian, sizes=((65536, 64), (64, 4096))),
    dense("softmax_hessian", js.softmax_hessian, jax.vmap(jax.hessian(jax.nn.softmax)), sizes=((4096, 64),)),
    # Products of the operators.
    product("J.mv", method("mv"), textbook.mv, "vector"),
    product("J.quadratic_form", method("quadratic_form"), textbook.quadratic_form, "vector"),
    product("J.solve", method("solve", 0.125), textbook.solve, "vector"),
    product("J.logdet", method("logdet", 0.125), textbook.logdet),
    product("J.pinv_mv", method("pinv_mv"), textbook.pinv_mv, "vector"),
    product("J.factor_mv", method("factor_mv"), textbook.factor_mv, "vector"),
    product("J.factor_rmv", method("factor_rmv"), textbook.factor_rmv, "vector"),
    product("J.trace", method("trace"), textbook.trace),
    product("J.frobenius_norm", method("frobenius_norm"), textbook.frobenius_norm),
    product("H.mv_integer_labels", hessian(CE), hvp(textbook.integer_labels), "label", "vector"),
    product("H.mv_focal", hessian(losses.focal_loss_with_integer_labels), hvp(textbook.focal), "label", "vector"),
    product(
        "H.mv_poly", hessian(losses.poly_loss_cross_entropy), hvp(theirs.poly_loss_cross_entropy), "soft", "vector"
    ),
    product("H.mv_brier", hessian(losses.brier_loss), hvp(textbook.brier), "soft", "vector"),
    product("H.mv_entropy", hessian(losses.softmax_entropy), hvp(textbook.entropy), "vector"),
    # Losses of logits over classes.
    pair("integer_labels", CE, textbook.integer_labels, "label"),
    pair("integer_labels_smoothing", lambda z, y: CE(z, y, label_smoothing=0.125), textbook.smoothed, "label"),
    pair("integer_labels_weights", lambda z, y, w: CE(z, y, class_weights=w), textbook.weighted, "label", "weights"),
    pair("integer_labels_ignore", lambda z, y: CE(z, y, ignore_index=3), textbook.ignoring, "label"),
    pair("integer_labels_z_loss", lambda z, y: CE(z, y, z_loss=0.0625), textbook.with_z_loss, "label"),
    pair("integer_labels_where", masked(CE), masked(theirs.softmax_cross_entropy_with_integer_labels), "label", "mask"),
    pair("soft_labels", losses.softmax_cross_entropy, theirs.softmax_cross_entropy, "soft"),
    pair("soft_labels_where", masked(js.softmax_cross_entropy), masked(theirs.softmax_cross_entropy), "soft", "mask"),
    pair("safe_soft_labels", losses.safe_softmax_cross_entropy, theirs.safe_softmax_cross_entropy, "soft"),
    pair("natural_gradient_norm", losses.natural_gradient_norm, textbook.natural_gradient_norm, "label"),
    pair("focal", losses.focal_loss_with_integer_labels, textbook.focal, "label"),
    pair("poly", losses.poly_loss_cross_entropy, theirs.poly_loss_cross_entropy, "soft"),
    pair("softmax_kl", losses.softmax_kl_divergence, textbook.softmax_kl, "logits"),
    pair(
        "softmax_kl_temperature",
        lambda z, x: losses.softmax_kl_divergence(z, x, temperature=2.5),
        lambda z, x: textbook.softmax_kl(z, x, 2.5),
        "logits",
    ),
    pair("jensen_shannon", losses.jensen_shannon_divergence, textbook.jensen_shannon, "logits"),
    pair("entropy", losses.softmax_entropy, textbook.entropy),
    pair("brier", losses.brier_loss, textbook.brier, "soft"),
    pair("entmax15_loss", losses.entmax_loss, textbook.entmax15_loss, "label", rounds=newton),
    pair(
        "sparsemax_multiclass",
        losses.multiclass_sparsemax_loss,
        theirs.multiclass_sparsemax_loss,
        "label",
        rounds=newton,
    ),
    # Divergences of probabilities.
    pair("kl_divergence", losses.kl_divergence, theirs.kl_divergence, "soft"),
    pair("kl_log_targets", losses.kl_divergence_with_log_targets, theirs.kl_divergence_with_log_targets, "log"),
    pair("generalized_kl", losses.generalized_kl_divergence, theirs.generalized_kl_divergence, "soft"),
    # Heads of one logit each, and regression.
    pair("binary", losses.sigmoid_binary_cross_entropy, theirs.sigmoid_binary_cross_entropy, "soft"),
    pair(
        "binary_pos_weight",
        lambda z, y: losses.sigmoid_binary_cross_entropy(z, y, pos_weight=2.5),
        textbook.binary,
        "soft",
    ),
    pair("sigmoid_focal", losses.sigmoid_focal_loss, lambda z, y: theirs.sigmoid_focal_loss(z, y, gamma=2.0), "soft"),
    pair(
        "sigmoid_focal_alpha",
        lambda z, y: losses.sigmoid_focal_loss(z, y, alpha=0.25),
        lambda z, y: theirs.sigmoid_focal_loss(z, y, alpha=0.25),
        "soft",
    ),
    pair("sparsemax_binary", losses.sparsemax_loss, theirs.sparsemax_loss, "binary"),
    pair("squared_error", losses.squared_error, theirs.squared_error, "logits"),
    pair("l2_loss", losses.l2_loss, theirs.l2_loss, "logits"),
    pair("sum_squared_error", losses.sum_squared_error, textbook.sum_squared_error, "logits"),
    pair("huber", losses.huber_loss, theirs.huber_loss, "logits"),
    pair("log_cosh", losses.log_cosh, theirs.log_cosh, "logits"),
    # Whole layers.
    pair(
        "linear_head",
        js.linear_softmax_cross_entropy_loss,
        textbook.linear_head,
        arguments=of_linear_head,
        sizes=((8192, 1024, 32768),),
        wrt=(0, 2),
    ),
]


def names(wanted: tuple[str, ...] = ()) -> list[Pair]:
    """The pairs of these names, all without any."""
    known = {p.name: p for p in PAIRS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no such function: {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in wanted] if wanted else PAIRS


def in_mode(f: Callable, mode: str, args: tuple, wrt: tuple[int, ...] = (0,)) -> tuple[Callable, tuple]:
    """`f` as it is used, and shapes of the arguments of that: those of `f`, tangents, cotangents.

    A VJP gives the gradient alone, value+VJP both, as training does; a JVP value and tangent, an HVP the tangent of the
    gradient alone.
    """
    inputs = tuple(args[i] for i in wrt)
    out = jax.eval_shape(f, *args)

    def of(x, args):
        args = list(args)
        for i, value in zip(wrt, x):
            args[i] = value
        return f(*args)

    def both(x, args, cotangent):
        value, pull = jax.vjp(lambda x: of(x, args), x)
        return value, pull(cotangent)[0]

    gradient = lambda *given: both(*given)[1]

    if mode == "value":
        return f, args
    if mode in ("VJP", "value+VJP"):
        return both if mode == "value+VJP" else gradient, (inputs, args, out)
    if mode == "JVP":
        return lambda x, args, t: jax.jvp(lambda x: of(x, args), (x,), (t,)), (inputs, args, inputs)
    call = lambda x, args, ct, t: jax.jvp(lambda x: gradient(x, args, ct), (x,), (t,))[1]
    return call, (inputs, args, out, inputs)
