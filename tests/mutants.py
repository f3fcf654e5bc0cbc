"""`python -m tests.mutants [NAME...]`: breaks the package in known ways, one at a time, and prints which test notices.

Each mutant is a change of one line in a temporary copy of the repository; the tests that ought to notice, of those that
`pytest` runs by default, stop at the first failure. An exit status of 1 says that a mutant survived, or does not apply.
"""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One breakage: `old` occurs once in the file of the package and becomes `new`; `tests` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def applied(self, root: Path = ROOT) -> str:
        """The text of the broken file."""
        text = (root / "jaxsoftmax" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.name!r}: {self.old!r} occurs {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)


# The package's files in brackets; beneath each the mutants, with pytest's arguments from tests/ on, and what changes.
TABLE = r"""
[maps/softmax.py]
softmax: sign of the Jacobian | contract/test_three_way.py -k softmax
  - return (jacobian_product(g, p, axis),)
  + return (-jacobian_product(g, p, axis),)
log_softmax: wrong axis | contract/test_transformations.py -k log_softmax
  - return centred_transpose(g, jnp.exp(logp), axis, above=0.75)
  + return centred_transpose(g, jnp.exp(logp), 0, above=0.75)
log_softmax: log1p becomes log | contract/test_accuracy_optimized.py -k 'float32 and log_softmax'
  - return classes.below(z, m) - jnp.log1p(s)
  + return classes.below(z, m) - jnp.log(1 + s)
softmax: mask forgotten in the result | contract/test_special_values.py -k 'mask and softmax'
  - return out if mask is None else jnp.where(mask, out, absent)
  + return out
log_softmax: keeps its logits as well for the backward pass | maps/test_softmax.py -k residuals
  - log_softmax_of.defvjp(_log_softmax_fwd, _log_softmax_bwd)
  + log_softmax_of.defvjp(
  +     lambda z, axis: (log_softmax_of(z, axis), (log_softmax_of(z, axis), z)),
  +     lambda axis, kept, g: _log_softmax_bwd(axis, kept[0], g + 0 * kept[1]),
  + )
[_core/centring.py]
products: mean with the top class counted twice | contract/test_three_way.py
  - classes.sum(below_half(p, above) * (v - r), axis)
  + classes.sum(below_half(p, above) * (v - r) + 1e-6 * is_top(p) * v, axis)
products with J: one threshold for both directions | contract/test_losses.py -m 'optimized and not slow' -k memory
  - for above in (0.5, 0.5625)
  + for above in (0.5, 0.5)
products with J: p may leave the simplex | contract/test_transformations.py -k 'quotients and second'
  - along = -classes.sum(dp * out, axis) / total
  + along = -classes.sum(dp * v, axis) / total
[_core/forms.py]
sums over the classes: top class not left out | contract/test_accuracy_optimized.py -k 'float32 and softmax'
  - return jnp.where(total < 2, rest, total - 1)
  + return total - 1
half precision: a wide copy for the maximum | maps/test_softmax.py -m 'optimized and not slow'
  - lax.platform_dependent(z, cpu=narrow, default=plain)
  + plain(z)
[losses/cross_entropy.py]
labels: off by one | contract/test_losses.py -k 'combination and integer'
  - return jnp.where(classes.index(z, axis) == label, -rest,
  + return jnp.where(classes.index(z, axis) == label + 1, -rest,
cross-entropy: z-loss without its square | contract/test_losses.py -k 'combination and integer'
  - * lse**2
  + * lse
cross-entropy: lse - z_label | contract/test_accuracy_optimized.py -k 'float32 and integer'
  - return jnp.where(gap > -1, jnp.log1p(rest / jnp.exp(gap)), jnp.log(total) - gap)
  + return jnp.log(total) - gap
cross-entropy: half of the second derivative | contract/test_accuracy_optimized.py -k 'float32 and integer'
  - return jacobian_at(g, z, m, total, axis), None, None, None, None
  + return 0.5 * jacobian_at(g, z, m, total, axis), None, None, None, None
soft labels: mass of 1 assumed | contract/test_three_way.py -k soft
  - mass = classes.sum(y, axis)
  + mass = jnp.ones_like(classes.sum(y, axis))
soft labels: p - y where p is near 1 | contract/test_accuracy_optimized.py -k 'float32 and softmax_cross_entropy'
  - return less(y, p, s / (1 + s), mass)
  + return mass * p - y
cross-entropy: class weight dropped | contract/test_losses.py -k 'combination and integer'
  - loss = loss if weights is None else loss * classes.take(weights, labels, axis)
  + loss = loss * 1
[losses/smoothing.py]
cross-entropy: class weight dropped from smoothed labels | contract/test_losses.py -k 'combination and integer'
  - return y if weights is None else weights * y
  + return y
cross-entropy: smoothing spread over masked classes too | contract/test_losses.py -k 'compressed and integer'
  - count = jnp.maximum(classes.sum(exists.astype(y.dtype), axis), 1)
  + count = classes.sum(jnp.ones_like(y), axis)
[_core/classes.py]
labels: outside the range they count as class 0 | contract/test_special_values.py -k integer_labels
  - return jnp.where(valid, given.astype(jnp.int32), -1)
  + return jnp.where(valid, given.astype(jnp.int32), 0)
[losses/entropy_brier.py]
Brier: the Gauss-Newton part dropped | contract/test_accuracy_optimized.py -k 'float32 and brier'
  - gradient + p * p
  + gradient
[_core/tracing.py]
tracing: two contexts for the cache | test_autodiff.py -k shares
  - with _use_mesh(jax.sharding.get_abstract_mesh()):
  + with contextlib.nullcontext():
[losses/focal.py]
focal: a slope too many | contract/test_losses.py -k 'combination and focal'
  - jnp.exp(-gamma * softplus(near)) * softplus(-near)
  + jnp.exp(-(gamma + 1) * softplus(near)) * softplus(-near)
[losses/divergences_of_logits.py]
KL: gradient in the target with the wrong sign | contract/test_transformations.py -k 'softmax_kl and quotients'
  - return ct * difference(x, z, sums, axis), -ct * jacobian_product(
  + return ct * difference(x, z, sums, axis), ct * jacobian_product(
KL: difference of logarithms where the two are close | ../jaxsoftmax/losses/divergences_of_logits.py
  - return jnp.where(is_near(self.change, self.mean), self.excess, self.change - self.mean)
  + return self.change - self.mean
[losses/temperature.py]
KL: temperature not applied to the target | contract/test_losses.py -k 'combination and softmax_kl'
  - [_divided(z, divisor, axis) for z in logits]
  + [_divided(z, divisor if z is logits[0] else 1.0, axis) for z in logits]
KL: logits divided by the temperature where they stand | contract/test_accuracy_optimized.py -k 'float32 and divergence'
  - return classes.below(z, classes.top(z, axis)) / divisor
  + return z / divisor - classes.top(z, axis) / divisor
[losses/binary.py]
logistic: positive weight missing in the gradient | contract/test_losses.py -k 'combination and binary'
  - dx = (1 - y) * sigmoid(x) - weight * y * sigmoid(-x)
  + dx = (1 - y) * sigmoid(x) - y * sigmoid(-x)
[maps/derivatives.py]
softmax_jvp: p may leave the simplex | contract/test_transformations.py -k 'quotients and softmax_jvp'
  - return dp * w - p * (classes.sum(dp * w, axis) / total)
  + return dp * w - p * (classes.sum(dp * v, axis) / total)
[maps/entmax.py]
entmax: exponent of the escort distribution | maps/test_entmax.py -k jacobian
  - return _shares(support_power(p, 2 - alpha), axis)
  + return _shares(support_power(p, alpha - 1), axis)
entmax: slope of a power of p | operators/test_derivatives_optimized.py -k entmax_in_logits
  - slope = exponent * _power(z, alpha, exponent + 1 - alpha, p, axis)
  + slope = exponent * _power(z, alpha, exponent - alpha, p, axis)
entmax: bound of alpha | contract/test_wrong_calls.py -k entmax
  - if not np.all((known >= 1) & (known < np.inf)):
  + if not np.all((known > 0) & (known < np.inf)):
[_core/dtypes.py]
half precision: summed in half precision | contract/test_losses.py -m 'optimized and not slow'
  - return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else
  + return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 16 else
[autodiff.py]
custom_vjp: wide cotangents stay wide | test_autodiff.py -k mixed_dtypes
  - return jax.lax.convert_element_type(cotangent, kind.dtype) if rounds else cotangent
  + return cotangent
custom_vjp: missing psum | test_autodiff.py -k 'every_device or mesh or collectives'
  - cotangent = jax.lax.psum(cotangent, extra)
  + cotangent = jax.lax.pmean(cotangent, extra)
[_transpose.py]
custom_vjp: forward mode of an affine bwd | test_autodiff_rules.py -k not_linear
  - if all(_zero_at_zero(
  + if True or all(_zero_at_zero(
[_linear_map.py]
linear_map: its derivative in the residuals is left out | test_linear_map.py -k derivatives
  - moving = {i: t for i, t in enumerate(tangents[:count]) if not _is_zero(t)}
  + moving = {}
[operators/diagonal_low_rank.py]
damped solve: weight of the mean left out | losses/test_hessian.py -k every_method
  - self._kappa + total(e * dw)
  + 0 * self._kappa + total(e * dw)
factor: square root of the excess | losses/test_hessian.py -k 'square or psd'
  - / (1 + jnp.sqrt(1 - square)))
  + / (1 + jnp.sqrt(1 + square)))
[network/per_example.py]
per-example norms: bias forgotten | network/test_flow.py -k per_example
  - (0 if layer.b is None else 1))
  + 0)
[network/backpropagation.py]
backpropagation: sum in place of the mean | network/test_backpropagation.py -k plain
  - return pullback(jnp.ones_like(losses) / losses.size)[0]
  + return pullback(jnp.ones_like(losses))[0]
[linear_head/rows.py]
linear head: class weight dropped from the gradient | linear_head/test_cross_entropy.py -k equals_full_logits
  - loss, of_u = of_label * loss, of_label * of_u
  + loss, of_u = of_label * loss, of_u
linear head: the mean of the tangent dropped from the Hessian | linear_head/test_cross_entropy.py -k equals_full_logits
  - jnp.exp(classes.shift(u, m)) * (du - at_top)
  + jnp.exp(classes.shift(u, m)) * at_top
[linear_head/call.py]
linear head: mean over all tokens | linear_head/test_cross_entropy.py -k 'equals_full_logits or nothing_counted'
  - counted = jnp.sum(counts(a))
  + counted = jnp.sum(jnp.ones_like(a))
[linear_head/stream.py]
linear head: a tangent's two products with one factor | linear_head/test_cross_entropy.py -k equals_full_logits
  - jnp.concatenate([along_a, a]), jnp.concatenate([b, along_b])
  + jnp.concatenate([along_a, a]), jnp.concatenate([b, b])
linear head: what the devices of the classes share counts once for each | linear_head/test_mesh.py -k equals_one_device
  - return varying(row / head.devices, frozenset(head.classes))
  + return varying(row, frozenset(head.classes))
"""
BLOCK = re.compile(r"(.+) \| (.+)\n((?:  - .*\n)+)((?:  \+ .*\n)+)")


