"""A small transformer in Equinox, trained on Python's documentation with the head that never holds the logits.

    python examples/transformer_equinox.py                   about a minute
    python examples/transformer_equinox.py --head full       with all logits in memory: the same losses
    python examples/transformer_equinox.py --devices 2       every batch divided over two devices: the same losses

Tied embeddings: the table of word vectors (V, D) is the head's weights as it is, with vocab_axis=0. The body's
parameters are bfloat16, table and head float32; gradients are clipped, and every optimizer step takes two batches
(optax.MultiSteps).
"""

import _language
import equinox as eqx
import jax
import jax.numpy as jnp

import jaxsoftmax as js

FEATURES, HEADS, LAYERS = 64, 4, 2


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, FEATURES, key=k1)
        self.mlp = eqx.nn.MLP(FEATURES, FEATURES, 4 * FEATURES, 1, jax.nn.gelu, key=k2)
        self.norms = eqx.nn.LayerNorm(FEATURES), eqx.nn.LayerNorm(FEATURES)

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    table: jax.Array  # float32
    body: tuple  # bfloat16: positions, blocks, norm

    def __init__(self, vocabulary, key):
        k1, k2, *keys = jax.random.split(key, 2 + LAYERS)
        self.table = jax.random.normal(k1, (vocabulary, FEATURES)) / FEATURES**0.5
        positions = jax.random.normal(k2, (_language.LENGTH, FEATURES)) * 0.1
        body = positions, [Block(key) for key in keys], eqx.nn.LayerNorm(FEATURES)
        self.body = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_array(leaf) else leaf, body)

    def __call__(self, words):
        """Hidden states (T, D) in float32, of the words (T,)."""
        positions, blocks, norm = self.body
        x = (self.table[words] * FEATURES**0.5).astype(jnp.bfloat16) + positions
        for block in blocks:
            x = block(x)
        return jax.vmap(norm)(x).astype(jnp.float32)


def mean_loss(model: Transformer, words: jax.Array, head: str, token_axes: str | None = None) -> jax.Array:
    x, targets = jax.vmap(model)(words[:, :-1]), words[:, 1:]
    if head == "fused":
        options = {"reduction": "mean", "vocab_axis": 0, "token_axes": token_axes}
        return js.linear_softmax_cross_entropy_loss(x, targets, model.table, **options)
    return js.softmax_cross_entropy_with_integer_labels(x @ model.table.T, targets).mean()


def main(arguments: list[str] | None = None) -> list[float]:
    """The loss of every batch."""
    chosen, text = _language.options(__doc__, arguments), _language.load()
    model = Transformer(text.vocabulary, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    token_axes = _language.DATA if len(chosen.devices) > 1 else None
    loss = lambda params, words: mean_loss(eqx.combine(params, static), words, chosen.head, token_axes)
    return _language.train(loss, params, text, chosen.steps, chosen.devices)[1]


if __name__ == "__main__":
    main()
