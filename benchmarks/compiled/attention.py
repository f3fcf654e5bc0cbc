"""`python -m benchmarks compiled attention`: attention by blocks beside the XLA attention of jax.nn, without a device.

Each cell: the bound of the time in ms and the ratio to that of jax.nn, temporary memory in GiB, ours of theirs, and
matrix products, of which one is as large as q kᵀ: ours of theirs. A dash is what needs more memory than the chip has.
"""

import argparse
from collections.abc import Callable, Sequence

import jax

import jaxsoftmax as js
from benchmarks.compiled import chips
from benchmarks.compiled.cost import Cost

SIZE = 1, 8192, 16, 128  # examples, tokens, heads, width
CASES = {"plain": {}, "causal": {"is_causal": True}, "window": {"local_window_size": 512}}
MODES = "value", "VJP", "JVP", "gradient of JVP"


def in_mode(f: Callable, mode: str) -> Callable:
    """(q, k, v), cotangent, tangents -> the value; value and gradient; value and tangent; a gradient of the tangent."""

    def gradient_of_jvp(x, ct, moved):
        return jax.vjp(lambda *x: jax.jvp(f, x, moved)[1], *x)[1](ct)

    def gradient(x, ct, moved):
        out, back = jax.vjp(f, *x)
        return out, back(ct)

    found = (lambda x, ct, moved: f(*x), gradient, lambda x, ct, moved: jax.jvp(f, x, moved), gradient_of_jvp)
    return dict(zip(MODES, found))[mode]


def measure(f: Callable, mode: str, dtype: str, size: tuple[int, ...], chip: str) -> Cost:
    x = jax.ShapeDtypeStruct(size, dtype)
    return chips.measure(in_mode(f, mode), (x,) * 3, x, (x,) * 3, chip=chip)


def cell(mode: str, dtype: str, options: dict, size: tuple[int, ...], chip: str) -> str:
    both = js.dot_product_attention, jax.nn.dot_product_attention
    ours, theirs = (fitting(lambda *x, f=f: f(*x, **options), mode, dtype, size, chip) for f in both)
    batch, tokens, heads, width = size
    product = 2.0 * batch * heads * tokens**2 * width
    of = lambda text: " of ".join("-" if cost is None else text(cost) for cost in (ours, theirs))
    ms = "-" if ours is None else f"{1e3 * ours.seconds:.1f} ms"
    ratio = "-" if ours is None or theirs is None else f"{ours.seconds / theirs.seconds:.2f}"
    gib, products = of(lambda cost: f"{(cost.temp or 0) / 2**30:.2f}"), of(lambda cost: f"{cost.flops / product:.3g}")
    return f"{ms}, {ratio}; {gib} GiB; {products}"


def fitting(*arguments) -> Cost | None:
    """What it costs, or None where it does not fit into the chip's memory."""
    try:
        return measure(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compiled attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", default="h100", choices=list(chips.CHIPS), help="(default: %(default)s)")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="(all)")
    parser.add_argument("--dtype", nargs="+", default=("bfloat16", "float32"), help="(both)")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES), help="(all)")
    parser.add_argument("--size", nargs=4, type=int, default=SIZE, metavar=("B", "T", "N", "H"), help=f"({SIZE})")
    options = parser.parse_args(arguments)
    print(f"bounds on {options.chip}, jax {jax.__version__}, size {tuple(options.size)}\n")
    print(f"| | {' | '.join(options.mode)} |\n|---|{'---|' * len(options.mode)}", flush=True)
    for dtype in options.dtype:
        for case in options.case:
            cells = (cell(mode, dtype, CASES[case], tuple(options.size), options.chip) for mode in options.mode)
            print(f"| {case} {dtype} | {' | '.join(cells)} |", flush=True)
