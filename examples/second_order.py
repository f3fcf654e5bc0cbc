"""Second-order work on a network that reads digits: Gauss-Newton against Adam, curvature spectrum, Laplace.

    python examples/second_order.py               a minute or two on two cores, half of it compilation

Prints what each optimizer reaches per step and per second, the curvature before and after training, and how well
calibrated the network is with and without a Laplace approximation of its last layer; the pictures go to --out.
"""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _common import Parser, folder, positive
from _digits import digits
from matplotlib.figure import Figure

from jaxsoftmax import curvature, network, softmax
from jaxsoftmax import softmax_cross_entropy_with_integer_labels as cross_entropy
from jaxsoftmax.training import TrainState, make_train_step

SIZES = (64, 32, 10)
LEVELS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the training loss


class Data(NamedTuple):
    x: jax.Array
    labels: jax.Array
    test_x: jax.Array
    test_labels: jax.Array


class Run(NamedTuple):
    """One optimizer: loss before each step, seconds until then (compilation left out), and where it ended."""

    losses: np.ndarray
    seconds: np.ndarray
    params: tuple


def load() -> Data:
    images, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    x, labels = images.reshape(-1, 64)[order].astype(np.float32), labels[order].astype(np.int32)
    x = (x - x.mean(0)) / 8
    return Data(*map(jnp.asarray, (x[:1200], labels[:1200], x[1200:], labels[1200:])))


def mean_loss(params, x, labels):
    return cross_entropy(network.forward(params, x), labels).mean()


def train(optimizer, params, data: Data, steps: int, objective=mean_loss) -> Run:
    train_step = make_train_step(objective, optimizer)
    jax.block_until_ready(train_step(TrainState.create(params, optimizer), data.x, data.labels))  # compiles
    state, losses, seconds, start = TrainState.create(params, optimizer), [], [], time.perf_counter()
    for _ in range(steps):
        state, metrics = train_step(state, data.x, data.labels)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return Run(np.array(losses), np.array(seconds), state.params)


def print_race(runs: dict[str, Run]) -> None:
    print("Training on all of the data at every step: steps and seconds until the loss falls below a level")
    print(f"{'loss':>6}", *(f"{name:>26}" for name in runs), "   fewer steps      less time")
    for level in LEVELS:
        cells, steps, seconds = [], {}, {}
        for name, run in runs.items():
            reached = np.flatnonzero(run.losses < level)
            if reached.size:
                steps[name], seconds[name] = reached[0], run.seconds[reached[0]]
                cells.append(f"{steps[name]:10} st. {seconds[name]:9.3f} s")
            else:
                cells.append("not reached")
        winners = [min(scores, key=scores.__getitem__) if scores else "-" for scores in (steps, seconds)]
        print(f"{level:6}", *(f"{cell:>26}" for cell in cells), "  ", *(f"{name:14}" for name in winners))


def draw_race(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("steps", "seconds")):
        for name, run in runs.items():
            axes.loglog(np.arange(1, len(run.losses) + 1) if unit == "steps" else run.seconds, run.losses, label=name)
        axes.set(xlabel=unit, ylabel="training loss")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Full-batch training on the digits; compilation is not counted")
    figure.savefig(path)


def spectrum(params, data: Data, steps: int) -> dict:
    """Top eigenvalues, trace and density of the Hessian and of the Gauss-Newton matrix."""
    found = {}
    for name, vp in (("Hessian", curvature.hvp), ("Gauss-Newton", curvature.ggn_vp)):
        product = functools.partial(vp, network.forward, cross_entropy, params, data.x, data.labels)
        found[name] = measure(curvature.linearized(product, params), params, steps)
    return found


@functools.partial(jax.jit, static_argnums=2)
def measure(product, like, steps: int):
    keys = jax.random.split(jax.random.key(1), 3)
    top, _, _ = curvature.top_eigenpairs(product, like, keys[0], 5, steps)
    trace = curvature.hutchpp_trace(product, like, keys[1], 3 * steps)
    return top, trace, curvature.spectral_density(product, like, keys[2], steps)


def print_spectra(spectra: dict[str, dict]) -> None:
    print("\nCurvature of the mean loss")
    print(f"{'':12} {'matrix':14} {'trace':>18}   eigenvalues of largest modulus")
    for when, found in spectra.items():
        for name, (top, trace, _) in found.items():
            error = f"{trace.mean:9.4f} ± {trace.standard_error:.4f}"
            print(f"{when:12} {name:14} {error:>18}  ", " ".join(f"{value:9.4f}" for value in top))


