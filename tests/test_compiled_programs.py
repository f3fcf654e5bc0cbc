"""What compilers for GPU and TPU make of the package: no change loses a fusion unseen.

A kernel more, or a pass more over an array of the logits' size, is a program that takes longer on every such machine.
The compilers need no device: `pip install ".[accelerators]"`.
"""

import functools

import jax
import pytest

from benchmarks import linear_head_compiled
from benchmarks.compiled import attention, chips, rows
from benchmarks.compiled.cost import Cost
from jaxsoftmax import brier_loss, dot_product_attention, logits_hessian
from jaxsoftmax.linear_head import default_chunk_size

pytestmark = pytest.mark.slow

WIDE, MIDDLE, LONG = rows.SIZES

# Chip, function, mode, size, dtype; kernels and passes at most. On TPU a kernel costs nothing of its own: passes alone.
PROGRAMS = [
    ("h100", "softmax", "value", MIDDLE, "float32", 1, 2.01),
    ("h100", "softmax", "VJP", MIDDLE, "float32", 1, 3.01),
    ("h100", "softmax", "JVP", MIDDLE, "float32", 2, 5.01),
    ("h100", "softmax", "JVP", MIDDLE, "bfloat16", 2, 5.01),
    ("h100", "softmax", "HVP", MIDDLE, "float32", 1, 4.01),
    ("h100", "log_softmax", "value", MIDDLE, "float32", 1, 2.01),
    ("h100", "log_softmax", "HVP", MIDDLE, "float32", 1, 4.01),
    ("h100", "softmax_where", "HVP", MIDDLE, "float32", 1, 4.3),
    ("h100", "logsumexp", "VJP", MIDDLE, "float32", 1, 2.01),
    ("h100", "logsumexp", "JVP", MIDDLE, "bfloat16", 3, 3.02),
    ("h100", "soft_labels", "HVP", MIDDLE, "bfloat16", 1, 4.01),
    ("h100", "softmax_kl", "JVP", MIDDLE, "bfloat16", 2, 5.01),
    ("h100", "entropy", "JVP", MIDDLE, "float32", 2, 3.01),
    ("h100", "entropy", "HVP", MIDDLE, "float32", 1, 3.01),
    ("h100", "brier", "HVP", MIDDLE, "bfloat16", 1, 4.01),
    ("h100", "integer_labels", "VJP", MIDDLE, "bfloat16", 6, 4.1),
    ("h100", "integer_labels_ignore", "value", WIDE, "bfloat16", 4, 2.5),
    ("h100", "poly", "value", WIDE, "float32", 1, 2.1),
    ("h100", "poly", "VJP", WIDE, "float32", 1, 3.1),
    ("h100", "poly", "HVP", WIDE, "float32", 1, 4.1),
    ("h100", "focal", "VJP", WIDE, "float32", 5, 4.4),
    ("h100", "poly", "value+VJP", MIDDLE, "bfloat16", 2, 5.01),
    ("h100", "focal", "HVP", MIDDLE, "bfloat16", 5, 6.1),
    ("h100", "integer_labels_z_loss", "VJP", MIDDLE, "bfloat16", 5, 4.1),
    ("h100", "integer_labels_z_loss", "HVP", MIDDLE, "float32", 5, 6.1),
    ("h100", "softmax_kl_temperature", "JVP", MIDDLE, "bfloat16", 2, 5.01),
    ("h100", "softmax_jvp", "JVP", MIDDLE, "float32", 3, 8.01),
    ("h100", "J.frobenius_norm", "value", MIDDLE, "float32", 1, 1.01),
    ("h100", "J.logdet", "value", MIDDLE, "bfloat16", 1, 1.01),
    ("h100", "log_softmax", "VJP", LONG, "bfloat16", 11, 7.1),
    ("h100", "entropy", "HVP", LONG, "float32", 17, 10.1),
    ("h100", "entropy", "HVP", LONG, "bfloat16", 17, 9.2),
    ("h100", "brier", "HVP", LONG, "bfloat16", 19, 18.2),
    ("h100", "poly", "VJP", LONG, "bfloat16", 15, 8.2),
    ("h100", "J.trace", "value", LONG, "bfloat16", 11, 3.1),
    ("h100", "J.frobenius_norm", "value", LONG, "bfloat16", 13, 5.2),
    ("h100", "J.quadratic_form", "value", LONG, "bfloat16", 14, 8.2),
    ("h100", "J.logdet", "value", LONG, "bfloat16", 13, 8.2),
    ("h100", "jensen_shannon", "value", LONG, "bfloat16", 12, 6.2),
    ("h100", "jensen_shannon", "JVP", LONG, "float32", 19, 12.2),
    ("h100", "generalized_kl", "JVP", WIDE, "float32", 1, 3.1),
    ("h100", "entmax15", "value", WIDE, "float32", 3, 3.1),
    ("v5e", "softmax", "value", LONG, "float32", None, 4.01),
    ("v5e", "softmax", "VJP", MIDDLE, "float32", None, 7.01),
    ("v5e", "J.trace", "value", MIDDLE, "float32", None, 3.01),
    ("v5e", "entropy", "HVP", MIDDLE, "bfloat16", None, 6.01),
    ("v5e", "jensen_shannon", "value", MIDDLE, "float32", None, 6.01),
    ("v5e", "J.frobenius_norm", "value", MIDDLE, "float32", None, 4.01),
    ("v5e", "integer_labels_z_loss", "value", MIDDLE, "bfloat16", None, 2.01),
    ("v5e", "integer_labels_weights", "VJP", MIDDLE, "bfloat16", None, 3.01),
    ("v5e", "integer_labels", "VJP", LONG, "float32", None, 4.01),
]


