"""Train a neural language model on the sources that come with Python, with the loss head that never holds the logits.

    python examples/train_language_model.py                a quarter of an hour on two cores: 4 epochs, 50,257 words
    python examples/train_language_model.py --resume       continue after an interruption
    python examples/train_language_model.py --head full    the same with all logits in memory, for comparison
    python examples/train_language_model.py --mesh data=2,classes=2      over four devices, of any kind; CPUs count as
        one unless this stands before the line: XLA_FLAGS=--xla_force_host_platform_device_count=4

The model of Bengio et al. (2003), https://www.jmlr.org/papers/v3/bengio03a.html, with tied embeddings: the vectors of
the last n words go through a feedforward network, and its output is compared with the vector of every word. After every
epoch a checkpoint is written to the --out folder; a picture is added at the end. Checkpoints hold whole arrays: a run
resumes on any other mesh.
"""

import argparse
import collections
import hashlib
import math
import pydoc_data.topics
import re
import resource
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import FileError, Parser, first_devices, folder, load_checkpoint, natural, positive, rate, save_checkpoint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxsoftmax
from jaxsoftmax import network, training
from jaxsoftmax.curvature import estimators

WORD = re.compile(r"\w+|[^\w\s]|\n")
UNKNOWN = 0
MEGABYTE = 2**20
PADDING = 128  # the vocabulary is padded to a multiple, so that it can be split over many numbers of devices


class Text(NamedTuple):
    """Words by number: words[i] is the i-th most frequent of the training text, words[0] stands for all others."""

    train: np.ndarray
    held_out: np.ndarray
    words: list[str]


# --- text ---


def documents() -> list[str]:
    """Python's documentation of its own language, and the sources of its library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    topics = [str(text) for _, text in sorted(pydoc_data.topics.topics.items())]
    reading = tqdm(sources, "reading", leave=False)
    return topics + [path.read_text(encoding="utf-8", errors="replace") for path in reading]


def load_text(vocabulary: int) -> Text:
    """Every twentieth document is held out; the vocabulary is of the others."""
    tokens = [WORD.findall(document) for document in tqdm(documents(), "splitting", leave=False)]
    counts = collections.Counter(word for i, words in enumerate(tokens) if i % 20 for word in words)
    words = ["<unknown>", *(word for word, _ in counts.most_common(vocabulary - 1))]
    numbers = {word: i for i, word in enumerate(words)}

    def encode(held_out: bool) -> np.ndarray:
        chosen = (words for i, words in enumerate(tokens) if (i % 20 == 0) == held_out)
        return np.array([numbers.get(word, UNKNOWN) for words in chosen for word in words], np.int32)

    return Text(encode(False), encode(True), words)


def unigram_perplexity(text: Text) -> float:
    """Of the held-out text, with the frequencies of the training text, one added to each."""
    counts = np.bincount(text.train, minlength=len(text.words)) + 1
    return float(np.exp(-np.mean(np.log(counts[text.held_out] / counts.sum()))))


# --- model ---


def init(key: jax.Array, options: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Vectors of the words (V, D), a bias for each (V,), -inf for the padding, and the network from n D to D."""
    k1, k2 = jax.random.split(key)
    rows = -(-vocabulary // PADDING) * PADDING
    embeddings = jax.random.normal(k1, (rows, options.features)) / options.features**0.5
    bias = jnp.where(jnp.arange(rows) < vocabulary, 0.0, -jnp.inf)
    sizes = (options.context * options.features, *options.hidden, options.features)
    return {"embeddings": embeddings, "bias": bias, "network": network.init(k2, sizes)}


def hidden_states(params: Any, contexts: jax.Array) -> jax.Array:
    x = params["embeddings"][contexts] * params["embeddings"].shape[-1] ** 0.5  # entries of variance 1
    return network.forward(params["network"], x.reshape(len(contexts), -1), jnp.tanh)


def fused_head(x: jax.Array, words: jax.Array, embeddings: jax.Array, bias: jax.Array) -> jax.Array:
    return jaxsoftmax.linear_softmax_cross_entropy_loss(
        x, words, embeddings, bias=bias, reduction="mean", vocab_axis=0, token_axes="data", class_axes="classes"
    )


def full_head(x: jax.Array, words: jax.Array, embeddings: jax.Array, bias: jax.Array) -> jax.Array:
    logits = x @ embeddings.T + bias[None]
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, words).mean()


HEADS: dict[str, Callable] = {"fused": fused_head, "full": full_head}


def mean_loss(head: Callable) -> Callable:
    return lambda params, contexts, words: head(
        hidden_states(params, contexts), words, params["embeddings"], params["bias"]
    )


