"""Train a feedforward network on handwritten digits, then look at its derivatives.

    python examples/train_digits.py                        scikit-learn's 8×8 digits, a few seconds
    python examples/train_digits.py --idx-dir FOLDER       MNIST, or anything in its IDX format
    python examples/train_digits.py --resume               continue after an interruption

After every epoch a checkpoint is written to the --out folder; pictures are added at the end.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import FileError, Parser, folder, load_checkpoint, natural, positive, rate, read_idx_pair, save_checkpoint
from _digits import digits
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxsoftmax
from jaxsoftmax import network, training

OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "sgd": optax.sgd, "rmsprop": optax.rmsprop, "lion": optax.lion}
activation = jax.nn.relu
loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels


class Part(NamedTuple):
    """Images (count, pixels) as float32 and labels (count,) as int32."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    train: Part
    test: Part
    pictures: np.ndarray  # the test images as they came, (count, height, width)
    num_classes: int


# --- data ---


def load_data(idx_dir: Path | None) -> Data:
    if idx_dir is None:
        images, labels = digits()
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=1)
        train_images, test_images, train_labels, test_labels = map(np.asarray, split)
    else:
        train_images, train_labels = read_idx_pair(idx_dir, "train")
        test_images, test_labels = read_idx_pair(idx_dir, "t10k")
        if train_images.shape[1:] != test_images.shape[1:]:
            sizes = f"{train_images.shape[1:]} for training, {test_images.shape[1:]} for testing"
            raise FileError(f"{idx_dir}: the images have two sizes, {sizes}")
    mean, scale = train_images.mean(0, dtype=np.float32), train_images.std(dtype=np.float32) or np.float32(1)

    def part(images, labels) -> Part:
        images = (images.astype(np.float32) - mean) / scale
        return Part(images.reshape(len(images), -1), labels.astype(np.int32))

    num_classes = 1 + int(max(train_labels.max(), test_labels.max()))
    return Data(part(train_images, train_labels), part(test_images, test_labels), test_images, num_classes)


def fingerprint(data: Data) -> str:
    arrays = (*data.train, *data.test)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


# --- model and training ---


def mean_loss(params, images, labels):
    return loss(network.forward(params, images, activation), labels).mean()


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(network.forward(params, images, activation).argmax(-1) == labels)


def batches(part: Part, options: argparse.Namespace, epoch: int, bar: tqdm) -> Iterator[Part]:
    """Full batches in an order that depends on seed and epoch alone, so that a resumed run sees the same."""
    order = np.random.default_rng((options.seed, epoch)).permutation(len(part.labels))
    for start in range(0, len(order) - options.batch_size + 1, options.batch_size):
        chosen = order[start : start + options.batch_size]
        yield Part(part.images[chosen], part.labels[chosen])
        bar.update(options.batch_size)


def train_epoch(train_step: Callable, state: Any, steps: Iterable) -> tuple[Any, float]:
    """The state after one pass over the batches, and the mean of their losses."""
    losses = []
    for batch in steps:
        state, metrics = train_step(state, *batch)
        losses.append(metrics["loss"])
    return state, float(np.mean(jax.device_get(losses), dtype=np.float64))


