"""A small transformer in Flax NNX, trained on Python's documentation with the head that never holds the logits.

    python examples/transformer_nnx.py                   about a minute
    python examples/transformer_nnx.py --head full       with all logits in memory: the same losses
    python examples/transformer_nnx.py --devices 2       every batch divided over two devices: the same losses

Tied embeddings: the table of word vectors (V, D) is the head's weights as it is, with vocab_axis=0. The body's
parameters are bfloat16, table and head float32; gradients are clipped, and every optimizer step takes two batches
(optax.MultiSteps).
"""

import jax
import jax.numpy as jnp
from _language import DATA, LENGTH, load, options, train
from flax import nnx

import jaxsoftmax as js

FEATURES, HEADS, LAYERS = 64, 4, 2
HALF = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs, **HALF)
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs, **HALF)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs, **HALF)
        self.norm1, self.norm2 = (nnx.LayerNorm(FEATURES, rngs=rngs, **HALF) for _ in range(2))

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        normal = jax.random.normal
        self.table = nnx.Param(normal(rngs.params(), (vocabulary, FEATURES)) / FEATURES**0.5)  # float32
        self.positions = nnx.Param(normal(rngs.params(), (LENGTH, FEATURES), jnp.bfloat16) * 0.1)
        for i in range(LAYERS):
            setattr(self, f"block{i}", Block(rngs))
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs, **HALF)

    def __call__(self, words):
        """Hidden states (B, T, D) in float32, of the words (B, T)."""
        x = (self.table[...][words] * FEATURES**0.5).astype(jnp.bfloat16) + self.positions[...][None]
        for i in range(LAYERS):
            x = getattr(self, f"block{i}")(x)
        return self.norm(x).astype(jnp.float32)


def mean_loss(model: Transformer, words: jax.Array, head: str, token_axes: str | None = None) -> jax.Array:
    x, table, targets = model(words[:, :-1]), model.table[...], words[:, 1:]
    if head == "fused":
        options = {"reduction": "mean", "vocab_axis": 0, "token_axes": token_axes}
        return js.linear_softmax_cross_entropy_loss(x, targets, table, **options)
    return js.softmax_cross_entropy_with_integer_labels(x @ table.T, targets).mean()


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every batch."""
    chosen, text = options(__doc__, arguments), load()
    graph, params, rest = nnx.split(Transformer(text.vocabulary, nnx.Rngs(0)), nnx.Param, ...)
    token_axes = DATA if len(chosen.devices) > 1 else None
    loss = lambda params, words: mean_loss(nnx.merge(graph, params, rest), words, chosen.head, token_axes)
    return train(loss, params, text, chosen.steps, chosen.devices)[1]


if __name__ == "__main__":
    main()