def windows(stream: np.ndarray, positions: np.ndarray, options: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    """The words before each position, and the word there, on their devices of the mesh."""
    arrays = stream[positions[:, None] + np.arange(-options.context, 0)], stream[positions]
    return jax.device_put(arrays, NamedSharding(options.mesh, PartitionSpec("data")))


# --- mesh ---


def parse_mesh(text: str) -> Mesh:
    """The mesh of "data=2,classes=2": its axes are of type Auto, what is not named has size 1."""
    named = dict(re.findall(r"(data|classes)=([1-9]\d*)", text))
    if ",".join(f"{name}={size}" for name, size in named.items()) != text:
        raise argparse.ArgumentTypeError(f"must be like data=2,classes=2, got {text!r}")
    sizes = {"data": 1, "classes": 1} | {name: int(size) for name, size in named.items()}
    if PADDING % sizes["classes"]:
        raise argparse.ArgumentTypeError(f"classes must divide {PADDING}, got {sizes['classes']}")
    devices = first_devices(str(math.prod(sizes.values())))
    return jax.make_mesh((*sizes.values(),), (*sizes,), axis_types=(AxisType.Auto,) * 2, devices=devices)


def place(tree: Any, mesh: Mesh) -> Any:
    """Parameters, or what an optimizer keeps of them: the rows of words split over classes, all else copied."""

    def put(path: tuple, leaf: jax.Array) -> jax.Array:
        of_words = {"embeddings", "bias"} & {getattr(key, "key", None) for key in path}
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("classes") if of_words else PartitionSpec()))

    return jax.tree_util.tree_map_with_path(put, tree)


# --- training ---


def train(text: Text, options: argparse.Namespace) -> tuple[Any, list[dict]]:
    """The trained parameters, and one record per epoch."""
    optimizer = optax.adam(options.learning_rate)
    state = training.TrainState.create(init(jax.random.key(options.seed), options, len(text.words)), optimizer)
    loss = mean_loss(HEADS[options.head])
    train_step, evaluate = training.make_train_step(loss, optimizer), jax.jit(loss)

    names = ("batch_size", "steps", "context", "features", "hidden", "learning_rate", "seed", "head")
    settings = {**{name: getattr(options, name) for name in names}, "text": fingerprint(text)}
    checkpoint, history = options.out / "checkpoint.npz", []
    if options.resume and checkpoint.exists():
        state, history = load_checkpoint(checkpoint, state, settings)
        if len(history) > options.epochs:
            raise FileError(f"{checkpoint}: has {len(history)} epochs already, more than --epochs {options.epochs}")
        print(f"resumed from {checkpoint} after epoch {len(history)}")
    state = place(state, options.mesh)

    count = options.steps * options.batch_size
    print(f"{'epoch':>5} {'loss':>9} {'held-out perplexity':>20} {'tokens/s':>10}", *map(table_row, history), sep="\n")
    with tqdm(total=options.epochs * count, initial=len(history) * count, unit="token", leave=False) as bar:
        for epoch in range(len(history) + 1, options.epochs + 1):
            # The order depends on seed and epoch alone, so that a resumed run sees the same.
            rng, losses, start = np.random.default_rng((options.seed, epoch)), [], time.perf_counter()
            for _ in range(options.steps):
                positions = rng.integers(options.context, len(text.train), options.batch_size)
                state, metrics = train_step(state, *windows(text.train, positions, options))
                losses.append(metrics["loss"])
                losses[-1].block_until_ready()
                bar.update(options.batch_size)
            speed = count / (time.perf_counter() - start)
            mean = float(np.mean(jax.device_get(losses), dtype=np.float64))
            if not math.isfinite(mean):
                sys.exit(f"error: the loss is {mean} in epoch {epoch}: try a smaller --learning-rate")
            perplexity = held_out_perplexity(evaluate, state.params, text, options)
            history.append({"epoch": epoch, "loss": mean, "perplexity": perplexity, "speed": speed})
            save_checkpoint(checkpoint, state, settings, history)
            bar.write(table_row(history[-1]))
    return state.params, history


def held_out_perplexity(evaluate: Callable, params: Any, text: Text, options: argparse.Namespace) -> float:
    """Over at most twenty batches, spread evenly over the held-out text."""
    batches = min(20, max(1, (len(text.held_out) - options.context) // options.batch_size))
    positions = np.linspace(options.context, len(text.held_out) - 1, batches * options.batch_size).astype(int)
    losses = [evaluate(params, *windows(text.held_out, chosen, options)) for chosen in np.split(positions, batches)]
    return float(np.exp(np.mean(jax.device_get(losses), dtype=np.float64)))


def table_row(row: dict) -> str:
    return f"{row['epoch']:5} {row['loss']:9.4f} {row['perplexity']:20.1f} {row['speed']:10,.0f}"


def fingerprint(text: Text) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in (text.train, text.held_out))).hexdigest()[:16]