def train(data: Data, options: argparse.Namespace) -> tuple[Any, list[dict]]:
    """The trained parameters, and one record per epoch."""
    optimizer = OPTIMIZERS[options.optimizer](options.learning_rate)
    sizes = (data.train.images.shape[1], *options.hidden, data.num_classes)
    state = training.TrainState.create(network.init(jax.random.key(options.seed), sizes), optimizer)
    train_step = training.make_train_step(mean_loss, optimizer)

    names = ("batch_size", "hidden", "learning_rate", "optimizer", "seed")
    settings = {**{name: getattr(options, name) for name in names}, "data": fingerprint(data)}
    checkpoint, history = options.out / "checkpoint.npz", []
    if options.resume and checkpoint.exists():
        state, history = load_checkpoint(checkpoint, state, settings)
        if len(history) > options.epochs:
            raise FileError(f"{checkpoint}: has {len(history)} epochs already, more than --epochs {options.epochs}")
        print(f"resumed from {checkpoint} after epoch {len(history)}")

    count = len(data.train.labels) // options.batch_size * options.batch_size
    print(f"{'epoch':>5} {'loss':>10} {'test accuracy':>14} {'examples/s':>11}", *map(table_row, history), sep="\n")
    with tqdm(total=options.epochs * count, initial=len(history) * count, unit="example", leave=False) as bar:
        for epoch in range(len(history) + 1, options.epochs + 1):
            start = time.perf_counter()
            state, mean = train_epoch(train_step, state, batches(data.train, options, epoch, bar))
            speed = count / (time.perf_counter() - start)
            if not math.isfinite(mean):
                sys.exit(f"error: the loss is {mean} in epoch {epoch}: try a smaller --learning-rate")
            row = {"epoch": epoch, "loss": mean, "accuracy": float(accuracy(state.params, *data.test)), "speed": speed}
            history.append(row)
            save_checkpoint(checkpoint, state, settings, history)
            bar.write(table_row(row))
    return state.params, history


def table_row(row: dict) -> str:
    return f"{row['epoch']:5} {row['loss']:10.5f} {row['accuracy']:13.2%} {row['speed']:11,.0f}"


# --- derivatives of the trained network ---


def compare_gradients(params, images, labels) -> None:
    """The gradient three ways: layer by layer, by jax.grad, and as the mean of jacrev's per-example gradients."""

    def losses(params):
        return loss(network.forward(params, images, activation), labels)

    by_hand = jax.jit(lambda params: network.backprop(params, images, labels, loss, activation))(params)
    by_grad = jax.jit(jax.grad(mean_loss))(params, images, labels)
    by_jacrev = jax.jit(lambda params: jax.tree.map(lambda J: J.mean(0), jax.jacrev(losses)(params)))(params)

    print(f"\nGradient of the mean loss over {len(labels)} test images, at its largest entry in each array:")
    print(f"{'':4} {'shape':>12} {'by hand':>15} {'jax.grad':>15} {'jax.jacrev':>15} {'largest difference':>20}")
    for n, layers in enumerate(zip(by_hand, by_grad, by_jacrev), 1):
        for name in ("W", "b"):
            arrays = np.stack([getattr(layer, name) for layer in layers])
            largest = np.unravel_index(np.abs(arrays[0]).argmax(), arrays[0].shape)
            values = " ".join(f"{array[largest]:15.8e}" for array in arrays)
            shape = "×".join(map(str, arrays[0].shape))
            print(f"{name}{n:<3} {shape:>12} {values} {np.ptp(arrays, axis=0).max():20.1e}")


def compare_jacobians(logits) -> None:
    """The Jacobian of the softmax at one output of the network: diag(p) - ppᵀ, and by automatic differentiation."""
    analytic = jaxsoftmax.softmax_jacobian(logits)
    jacobians = np.stack([analytic, jax.jacrev(jaxsoftmax.softmax)(logits), jax.jacfwd(jaxsoftmax.softmax)(logits)])
    probs = np.asarray(jaxsoftmax.softmax(logits))
    print("\nJacobian of the softmax at the least certain test image; its diagonal for the likeliest classes:")
    print(f"{'class':>5} {'probability':>12} {'analytic':>15} {'jax.jacrev':>15} {'jax.jacfwd':>15}")
    for k in probs.argsort()[::-1][:5]:
        print(f"{k:5} {probs[k]:12.6f} " + " ".join(f"{J[k, k]:15.8e}" for J in jacobians))
    print(f"largest difference over all {analytic.size} entries: {np.ptp(jacobians, axis=0).max():.1e}")


# --- pictures ---


