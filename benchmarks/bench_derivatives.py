"""Value, VJP, JVP and HVP of the maps and of the heads in everyday use, each against its twin in jax.nn or optax.

Three sizes, float32 and bfloat16. Beside the ratio stands how often the compiled program goes over an array of the
logits' size, ours and theirs, and how often it must: once for each sum or maximum over the classes that needs the one
before, and once for a result of that size. (A kernel that does all this on rows in cache counts as one.) Then the sums
and maxima over the classes that the program holds. Where the goal is missed, it says what the digits cost.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax
from benchmarks import Row, benchmark
from benchmarks.bench_heads import arguments, their_brier, their_entropy, their_softmax_kl
from benchmarks.timing import compare, passes, reductions

SIZES = (65536, 64), (1024, 32768), (4096, 1024)
DTYPES = "float32", "bfloat16"
MODES = "value", "VJP", "JVP", "HVP"
GOAL = 1.1


# What the digits cost on a CPU, whose forms stand in `_core/forms.py` and `forms_of_two.py` with what else was tried.
# Memory shows most: XLA keeps an array that two kernels share, and glibc gives back after each call what a program
# allocated beyond 32 MiB, so that the next call pays for fresh pages, 4,096 in 16 MiB. For the same reason ratios of
# one row move by 0.3 or more between runs: it depends on what was allocated before whether a result's pages are fresh.
CLIPPED = "infinite logits keep their limits, which is one operation more at each class"
TOP_APART = "two sums where theirs is one: the top class is left out"
CENTRED = "means are measured from the top class: one sum more for each"
LABEL_APART = "the label is left out of its sum, by its index"
LIMITS = "no product of 0 and inf, and the top class is left out"
REST_APART = "Σg without the top class as well, and 1 - p as a sum"
HALF = "what is kept is float32, theirs half as wide"
RATIO = "log p - log q from z - x, centred before it is exponentiated: four sums where theirs are three"


class Twins(NamedTuple):
    """Our function and theirs, what the second argument is; for value and derivatives, passes needed and what costs."""

    ours: Callable
    theirs: Callable
    kind: str
    needed: tuple[int, int]
    costs: tuple[str, str] = ("", "")


def over_last_axis(f: Callable) -> Callable:
    return lambda x: f(x, axis=-1)


TWINS = {
    "softmax": Twins(jaxsoftmax.softmax, jax.nn.softmax, "", (3, 3), (CLIPPED, CENTRED)),
    "log_softmax": Twins(jaxsoftmax.log_softmax, jax.nn.log_softmax, "", (3, 3), (TOP_APART, REST_APART)),
    "logsumexp": Twins(
        over_last_axis(jaxsoftmax.logsumexp), over_last_axis(jax.nn.logsumexp), "", (2, 3), (TOP_APART, CENTRED)
    ),
    "integer_labels": Twins(
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        optax.softmax_cross_entropy_with_integer_labels,
        "labels",
        (2, 3),
        (LABEL_APART, CENTRED),
    ),
    "soft_labels": Twins(
        jaxsoftmax.softmax_cross_entropy, optax.softmax_cross_entropy, "distributions", (2, 3), (LIMITS, CENTRED)
    ),
    "binary": Twins(
        jaxsoftmax.sigmoid_binary_cross_entropy, optax.sigmoid_binary_cross_entropy, "distributions", (1, 1)
    ),
    "softmax_kl": Twins(jaxsoftmax.softmax_kl_divergence, their_softmax_kl, "logits", (3, 3), (RATIO, RATIO)),
    "entropy": Twins(jaxsoftmax.softmax_entropy, their_entropy, "", (2, 3), (TOP_APART, CENTRED)),
    "brier": Twins(jaxsoftmax.brier_loss, their_brier, "distributions", (3, 4), (LIMITS, CENTRED)),
}


def modes(f: Callable) -> dict[str, Callable]:
    """The ways to use f(x, *args), each a function of (x, tangent, cotangent, *args)."""

    def vjp(x, tangent, cotangent, *args):
        out, pullback = jax.vjp(lambda x: f(x, *args), x)
        return out, pullback(cotangent)[0]

    return {
        "value": lambda x, tangent, cotangent, *args: f(x, *args),
        "VJP": vjp,
        "JVP": lambda x, tangent, cotangent, *args: jax.jvp(lambda x: f(x, *args), (x,), (tangent,)),
        "HVP": lambda x, tangent, cotangent, *args: jax.jvp(
            lambda x: vjp(x, tangent, cotangent, *args)[1], (x,), (tangent,)
        ),
    }


def contest(name: str, sizes=SIZES, dtypes=DTYPES, only=MODES, **options) -> Iterator[Row]:
    """The rows of one function; `options` are of `compare`."""
    ours, theirs, kind, needed, costs = TWINS[name]
    our_modes, their_modes = modes(ours), modes(theirs)
    for dtype in dtypes:
        for size in sizes:
            x, *args = (a.astype(dtype) if a.dtype == jnp.float32 else a for a in arguments(size, kind))
            out = jax.eval_shape(ours, x, *args), jax.eval_shape(theirs, x, *args)
            k1, k2 = jax.random.split(jax.random.key(1))
            tangent, cotangent = jax.random.normal(k1, size, dtype), jax.random.normal(k2, out[0].shape)
            for mode in only:
                # Each gets the cotangent in the dtype that it answers in.
                fs = [
                    jax.jit(lambda x, t, c, *args, f=f, answer=answer: f(x, t, c.astype(answer.dtype), *args))
                    for f, answer in zip((our_modes[mode], their_modes[mode]), out)
                ]
                inputs = x, tangent, cotangent, *args
                seen, sums = ([count(f, *inputs) for f in fs] for count in (passes, reductions))
                order = int(mode != "value")
                times = compare(dict(zip(("ours", "theirs"), fs)), inputs, **options)
                row = times.row(f"{name} {mode} {dtype}", size, GOAL)
                note = f"passes {seen[0]}, theirs {seen[1]}, needed {needed[order]}; sums {sums[0]}, theirs {sums[1]}"
                missed = [costs[order], HALF if dtype == "bfloat16" else ""] if row.ratio > GOAL else []
                yield row._replace(note="; ".join([note, *filter(None, missed)]))


for _name in TWINS:
    benchmark(_name)(functools.partial(contest, _name))
