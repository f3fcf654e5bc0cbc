"""Sample arguments, three examples of four classes, exact in every dtype, so that all dtypes have one reference."""

import jax.numpy as jnp
import numpy as np

B, K = 3, 4
_rng = np.random.default_rng(7)


def rounded(x) -> np.ndarray:
    """The nearest numbers that bfloat16 and float16 both hold, as doubles."""
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


Z = _rng.normal(size=(B, K)) * 1.5
Z[0, 1] += 6.0  # one example that is sure of itself
Z = rounded(Z)
V = rounded(_rng.normal(size=(B, K)))
P = rounded(np.exp(Z) / np.exp(Z).sum(-1, keepdims=True))
Y = rounded(np.exp(V) / np.exp(V).sum(-1, keepdims=True))
LABELS = np.array([1, 3, 0], np.int32)
MASK = np.array([[True, True, False, True], [True, True, True, True], [True, False, False, True]])
WEIGHTS = np.array([0.5, 1.0, 2.0, 1.5])
LOGP = rounded(np.log(P))

KINDS = {"label": LABELS, "soft": Y, "logits": V, "log": rounded(np.log(Y)), "vector": V}
