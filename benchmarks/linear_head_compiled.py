"""The linear head as the compilers for accelerators make it: `python -m benchmarks.linear_head_compiled [ROW...]`.

Bounds of `benchmarks.compiled`, in bfloat16, with no device. A row is ours over the other, both bounds in milliseconds,
and both temporary memories in MiB:

    modes         value, gradient in x and W, its derivative: over the same of optax on full logits, in bfloat16, half
                  as wide as ours, and in float32
    options       the gradient with one option each: over the plain head's, three products; "none" over four
    masked        a third of the tokens ignored, and none of those that may be: over the plain head's
    distillation  value and gradient of linear_softmax_kl_divergence: over full logits; of a teacher's 64 best words:
                  over the plain head's
    pod           whatever the chip, 256 TPU v5e, 2^20 tokens, D 4096, V 128256 over 16 of them: over the share of the
                  three products at peak, with what a device sends, over the bytes that its gradients have
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoftmax as js
from benchmarks.compiled import chips
from benchmarks.compiled.cost import Cost
from benchmarks.compiled.table import size_of, text_of
from jaxsoftmax.linear_head.plan import plan

Size = tuple[int, int, int]  # tokens, features, classes
Rows = Iterator[tuple[str, Cost, Cost]]  # what, ours, the other

SIZES: dict[str, tuple[Size, ...]] = {
    "h100": ((8192, 4096, 128256), (16384, 2048, 32768), (4096, 8192, 262144)),
    "v5e": ((8192, 4096, 128256), (16384, 2048, 32768)),
    "v6e": ((8192, 4096, 128256), (16384, 2048, 32768)),
}
POD = 2**20, 4096, 128256
OPTIONS = {
    "logit_softcap": 30.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "class_weights": lambda v: jnp.ones(v),
    "bias": lambda v: jnp.zeros(v, jnp.bfloat16),
}
struct = jax.ShapeDtypeStruct


def arguments(size: Size) -> tuple[jax.ShapeDtypeStruct, ...]:
    n, d, v = size
    return struct((n, d), jnp.bfloat16), struct((n,), jnp.int32), struct((d, v), jnp.bfloat16)


def fused(x, labels, weights, **options):
    return js.linear_softmax_cross_entropy_loss(x, labels, weights, **options)


def logits(wide: bool, x, weights):
    """In float32, after the product's own rounding to bfloat16 unless `wide`."""
    return jnp.dot(x, weights, preferred_element_type=jnp.float32) if wide else (x @ weights).astype(jnp.float32)


def full(wide: bool, x, labels, weights):
    return optax.softmax_cross_entropy_with_integer_labels(logits(wide, x, weights), labels).sum()


WIDTHS = ("", False), (", float32 logits", True)


def gradient(f: Callable) -> Callable:
    return jax.value_and_grad(f, (0, 2))


def hvp(f: Callable) -> Callable:
    def product(x, labels, weights, *along):
        of = lambda x, weights: jax.grad(f, (0, 2))(x, labels, weights)
        return jax.jvp(of, (x, weights), along)[1]

    return product


def modes(size: Size, chip: str) -> Rows:
    args = arguments(size)
    measure = functools.partial(chips.measure, chip=chip)
    for name, of, more in (("value", lambda f: f, ()), ("gradient", gradient, ()), ("HVP", hvp, (args[0], args[2]))):
        ours = measure(of(fused), *args, *more)
        for what, wide in WIDTHS:
            yield name + what, ours, measure(of(functools.partial(full, wide)), *args, *more)


def options(size: Size, chip: str) -> Rows:
    args = arguments(size)
    measure = lambda f: chips.measure(gradient(f), *args, chip=chip)
    plain = measure(fused)
    for name, value in OPTIONS.items():
        value = value(size[2]) if callable(value) else value
        yield name, measure(functools.partial(fused, **{name: value})), plain
    yield "statistics", chips.measure(with_statistics, *args, chip=chip), plain
    ct = struct(size[:1], jnp.float32)
    each = lambda x, labels, weights, ct: jnp.vdot(ct, fused(x, labels, weights, reduction="none"))
    # A cotangent comes after the losses, so the logits are made twice; no chunk is all of cotangents 0.
    four = dataclasses.replace(plain, seconds=4 / 3 * plain.seconds)
    yield 'reduction="none"', chips.measure(gradient(each), *args, ct, chip=chip, rounds=chunks_of(size, chip)), four


def with_statistics(x, labels, weights):
    of = lambda x, weights: js.linear_softmax_cross_entropy_with_statistics(x, labels, weights)
    return jax.value_and_grad(of, (0, 1), has_aux=True)(x, weights)


