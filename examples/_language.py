"""What the small language models share: real text that comes with Python (pydoc_data.topics), and the training loop."""

import argparse
import collections
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from _common import Parser, first_devices, positive
from tqdm import tqdm

from jaxsoftmax import training

LENGTH, BATCH = 64, 16
DATA = "data"  # the axis of the mesh
WORD = re.compile(r"\w+|[^\w\s]|\n")


class Text(NamedTuple):
    """Words by number: 0 stands for all but the most frequent ones."""

    train: np.ndarray
    held_out: np.ndarray
    vocabulary: int


def load(vocabulary: int = 4096) -> Text:
    """Every tenth topic is held out; the vocabulary is of the others."""
    topics = [WORD.findall(str(text)) for _, text in sorted(pydoc_data.topics.topics.items())]
    counts = collections.Counter(word for i, words in enumerate(topics) if i % 10 for word in words)
    numbers = {word: i for i, (word, _) in enumerate(counts.most_common(vocabulary - 1), 1)}
    parts = [
        np.array([numbers.get(word, 0) for i, words in enumerate(topics) if (i % 10 == 0) == held for word in words])
        for held in (False, True)
    ]
    return Text(parts[0].astype(np.int32), parts[1].astype(np.int32), vocabulary)


def batches(stream: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """`count` batches (BATCH, LENGTH + 1) of consecutive words, the same in every run."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        starts = rng.integers(0, len(stream) - LENGTH, BATCH)
        yield stream[starts[:, None] + np.arange(LENGTH + 1)]


def train(
    loss: Callable[[Any, jax.Array], jax.Array], params: Any, text: Text, steps: int, devices: list[Any]
) -> tuple[Any, list[float]]:
    """The parameters after `steps` batches, and the loss of each: clipped gradients, two batches to an Adam step.

    Every batch is divided over the devices, the parameters are on each of them: nothing else is said of a mesh here.
    """
    mesh = jax.sharding.Mesh(devices, (DATA,))
    on_each, divided = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), (DATA,)))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    optimizer = optax.MultiSteps(adam, every_k_schedule=2).gradient_transformation()
    # All of the state, counters too: it comes back from a step on these devices, and would be compiled for twice.
    state = jax.device_put(training.TrainState.create(params, optimizer), on_each)
    step = training.make_train_step(loss, optimizer)
    losses = []
    for words in tqdm(batches(text.train, steps), total=steps, unit="step", leave=False, mininterval=1.0):
        state, metrics = step(state, jax.device_put(words, divided))
        losses.append(metrics["loss"])
    losses, last = [float(x) for x in losses], held_out(loss, state.params, text)
    print(f"loss {losses[0]:.3f} -> {np.mean(losses[-20:]):.3f} in {steps} steps, held out {last:.3f}")
    return state.params, losses


def held_out(loss: Callable[[Any, jax.Array], jax.Array], params: Any, text: Text) -> float:
    """The mean loss over ten batches of the held-out text."""
    return float(np.mean([jax.jit(loss)(params, words) for words in batches(text.held_out, 10)]))


def options(description: str | None, arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description)
    parser.add_argument("--steps", type=positive, default=300, help="batches")
    parser.add_argument("--head", choices=("fused", "full"), default="fused", help="full holds all logits, to compare")
    parser.add_argument("--devices", type=first_devices, default="1", help="how many divide every batch")
    return parser.parse_args(arguments)
