"""How many digits a function keeps: errors against exact references at the very numbers that it is given.

The units:

- value and gradient in units of eps (|f| + Σ_k |∂f/∂z_k| w_k) = eps |f| (1 + κ), where w_k is the size of the logit as
  the function sees it: max(|z_k - max z|, 1) where a constant added to all logits changes nothing, else |z_k|;
- products (JVP, VJP, HVP, operator methods) in units of eps |J||v|, entry by entry, where a gradient counts for |J|
  with the size above;
- what is rounded to half precision in units of its last place.

Numbers below the smallest normal one may be missing: the processor flushes them. "inf" is a NaN or an infinity where
there is a number.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from mpmath import mp, mpf

from tests.accuracy import linear_head as linear
from tests.helpers import enable_x64
from tests.registry import FUNCTIONS, Function
from tests.registry import formulas as exact

GAPS = (5, 12, 20, 40, 60, 80, 100)
OFFSETS = (1e4, -1e4, 1e6, -1e6)


def computed_in(dtype) -> np.finfo:
    """float64 or float32, in which half precision is computed."""
    return np.finfo(np.float64 if dtype == np.float64 else np.float32)


# Slices: logits, as numbers of a dtype, and the other arguments.


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """N slices of K classes. `z`, `args`, `direction` and `cotangent` hold one number per kind of class, M of them."""

    regimes: list[str]
    z: np.ndarray
    args: tuple[np.ndarray, ...]
    direction: np.ndarray
    cotangent: np.ndarray
    counts: np.ndarray  # how many of the K classes are of each kind
    kinds: np.ndarray  # of which kind each class is


def as_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of this dtype, as doubles."""
    return np.asarray(x, np.float64).astype(jnp.dtype(dtype)).astype(np.float64)