def measured(chip: str, name: str, mode: str, size: tuple[int, ...], dtype: str) -> tuple[Cost, int]:
    """What ours costs, and the bytes of the logits."""
    (pair,) = rows.names((name,))
    args = pair.arguments(size, dtype, *pair.kinds)
    call, inputs = rows.in_mode(pair.ours, mode, args, pair.wrt)
    return chips.measure(call, *inputs, chip=chip, rounds=pair.rounds(chip, size)), args[0].size * args[
        0
    ].dtype.itemsize


def skip_without(chip: str) -> None:
    if absent := chips.missing(chip):
        pytest.skip(f"no compiler for {chip} here: {', '.join(absent)} not installed, see docs/performance.md")


@pytest.mark.parametrize("chip, name, mode, size, dtype, kernels, passes", PROGRAMS)
def test_no_fusion_is_lost(chip, name, mode, size, dtype, kernels, passes):
    skip_without(chip)
    cost, logits = measured(chip, name, mode, size, dtype)
    assert cost.bytes <= passes * logits
    assert kernels is None or cost.kernels <= kernels


def test_a_solve_with_a_hessian_is_one_kernel():
    """Though it looks for a class to keep apart."""
    skip_without("h100")
    solve = lambda z, y, v: logits_hessian(brier_loss, z, y).solve(v, 1.0)
    cost = chips.measure(solve, *[jax.ShapeDtypeStruct(MIDDLE, "float32")] * 3, chip="h100")
    assert cost.kernels == 1


@pytest.mark.parametrize("case, passes", [("plain", 26), ("causal", 16)])
def test_the_gradient_of_attentions_tangent_compiles_for_a_tpu(case, passes):
    """It ran out of memory for vectors where a product, sums over its rows and what is done with them were a kernel."""
    skip_without("v5e")
    call = functools.partial(dot_product_attention, **attention.CASES[case])
    cost = attention.measure(call, "gradient of JVP", "bfloat16", attention.SIZE, "v5e")
    batch, tokens, heads, _ = attention.SIZE
    assert cost.seconds * chips.CHIPS["v5e"].bandwidth <= passes * 4 * batch * heads * tokens**2


@pytest.mark.parametrize("chip, mode, arrays", [("h100", "gradient", 0.5), ("v5e", "gradient", 1), ("h100", "HVP", 2)])
def test_memory_of_the_linear_head(chip, mode, arrays):
    """The float32 gradient of the weights, and so many float32 arrays of a chunk's logits."""
    skip_without(chip)
    tokens, features, vocab = size = 8192, 4096, 128256
    args = x, _, weights = linear_head_compiled.arguments(size)
    of, more = (linear_head_compiled.hvp, (x, weights)) if mode == "HVP" else (linear_head_compiled.gradient, ())
    cost = chips.measure(of(linear_head_compiled.fused), *args, *more, chip=chip)
    chunk = default_chunk_size(*size, platform=chips.CHIPS[chip].platform)
    assert cost.temp <= 1.01 * 4 * vocab * (features + arrays * chunk)


def test_gradients_cross_a_pod_rounded_where_nothing_is_told():
    """Those of x as bfloat16; XLA adds up those of the weights, once, before they are rounded."""
    skip_without("v5e")
    tokens, features, vocab = linear_head_compiled.POD
    sent = linear_head_compiled.on_pod(linear_head_compiled.POD, "Auto, untold").sent
    assert sum(size for _, size in sent.values()) <= 1.01 * features * (2 * tokens + 4 * vocab) / 16