def draw_training_curve(history: list[dict], path: Path) -> None:
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.set_title("Training")
    left.semilogy(epochs, [row["loss"] for row in history], "o-", color="tab:blue")
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color="tab:blue")
    left.xaxis.get_major_locator().set_params(integer=True)
    right = left.twinx()
    right.plot(epochs, [100 * row["accuracy"] for row in history], "s-", color="tab:orange")
    right.set_ylabel("test accuracy in %", color="tab:orange")
    figure.savefig(path)


def draw_jacobian(logits, path: Path) -> None:
    jacobian, probs = np.asarray(jaxsoftmax.softmax_jacobian(logits)), np.asarray(jaxsoftmax.softmax(logits))
    classes, bound = np.arange(len(probs)), np.abs(jacobian).max()
    ticks = classes[:: 1 + len(classes) // 20]
    figure = Figure(figsize=(14, 4.3), layout="constrained")
    heat, diagonal, bars = figure.subplots(1, 3)
    image = heat.imshow(jacobian, cmap="RdBu", vmin=-bound, vmax=bound)
    figure.colorbar(image, ax=heat)
    heat.set(title="J = diag(p) - ppᵀ", xlabel="logit j", ylabel="probability i", xticks=ticks, yticks=ticks)
    diagonal.bar(classes, np.diag(jacobian), color="steelblue")
    diagonal.set(title="diagonal p(1 - p)", xlabel="class", xticks=ticks)
    bars.bar(classes, probs, color="coral")
    bars.set(title="probabilities p", xlabel="class", xticks=ticks)
    figure.suptitle("The softmax at the test image the network is least sure of")
    figure.savefig(path)


def draw_predictions(data: Data, probs: np.ndarray, path: Path) -> None:
    """The test images the network is least sure of."""
    chosen = probs.max(-1).argsort()[:16]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, i in zip(figure.subplots(2, 8).flat, chosen):
        axes.imshow(data.pictures[i], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        guess, label = probs[i].argmax(), data.test.labels[i]
        title = f"{guess} ({probs[i, guess]:.0%})\nlabel {label}"
        axes.set_title(title, color="black" if guess == label else "tab:red")
    figure.suptitle("The test images the network is least sure of: prediction, its probability, label")
    figure.savefig(path)


# --- command line ---


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--epochs", type=positive, default=20, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive, default=32, help="images per step")
    parser.add_argument("--hidden", type=positive, nargs="*", default=[512, 256], help="widths of the hidden layers")
    parser.add_argument("--learning-rate", type=rate, default=1e-3, help="of the optimizer")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="of optax")
    parser.add_argument(
        "--seed", type=natural, default=0, help="of the initial parameters and the order of the batches"
    )
    parser.add_argument("--out", type=folder, default="out/digits", help="folder for checkpoint and pictures")
    parser.add_argument("--idx-dir", type=Path, help="folder of MNIST-format IDX files, gzipped or not")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        data = load_data(options.idx_dir)
        if options.batch_size > len(data.train.labels):
            sys.exit(
                f"error: --batch-size {options.batch_size}: there are only {len(data.train.labels)} training images"
            )
        params, history = train(data, options)
    except (FileError, OSError) as error:
        sys.exit(f"error: {error}")

    compare_gradients(params, data.test.images[:16], data.test.labels[:16])
    logits = network.forward(params, data.test.images, activation)
    probs = np.asarray(jaxsoftmax.softmax(logits))
    least_certain = logits[probs.max(-1).argmin()]
    compare_jacobians(least_certain)

    draw_training_curve(history, options.out / "training_curve.png")
    draw_jacobian(least_certain, options.out / "jacobian.png")
    draw_predictions(data, probs, options.out / "predictions.png")
    print(f"\ntest accuracy {history[-1]['accuracy']:.2%}; checkpoint and pictures are in {options.out}")


if __name__ == "__main__":
    main()
