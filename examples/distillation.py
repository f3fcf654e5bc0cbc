"""A small model learns from a larger one with linear_softmax_kl_divergence: the logits of neither exist as a whole.

    python examples/distillation.py                   three minutes on two cores

The teacher is the transformer of examples/transformer_equinox.py. The student sees the last two words only. It learns
from the words themselves, and from the teacher's distribution over all words as well (Hinton et al. 2015,
https://arxiv.org/abs/1503.02531): the divergence at temperature T, times T² so that its gradient does not shrink.
"""

from typing import Any

import _language
import equinox as eqx
import jax
import jax.numpy as jnp
from transformer_equinox import Transformer, mean_loss

import jaxsoftmax as js
from jaxsoftmax import network

FEATURES, TEMPERATURE = 32, 2.0


def init(key: jax.Array, vocabulary: int) -> dict[str, Any]:
    k1, k2 = jax.random.split(key)
    table = jax.random.normal(k1, (vocabulary, FEATURES)) / FEATURES**0.5
    return {"table": table, "network": network.init(k2, (2 * FEATURES, 128, FEATURES))}


def hidden_states(student: dict[str, Any], words: jax.Array) -> jax.Array:
    """(B, T, D) of the words (B, T): each word with the one before it."""
    x = student["table"][words] * FEATURES**0.5
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return network.forward(student["network"], jnp.concatenate([before, x], -1), jnp.tanh)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """The losses of the teacher and of the student."""
    chosen, text = _language.options(__doc__, arguments), _language.load()
    params, static = eqx.partition(Transformer(text.vocabulary, jax.random.key(0)), eqx.is_array)
    print("teacher: ", end="")
    of_params = lambda params, words: mean_loss(eqx.combine(params, static), words, chosen.head)
    params, of_teacher = _language.train(of_params, params, text, chosen.steps, chosen.devices)
    teacher = eqx.combine(params, static)

    def cross_entropy(student: dict[str, Any], words: jax.Array) -> jax.Array:
        x, table = hidden_states(student, words[:, :-1]), student["table"]
        return js.linear_softmax_cross_entropy_loss(x, words[:, 1:], table, reduction="mean", vocab_axis=0)

    def loss(student: dict[str, Any], words: jax.Array) -> jax.Array:
        x, table = hidden_states(student, words[:, :-1]), student["table"]
        target = jax.lax.stop_gradient(jax.vmap(teacher)(words[:, :-1]))
        soft = js.linear_softmax_kl_divergence(
            x, target, table, teacher.table, temperature=TEMPERATURE, reduction="mean", vocab_axis=0
        )
        return 0.5 * cross_entropy(student, words) + 0.5 * TEMPERATURE**2 * soft

    print("student: ", end="")
    student, of_student = _language.train(
        loss, init(jax.random.key(1), text.vocabulary), text, chosen.steps, chosen.devices
    )
    own = _language.held_out(cross_entropy, student, text)
    print(f"the student's loss is half divergence from the teacher; its cross-entropy, to compare: held out {own:.3f}")
    return {"teacher": of_teacher, "student": of_student}


if __name__ == "__main__":
    main()
