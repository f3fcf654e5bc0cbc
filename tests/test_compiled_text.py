"""The reader of compiled programs, on small ones."""

import math

import jax
import numpy as np
import pytest

from benchmarks.compiled import rows
from benchmarks.compiled.cost import Chip, cost_of
from benchmarks.compiled.text import arrays, parse
from tests.helpers import one_in
from tests.registry.heads import HEADS

GPU = Chip("cuda", "", flops=1e12, bandwidth=1e9, launch=1e-6)
TPU = Chip("tpu", "", flops=1e12, bandwidth=1e9, launch=0.0)

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""


def cost(text: str, chip: Chip = GPU, rounds: int = 1):
    return cost_of(parse("HloModule test, entry_computation_layout={(f32[8]{0})->f32[8]{0}}\n" + text), chip, rounds)


def test_a_fusion_that_runs_beside_others_reads_what_it_slices():
    text = """
%take (p: f32[64,8], i: s32[]) -> f32[2,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %r = f32[2,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: f32[64,8], i: s32[]) -> f32[2,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = ((f32[64,8]{1,0}, s32[]), f32[2,8]{1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%take
  ROOT %d = f32[2,8]{1,0} fusion-done(%s)
}
"""
    assert cost(text).bytes == 2 * 64 + 4


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("f32[]", 4),
        ("pred[8,3]", 24),
        ("bf16[8,3]{1,0}", 48),
        ("f8e4m3fn[16]{0}", 16),
        ("s4[16]{0}", 8),
        ("f32[3,5]{0,1:T(8,128)}", 4 * 128 * 8),  # three numbers fill a row of 128, five rows one of eight
        ("bf16[1000]{0:T(1024)(128)(2,1)S(1)}", 2048),
        ("f32[]{:T(128)}", 4),
        ("(f32[2]{0}, /*index=1*/s32[4]{0})", 24),
    ],
)
def test_bytes_of_a_type(text, nbytes):
    assert math.fsum(a.nbytes for a in arrays(text)) == nbytes


def test_a_fusion_reads_each_operand_once_and_writes_its_result():
    text = """
%sum (p: f32[64,8]) -> f32[64] {
  %p = f32[64,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[64]{0} reduce(%p, %zero), dimensions={1}, to_apply=%add
}

ENTRY %main (x: f32[64,8]) -> f32[64] {
  %x = f32[64,8]{1,0} parameter(0)
  ROOT %f = f32[64]{0} fusion(%x), kind=kInput, calls=%sum, metadata={op_name="jit(f)/sum (of = {rows})"}
}
"""
    found = cost(ADD + text)
    assert (found.kernels, found.bytes) == (1, 4 * (512 + 64))
    assert found.seconds == pytest.approx(found.bytes / GPU.bandwidth + GPU.launch)


SLICES = """
%part (p: bf16[64,8], i: s32[], u: f32[64,8]) -> f32[64,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[64,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %wide = f32[64,8]{1,0} convert(%p)
  %row = f32[1,8]{1,0} dynamic-slice(%wide, %i, %zero), dynamic_slice_sizes={1,8}
  ROOT %new = f32[64,8]{1,0} dynamic-update-slice(%u, %row, %i, %zero)
}

ENTRY %main (x: bf16[64,8], i: s32[], u: f32[64,8]) -> f32[64,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[64,8]{1,0} parameter(2)
  ROOT %f = f32[64,8]{1,0} fusion(%x, %i, %u), kind=kLoop, calls=%part
}
"""


def test_of_a_slice_the_slice_is_read_at_its_own_width_and_an_update_is_written_in_place():
    assert cost(SLICES).bytes == 2 * 8 + 4 + 4 * 8


def test_what_is_done_element_by_element_is_done_to_the_slice_alone_but_to_all_of_a_result():
    assert cost(SLICES.replace("convert", "negate").replace("bf16", "f32")).bytes == 4 * 8 + 4 + 4 * 8
    cast = """
%cast (p: bf16[64]) -> f32[64] {
  %p = bf16[64]{0} parameter(0)
  ROOT %r = f32[64]{0} convert(%p)
}

ENTRY %main (x: bf16[64]) -> f32[64] {
  %x = bf16[64]{0} parameter(0)
  ROOT %f = f32[64]{0} fusion(%x), kind=kLoop, calls=%cast
}
"""
    assert cost(cast).bytes == 2 * 64 + 4 * 64


LOOP = """
%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %j = s32[] copy(%i)
  %y = f32[64]{0} negate(%x)
  ROOT %t = (s32[], f32[64]{0}) tuple(%j, %y)
}

%condition (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, LIMIT), direction=LT
}

ENTRY %main (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  ROOT %w = (s32[], f32[64]{0}) while(%s), condition=%condition, body=%bodyTRIPS
}
"""
ROUND, TEST = 8 + 2 * 256, 4 + 4 + 1  # bytes of the body, and of the condition


