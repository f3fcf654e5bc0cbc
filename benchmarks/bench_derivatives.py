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


# What the digits cost. XLA's CPU backend runs a kernel operation by operation over rows in cache, so that arithmetic
# shows, not only memory. Tried for the sum without the top class in place of Σ(e - ⌊e⌋) beside Σ⌊e⌋, and slower
# somewhere (processor time of logsumexp over jax.nn's at (65536, 64), (4096, 1024), (1024, 32768), (8192, 8192); the
# form kept: 2.2, 1.5, 1.7, 1.4, and 0.7 in place of 2.2 since the logarithm is a kernel of its own):
#   e kept in memory, Σe beside Σe where e < 1    1.1, 1.3 to 2, 4.1, 3.7
#   m in a kernel of its own before the sums      1.6, 2.7, 7.2, 7.0
#   one reduction of a pair                       3.8, 4.4, 4.4
#   ties counted by Σ min((m - z) 3e38, 1)        1.9, 1.8, 4.4
#   the second sum under lax.cond                 1.6, 2.1, 1.9 where any row has p > 1/2; else 0.7, 0.9, 1.0
#
# Memory shows most of all. XLA keeps an array, even of a constant, that two kernels share, and glibc gives back after
# each call what a program allocated beyond 32 MiB: the next call pays for fresh pages, 4,096 in 16 MiB.
# So derivatives that keep three arrays where theirs keep two take 2 to 3 times as long: softmax's HVP took 3 while two
# of its four arrays said which class is the top one, but 1.3 with an allocator that keeps the pages
# (LD_PRELOAD=libjemalloc.so.2, MALLOC_CONF=dirty_decay_ms:-1). For the same reason ratios of one row move by 0.3 or
# more between runs: it depends on what was allocated before whether a result's pages are fresh.
#
# KL's value, at the first three sizes (the form kept: 2.7, 2.9, 1.3):
#   log p - log q from a sum of expm1, arrays kept            5.8, 6.3, 2.1
#   the mean difference subtracted first, arrays kept         6.0, 5.4, 1.6
#   barriers between the kernels, but the same limits         7.2, 6.2, 2.1
# Brier's (the form kept: 2.5, 2.2, 1.2):
#   arithmetic alone, one kernel                              7 to 12, 1.6, 1.3
#   barriers between the kernels                              3.0, 2.4 to 4.9, 0.8
#
# Of log_softmax's 1.5 and 1.6, at the first two sizes: the limit of infinite logits 0.1 and 0.2, the top class left out
# 0.1 and 0.2, its ties 0.1 and 0.1. What it pulls back (the form kept: 1.1 to 1.4, 1.4; g - p Σg as it stands: 1, 1):
#   g - p Σg, corrected at the top class                      1.1 to 1.4, 1.5
#   1 - p by expm1                                            1.2 to 1.4, 1.5
#   the top class's entry as a number per row                 2.4 to 4.2, 5
# The sum without the top class settled, as for logsumexp, before it is used at each class (first two sizes): values of
# soft labels 0.9 and 1.7 to 2.0 and 5 to 8, of the entropy 0.5 and 1.7 to 1.3 and 4.6, of log_softmax 1.4 and 1.5 to
# 1.6 and 1.8.
#
# Integer labels' value, with the label left out of the sum (the form kept: 1.2, 1.3, 1.4; with it in: 0.8, 1, 1):
#   by a choice at each class                                 1.2, 1.4, 5.0
#   by an index in integers                                   1.6, 2.1, 5.1
#   by the square of the distance                             1.05, 1.35, 1.45
#   with m settled                                            1.3, 1.4, 1.4
# logsumexp's JVP (the form kept: 2.0, 1.8; no sum without the top class: 1.2, 1.0):
#   divided behind the sum over the tangent                   2.2, 1.6
#   and all three sums settled                                2.3, 5.9
# VJP of soft labels and of Brier's loss (the form kept: 1.1 and 1.65, 1.3 and 1.15 to 1.25; Brier's without the top
# class apart: 1.2, 1.1):
#   the top class by arithmetic                               2.5, 2.3;  1.7, 1.5
#   m and the sums settled                                    1.0, 1.5;  1.4, 1.5
#   the sum without the top class settled                     1.1, 1.6;  not tried
#
# At (1024, 32768), where XLA makes no kernel of whole rows, g less its top entry computed again, not kept, took
# softmax's HVP from 1.25 to 1.44, log_softmax's from 1.3 to 1.5.
# Σexp(z - m) settled before p is divided by it: logsumexp's JVP at (65536, 64) from 2 to 1.9, its HVP from 0.9 to 3.
# KL of bfloat16 logits that are widened kernel by kernel takes as long: XLA finds one wide copy for all of them, behind
# barriers too.
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
