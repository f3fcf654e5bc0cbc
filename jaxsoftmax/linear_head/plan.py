"""What is static in a linear head, and how its tokens are cut into chunks.

A chunk of C tokens takes 6 C D V operations and passes once over the gradient of the weights, 8 D V bytes in float32,
whatever C. While the product xᵀG takes 2 C D V operations, those bytes are hidden if C is at least four times what the
machine computes per byte that it moves: 295 on an H100, 240 on a TPU v5e, 560 on a v6e. So there a chunk has 2048
tokens, fewer only where one array of their logits would take more than 2 GiB, and 1368 where tokens are skipped: half a
chunk of those that count is lost, on average. A CPU needs fewer, and has less to give: 64 MiB.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxsoftmax._core import checks, dtypes
from jaxsoftmax._core.classes import ClassAxis

Arrays = Mapping[str, Array]
MeshAxes = str | Sequence[str] | None
Precision = str | lax.Precision | None
Reduction = Literal["none", "sum", "mean"]

TOKENS, LOGITS, LEAST = 2048, 2 << 30, 256  # of a chunk on an accelerator: tokens, bytes of its logits, least tokens
SKIPPING = 1368  # tokens, where some may be skipped
CPU_TOKENS, CPU_BYTES, CPU_LEAST = 512, 64 << 20, 64
SLAB_BYTES = 4 << 20  # of the part of ∂F/∂W that a CPU makes at once
ALIGNMENT = 8  # of chunks, so that no kernel is left with single rows
MANY = 1 << 30  # tokens, where a size is symbolic


class Head(NamedTuple):
    """What is static in a linear head: how logits become numbers per token, and what is known of the call.

    Attributes:
      vocab_axis: the classes' axis in the weights.
      classes: axes of the mesh, inside a `shard_map`, over whose devices the classes are split.
      chunk_size: what the caller chose, or None.
      precision: of the matrix products.
      every: whether the token weights are 1: how many tokens count is then known beforehand.
      spread: over how many devices XLA is to divide the tokens of each chunk, and the classes.
      rule: rule(head, z, constants, options) -> `rows.Facts` of the logits of a chunk.
      columns: how many numbers it finds per token; where there are several, an index too.
      weighed: how many of them F weighs: the first, or all.
    """

    vocab_axis: int
    classes: tuple[str, ...] = ()
    chunk_size: int | None = None
    precision: Precision = None
    every: bool = False
    spread: int = 1
    rule: Any = None
    columns: int = 1
    weighed: int = 1

    @property
    def class_axis(self) -> Any:
        """Of arrays (C, V)."""
        return ClassAxis((1,), self.classes) if self.classes else 1

    @property
    def devices(self) -> int:
        """How many share the classes."""
        return lax.psum(1, self.classes)


class Tokens(NamedTuple):
    """The tokens' constants: arrays with one row per token, which of the tokens count, and what they share."""

    rows: Any
    valid: Array | None = None
    shared: Any = None


def wide_dtype(arrays: Arrays) -> jnp.dtype:
    """The dtype of logits, losses and sums."""
    found = (arrays[n] for n in ("x", "weights", "bias") if n in arrays)
    return dtypes.compute_dtype(dtypes.common_dtype(*found))


def operand_dtype(precision: Precision, arrays: Arrays) -> jnp.dtype:
    """What x, the weights and the gradient in the logits are multiplied in."""
    found = {arrays[name].dtype for name in ("x", "weights")}
    found = {d if jnp.finfo(d).bits >= 16 else jnp.dtype(jnp.bfloat16) for d in found}
    rounded = precision in (None, "default", "fastest", "bfloat16", lax.Precision.DEFAULT)
    return found.pop() if rounded and len(found) == 1 else wide_dtype(arrays)


class Plan(NamedTuple):
    """Tokens whose logits exist at once, and classes whose part of ∂F/∂W is made at once."""

    chunk: int
    slab: int


