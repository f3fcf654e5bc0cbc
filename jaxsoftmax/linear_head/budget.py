"""How many tokens have logits at once, and what memory that takes.

A chunk of C tokens takes 6 C D V operations and passes once over the gradient of the weights, 8 D V bytes in float32,
whatever C. So C should be large; but its logits take 4 C V bytes. Between the two, per kind of device:

- BUDGET: bytes of temporary memory to aim at.
- SATURATION: tokens beyond which a larger chunk gains nothing: passing over the gradient is then below 5 % of the time.
- LEAST: tokens that a chunk has whatever the budget says: with fewer, passing over the gradient takes longest.
"""

import jax

from jaxsoftmax._core import checks

BUDGET = {"cpu": 64 << 20}
BUDGET_OTHER = 2 << 30
SATURATION = {"cpu": 512}
SATURATION_OTHER = 8192
LEAST = 1 / 8  # of the saturation
SLAB_BYTES = 4 << 20  # of a slab of the weights, so that it stays in the cache between its products
MANY = 1 << 30
ALIGNMENT = 8  # of chunks, so that no kernel is left with single rows


def default_chunk_size(num_tokens: int, features: int, vocab: int, itemsize: int = 4) -> int:
    """Tokens per chunk that `chunk_size=None` takes: min(budget / (itemsize (V + 3 D)), saturation, N) of N tokens.

    Less for what a slab of the weight gradient takes, and so that chunks are of nearly equal size; never fewer than 64
    tokens on CPU, 1024 elsewhere. Options and derivatives of the gradient need 2 to 6 arrays of the logits in place of
    one, and take as many times fewer tokens; for derivatives the budget grows to twice the weights where that is more,
    but at most to a quarter of all logits.

    The budget of temporary memory is 64 MiB on CPU and 2 GiB elsewhere, the saturation 512 tokens on CPU and 8192
    elsewhere.

    Args:
      num_tokens: N.
      features: D.
      vocab: V.
      itemsize: bytes of one logit.

    Returns:
      The number of tokens, at least 1.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.default_chunk_size(num_tokens=5, features=16, vocab=100)
      5

    Reference: docs/mathematics.md, section 6.
    """
    _check_sizes(num_tokens, features, vocab, itemsize)
    return default_chunk(num_tokens, features, vocab, itemsize)


def predict_temp_bytes(
    num_tokens: int, features: int, vocab: int, chunk_size: int | None = None, itemsize: int = 4
) -> int:
    """Peak temporary bytes of value and gradient, beside arguments and gradients: one array of a chunk's logits.

    itemsize (C V + (S + R) (C + D) + S D + 3 C D), with slabs of S < V columns of the weights and R = V mod S, for x
    and weights of one dtype of at least 32 bits, without softcap, smoothing and z-loss. XLA before JAX 0.10 may keep a
    second array of a chunk's logits.

    Args:
      num_tokens: N.
      features: D.
      vocab: V.
      chunk_size: C; None for `default_chunk_size`.
      itemsize: bytes of one logit.

    Returns:
      The number of bytes, within 25 % of the compiled program's `memory_analysis()` where the logits of a chunk, or
      the slabs, are the most of it.

    Example:
      >>> from jaxsoftmax import linear_head
      >>> linear_head.predict_temp_bytes(2048, 512, 32768, chunk_size=128) >> 20
      25

    Reference: docs/mathematics.md, section 6.
    """
    _check_sizes(num_tokens, features, vocab, itemsize)
    if chunk_size is None:
        chunk_size = default_chunk(num_tokens, features, vocab, itemsize)
    fixed, per_token = temp_of_chunk(features, vocab, 1)
    return itemsize * (fixed + min(checks.at_least("chunk_size", chunk_size, 1), num_tokens) * per_token)


def _check_sizes(num_tokens, features, vocab, itemsize) -> None:
    for name, size in {"num_tokens": num_tokens, "features": features, "vocab": vocab}.items():
        checks.at_least(name, size, 0)
    checks.at_least("itemsize", itemsize, 1)


def default_chunk(num_tokens: int, features: int, vocab: int, itemsize: int, arrays: int = 1, devices: int = 1) -> int:
    """How many tokens have logits at once on a device, when `arrays` of a chunk's logits exist.

    Devices of a CPU share its memory, so each of `devices` gets its part of the budget.

    Three and more are those of a derivative of the gradient, whose direction and result have the size of the weights
    each: the budget grows to the two of them, up to a quarter of all logits.
    """
    if not isinstance(num_tokens, int):  # a symbolic size: chunks that suit many tokens
        num_tokens = MANY
    backend = jax.default_backend()
    budget, saturation = BUDGET.get(backend, BUDGET_OTHER), SATURATION.get(backend, SATURATION_OTHER)
    if backend == "cpu":
        budget //= devices
    if arrays > 2:
        budget = max(budget, itemsize * vocab * min(2 * features, num_tokens // 4))
    fixed, per_token = temp_of_chunk(features, vocab, arrays, devices)
    fits = max(0, budget // itemsize - fixed) // per_token
    return _equal_chunk(num_tokens, min(saturation, max(fits, int(LEAST * saturation) // arrays)))


def temp_of_chunk(features: int, vocab: int, arrays: int, devices: int = 1) -> tuple[int, int]:
    """Numbers that exist beside the gradients: so many, and so many per token of a chunk.

    One array of logits, a slab of G, of the weights and of xᵀG, each with what is left over V mod S, and three rows of
    x; where there are more arrays of logits, they are gone but for one or two by the time of the slabs.
    """
    if arrays > 1:
        return 0, arrays * vocab + 5 * features + 16
    slab = slab_size(features, vocab, devices)
    part = slab + vocab % slab if slab < vocab else 0
    return (part + min(slab, vocab)) * features, vocab + part + 3 * features + 16


def slab_size(features: int, vocab: int, devices: int = 1) -> int:
    """Columns of the weights that are used and updated at once: about 4 MiB of them in float32, 1 MiB beside others."""
    size = SLAB_BYTES if devices == 1 else SLAB_BYTES // 4
    return max(1, min(vocab, max(256, size // (4 * max(features, 1)))))


def _equal_chunk(num_tokens: int, most: int) -> int:
    """Tokens per chunk, at most `most`, so that the last chunk is nearly full."""
    most = max(1, min(most, num_tokens))
    if most < ALIGNMENT:
        return most
    each = -(-num_tokens // -(-num_tokens // most))
    return min(most // ALIGNMENT * ALIGNMENT, -(-each // ALIGNMENT) * ALIGNMENT)