def parsed(table: str) -> list[Mutant]:
    _, *parts = re.split(r"^\[(.+)\]\n", table, flags=re.MULTILINE)
    text = lambda lines: "\n".join(line[4:] for line in lines.splitlines())
    return [
        Mutant(name, file, text(old), text(new), tests)
        for file, body in zip(parts[::2], parts[1::2])
        for name, tests, old, new in BLOCK.findall(body)
    ]


MUTANTS = parsed(TABLE)


def copy_to(folder: Path) -> None:
    for name in ("jaxsoftmax", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)


def who_notices(mutant: Mutant, folder: Path) -> str:
    """The first test that fails on the broken package; empty if all pass."""
    path = folder / "jaxsoftmax" / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(folder), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {} if "optimized" in mutant.tests else QUICK
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no"]
    try:
        command += shlex.split(f"tests/{mutant.tests}")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(whole, encoding="utf-8")
    if done.returncode in (0, 5):  # all passed, or none of them runs by default
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"mutant {mutant.name!r}: pytest {mutant.tests} did not run:\n{done.stdout}{done.stderr}")
    return found[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name; all without one")
    names = parser.parse_args().names
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    noticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_to(Path(folder))
        for mutant in chosen:
            begin = time.perf_counter()
            try:
                found = who_notices(mutant, Path(folder))
                noticed += found != ""
            except ValueError as error:
                found = f"does not apply: {error}"
            print(f"{mutant.name:58} {time.perf_counter() - begin:5.0f} s  {found or 'SURVIVED'}", flush=True)
    print(f"{noticed} of {len(chosen)} noticed")
    return int(noticed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
