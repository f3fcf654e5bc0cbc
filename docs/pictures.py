"""`python docs/pictures.py [NAME...]`: the pictures of these pages, drawn from what the package computes.

Names: digits, memory, jacobian, spectrum, training, scaling. They go to docs/pictures/; all take some minutes,
training most.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import jaxsoftmax as js

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "examples"), str(DOCS.parent)]
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=64"  # of scaling
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
matplotlib.rcParams["svg.hashsalt"] = "jaxsoftmax"  # the same file from the same data
matplotlib.rcParams["font.family"] = "sans-serif"


def new_axes(**labels: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.grid(alpha=0.3)
    return figure, axes


def draw_digits() -> Figure:
    """Of the loss and of its gradient at the label, against the gap between the logits."""
    import digits

    gaps = np.arange(0.0, 62.0, 2.0)
    figure, axes = new_axes(xlabel="gap between the logits", ylabel="digits kept in float32", ylim=(-0.2, 7.6))
    for quantity, style in (("cross-entropy", "-"), ("its gradient at the label", "--")):
        for library, color in (("jaxsoftmax", "tab:blue"), ("jax.nn, optax", "tab:red")):
            kept = [digits.measure(library, quantity, gap) for gap in gaps]
            axes.plot(gaps, kept, style, color=color, label=f"{quantity}, {library}")
    axes.legend(fontsize="small", loc="center right")
    return figure


def draw_memory() -> Figure:
    """Temporary memory of the compiled value and gradient in x and W, 4,096 tokens of 256 features, float32."""
    tokens, features = 4096, 256
    vocabularies = [2**k for k in range(10, 18)]
    heads: dict[str, Callable] = {
        "all logits in memory": lambda x, W, y: js.softmax_cross_entropy_with_integer_labels(x @ W, y).mean(),
        "linear_softmax_cross_entropy_loss": lambda x, W, y: js.linear_softmax_cross_entropy_loss(
            x, y, W, reduction="mean"
        ),
    }
    figure, axes = new_axes(
        xlabel="words in the vocabulary", ylabel="temporary memory, MiB", xscale="log", yscale="log"
    )
    for (name, head), color in zip(heads.items(), ("tab:red", "tab:blue")):
        used = []
        for vocabulary in vocabularies:
            shapes = (tokens, features), (features, vocabulary)
            x, W = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
            y = jax.ShapeDtypeStruct((tokens,), jnp.int32)
            compiled = jax.jit(jax.value_and_grad(head, (0, 1))).lower(x, W, y).compile()
            used.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        axes.plot(vocabularies, used, "o-", color=color, label=name)
    axes.legend()
    axes.set_title(f"{tokens:,} tokens, {features} features, on {jax.devices()[0].platform}", fontsize="medium")
    return figure


LOGITS = jnp.array([2.0, 1.0, 0.5, -0.5, 0.0])


def draw_jacobian() -> Figure:
    return js.visualize_jacobian(LOGITS)


def draw_spectrum() -> Figure:
    return js.visualize_spectrum(LOGITS)


def draw_training() -> Figure:
    """The small transformer of examples/transformer_equinox.py, with either head: the same curve."""
    import transformer_equinox as example

    figure, axes = new_axes(xlabel="step", ylabel="loss per token", xscale="log")
    for head, style in (("full", "-"), ("fused", "--")):
        losses = example.main(["--head", head, "--steps", "100"])
        axes.plot(np.arange(1, len(losses) + 1), losses, style, label=f"{head} head")
    axes.legend()
    return figure


def draw_scaling() -> Figure:
    """The linear head on 1 to 64 devices, compiled: its matrix products and what is sent, for each device."""
    from benchmarks import scaling

    counts = [2**k for k in range(7)]
    meshes = {
        "tokens split": ("tab:blue", [(n, 1) for n in counts]),
        "classes split": ("tab:red", [(1, n) for n in counts]),
        "both split": ("tab:green", [(2 ** (k // 2), 2 ** (k - k // 2)) for k in range(7)]),
    }
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    work, sent = figure.subplots(1, 2)
    for name, (color, shapes) in meshes.items():
        found = [scaling.measured(shape) for shape in shapes]
        work.plot(counts, [program.products / n for program, n in zip(found, counts)], "o-", color=color, label=name)
        sent.plot(counts, [program.sent for program in found], "o-", color=color, label=name)
    work.plot(counts, [1 / n for n in counts], "k--", label="equal shares", zorder=0)
    work.set(xscale="log", yscale="log", xlabel="devices", ylabel="products of a device, of one alone")
    sent.set(xscale="log", xlabel="devices", ylabel="MiB sent by a device")
    for axes in (work, sent):
        axes.grid(alpha=0.3)
        axes.set_xticks(counts, map(str, counts))
        axes.legend(fontsize="small")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "digits": draw_digits,
    "memory": draw_memory,
    "jacobian": draw_jacobian,
    "spectrum": draw_spectrum,
    "training": draw_training,
    "scaling": draw_scaling,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]().savefig(DOCS / "pictures" / f"{name}.svg", metadata={"Date": None})
        print(DOCS / "pictures" / f"{name}.svg")
