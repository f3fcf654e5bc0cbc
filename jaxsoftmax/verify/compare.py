"""Derivatives of anybody's function, with a rule of its own or none, compared four ways.

Reverse mode, forward mode, a closed form and central differences must agree. Errors are counted in units of what
rounding the arguments costs in any case, so that one tolerance fits all functions, arguments and dtypes.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import experimental, lax

from jaxsoftmax._core import checks
from jaxsoftmax.verify.table import table

__all__ = ["Comparison", "DerivativeReport", "compare_derivatives", "logit_regimes"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a `DerivativeReport`: how far two ways to the same derivative are apart.

    Args:
      regime: name of the arguments.
      first: one way to the derivative.
      second: the other.
      error: the largest difference, entry by entry, in units of eps times the condition; inf where one of them is NaN.

    Example:
      >>> from jaxsoftmax.verify import Comparison
      >>> Comparison("given", "reverse", "forward", 0.5).error
      0.5
    """

    regime: str
    first: str
    second: str
    error: float


@dataclasses.dataclass(frozen=True)
class DerivativeReport:
    """What `compare_derivatives` found.

    Args:
      name: of the function.
      tolerance: the largest error that passes.
      comparisons: one per regime and pair of ways.
      missing: per mode that the function refuses ("forward", "reverse"), JAX's own message.
      differences: the dtype in which the central differences were taken.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoftmax.verify import compare_derivatives
      >>> report = compare_derivatives(jnp.sin, jnp.ones(2), analytic=lambda x: jnp.diag(jnp.cos(x)))
      >>> report.ok, report.missing
      (True, {})
    """

    name: str
    tolerance: float
    comparisons: tuple[Comparison, ...]
    missing: Mapping[str, str]
    differences: str

    @property
    def ok(self) -> bool:
        """Whether all comparisons agree. A mode that is missing does not count: see `missing`."""
        return all(c.error <= self.tolerance for c in self.comparisons)

    def assert_ok(self) -> None:
        """Raise an AssertionError that shows the table unless all comparisons agree."""
        if not self.ok:
            raise AssertionError(f"derivatives disagree\n{self}")

    def __str__(self) -> str:
        rows = [
            (c.regime, f"{c.first} - {c.second}", f"{c.error:.3g}", "ok" if c.error <= self.tolerance else "FAILS")
            for c in self.comparisons
        ]
        lines = [f"Derivatives of {self.name}, in units of eps times the condition; {self.tolerance:g} passes", ""]
        lines += table(("regime", "difference", "error", ""), rows)
        lines += ["", f"central differences in {self.differences}"]
        lines += [f"{mode} mode is missing: {why}" for mode, why in self.missing.items()]
        return "\n".join(lines)


def compare_derivatives(
    f: Callable,
    *args: Any,
    analytic: Callable | None = None,
    argnums: int | Sequence[int] = 0,
    regimes: Mapping[str, Sequence[Any]] | None = None,
    tolerance: float = 16.0,
) -> DerivativeReport:
    """Compare the first derivatives of any function: reverse mode, forward mode, a closed form, central differences.

    The unit of error of the entry ∂f_i/∂x_j is eps (|∂f_i/∂x_j| + Σ_k |x_k ∂²f_i/∂x_j∂x_k|): what rounding the
    arguments alone must cost. Central differences, extrapolated, are taken in float64 where f computes in it, else
    in the arguments' own dtype, and the error estimated for them is allowed on top. For second derivatives pass a
    gradient: compare_derivatives(jax.grad(loss), logits, analytic=hessian).

    Args:
      f: any function of JAX arrays that `jax.jit` takes, with a custom rule or none; arguments and result are pytrees.
      *args: its arguments, the regime "given".
      analytic: a function of the same arguments: the Jacobian in the form that `jax.jacrev(f, argnums)` has.
      argnums: positions of the arguments to differentiate, of one floating-point dtype.
      regimes: more arguments to compare at, by name; `logit_regimes` has hostile ones for functions of logits.
      tolerance: the largest error that passes, in units.

    Returns:
      A `DerivativeReport`: a table as `str()`, `.ok`, `.assert_ok()`. A mode that f refuses (forward mode of a
      `jax.custom_vjp` function) is in `.missing`, and the others are compared.

    Raises:
      TypeError: if f is not callable, a differentiated argument is not floating-point, or f refuses both modes.
      ValueError: if the closed form has another number of entries than the Jacobian.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoftmax import softmax, softmax_jacobian
      >>> from jaxsoftmax.verify import compare_derivatives, logit_regimes
      >>> compare_derivatives(softmax, jnp.array([1.0, 0.0]), analytic=softmax_jacobian, regimes=logit_regimes()).ok
      True
      >>> wrong = jax.custom_vjp(jnp.exp)
      >>> wrong.defvjp(lambda x: (jnp.exp(x), x), lambda x, ct: (1.01 * ct * jnp.exp(x),))
      >>> report = compare_derivatives(wrong, jnp.ones(2))
      >>> report.ok, list(report.missing)
      (False, ['forward'])

    Reference: Ridders 1982, Accurate computation of F′(x) and F′(x) F″(x) (the extrapolated differences).
    """
    checks.function("f", f)
    checks.number("tolerance", tolerance, 0.0)
    if analytic is not None:
        checks.function("analytic", analytic)
    numbers = [argnums] if isinstance(argnums, int) else list(argnums)
    if not args:
        raise TypeError("args must hold the arguments at which f is differentiated: compare_derivatives(f, x)")
    if not all(-len(args) <= checks.integer("argnums", i) < len(args) for i in numbers):
        raise ValueError(f"argnums={argnums} names an argument that is not among the {len(args)} given")
    problem, missing, found = None, {}, []
    for regime, arguments in {"given": args, **(regimes or {})}.items():
        point = _Point(arguments, numbers)
        if problem is None or problem.structure != point.structure:  # else what is compiled serves again
            problem = _Problem(f, point.structure)
        ways = {}
        for mode in _MODES:
            try:
                ways[mode] = problem.jacobian(mode, point)
            except (TypeError, ValueError, NotImplementedError) as error:
                missing[mode] = str(error).splitlines()[0]
        if not ways:
            raise TypeError(f"f has neither forward nor reverse mode: {missing['reverse']}")
        size = problem.condition(next(iter(ways)), point)
        differences, spread = problem.differences(point)
        if analytic is not None:
            ways["closed form"] = point.closed_form(f, analytic)
        info = jnp.finfo(point.x.dtype)
        unit = float(info.eps) * size + float(info.tiny)
        names = list(ways)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                found.append(Comparison(regime, first, second, _units(ways[first] - ways[second], unit)))
            gap = np.where(np.isfinite(spread), ways[first] - differences, 0.0)
            found.append(Comparison(regime, first, "differences", _units(gap, unit + spread)))
    name, precision = getattr(f, "__name__", str(f)), "" if problem is None else str(problem.dtype)
    return DerivativeReport(name, tolerance, tuple(found), missing, precision)


