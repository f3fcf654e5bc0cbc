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


LOSSES, TRANSFORMS = "tests/contract/test_losses.py", "tests/contract/test_transformations.py"
SPECIAL, LINEAR = "tests/contract/test_special_values.py", "tests/linear_head/test_cross_entropy.py"

MUTANTS = [
    Mutant(
        "softmax: sign of the Jacobian",
        "maps/softmax.py",
        "return jacobian_product(g, p, axis), None, None",
        "return -jacobian_product(g, p, axis), None, None",
        "tests/contract/test_three_way.py -k softmax",
    ),
    Mutant(
        "log_softmax: wrong axis",
        "maps/softmax.py",
        "return centred_transpose(g, jnp.exp(logp), axis, above=0.75)",
        "return centred_transpose(g, jnp.exp(logp), 0, above=0.75)",
        f"{TRANSFORMS} -k log_softmax",
    ),
    Mutant(
        "log_softmax: log1p becomes log",
        "maps/softmax.py",
        "return num.below(z, m) - jnp.log1p(s)",
        "return num.below(z, m) - jnp.log(1 + s)",
        "tests/maps/test_softmax_optimized.py",
    ),
    Mutant(
        "softmax: mask forgotten in the result",
        "maps/softmax.py",
        "return out if mask is None else jnp.where(mask, out, absent)",
        "return out",
        "tests/maps/test_softmax.py -k masked",
    ),
    Mutant(
        "log_softmax: keeps its logits as well for the backward pass",
        "maps/softmax.py",
        "return num.result(logp), logp\n\n\ndef _log_softmax_bwd(axis, logp, g):\n",
        "return num.result(logp), (logp, z)\n\n\n"
        "def _log_softmax_bwd(axis, both, g):\n    logp, g = both[0], g + 0 * both[1]\n",
        "tests/maps/test_softmax_optimized.py -k residuals",
    ),
    Mutant(
        "products: mean with the top class counted twice",
        "_core/centring.py",
        "return r, num.class_sum(below_half(p, above) * (v - r), axis)",
        "return r, num.class_sum(below_half(p, above) * (v - r) + 1e-6 * is_top(p) * v, axis)",
        "tests/contract/test_three_way.py",
    ),
    Mutant(
        "sums over the classes: top class not left out",
        "_core/forms.py",
        "return jnp.where(total < 2, rest, total - 1)",
        "return total - 1",
        "tests/maps/test_softmax_optimized.py",
    ),
    Mutant(
        "labels: off by one",
        "losses/cross_entropy.py",
        "return jnp.where(num.class_index(z, axis) == label, -rest,",
        "return jnp.where(num.class_index(z, axis) == label + 1, -rest,",
        f"{LOSSES} -k 'combination and integer'",
    ),
    Mutant(
        "labels: outside the range they count as class 0",
        "_core/class_axis.py",
        "return jnp.where(valid, labels.astype(jnp.int32), -1)",
        "return jnp.where(valid, labels.astype(jnp.int32), 0)",
        f"{SPECIAL} -k integer_labels",
    ),
    Mutant(
        "products with J: one threshold for both directions",
        "_core/centring.py",
        "for above in (0.5, 0.5625)",
        "for above in (0.5, 0.5)",
        "tests/contract/test_losses.py -m 'optimized and not slow' -k memory",
    ),
    Mutant(
        "products with J: p may leave the simplex without its total",
        "_core/centring.py",
        "along = -num.class_sum(dp * out, axis) / total",
        "along = -num.class_sum(dp * v, axis) / total",
        f"{TRANSFORMS} -k 'quotients and softmax_vjp'",
    ),
    Mutant(
        "Brier: the Gauss-Newton part dropped",
        "losses/entropy_brier.py",
        "gradient + p * p",
        "gradient",
        "tests/contract/test_accuracy_optimized.py -k 'float32 and brier'",
    ),
    Mutant(
        "tracing: two contexts for the cache",
        "_core/plumbing.py",
        "with _use_mesh(jax.sharding.get_abstract_mesh()):",
        "with contextlib.nullcontext():",
        "tests/test_autodiff.py -k shares",
    ),
    Mutant(
        "cross-entropy: class weight dropped",
        "losses/cross_entropy.py",
        "loss = loss if weights is None else loss * num.take_class(weights, labels, axis)",
        "loss = loss * 1",
        "tests/losses/test_cross_entropy.py -k class_weights_alone",
    ),
    Mutant(
        "cross-entropy: class weight dropped from smoothed labels",
        "losses/cross_entropy.py",
        "return y if weights is None else weights * y",
        "return y",
        f"{LOSSES} -k 'combination and integer'",
    ),
    Mutant(
        "cross-entropy: smoothing spread over masked classes too",
        "losses/cross_entropy.py",
        "uniform = smooth / jnp.maximum(num.class_sum(exists.astype(z.dtype), axis), 1)",
        "uniform = smooth / num.class_sum(jnp.ones_like(z), axis)",
        f"{LOSSES} -k 'compressed and integer'",
    ),
    Mutant(
        "cross-entropy: z-loss without its square",
        "losses/cross_entropy.py",
        "* logsumexp_of(wide, axis) ** 2",
        "* logsumexp_of(wide, axis)",
        f"{LOSSES} -k 'combination and integer'",
    ),
    Mutant(
        "cross-entropy: lse - z_label",
        "losses/cross_entropy.py",
        "return jnp.where(gap > -1, jnp.log1p(rest / jnp.exp(gap)), jnp.log(total) - gap)",
        "return jnp.log(total) - gap",
        "tests/losses/test_cross_entropy_optimized.py",
    ),
    Mutant(
        "cross-entropy: half of the second derivative",
        "losses/cross_entropy.py",
        "return jacobian_product(g, probabilities(*residuals, axis), axis), None, None, None, None",
        "return 0.5 * jacobian_product(g, probabilities(*residuals, axis), axis), None, None, None, None",
        "tests/contract/test_accuracy_optimized.py -k 'float32 and integer'",
    ),
    Mutant(
        "soft labels: mass of 1 assumed",
        "losses/cross_entropy.py",
        "mass = num.class_sum(y, axis)",
        "mass = jnp.ones_like(num.class_sum(y, axis))",
        "tests/contract/test_three_way.py -k soft",
    ),
    Mutant(
        "soft labels: p - y where p is near 1",
        "losses/cross_entropy.py",
        "return less(y, p, s / (1 + s), mass)",
        "return mass * p - y",
        "tests/contract/test_accuracy_optimized.py -k 'float32 and softmax_cross_entropy'",
    ),
    Mutant(
        "focal: a slope too many",
        "losses/focal.py",
        "jnp.exp(-gamma * softplus(near)) * softplus(-near)",
        "jnp.exp(-(gamma + 1) * softplus(near)) * softplus(-near)",
        f"{LOSSES} -k 'combination and focal'",
    ),
    Mutant(
        "KL: temperature not applied to the target",
        "losses/divergences_of_logits.py",
        "temperature, axis) for a in (x, z))",
        "temperature if a is x else None, axis) for a in (x, z))",
        f"{LOSSES} -k 'combination and softmax_kl'",
    ),
    Mutant(
        "KL: logits divided by the temperature where they stand",
        "losses/temperature.py",
        "(z - jnp.where(jnp.isfinite(top), top, 0.0)) / divisor",
        "z / divisor",
        "tests/contract/test_accuracy_optimized.py -k 'float32 and divergence'",
    ),
    Mutant(
        "KL: gradient in the target with the wrong sign",
        "losses/divergences_of_logits.py",
        "return ct * difference(x, z, sums, axis), ct * dz",
        "return ct * difference(x, z, sums, axis), -ct * dz",
        f"{TRANSFORMS} -k 'softmax_kl and quotients'",
    ),
    Mutant(
        "KL: difference of logarithms where the two are close",
        "losses/divergences_of_logits.py",
        "return jnp.where(self.is_near, self.excess, self.change - self.mean)",
        "return self.change - self.mean",
        "jaxsoftmax/losses/divergences_of_logits.py",
    ),
    Mutant(
        "logistic: positive weight missing in the gradient",
        "losses/binary.py",
        "dx = (1 - y) * sigmoid(x) - weight * y * sigmoid(-x)",
        "dx = (1 - y) * sigmoid(x) - y * sigmoid(-x)",
        f"{LOSSES} -k 'combination and binary'",
    ),
    Mutant(
        "entmax: exponent of the escort distribution",
        "maps/entmax.py",
        "q = support_power(p, 2 - alpha)",
        "q = support_power(p, alpha - 1)",
        "tests/maps/test_entmax.py -k jacobian",
    ),
    Mutant(
        "entmax: bound of alpha",
        "maps/entmax.py",
        "if not np.all((known >= 1) & (known < np.inf)):",
        "if not np.all((known > 0) & (known < np.inf)):",
        "tests/contract/test_wrong_calls.py -k entmax",
    ),
    Mutant(
        "half precision: summed in half precision",
        "_core/dtypes.py",
        "return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else",
        "return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 16 else",
        "tests/contract/test_losses.py -m 'optimized and not slow'",
    ),
    Mutant(
        "half precision: a wide copy for the maximum",
        "_core/forms.py",
        "lax.platform_dependent(z, cpu=narrow, default=plain)",
        "plain(z)",
        "tests/maps/test_softmax_optimized.py -k half_precision",
    ),
    Mutant(
        "custom_vjp: wide cotangents stay wide",
        "autodiff.py",
        "return jax.lax.convert_element_type(cotangent, kind.dtype) if rounds else cotangent",
        "return cotangent",
        "tests/test_autodiff.py -k mixed_dtypes",
    ),
    Mutant(
        "custom_vjp: missing psum",
        "autodiff.py",
        "cotangent = jax.lax.psum(cotangent, extra)",
        "cotangent = jax.lax.pmean(cotangent, extra)",
        "tests/test_autodiff.py -k 'every_device or mesh or collectives'",
    ),
    Mutant(
        "custom_vjp: forward mode of an affine bwd",
        "_transpose.py",
        "if not all(_zero_at_zero(",
        "if False and not all(_zero_at_zero(",
        "tests/test_autodiff_rules.py -k not_linear",
    ),
    Mutant(
        "linear_map: its derivative in the residuals is left out",
        "_linear_map.py",
        "moving = {i: t for i, t in enumerate(tangents[:count]) if not _is_zero(t)}",
        "moving = {}",
        "tests/test_linear_map.py -k derivatives",
    ),
    Mutant(
        "damped solve: weight of the mean left out",
        "operators/diagonal_low_rank.py",
        "b = self._kappa + num.class_sum(",
        "b = 0 * self._kappa + num.class_sum(",
        "tests/losses/test_hessian.py -k every_method",
    ),
    Mutant(
        "factor: square root of the excess",
        "operators/diagonal_low_rank.py",
        "/ (1 + jnp.sqrt(1 - square)))",
        "/ (1 + jnp.sqrt(1 + square)))",
        "tests/losses/test_hessian.py -k 'square or psd'",
    ),
    Mutant(
        "per-example norms: bias forgotten",
        "network/per_example.py",
        "(0 if layer.b is None else 1))",
        "0)",
        "tests/network/test_flow.py -k per_example",
    ),
    Mutant(
        "backpropagation: sum in place of the mean",
        "network/backpropagation.py",
        "return pullback(jnp.ones_like(losses) / losses.size)[0]",
        "return pullback(jnp.ones_like(losses))[0]",
        "tests/network/test_backpropagation.py -k plain",
    ),
    Mutant(
        "linear head: class weight dropped from the gradient",
        "linear_head/rows.py",
        "loss, of_u = of_label * loss, of_label * of_u",
        "loss, of_u = of_label * loss, of_u",
        f"{LINEAR} -k equals_full_logits",
    ),
    Mutant(
        "linear head: the mean of the tangent dropped from the Hessian",
        "linear_head/rows.py",
        "jnp.exp(num.shift(u, m)) * (du - at_top)",
        "jnp.exp(num.shift(u, m)) * at_top",
        f"{LINEAR} -k equals_full_logits",
    ),
    Mutant(
        "linear head: mean over all tokens",
        "linear_head/call.py",
        "counted = jnp.sum(a if valid is None else jnp.where(valid, a, 0.0))",
        "counted = jnp.sum(jnp.ones_like(a))",
        f"{LINEAR} -k 'equals_full_logits or nothing_counted'",
    ),
    Mutant(
        "linear head: the gradient in x is not added up over the classes' devices",
        "linear_head/plan.py",
        "return () if self.copies else self.classes",
        "return ()",
        "tests/linear_head/test_mesh.py -k equals_one_device",
    ),
]


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
        done = subprocess.run(
            [*command, *shlex.split(mutant.tests)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
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
