"""`python docs/digits.py`: the decimal digits that jax.nn, optax and jaxsoftmax keep in float32, as a Markdown table.

Each cell is the worst of 64 random examples of 10 classes: -log10 of the relative error against the same formula in
extended precision, at the very same float32 numbers, rounded down; 7 is what float32 can hold, 0 is nothing right.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoftmax as js

# The gap between the first logit and the highest of the others, and what is added to all.
REGIMES = {
    "unsure": (0.5, 0.0),
    "gap 10": (10.0, 0.0),
    "gap 20": (20.0, 0.0),
    "gap 60": (60.0, 0.0),
    "offset 10⁴": (10.0, 1e4),
}


def logits(gap: float, offset: float, examples: int = 64, num_classes: int = 10) -> np.ndarray:
    """float32 logits whose first class leads by the gap."""
    z = np.random.default_rng(0).normal(size=(examples, num_classes))
    z[:, 0] = z[:, 1:].max(1) + gap
    return np.asarray(z + offset, np.float32)


def reference(z: np.ndarray) -> dict[str, np.ndarray]:
    """Extended precision, with nothing subtracted that could cancel there."""
    z = np.asarray(z, np.longdouble)
    below = z[:, 1:] - z[:, :1]
    others = np.exp(below)
    rest = others.sum(1)
    log_top = -np.log1p(rest)
    p = np.concatenate([np.ones_like(rest)[:, None], others], 1) / (1 + rest)[:, None]
    log_p = np.concatenate([log_top[:, None], below + log_top[:, None]], 1)
    shift = np.asarray(STEP, np.longdouble)
    return {
        "log p of the first class": log_top,
        "cross-entropy": -log_top,
        "its gradient at the label": -rest / (1 + rest),
        "its Hessian, times a vector": 0.5 * rest / (1 + rest) ** 2,
        "entropy": -np.sum(p * log_p, 1),
        "KL of two models": np.log1p(np.sum(p * np.expm1(shift), 1)) - np.sum(p * shift, 1),
    }


LABEL = jnp.array(0)
STEP = np.asarray([0.0] + [0.25] * 9, np.float32)  # from the logits of one model to those of the other
VECTOR = jnp.array([1.0] + [0.5] * 9)

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def of_loss(loss: Loss) -> dict[str, Callable]:
    gradient = jax.grad(loss)
    return {
        "cross-entropy": lambda z: loss(z, LABEL),
        "its gradient at the label": lambda z: gradient(z, LABEL)[0],
        "its Hessian, times a vector": lambda z: jax.jvp(lambda z: gradient(z, LABEL), (z,), (VECTOR,))[1][0],
    }


LIBRARIES: dict[str, dict[str, Callable]] = {
    "jax.nn, optax": {
        "log p of the first class": lambda z: jax.nn.log_softmax(z)[0],
        **of_loss(optax.softmax_cross_entropy_with_integer_labels),
        "entropy": lambda z: -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z)),
        "KL of two models": lambda z: optax.kl_divergence(jax.nn.log_softmax(z + STEP), jax.nn.softmax(z)),
    },
    "jaxsoftmax": {
        "log p of the first class": lambda z: js.log_softmax(z)[0],
        **of_loss(js.softmax_cross_entropy_with_integer_labels),
        "entropy": js.softmax_entropy,
        "KL of two models": lambda z: js.softmax_kl_divergence(z + STEP, z),
    },
}


def digits(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the worst example."""
    error = np.max(np.abs(np.asarray(found, np.longdouble) - wanted) / np.abs(wanted))
    return float(np.clip(-np.log10(np.maximum(error, 1e-8)), 0, 7)) if np.isfinite(error) else 0.0


def measure(library: str, quantity: str, gap: float, offset: float = 0.0) -> float:
    z = logits(gap, offset)
    return digits(jax.jit(jax.vmap(LIBRARIES[library][quantity]))(z), reference(z)[quantity])


def table() -> str:
    rows = [["", "library", *REGIMES], ["---"] * (2 + len(REGIMES))]
    for quantity in LIBRARIES["jaxsoftmax"]:
        for library in LIBRARIES:
            cells = [str(int(measure(library, quantity, *regime))) for regime in REGIMES.values()]
            rows.append([quantity if library != "jaxsoftmax" else "", library, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