def draw_spectra(spectra: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (when, found) in zip(figure.subplots(1, 2, sharey=True), spectra.items()):
        nodes = np.concatenate([np.asarray(density.nodes).reshape(-1) for _, _, density in found.values()])
        low, high = nodes.min(), nodes.max()
        grid = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 2000)
        for name, (_, _, density) in found.items():
            axes.semilogy(grid, np.maximum(density.density(grid, (high - low) / 100), 1e-9), label=name)
        axes.set(title=when, xlabel="eigenvalue", ylabel="density", ylim=(1e-5, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Density of the eigenvalues, by stochastic Lanczos quadrature")
    figure.savefig(path)


def features(params, x):
    """What the last layer receives."""
    return jnp.tanh(network.forward(params[:-1], x))


def reliability(probs, labels, bins: int = 10):
    """Mean confidence, accuracy and share of the examples in each bin of confidence, and the calibration error."""
    probs, labels = np.asarray(probs), np.asarray(labels)
    confidence, right = probs.max(-1), probs.argmax(-1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    share = np.bincount(which, minlength=bins) / len(labels)
    total = np.maximum(np.bincount(which, minlength=bins), 1)
    mean, accuracy = (np.bincount(which, values, bins) / total for values in (confidence, right))
    return mean, accuracy, share, float(np.sum(share * np.abs(mean - accuracy)))


def calibrate(params, data: Data, steps: int) -> dict[str, jax.Array]:
    """Probabilities on the test digits, of a network at the maximum of its posterior, without and with Laplace."""

    def penalized(params, x, labels):  # the prior N(0, 1) on every parameter, as the posterior will assume
        return mean_loss(params, x, labels) + sum(jnp.sum(w**2) for w in jax.tree.leaves(params)) / (2 * len(labels))

    params = train(optax.adam(1e-2), params, data, steps, penalized).params
    posterior = curvature.last_layer_laplace(params[-1], features(params, data.x), data.labels, cross_entropy)
    fitted, inputs = posterior.with_best_prior(), features(params, data.test_x)
    print("\nLast-layer Laplace:", end=" ")
    print(f"log evidence {posterior.log_evidence():.1f} at the prior precision of training, 1,", end=" ")
    print(f"{fitted.log_evidence():.1f} at its best, {fitted.prior_precision:.3g}")
    return {
        "network": softmax(network.forward(params, data.test_x)),
        "Laplace": posterior.probabilities(inputs),
        "Laplace, best prior": fitted.probabilities(inputs),
        "Laplace, 1000 draws": posterior.probabilities(inputs, jax.random.key(2), 1000),
    }


def print_calibration(predictions: dict[str, jax.Array], labels) -> None:
    print(f"{'test digits':24} {'accuracy':>9} {'-log p':>9} {'calibration error':>18} {'mean confidence':>16}")
    for name, probs in predictions.items():
        surprise = -jnp.mean(jnp.log(probs[jnp.arange(len(labels)), labels]))
        accuracy, error = jnp.mean(probs.argmax(-1) == labels), reliability(probs, labels)[-1]
        print(f"{name:24} {accuracy:9.2%} {surprise:9.4f} {error:18.4f} {probs.max(-1).mean():16.2%}")
    print("The network is less sure than it is right, and a mean over W lowers confidence: here it calibrates worse.")


def draw_calibration(predictions: dict[str, jax.Array], labels, path: Path) -> None:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="perfect")
    for name, probs in predictions.items():
        mean, accuracy, share, error = reliability(probs, labels)
        seen = share > 0
        axes.plot(mean[seen], accuracy[seen], "o-", label=f"{name}: error {error:.3f}")
    axes.set(title="Calibration on the test digits", xlabel="confidence", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=positive, default=40, help="Gauss-Newton steps; Adam takes ten times as many")
    parser.add_argument("--lanczos-steps", type=positive, default=60, help="of each spectrum, at least 5")
    parser.add_argument("--out", type=folder, default="out/second_order", help="folder for the pictures")
    options = parser.parse_args(arguments)
    if options.lanczos_steps < 5:
        parser.error(f"--lanczos-steps must be at least 5, got {options.lanczos_steps}")

    print("compiling and training: Gauss-Newton, then Adam ...", flush=True)
    data = load()
    params = network.init(jax.random.key(0), SIZES)
    runs = {
        "Gauss-Newton": train(curvature.gauss_newton(network.forward, cross_entropy), params, data, options.steps),
        "Adam (0.01)": train(optax.adam(1e-2), params, data, 10 * options.steps),
    }
    print_race(runs)
    draw_race(runs, options.out / "race.png")

    trained = runs["Adam (0.01)"].params
    print("\nmeasuring the curvature ...", flush=True)
    spectra = {when: spectrum(p, data, options.lanczos_steps) for when, p in (("before", params), ("after", trained))}
    print_spectra(spectra)
    draw_spectra(spectra, options.out / "spectrum.png")

    predictions = calibrate(params, data, 10 * options.steps)
    print_calibration(predictions, data.test_labels)
    draw_calibration(predictions, data.test_labels, options.out / "calibration.png")
    print(f"\nThe pictures are in {options.out}.")


if __name__ == "__main__":
    main()