@pytest.mark.parametrize(
    "trips, limit, rounds, known",
    [
        (', backend_config={"known_trip_count":{"n":"7"},"x":[]}', "%limit", 7, True),
        ("", "%limit", 5, True),
        ("", "%i", 3, False),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(trips, limit, rounds, known):
    found = cost(LOOP.replace("TRIPS", trips).replace("LIMIT", limit), rounds=3)
    assert found.bytes == rounds * (ROUND + TEST - (0 if known and limit == "%limit" else 4))
    assert found.kernels == 3 * rounds
    assert found.undecided == (not known)


@pytest.mark.parametrize(
    "branches", ["branch_computations={%cheap, %dear}", "true_computation=%dear, false_computation=%cheap"]
)
def test_of_branches_the_cheapest_counts(branches):
    text = """
%cheap (x: f32[64]) -> f32[64] {
  ROOT %x = f32[64]{0} parameter(0)
}

%dear (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  ROOT %y = f32[64]{0} negate(%x)
}

ENTRY %main (x: f32[64], i: s32[]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %c = f32[64]{0} conditional(%i, %x, %x), BRANCHES
}
"""
    assert cost(text.replace("BRANCHES", branches)).bytes == 0


def test_on_tpu_what_lies_on_the_chip_costs_what_is_copied_there():
    text = """
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%s)
  %n = f32[8,128]{1,0:T(8,128)S(1)} negate(%d)
  ROOT %y = f32[8,128]{1,0:T(8,128)} exponential(%n)
}
"""
    found = cost(text, TPU)
    assert (found.kernels, found.bytes) == (2, 2 * 4096)  # read by the copy, written by the last


@pytest.mark.parametrize(
    "operation, flops",
    [
        ("dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 16 * 32 * 8),
        (
            'custom-call(%x, %w), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
            '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            2 * 16 * 32 * 8,
        ),
        ("convolution(%x, %w), dim_labels=bf_io->bf", 2 * 16 * 32 * 8),
    ],
)
def test_flops_of_products(operation, flops):
    text = f"""
ENTRY %main (x: f32[16,32], w: f32[32,8]) -> f32[16,8] {{
  %x = f32[16,32]{{1,0}} parameter(0)
  %w = f32[32,8]{{1,0}} parameter(1)
  ROOT %y = f32[16,8]{{1,0}} {operation}
}}
"""
    found = cost(text, Chip("cuda", "", flops=1e3, bandwidth=1e12, launch=0.0))
    assert found.flops == flops
    assert found.seconds == pytest.approx(flops / 5e2)  # numbers of 32 bits run at half the rate
    assert cost(text.replace("f32", "bf16"), Chip("cuda", "", 1e3, 1e12, 0.0)).seconds == pytest.approx(flops / 1e3)


def test_what_devices_send_is_counted_with_the_loops():
    text = LOOP.replace("negate(%x)", "all-reduce(%x), to_apply=%add").replace("LIMIT", "%limit").replace("TRIPS", "")
    assert cost(ADD + text).sent == {"all-reduce": (5, 5 * 256)}


# Pairs: a ratio says something only if both compute the same.

SMALL = (6, 5)


def sample(struct: jax.ShapeDtypeStruct, kind: str, seed: int) -> jax.Array:
    numbers = np.random.default_rng(seed).normal(size=struct.shape)
    match kind:
        case "label":
            numbers = np.arange(numbers.size) % SMALL[-1]
        case "binary":
            numbers = np.arange(numbers.size).reshape(struct.shape) % 2
        case "mask":
            numbers = np.arange(numbers.size).reshape(struct.shape) % 4 != 3
        case "soft":
            numbers = np.exp(numbers) / np.exp(numbers).sum(-1, keepdims=True)
        case "weights":
            numbers = np.abs(numbers) + 0.5
        case "log":
            numbers = numbers - np.log(np.exp(numbers).sum(-1, keepdims=True))
    return jax.numpy.asarray(numbers, struct.dtype)


OF_LOGITS = [p for p in rows.PAIRS if p.arguments is rows.of_logits]


@pytest.mark.parametrize("pair", one_in(4, OF_LOGITS), ids=lambda p: p.name)
def test_both_of_a_pair_compute_the_same(pair):
    kinds = "logits", *pair.kinds
    structs = pair.arguments(SMALL, "float32", *pair.kinds)
    args = [sample(s, kind, seed) for seed, (s, kind) in enumerate(zip(structs, kinds))]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(pair.ours(*args), pair.theirs(*args), rtol=2e-4, atol=2e-5)


def test_every_head_of_the_registry_has_a_pair():
    assert {head.loss for head in HEADS} <= {pair.ours for pair in rows.PAIRS}


def test_unknown_names_are_told_what_there_is():
    with pytest.raises(ValueError, match="no such function: softmx; known are softmax, "):
        rows.names(("softmx",))
