"""How many tokens and classes have logits at once, and what memory that takes."""

import jax
from jax import Array

from jaxsoftmax._core import checks
from jaxsoftmax.linear_head.types import wide_dtype

# Per backend: bytes of temporary memory to aim at, and the tokens beyond which a larger chunk gains nothing: the
# traffic of the accumulator, κ D V bytes per chunk, is then 5 % of the time of its 6 C D V operations.
BUDGET = {"cpu": 64 << 20}
BUDGET_OTHER = 2 << 30
SATURATION = {"cpu": 512}
SATURATION_OTHER = 8192
SLAB_BYTES = 4 << 20
ALIGNMENT = 8
# So few tokens per chunk, as a part of the saturation, that four matrix products over blocks of the vocabulary take
# less time than three over all of it.
FEW = 0.1
MIN_BLOCK = 128
# The first chunk has as many tokens as there are features, and is taken where this part of it counts.
FULL = 0.75


def default_chunk_size(num_tokens: int, features: int, vocab: int, itemsize: int = 4) -> int:
    """Tokens per chunk that `chunk_size=None` takes: min(budget / (itemsize (V + 3 D)), saturation, N), N tokens.

    Less for what a slab of the weight gradient takes, and so that chunks are of nearly equal size. Options and
    derivatives of the gradient need 2 to 6 arrays of the logits in place of one, and take as many times fewer tokens;
    for derivatives the budget grows to twice the weights where that is more, but at most to a quarter of all logits.

    The first D tokens are a chunk of their own where 2 D is at least a chunk and the gradient of the weights is wanted
    (without softcap, smoothing, z-loss and statistics): their logits lie in the gradient's memory, which takes their
    place slab by slab. So no token needs memory for its logits where there are no more tokens than features.

    The budget of temporary memory is 64 MiB on CPU and 2 GiB elsewhere. A chunk of C tokens takes the time of its
    6 C D V operations plus that of passing once over the (D, V) accumulator, 6 N D V / F (1 + κ F / (6 BW C)) in all,
    so beyond a saturation (512 tokens on CPU, 8192 elsewhere) a larger chunk gains nothing. Where the budget holds the
    logits of only a few tokens, the number saturates all the same and the vocabulary is streamed in blocks that fit:
    the same result in every mode and order, for a fourth matrix product.

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
    return default_chunk(num_tokens, features, vocab, itemsize)[0]


def predict_temp_bytes(
    num_tokens: int, features: int, vocab: int, chunk_size: int | None = None, itemsize: int = 4
) -> int:
    """Peak temporary bytes of value and gradient, beside arguments and gradients: one array of a chunk's logits.

    itemsize (C V + (S + R) (C + D) + S D + 3 C D), with slabs of S < V columns of the weights and R = V mod S, for x
    and weights of one dtype of at least 32 bits, without softcap, smoothing and z-loss; with C = D and no C V for a
    first chunk of D tokens (see `default_chunk_size`); itemsize (B (3 C + 1.5 D) + 3 C D) where the vocabulary is
    streamed in blocks of B classes. XLA before JAX 0.10 may keep a second array of a chunk's logits.

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
    if chunk_size is not None:
        checks.at_least("chunk_size", chunk_size, 1)
    chunk, block = (chunk_size, None) if chunk_size else default_chunk(num_tokens, features, vocab, itemsize)
    chunk, slab = min(chunk, num_tokens), slab_size(features, vocab)
    if block is not None:
        return itemsize * (block * (6 * chunk + 3 * features) // 2 + 3 * chunk * features)
    fixed, per_token = temp_of_chunk(features, vocab, slab)
    first = first_chunk(chunk, num_tokens, features)
    return itemsize * (fixed + max(first * (per_token - vocab), chunk * per_token if num_tokens > first else 0))


def _check_sizes(num_tokens, features, vocab, itemsize) -> None:
    for name, size in {"num_tokens": num_tokens, "features": features, "vocab": vocab}.items():
        checks.at_least(name, size, 0)
    checks.at_least("itemsize", itemsize, 1)


def chosen_chunks(
    chunk_size: int | None, theta: dict[str, Array], axis: int, arrays: int, whole: bool = False
) -> tuple[int, int, int | None]:
    """Tokens whose logits exist at once, in the gradient and in its derivatives, and classes if not all.

    Args:
      chunk_size: tokens, where the caller chose.
      theta: the arguments by name.
      axis: the vocabulary's.
      arrays: how many arrays of a chunk's logits the gradient takes; its derivatives take three times as many.
      whole: whether all classes of a token must be there.
    """
    if chunk_size is not None:
        chunk_size = checks.at_least("chunk_size", chunk_size, 1)
        return max(1, chunk_size // arrays), max(1, chunk_size // (3 * arrays)), None
    num_tokens, features = theta["x"].shape
    size = num_tokens, features, theta["weights"].shape[axis], wide_dtype(theta).itemsize
    chunk, block = default_chunk(*size, 1, whole)
    if block is not None:
        return chunk, chunk, block
    gradient = chunk if arrays == 1 else default_chunk(*size, arrays, True)[0]
    return gradient, default_chunk(*size, 3 * arrays, True)[0], None


def slab_size(features: int, vocab: int) -> int:
    """Columns of the weights that are used and updated at once: about 4 MiB of them in float32."""
    return max(1, min(vocab, max(256, SLAB_BYTES // (4 * max(features, 1)))))


def default_chunk(
    num_tokens: int, features: int, vocab: int, itemsize: int = 4, arrays: int = 1, whole: bool = False
) -> tuple[int, int | None]:
    """How many tokens and classes have logits at once, by budget and saturation; None stands for all classes.

    Part of the classes only where the budget has no room for all those of a few tokens, and `whole` does not forbid it.
    `arrays` of a chunk's logits exist; three and more are those of a derivative of the gradient, whose direction and
    result have the size of the weights each: the budget grows to the two of them, up to a quarter of all logits.
    """
    backend = jax.default_backend()
    budget, saturation = BUDGET.get(backend, BUDGET_OTHER), SATURATION.get(backend, SATURATION_OTHER)
    if arrays > 2:
        budget = max(budget, itemsize * vocab * min(2 * features, num_tokens // 4))
    most, slab = max(1, min(saturation, num_tokens)), slab_size(features, vocab)
    fixed, per_token = temp_of_chunk(features, vocab, slab, arrays)
    fits = max(0, budget // itemsize - fixed) // per_token
    if whole or fits >= min(FEW * saturation, most):
        most = min(most, max(1, fits))
        return _equal_chunk(num_tokens - (first_chunk(most, num_tokens, features) if arrays == 1 else 0), most), None
    columns = (budget // itemsize - 3 * most * features) // (3 * (most + features))
    return most, equal_blocks(vocab, max(MIN_BLOCK, columns))


def temp_of_chunk(features: int, vocab: int, slab: int, arrays: int = 1) -> tuple[int, int]:
    """Numbers that exist beside the gradients: so many, and so many per token of a chunk.

    One array of logits, a slab of G, of the weights and of xᵀG, each with what is left over V mod S, and three rows of
    x; where there are more arrays of logits, they are gone but for one or two by the time of the slabs.
    """
    if arrays > 1:
        return 0, arrays * vocab + 5 * features + 16
    part = slab + vocab % slab if slab < vocab else 0
    return (part + min(slab, vocab)) * features, vocab + part + 3 * features + 16


def _equal_chunk(num_tokens: int, most: int) -> int:
    """Tokens per chunk, at most `most`, so that the last chunk is nearly full."""
    if most < ALIGNMENT or num_tokens < 1:
        return most
    most = most // ALIGNMENT * ALIGNMENT
    each = -(-num_tokens // max(1, -(-num_tokens // most)))
    return min(most, -(-each // ALIGNMENT) * ALIGNMENT, max(1, num_tokens))


def equal_blocks(vocab: int, most: int) -> int:
    """Classes per block, at most `most`, so that few are left over: what is left has buffers of its own."""
    return vocab // -(-vocab // max(1, most))


def first_chunk(chunk: int, num_tokens: int, features: int) -> int:
    """Tokens of the first chunk, D, whose logits lie where the gradient of the weights comes to lie; 0 for no such."""
    return features if 2 * features >= chunk and num_tokens >= FULL * features else 0