# Where it is since JAX 0.8, and where it was before.
_enable_x64: Any = operator.attrgetter("enable_x64")(jax if hasattr(jax, "enable_x64") else experimental)
_MODES = {"reverse": jax.jacrev, "forward": jax.jacfwd}


class _Point:
    """Arguments, taken apart: x, the differentiated ones end to end; rest, the other arrays; structure, all else."""

    def __init__(self, args: Sequence[Any], argnums: Sequence[int]):
        self.args, self.argnums = args, [i % len(args) for i in argnums]
        leaves, tree = jax.tree.flatten([args[i] for i in self.argnums])
        leaves = [checks.as_loss_float("a differentiated argument", leaf) for leaf in leaves]
        self.x = jnp.concatenate([leaf.ravel() for leaf in leaves])
        self.shapes = [leaf.shape for leaf in leaves]
        others, other_tree = jax.tree.flatten([None if i in self.argnums else a for i, a in enumerate(args)])
        held = [isinstance(leaf, np.ndarray | np.generic | jax.Array) for leaf in others]
        self.rest = [jnp.asarray(leaf) for leaf, array in zip(others, held) if array]
        static = [None if array else leaf for leaf, array in zip(others, held)]
        self.structure = self.argnums, tree, self.shapes, other_tree, held, static

    def closed_form(self, f: Callable, analytic: Callable) -> np.ndarray:
        """The leaves of the Jacobian's tree, as blocks of one matrix."""
        outputs = [jnp.size(y) for y in jax.tree.leaves(f(*self.args))]
        inputs = [math.prod(shape) for shape in self.shapes]
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(analytic(*self.args))]
        sizes = [m * n for m in outputs for n in inputs]
        if [leaf.size for leaf in leaves] != sizes:
            raise ValueError(f"analytic must return arrays of {sizes} entries, got {[leaf.size for leaf in leaves]}")
        blocks = iter(leaves)
        return np.block([[next(blocks).reshape(m, n) for n in inputs] for m in outputs])