# --- after training ---


def report_memory(params: Any, options: argparse.Namespace, vocabulary: int) -> None:
    """Temporary memory of the compiled gradient with either head on a device, and the peak of this process."""
    batch = windows(np.zeros(options.context + 1, np.int32), np.full(options.batch_size, options.context), options)
    print(f"\nTemporary memory of one gradient, {options.batch_size} tokens and {vocabulary:,} words:")
    for name, head in HEADS.items():
        compiled = jax.jit(jax.value_and_grad(mean_loss(head))).lower(params, *batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        print(f"  {name:5} head {memory.temp_size_in_bytes / MEGABYTE:10,.1f} MiB")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"peak of this process, with the {options.head} head: {peak / MEGABYTE:,.0f} MiB")


def top_of_the_spectrum(params: Any, text: Text, options: argparse.Namespace) -> None:
    """Largest eigenvalues of the Hessian of the mean loss in W, the V × D weights of the last layer."""
    positions = np.linspace(options.context, len(text.held_out) - 1, options.batch_size).astype(int)
    contexts, words = windows(text.held_out, positions, options)
    states = jax.jit(hidden_states)(params, contexts)

    @jax.jit
    def largest(states: jax.Array, words: jax.Array, weights: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        gradient = jax.grad(lambda weights: fused_head(states, words, weights, bias))
        product = lambda v: jax.jvp(gradient, (weights,), (v,))[1]
        count = options.eigenvalues
        return estimators.top_eigenpairs(product, weights, jax.random.key(0), count, num_steps=4 * count)

    values, _, residuals = largest(states, words, params["embeddings"], params["bias"])
    size = f"{params['embeddings'].size:,}"
    print(f"\nLargest eigenvalues of the loss's Hessian in W, {size} × {size}, by Lanczos on its products:")
    for value, residual in zip(values, residuals):
        print(f"  {value:10.4f} ± {residual:.1e}")


def draw_learning_curve(history: list[dict], unigram: float, path: Path) -> None:
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(epochs, [math.exp(row["loss"]) for row in history], "o-", label="training")
    axes.semilogy(epochs, [row["perplexity"] for row in history], "s-", label="held out")
    axes.axhline(unigram, color="gray", linestyle="--", label="held out, word frequencies alone")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Language model", xlabel="epoch", ylabel="perplexity")
    axes.legend()
    figure.savefig(path)


# --- command line ---


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=4, help="each of --steps steps")
    parser.add_argument("--steps", type=positive, default=250, help="steps per epoch")
    parser.add_argument("--batch-size", type=positive, default=1024, help="tokens per step")
    parser.add_argument("--vocabulary", type=positive, default=50257, help="number of words")
    parser.add_argument("--context", type=positive, default=6, help="number of words to predict from")
    parser.add_argument("--features", type=positive, default=64, help="length of a word's vector")
    parser.add_argument("--hidden", type=positive, nargs="*", default=[256], help="widths of the hidden layers")
    parser.add_argument("--learning-rate", type=rate, default=3e-3, help="of Adam")
    parser.add_argument("--head", choices=HEADS, default="fused", help="full holds all logits, to compare")
    parser.add_argument("--eigenvalues", type=positive, default=3, help="how many to compute at the end")
    parser.add_argument(
        "--mesh", type=parse_mesh, default="data=1", help="devices, as data=2,classes=2", metavar="SIZES"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the initial parameters and the batches")
    parser.add_argument("--out", type=folder, default="out/language_model", help="folder of what is written")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    options = parser.parse_args(arguments)
    if options.batch_size % options.mesh.shape["data"]:
        parser.error(f"--batch-size {options.batch_size} must be a multiple of data={options.mesh.shape['data']}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        text = load_text(options.vocabulary)
        unigram = unigram_perplexity(text)
        unknown = np.mean(text.held_out == UNKNOWN)
        print(f"{len(text.train):,} words to train on, {len(text.held_out):,} held out, {len(text.words):,} different")
        print(f"held-out perplexity of word frequencies alone: {unigram:.1f}; {unknown:.1%} of the words are unknown")
        params, history = train(text, options)
    except (FileError, OSError) as error:
        sys.exit(f"error: {error}")
    report_memory(params, options, len(text.words))
    top_of_the_spectrum(params, text, options)
    draw_learning_curve(history, unigram, options.out / "learning_curve.png")
    print(f"\nheld-out perplexity {history[-1]['perplexity']:.1f}; checkpoint and picture are in {options.out}")


if __name__ == "__main__":
    main()