def chunks_of(size: Size, chip: str, part: float = 1.0) -> int:
    """Of that part of the tokens, where some may be skipped."""
    chunk = plan(chips.CHIPS[chip].platform, *size, itemsize=4, skips=True).chunk
    return -(-int(part * size[0]) // chunk)


def masked(size: Size, chip: str) -> Rows:
    """The loop ends after the tokens that count: as many rounds as they take."""
    args, rounds = arguments(size), chunks_of(size, chip, 2 / 3)
    ignoring = functools.partial(fused, ignore_index=-1)
    ours = chips.measure(gradient(ignoring), *args, chip=chip, rounds=rounds)
    whole = chips.measure(gradient(fused), *args, chip=chip)
    yield f"a third ignored, {rounds} chunks", ours, whole
    yield "none ignored", chips.measure(gradient(ignoring), *args, chip=chip, rounds=chunks_of(size, chip)), whole


def distillation(size: Size, chip: str) -> Rows:
    x, labels, weights = arguments(size)

    def plain(wide, x, target_x, weights, target_weights):
        logp, logq = (jax.nn.log_softmax(logits(wide, *pair)) for pair in ((x, weights), (target_x, target_weights)))
        return jnp.sum(jnp.exp(logq) * (logq - logp))

    measure = lambda f: chips.measure(gradient(f), x, x, weights, weights, chip=chip)
    ours = measure(js.linear_softmax_kl_divergence)
    for what, wide in WIDTHS:
        yield "KL of two heads" + what, ours, measure(functools.partial(plain, wide))
    k = struct((size[0], 64), jnp.int32), struct((size[0], 64), jnp.float32)
    of = lambda x, weights, *teacher: js.linear_softmax_top_k_kl_divergence(x, *teacher, weights)
    few = chips.measure(jax.value_and_grad(of, (0, 1)), x, weights, *k, chip=chip)
    yield "64 best words", few, chips.measure(gradient(fused), x, labels, weights, chip=chip)


TOLD = {"token_axes": "data", "class_axes": "classes"}
LAYOUTS = {  # the kind of the mesh's axes, which of them splits the features of the weights, what the call is told
    "Explicit": (AxisType.Explicit, None, {}),
    "Explicit, FSDP": (AxisType.Explicit, "data", {}),
    "Auto, told": (AxisType.Auto, None, TOLD),
    "Auto, told, FSDP": (AxisType.Auto, "data", TOLD),
    "Auto, untold": (AxisType.Auto, None, {}),
    "Auto, untold, FSDP": (AxisType.Auto, "data", {}),
}


def on_pod(size: Size, layout: str) -> Cost:
    kind, features, told = LAYOUTS[layout]
    devices = np.array(chips.devices("v5e", "v5e:16x16")).reshape(16, 16)
    mesh = Mesh(devices, ("data", "classes"), axis_types=(kind, kind))
    specs = P("data"), P("data"), P(features, "classes")
    args = [struct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)) for a, s in zip(arguments(size), specs)]
    return chips.measure(gradient(functools.partial(fused, **told)), *args, chip="v5e", mesh=mesh)


def pod(size: Size, chip: str) -> Rows:
    """The other is what no program on the pod can undercut: products at peak, gradients sent once, nothing kept."""
    n, d, v = size
    sent = {"gradients": (2, 2.0 * (d * v + n * d) / 16)}
    share = Cost(seconds=6 * n * d * v / 256 / chips.CHIPS["v5e"].flops, temp=0, sent=sent)
    for layout in LAYOUTS:
        yield layout, on_pod(size, layout), share


ROWS = {f.__name__: f for f in (modes, options, masked, distillation, pod)}


def line(name: str, size: Size, ours: Cost, other: Cost) -> str:
    times = f"{ours.seconds / other.seconds:.3f} | {1e3 * ours.seconds:.2f} | {1e3 * other.seconds:.2f}"
    sent = [sum(size for _, size in cost.sent.values()) / 2**20 for cost in (ours, other)]
    memory = [(cost.temp or 0) / 2**20 for cost in (ours, other)]
    text = f"| {name} | {text_of(size)} | {times} | {memory[0]:.0f} | {memory[1]:.0f} |"
    return text + (f" {sent[0]:.1f} | {sent[1]:.1f} |" if any(sent) else " | |")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear_head_compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--chip", default="h100", choices=list(SIZES), help="(default: %(default)s)")
    parser.add_argument("--size", nargs="+", type=size_of, metavar="N×D×V", help="(the chip's)")
    wanted = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if unknown := set(wanted.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")
    print(f"{wanted.chip}, jax {jax.__version__}\n")
    print("| | size | ratio | ms | other ms | temp MiB | other | sent MiB | other |\n" + 9 * "|---" + "|", flush=True)
    for name in wanted.rows or ROWS:
        for size in [POD] if name == "pod" else wanted.size or SIZES[wanted.chip]:
            for what, ours, other in ROWS[name](size, wanted.chip):
                print(line(what, size, ours, other), flush=True)


if __name__ == "__main__":
    main()