class _Problem:
    """f at arguments of one structure, (x, rest) -> y flat: compiled once for its value, once for each mode."""

    def __init__(self, f: Callable, structure: tuple):
        self.structure = structure
        argnums, tree, shapes, other_tree, held, static = structure
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()

        def flat(x, rest):
            rest = iter(rest)
            args = jax.tree.unflatten(other_tree, [next(rest) if h else leaf for h, leaf in zip(held, static)])
            parts = [part.reshape(shape) for part, shape in zip(jnp.split(x, ends), shapes)]
            for i, value in zip(argnums, jax.tree.unflatten(tree, parts)):
                args[i] = value
            return jnp.concatenate([jnp.ravel(y) for y in jax.tree.leaves(f(*args))])

        over = lambda g: jax.jit(lambda points, rest: lax.map(lambda x: g(x, rest), points))
        self.values = over(flat)
        self.jacobians = {mode: over(differentiate(flat)) for mode, differentiate in _MODES.items()}
        self.dtype = jnp.dtype(jnp.float64)

    def jacobian(self, mode: str, point: _Point) -> np.ndarray:
        return np.asarray(self.jacobians[mode](point.x[None], point.rest), np.float64)[0]

    def widest(self, compiled: Callable, point: _Point, points: Callable) -> tuple[np.ndarray, np.ndarray]:
        """Points around x and a function at each, in float64; or in x's own dtype where f does not take float64."""
        x = np.asarray(point.x, np.float64)
        wide = lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a
        if self.dtype == jnp.float64:
            with _enable_x64(True):
                at = points(x, float(jnp.finfo(jnp.float64).eps))
                try:
                    out = compiled(jnp.asarray(at), [wide(a) for a in point.rest])
                    if out.dtype == jnp.float64:
                        return at, np.asarray(out)
                except (TypeError, ValueError):  # it holds arrays of float32, under strict promotion
                    pass
            self.dtype = point.x.dtype
        at = np.asarray(points(x, float(jnp.finfo(point.x.dtype).eps)), point.x.dtype)
        return at.astype(np.float64), np.asarray(compiled(jnp.asarray(at), point.rest), np.float64)

    def condition(self, mode: str, point: _Point) -> np.ndarray:
        """|∂f_i/∂x_j| + Σ_k |x_k ∂²f_i/∂x_j∂x_k|, the sum by central differences of the Jacobian."""
        at, jacobians = self.widest(self.jacobians[mode], point, _scaled)
        count = len(jacobians) // 2
        k = np.arange(count)
        with np.errstate(invalid="ignore", divide="ignore"):
            step = at[k, k] / at[count + k, k] - 1
            change = np.abs(jacobians[:count] - jacobians[count:]) / step[:, None, None]
        return np.abs(jacobians).max(0, initial=0.0) + np.where(np.isfinite(change), change, 0.0).sum(0)

    def differences(self, point: _Point) -> tuple[np.ndarray, np.ndarray]:
        """Central differences over shrinking steps, extrapolated to 0, and the error estimated for each entry.

        The error is infinite where nothing can be said: at infinite arguments, or where f is not finite around x.
        """
        at, values = self.widest(self.values, point, _displaced)
        eps = float(jnp.finfo(self.dtype).eps)
        values = values.reshape(2, _STEPS, at.shape[1], -1)  # above and below, step, j, i
        at = at.reshape(2, _STEPS, at.shape[1], at.shape[1])
        best = spread = np.full(values.shape[2:], np.inf)
        row: list[np.ndarray] = []
        with np.errstate(invalid="ignore", divide="ignore"):
            for (high, low), (above, below) in zip(values.swapaxes(0, 1), at.swapaxes(0, 1)):
                width = np.diagonal(above - below)[:, None]
                rounding = 4 * eps * np.maximum(np.abs(high), np.abs(low)) / width
                new = [(high - low) / width]
                for order, old in enumerate(row[:6]):  # Neville: the error of order h^(2·order + 2) cancels
                    new.append(new[-1] + (new[-1] - old) / (4.0 ** (order + 1) - 1))
                    error = 2 * np.maximum(np.abs(new[-1] - new[-2]), np.abs(new[-1] - old)) + rounding
                    best, spread = np.where(error < spread, new[-1], best), np.where(error < spread, error, spread)
                row = new
        return best.T, spread.T


_STEPS = 24


def _displaced(x: np.ndarray, eps: float) -> np.ndarray:
    """x ± h e_j for every j and shrinking h."""
    steps = 0.5 ** np.arange(_STEPS)[:, None] * np.isfinite(x)
    moved = steps[:, :, None] * np.eye(len(x))
    return np.concatenate([x + moved, x - moved]).reshape(-1, len(x))


def _scaled(x: np.ndarray, eps: float) -> np.ndarray:
    """x with each x_k in turn made larger, then smaller, by a small part of it."""
    step = eps ** (1 / 3) * np.eye(len(x))
    return np.concatenate([x * (1 + step), x * (1 - step)])


def _units(difference: np.ndarray, unit: np.ndarray) -> float:
    error = np.max(np.abs(difference) / unit, initial=0.0)
    return math.inf if np.isnan(error) else float(error)


def logit_regimes(num_classes: int = 5) -> dict[str, tuple[jax.Array]]:
    """Logits at which formulas fail: for `compare_derivatives(…, regimes=logit_regimes())`.

    Args:
      num_classes: K, at least 2.

    Returns:
      Per name a tuple of one array (K,): moderate, sure of one class, all equal, one far below, far from 0.

    Example:
      >>> from jaxsoftmax.verify import logit_regimes
      >>> list(logit_regimes())
      ['moderate', 'sure', 'equal', 'far below', 'offset']
    """
    checks.at_least("num_classes", num_classes, 2)
    wave = jnp.cos(2.0 * jnp.arange(num_classes, dtype=float))
    one = jnp.zeros(num_classes).at[0].set(1.0)
    z = {"moderate": wave, "sure": wave + 20 * one, "equal": 0 * wave, "far below": wave - 60 * one}
    return {name: (value,) for name, value in {**z, "offset": wave + 1e3}.items()}