def plan(
    platform: str,
    num_tokens,
    features: int,
    vocab: int,
    itemsize: int,
    order: int = 1,
    devices: int = 1,
    skips: bool = False,
) -> Plan:
    """The plan of a platform, "cpu" or any other, for a pass of the given order; `skips`: tokens may be left out.

    A CPU has two arrays of a chunk's logits at once, and five for a derivative of the gradient. The direction and the
    result of that have the size of the weights each, so there, and devices of a CPU share its memory, the budget grows
    to the two of them, up to a quarter of all logits. Chunks are nearly equal, so that the last one is nearly full.
    """
    num_tokens = num_tokens if isinstance(num_tokens, int) else MANY
    token, slab = itemsize * max(vocab, 1), vocab
    most = min(SKIPPING if skips else TOKENS, max(LOGITS // token, LEAST))
    if platform == "cpu":
        slab = min(vocab, max(256, SLAB_BYTES // (itemsize * (features + CPU_TOKENS))))
        budget, arrays = CPU_BYTES // devices, 2 if order < 2 else 5
        if order > 1:
            budget = max(budget, token * min(2 * features, num_tokens // 4))
        fits = (budget - itemsize * features * slab) // (arrays * token + itemsize * (slab + 3 * features))
        most = min(CPU_TOKENS, max(fits, CPU_LEAST // arrays))
    if num_tokens <= most:
        return Plan(max(1, num_tokens), slab)
    each = -(-num_tokens // -(-num_tokens // (most // ALIGNMENT * ALIGNMENT)))
    return Plan(-(-each // ALIGNMENT) * ALIGNMENT, slab)


def default_chunk_size(num_tokens: int, features: int, vocab: int, itemsize: int = 4, *, platform: str) -> int:
    """Tokens per chunk that `chunk_size=None` takes for value and gradient, decided where the program is lowered.

    On an accelerator min(2048, 2 GiB / (itemsize V)), at least 256, for derivatives of the gradient as well; 1368 for
    2048 with `ignore_index` or `token_weights`. On a CPU at most 512, what 64 MiB hold, but at least 32. Then so that
    chunks are of nearly equal size.

    Args:
      num_tokens: N.
      features: D.
      vocab: V.
      itemsize: bytes of one logit.
      platform: which machine runs the program: "cpu", "cuda", "tpu", …; `jax.default_backend()` says it of this one.

    Returns:
      The number of tokens, at least 1.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.default_chunk_size(num_tokens=8192, features=4096, vocab=128256, platform="tpu")
      2048

    Reference: docs/mathematics.md, section 6.
    """
    return _checked_plan(num_tokens, features, vocab, itemsize, platform).chunk


def predict_temp_bytes(
    num_tokens: int,
    features: int,
    vocab: int,
    chunk_size: int | None = None,
    itemsize: int = 4,
    *,
    platform: str,
) -> int:
    """Peak temporary bytes of value and gradient in float32, beside arguments and gradients: a chunk's logits.

    itemsize C (V + 3 D); on a CPU, which keeps two arrays of a chunk's logits and makes S classes of the gradient of
    the weights at once, itemsize (C (2 V + 3 D) + S D). Narrower x and weights need, on top, the gradient of the
    weights in float32, 4 D V.

    Args:
      num_tokens, features, vocab, itemsize, platform: as in `default_chunk_size`.
      chunk_size: C; None for `default_chunk_size`.

    Returns:
      The number of bytes, within 25 % of the compiled program's `memory_analysis()` where the logits of a chunk, or
      what is made of the gradient at once, are the most of it.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.predict_temp_bytes(2048, 512, 32768, chunk_size=128, platform="cpu") >> 20
      34

    Reference: docs/mathematics.md, section 6.
    """
    chunk, slab = _checked_plan(num_tokens, features, vocab, itemsize, platform)
    if chunk_size is not None:
        chunk = min(checks.at_least("chunk_size", chunk_size, 1), num_tokens)
    on_cpu = chunk * vocab + (slab * features if slab < vocab else 0) if platform == "cpu" else 0
    return itemsize * (chunk * (vocab + 3 * features) + on_cpu)


def _checked_plan(num_tokens, features, vocab, itemsize, platform) -> Plan:
    for name, size in {"num_tokens": num_tokens, "features": features, "vocab": vocab}.items():
        checks.at_least(name, size, 0)
    checks.at_least("itemsize", itemsize, 1)
    if not isinstance(platform, str):
        raise TypeError(f'platform must be "cpu", "cuda", "tpu" or another name of JAX, got {platform!r}')
    return plan(platform, num_tokens, features, vocab, itemsize)
