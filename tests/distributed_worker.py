"""One of the processes that train together in tests/test_distributed.py, with two CPU devices each.

    python -m tests.distributed_worker FILE PORT PROCESS [KILLED]

Writes losses and parameters to FILE. With KILLED, the process of this number then dies and the others go on.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxsoftmax
from jaxsoftmax import network, training

PROCESSES, STEPS, BATCH = 2, 5, 64
TIMEOUT = 10  # seconds without a sign of life, after which a process counts as dead


def digits_loss(params, images, labels):
    logits = network.forward(params, images, jnp.tanh)
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def words_loss(params, x, words):
    return jaxsoftmax.linear_softmax_cross_entropy_loss(
        x, words, *params, reduction="mean", token_axes="data", class_axes="classes"
    )


def place(x, mesh: Mesh, *spec) -> jax.Array:
    """The global array; each process hands over the part of its devices."""
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(*spec)), x, x.shape)


def train(loss, mesh: Mesh, params, specs, over, *data) -> list[np.ndarray]:
    """The losses of the steps, and the parameters after them."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    params = [place(x, mesh, *spec) for x, spec in zip(params, specs, strict=True)]
    state = jax.jit(lambda params: training.TrainState.create(params, optimizer))(params)
    step, losses = training.make_train_step(loss, optimizer), []
    for i in range(STEPS):
        batch = [place(x[i * BATCH : (i + 1) * BATCH], mesh, over) for x in data]
        state, metrics = step(state, *batch)
        losses.append(metrics["loss"])
    whole = jax.jit(lambda *arrays: arrays, out_shardings=NamedSharding(mesh, P()))
    return [np.asarray(x) for x in whole(jnp.stack(losses), *state.params)]


def results(mesh: Mesh) -> list[np.ndarray]:
    """Of the digits, split over all devices, and of a linear head, its tokens and its classes split."""
    images, digits = load_digits(return_X_y=True)
    params, tree = jax.tree.flatten(network.init(jax.random.key(0), (64, 16, 10)))
    loss = lambda params, *batch: digits_loss(jax.tree.unflatten(tree, params), *batch)
    found = train(loss, mesh, params, [()] * len(params), mesh.axis_names, np.float32(images / 16), np.int32(digits))

    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((STEPS * BATCH, 8), (8, 24)))
    words = rng.integers(24, size=STEPS * BATCH).astype(np.int32)
    return found + train(words_loss, mesh, [weights], [(None, "classes")], "data", x, words)


def main(file: str, port: str, process: str, killed: str = "") -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeouts = {"heartbeat_timeout_seconds": TIMEOUT, "shutdown_timeout_seconds": TIMEOUT} if killed else {}
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(process), initialization_timeout=60, **timeouts)
    # Each process is a row of the mesh, and has a block of the classes.
    mesh = Mesh(np.reshape(jax.devices(), (PROCESSES, -1)), ("classes", "data"))
    np.savez(file, *results(mesh))
    if killed == process:
        os.kill(os.getpid(), signal.SIGKILL)
    while killed:
        results(mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
