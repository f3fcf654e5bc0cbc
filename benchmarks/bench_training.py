"""The training step of examples/train_digits.py against the same step in plain jnp and optax."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.timing import compare
from jaxsoftmax import network, training

SIZES = (64, 512, 256, 10)
BATCHES = 32, 1024


def ours(params, optimizer) -> Callable:
    """A function of the batch that takes a step and returns the loss; the state moves on inside."""
    loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
    step = training.make_train_step(
        lambda params, x, y: loss(network.forward(params, x, jax.nn.relu), y).mean(), optimizer
    )
    state = training.TrainState.create(params, optimizer)

    def run(x, y):
        nonlocal state
        state, metrics = step(state, x, y)
        return metrics["loss"]

    return run


def theirs(params, optimizer) -> Callable:
    def mean_loss(params, x, y):
        *hidden, (W, b) = params
        for V, c in hidden:
            x = jax.nn.relu(x @ V.T + c)
        return optax.softmax_cross_entropy_with_integer_labels(x @ W.T + b, y).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(mean_loss)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = [(jnp.copy(layer.W), jnp.copy(layer.b)) for layer in params]
    opt_state = optimizer.init(params)

    def run(x, y):
        nonlocal params, opt_state
        params, opt_state, loss = step(params, opt_state, x, y)
        return loss

    return run


@benchmark("digits_step")
def digits_step() -> Iterator[Row]:
    k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
    params, optimizer = network.init(k1, SIZES), optax.adam(1e-3)
    for batch in BATCHES:
        x, y = jax.random.normal(k2, (batch, SIZES[0])), jax.random.randint(k3, (batch,), 0, SIZES[-1])
        contestants = {"ours": ours(params, optimizer), "theirs": theirs(params, optimizer)}
        yield compare(contestants, (x, y), rounds=31).row("digits step", (batch, *SIZES), goal=1.05)