def logits_of(num_kinds: int, dtype: str, quick: bool, absolute: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(regime, logits) in turn; the three first kinds hold the top class."""
    rng = np.random.default_rng(num_kinds)

    def normal():
        return -np.sort(-rng.normal(size=num_kinds))

    def ahead(gap):
        z = normal()
        z[0] = np.max(z[1:], initial=z[0] - gap) + gap
        return z

    for _ in range(1 if quick else 3):
        yield "normal", normal()
    for gap in (12, 20, 60, 90) if quick else GAPS:
        for _ in range(1 if quick else 2):
            yield "gap to 60" if gap <= 60 else "gap to 100", ahead(gap)
    if dtype in ("float32", "float64"):
        yield "gap to 100", 1e30 * normal()
    for offset in (1e4,) if quick else OFFSETS:
        if abs(offset) < float(jnp.finfo(dtype).max):
            yield "offset", normal() + offset
            yield "offset", ahead(20) + offset
    if num_kinds > 1:
        tied = normal()
        tied[1] = tied[0]
        yield "ties", tied
        yield "ties", np.full(num_kinds, 0.7)
        if not absolute:  # else near 0 the other argument decides how much cancels
            yield "ties", 1e-3 * normal()
        low, high = {"float64": (-690, -760), "float16": (-8, -17)}.get(dtype, (-80, -110))
        yield "tails", np.concatenate([[0.3], np.linspace(low, high, num_kinds - 1)])


def slices(function: Function, num_classes: int, dtype: str, quick: bool = False) -> Slices:
    """All regimes, for every kind of label: one-hot on the top class and off it, and soft; near and far logits."""
    many = num_classes > 16
    counts = np.ones(min(num_classes, 8), int) if many else np.ones(num_classes, int)
    if many:
        counts[3:] = np.diff(np.linspace(0, num_classes - 3, 6).astype(int))
    size, rng = len(counts), np.random.default_rng(num_classes)
    kinds = np.repeat(np.arange(size), counts)
    kinds = rng.permutation(kinds) if many else kinds
    variants = {"label": 2, "soft": 3, "logits": 2}.get(function.kinds[0] if function.kinds else "", 1)
    regimes, z, args = [], [], []
    for regime, logits in logits_of(size, dtype, quick, function.absolute):
        if function.logarithms:
            logits = logits - np.logaddexp.reduce(logits + np.log(counts)) - 0.01
        logits = as_dtype(logits, dtype)
        top, other = int(np.argmax(logits)), int(np.argsort(-logits)[min(1, size - 1)])
        for variant in range(variants):
            regimes.append(regime)
            z.append(logits)
            args.append([argument(kind, variant, logits, top, other, counts, rng) for kind in function.kinds])
    arrays = tuple(
        np.array(a) if kind == "label" else as_dtype(np.array(a), dtype) for kind, a in zip(function.kinds, zip(*args))
    )
    direction, cotangent = (as_dtype(rng.normal(size=(len(z), size)), dtype) for _ in range(2))
    return Slices(regimes, np.array(z), arrays, direction, cotangent, counts, kinds)


def argument(kind: str, variant: int, z, top: int, other: int, counts, rng):
    if kind == "label":
        return (top, other)[variant]
    if kind == "soft" and variant < 2:
        return np.eye(len(z))[(top, other)[variant]]
    if kind in ("soft", "log"):
        y = rng.exponential(size=len(z))
        y = y / (counts @ y)
        return y if kind == "soft" else np.log(y)
    if kind == "logits" and variant == 1:
        return z + 1e-2 * rng.normal(size=len(z))
    return rng.normal(size=len(z)) + (z.mean() if kind == "logits" and abs(z.mean()) > 1e3 else 0)


# What should come out.


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """Per quantity (N, …): the number, and the size that its error is measured in."""

    numbers: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]


def expected(function: Function, s: Slices, order: int) -> Expected:
    """The references; derivatives up to `order`, sizes always."""
    rows: list[tuple[dict, dict]] = []
    for i in range(len(s.z)):
        for piece in range(s.z.shape[1]) if function.elementwise else [slice(None)]:
            rows.append(expected_slice(function, s, i, np.atleast_1d(np.arange(s.z.shape[1])[piece]), order))
    numbers, sizes = (
        {q: np.stack([exact.longdouble(row[part][q]) for row in rows]) for q in rows[0][part]} for part in (0, 1)
    )
    return Expected(numbers, {q: x.astype(np.float64) for q, x in sizes.items()})


def expected_slice(function: Function, s: Slices, i: int, part: np.ndarray, order: int) -> tuple[dict, dict]:
    z = [mpf(x) for x in s.z[i, part]]
    with mp.workdps(exact.digits([*z, mpf(0)] if function.absolute else z)):
        args = [int(a[i]) if a.ndim == 1 else [mpf(x) for x in a[i, part]] for a in s.args]
        counts = s.counts[part].tolist()
        n, v = np.array(counts, object), np.array([mpf(x) for x in s.direction[i, part]], object)
        top = max(z)
        weight = np.array([abs(x) if function.absolute else max(abs(x - top), 1) for x in z], object)
        if function.product:
            value = np.array(function.formula(z, counts, *args), object)
            return {"value": value}, {"value": linear_size(function, z, counts, args)}
        if function.order == 0:
            value = exact.derivatives(lambda x: function.formula(x, counts, *args), z, 0)[0]
            return {"value": value}, {"value": abs(value)}
        kept = ("value", "vjp", "jvp", "hvp")[: 4 if order > 1 else 3]
        found = [
            of_formula(lambda x: formula(x, counts, *args), z, n, v, weight, s.cotangent[i, part])
            for formula in (function.formula, *function.terms)
        ]
        sizes = [size for _, size in (found[1:] or found)]
        return {q: found[0][0][q] for q in kept}, {q: sum(size[q] for size in sizes) for q in kept}


def of_formula(f: Callable, z: list, n, v, weight, cotangent) -> tuple[dict, dict]:
    """The quantities of one slice, and their sizes."""
    value, jacobian, second = exact.derivatives(f, z)
    out = len(value)
    c = n * np.array([mpf(x) for x in cotangent], object) if out > 1 else np.array([mpf(1)], object)
    gradient, curvature = c @ jacobian / n, np.tensordot(c, second, 1) / n[:, None]
    numbers = {"value": value, "vjp": gradient, "jvp": jacobian @ v, "hvp": curvature @ v}
    slope = abs(gradient) + abs(curvature) @ weight if out == 1 else abs(c) @ abs(jacobian) / n
    sizes = {
        "value": abs(value) + abs(jacobian) @ weight,
        "vjp": slope,
        "jvp": np.array([slope @ (n * abs(v))]) if out == 1 else abs(jacobian) @ abs(v),
        "hvp": np.tensordot(abs(c), abs(second), 1) @ abs(v) / n,
    }
    if out > 1:  # second derivatives of p that cancel, as p(1 - p)(1 - 2p) at p = 1/2
        sizes["hvp"] = np.maximum(sizes["hvp"], slope * abs(v))
    return numbers, sizes


def linear_size(function: Function, z, counts, args) -> np.ndarray:
    """|J||v| of a function that is linear in its last two vectors."""
    *fixed, last = args
    unit = [[mpf(int(i == k)) for i in range(len(z))] for k in range(len(z))]
    if not fixed:
        return sum(abs(last[k]) * abs(np.array(function.formula(z, counts, unit[k]), object)) for k in range(len(z)))
    *fixed, before = fixed
    return sum(
        abs(before[j] * last[k]) * abs(np.array(function.formula(z, counts, *fixed, unit[j], unit[k]), object))
        for j in range(len(z))
        for k in range(len(z))
    )


# What does come out.


def measured(call: Callable, function: Function, s: Slices, dtype: str, order: int, jit: bool = True) -> dict:
    """The quantities as numpy arrays, in the dtype they come in; (N, …) as `expected` has them."""

    def spread(x: np.ndarray, kind: str = "") -> jax.Array:
        if kind == "label":
            return jnp.asarray(x, jnp.int32)
        return jnp.asarray(x[:, s.kinds].astype(jnp.dtype(dtype)))

    z, args = spread(s.z), [spread(a, kind) for a, kind in zip(s.args, function.kinds)]
    direction, cotangent = spread(s.direction), spread(s.cotangent)
    if "label" in function.kinds:
        positions = jnp.asarray([int(np.flatnonzero(s.kinds == c)[0]) for c in s.args[0]], jnp.int32)
        args[0] = positions
    elif function.elementwise:
        z, direction, *args = (x.reshape(-1, 1) for x in (z, direction, *args))

    def quantities(z, direction, cotangent, *args):
        f = lambda z: call(z, *args)
        value = f(z)
        out = {"value": value}
        if order > 0:
            c = cotangent.astype(value.dtype) if value.shape == z.shape and not function.elementwise else None
            c = jnp.ones_like(value) if c is None else c
            pull = lambda z: jax.vjp(f, z)[1](c)[0]
            out["jvp"] = jax.jvp(f, (z,), (direction,))[1]
            if order > 1:
                out["vjp"], out["hvp"] = jax.jvp(pull, (z,), (direction,))
            else:
                out["vjp"] = pull(z)
        return out

    out = (jax.jit(quantities) if jit else quantities)(z, direction, cotangent, *args)
    return {q: np.asarray(x).reshape(len(z), -1) for q, x in out.items()}


def units(got: np.ndarray, want: np.ndarray, size: np.ndarray, flushed: np.ndarray | float = 0) -> np.ndarray:
    """Errors (N, …) in units of eps · size, or for half precision of the last place.

    What may be missing below the smallest normal number is taken off: `flushed` (N, 1) of them.
    """
    info = jnp.finfo(got.dtype)
    inner = computed_in(got.dtype)
    eps, tiny = float(inner.eps), float(inner.tiny)
    missing = tiny * np.maximum(flushed, 4)
    unit = eps * size
    if info.bits < 32:  # half of it from the one rounding, and what float32 inside leaves
        place = np.floor(np.log2(np.maximum(abs(want.astype(np.float64)), float(info.tiny))))
        unit = 2.0**place * float(info.eps) + 20 * unit
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = np.maximum(np.asarray(abs(got.astype(np.longdouble) - want), np.float64) - missing, 0)
        error = np.where(error == 0, 0, error / unit)
        overflow = (abs(want) > float(info.max)) | (size > float(info.max))
    return np.where(overflow, 0, np.where(np.isnan(error), np.inf, error))


def worst(function: Function, s: Slices, want: Expected, got: dict) -> dict[tuple[str, str], float]:
    """(quantity, regime) -> the largest error."""
    out: dict[tuple[str, str], float] = {}
    repeat = len(next(iter(got.values()))) // len(s.regimes)
    regimes = np.repeat(s.regimes, repeat)
    below = np.abs(s.z.reshape(-1, 1)) if function.elementwise else np.max(s.z, 1, keepdims=True) - s.z
    tiny = float(computed_in(next(iter(got.values())).dtype).tiny)
    furthest = np.max(below, 1, keepdims=True)
    flushed = np.where(furthest > -np.log(tiny), 4 * len(s.kinds) * np.minimum(furthest, 1e3), 0)
    for quantity, x in got.items():
        if quantity in want.numbers:
            number, size = want.numbers[quantity], want.sizes[quantity]
            if number.shape != x.shape:
                number, size = number[:, s.kinds], size[:, s.kinds]
            errors = np.where((flushed > 0) & function.support, 0, units(x, number, size, flushed))
            for regime in dict.fromkeys(s.regimes):
                out[quantity, regime] = float(np.max(errors[regimes == regime], initial=0.0))
    return out


@functools.cache
def reference(name: str, num_classes: int, dtype: str, quick: bool, order: int) -> tuple[Slices, Expected]:
    s = slices(FUNCTIONS[name], num_classes, dtype, quick)
    return s, expected(FUNCTIONS[name], s, order)


def errors(
    name: str, num_classes: int = 10, dtype: str = "float32", peer: str = "", jit: bool = True, quick: bool = False
) -> dict[tuple[str, str], float]:
    """Worst error of one function (or of a peer's) per quantity and regime."""
    function = FUNCTIONS[name]
    order = min(function.order, 1) if dtype in ("bfloat16", "float16") or not jit else function.order
    with enable_x64():
        s, want = reference(name, num_classes, dtype, quick, order)
    call = function.peers[peer] if peer else function.call
    with enable_x64() if dtype == "float64" else contextlib.nullcontext():
        with jax.numpy_dtype_promotion("standard") if peer else contextlib.nullcontext():
            return worst(function, s, want, measured(call, function, s, dtype, order, jit))


@functools.cache
def linear_reference(name: str, regime: str, num_classes: int, dtype: str, second: bool) -> tuple:
    with enable_x64():
        given = linear.problem(linear.GAPS[regime], num_classes, second, functools.partial(as_dtype, dtype=dtype))
        return given, linear.expected(linear.HEADS[name][0], given)


def linear_errors(name: str, num_classes: int = 10, dtype: str = "float32", jit: bool = True) -> dict:
    """Worst error of one linear head per quantity and regime, over two kinds of labels and of teachers."""
    out: dict[tuple[str, str], float] = {}
    for regime in linear.GAPS:
        for second in (False, True):
            given, want = linear_reference(name.removesuffix("(streamed)"), regime, num_classes, dtype, second)
            with enable_x64() if dtype == "float64" else contextlib.nullcontext():
                found = linear.results(name, given, dtype, jit)
            for q, x in found.items():
                out[q, regime] = max(out.get((q, regime), 0.0), float(np.max(units(x, *want[q]))))
    return out
