"""The fused linear head against bare matrix products of the same work, optax on full logits, and tokamax.

Rows that name MiB or % in place of a time: read that for ms. The error of a bfloat16 gradient is relative to its norm,
against float64, and stands beside what rounding the exact gradient to bfloat16 costs, which no result of that dtype can
undercut: so with `precision="highest"`. By default the gradient in the logits is rounded as well, which adds an error
of at most that size, √2 of it in all. `--gpu-sizes` adds the sizes of large models, in bfloat16. tokamax needs Python
3.12.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import Row, benchmark
from benchmarks.timing import compare, temp_bytes
from jaxsoftmax.linear_head import linear_softmax_cross_entropy_loss

try:
    import tokamax
except ImportError:
    tokamax = None

SIZES = (2048, 512, 32768), (2048, 512, 50257), (1024, 1024, 65536), (4096, 256, 128256)
GPU_SIZES = (32768, 2560, 128256), (8192, 2304, 256000)
ROUNDS = 5


def full(x, weights, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ weights, labels).sum()


def fused(x, weights, labels, token_weights=None, precision=None):
    return linear_softmax_cross_entropy_loss(x, labels, weights, token_weights=token_weights, precision=precision)


def value_and_grad(loss):
    return jax.value_and_grad(loss, (0, 1))


def hvp(loss):
    def product(x, weights, labels, *direction):
        gradient = lambda x, weights: jax.grad(loss, (0, 1))(x, weights, labels)
        return jax.jvp(gradient, (x, weights), direction)[1]

    return product


def bare_products():
    """xW, gWᵀ and xᵀg, each compiled on its own."""
    forward, to_x, to_weights = (jax.jit(f) for f in (lambda x, w: x @ w, lambda g, w: g @ w.T, lambda x, g: x.T @ g))

    def run(x, weights, _):
        g = forward(x, weights)
        return g, to_x(g, weights), to_weights(x, g)

    return run


def arguments(size, dtype=jnp.float32, std=1.0):
    """x, weights and labels, with logits of the given standard deviation."""
    n, d, v = size
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    x, weights = jax.random.normal(k1, (n, d), dtype), jax.random.normal(k2, (d, v), dtype) * (std / d**0.5)
    return x, weights.astype(dtype), jax.random.randint(k3, (n,), 0, v)


def exact_gradient(x, weights, labels, chunk: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """The gradient in x and weights in float64, from NumPy, a few tokens at a time."""
    x, weights = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, weights))
    labels = np.asarray(labels)
    to_x, to_weights = np.empty_like(x), np.zeros_like(weights)
    for part in (slice(i, i + chunk) for i in range(0, len(x), chunk)):
        g = x[part] @ weights
        np.exp(g - g.max(1, keepdims=True), out=g)
        g /= g.sum(1, keepdims=True)
        g[np.arange(len(g)), labels[part]] -= 1
        to_x[part] = g @ weights.T
        to_weights += x[part].T @ g
    return to_x, to_weights


def error_rows(size) -> Iterator[Row]:
    """Errors of the bfloat16 gradient in percent, and of the exact gradient rounded to bfloat16."""
    f64 = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    for std in (1.0, 4.0):
        args = arguments(size, jnp.bfloat16, std)
        found = {
            (precision, goal): jax.jit(value_and_grad(functools.partial(fused, precision=precision)))(*args)[1]
            for precision, goal in (("highest", 1.01), ("default", 1.5))
        }
        for i, (name, exact) in enumerate(zip(("x", "W"), exact_gradient(*args))):
            rounded = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
            for (precision, goal), gradient in found.items():
                both = gradient[i], rounded
                ours, floor = (100 * np.linalg.norm(f64(a) - exact) / np.linalg.norm(exact) for a in both)
                title = f"bf16 {precision}, logit std {std:.0f}, error in {name}, %, against rounding"
                yield Row(title, "×".join(map(str, size)), ours, floor, ours / floor, goal)


def tokamax_rows(size) -> Iterator[Row]:
    if tokamax is None:
        return
    args = arguments(size)
    for implementation, goal in (("xla", None), ("chunked_xla", 0.8)):
        loss = functools.partial(tokamax_loss, implementation)
        times = compare({"ours": jax.jit(value_and_grad(fused)), "theirs": jax.jit(value_and_grad(loss))}, args, ROUNDS)
        yield times.row(f"value+grad, against tokamax {implementation}", size, goal)


def tokamax_loss(implementation, x, weights, labels):
    return tokamax.linear_softmax_cross_entropy_loss(x, labels, weights, implementation=implementation)


def memory_row(name: str, size, ours, theirs, goal: float, args) -> Row:
    ours, theirs = (
        temp_bytes(ours, *args) / 2**20,
        (theirs if isinstance(theirs, float) else temp_bytes(theirs, *args) / 2**20),
    )
    return Row(f"{name} temp, MiB", "×".join(map(str, size)), ours, theirs, ours / theirs, goal)


# An HVP has three arrays of a chunk's logits in a quarter of the memory that all logits take; where D is large, passing
# over the weights and their gradients once for each of so short chunks costs time. At (1024, 1024, 65536), over full
# logits: 1.25 to 1.28 in 61 MiB, 1.11 in 98 MiB, 1.06 in 196 MiB (`chunk_size`). Tried and dropped: the second product
# made after the first two are added, which leaves two arrays, 1.22 in 62 MiB; the same with slabs of a MiB, 1.4.
def rows(size, dtype=jnp.float32) -> Iterator[Row]:
    args = arguments(size, dtype)
    ours = jax.jit(value_and_grad(fused))
    yield memory_row("value+grad, against 64 MiB,", size, value_and_grad(fused), 64.0, 1.0, args)
    x, weights, _ = args
    direction = x[::-1], weights[:, ::-1]  # not x and weights themselves: products would coincide
    along = *args, *direction
    yield memory_row("HVP, against full logits' bytes,", size, hvp(fused), size[0] * size[2] / 2**18, 0.25, along)
    contest = {"ours": ours, "theirs": bare_products()}
    yield compare(contest, args, ROUNDS).row("value+grad, against three products", size, goal=1.1)
    yield compare({"ours": ours, "theirs": jax.jit(value_and_grad(full))}, args, ROUNDS).row(
        "value+grad, against optax on full logits", size, goal=1.0
    )
    few = (jnp.arange(size[0]) % 10 == 0).astype(jnp.float32)
    skipping = jax.jit(value_and_grad(lambda *args: fused(*args, few)))
    yield compare({"ours": skipping, "theirs": ours}, args, ROUNDS).row("10 % valid, against all", size, goal=0.3)
    yield compare({"ours": jax.jit(hvp(fused)), "theirs": jax.jit(hvp(full))}, along, 3).row(
        "HVP, against full logits", size, goal=1.1
    )


@benchmark("linear_head")
def linear_head() -> Iterator[Row]:
    if tokamax is None:
        print("tokamax is not installed: its rows are left out")
    for size in SIZES:
        yield from rows(size)
        yield from tokamax_rows(size)
        yield from error_rows(size)


@benchmark("linear_head", gpu_sizes=True)
def linear_head_gpu_sizes() -> Iterator[Row]:
    for size in GPU_SIZES:
        args = arguments(size, jnp.bfloat16)
        contest = {"ours": jax.jit(value_and_grad(fused)), "theirs": bare_products()}
        yield memory_row("value+grad, against 5 GiB,", size, value_and_grad(fused), 5.0 * 1024, 1.0, args)
        yield compare(contest, args, ROUNDS).row("value+grad, against three products", size, goal=1.25)
