"""The costs read from a compiled program, and the lines of tools/predict/aot_table.py.

Run: python -m pytest tests/tools/test_aot_table.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_cost import cost, group
from roofline import Span, spans

from nanochat_jax.distributed.mesh import make_mesh
from tests.support.marks import needs_tpu_compiler

ROOT = Path(__file__).parents[2]
PROGRAM = """
HloModule example

%product (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[] constant(12)
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %w = f32[16,4]{1,0:S(1)} constant({...})
  %y = f32[8,4]{1,0:S(1)} fusion(%x, %w), kind=kOutput, calls=%product
  %sum = f32[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%next, %sum)
}

%start (x: f32[2,4]) -> f32[16,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %gathered.1 = f32[16,4]{1,0} all-gather(%x), channel_id=2, replica_groups=mesh['data'=8,'model'=1] {'data'}
}

%finish (x: f32[2,4]) -> f32[16,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %gathered.2 = f32[16,4]{1,0} all-gather(%x), channel_id=2, replica_groups=mesh['data'=8,'model'=1] {'data'}
}

ENTRY %main (x: f32[8,16], w: f32[2,4]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[2,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %begun = f32[16,4]{1,0} fusion(%w), kind=kCustom, calls=%start
  %ended = f32[16,4]{1,0} fusion(%w), kind=kCustom, calls=%finish
  %state = (s32[], f32[8,16]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,16]{1,0}) while(%state), condition=%condition, body=%body
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_collective_in_pieces_once():
    found = cost(PROGRAM)
    assert found.flops == 6 * 2 * 8 * 16 * 4  # 12 iterations in 6 passes of a body that was unrolled twice
    assert found.collectives == {"all-reduce": [6, 6 * 2 * 7 / 8 * 512], "all-gather": [1, 7 / 8 * 256]}
    assert found.groups == {
        ("all-reduce", 8, 1): found.collectives["all-reduce"],
        ("all-gather", 8, 1): found.collectives["all-gather"],
    }
    assert found.unknown_loops == 0


@pytest.mark.parametrize(
    ("attributes", "size", "distance"),
    [
        ("replica_groups=[1,8]<=[8], to_apply=%add", 8, 1),
        ("replica_groups=[4,2]<=[8]", 2, 1),
        ("replica_groups=[2,4]<=[4,2]T(1,0), channel_id=3", 4, 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4, 2),
        ("replica_groups={{0},{1}}", 1, 0),
        ("replica_groups=mesh['data'=4,'model'=2] {'data'}", 4, 2),
        ("replica_groups=mesh['data'=4,'model'=2] {'model'}", 2, 1),
        ("replica_groups=mesh['data'=4,'model'=2] {'data','model'}", 8, 1),
        ("source_target_pairs={{0,7},{1,0}}", 2, 7),
        ("channel_id=1", 2, 1),  # it does not say
    ],
)
def test_who_takes_part_in_a_collective_is_read_from_every_form(attributes, size, distance):
    assert group(f"%x), {attributes}") == (size, distance)


def test_collectives_that_stand_alone_may_share_a_channel_and_a_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.1.clone (x: f32[64,4]) -> f32[8,4] {
  %x = f32[64,4]{1,0} parameter(0)
  %all = f32[64,4]{1,0} all-reduce(%x), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %part = f32[8,4]{1,0} dynamic-slice(%all), dynamic_slice_sizes={8,4}
}

ENTRY %main (x: f32[64,4]) -> f32[8,4] {
  %x = f32[64,4]{1,0} parameter(0)
  %one = f32[8,4]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %two = f32[8,4]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %three = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
    assert cost(text).collectives == {"reduce-scatter": [3, 3 * 7 * 128.0]}


def test_a_collective_in_two_halves_counts_its_results_once():
    text = """
ENTRY %main (x: f32[64,4], y: f32[16]) -> f32[64,4] {
  %x = f32[64,4]{1,0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %a = ((f32[64,4], f32[16]), (f32[512,4]{1,0}, f32[128]{0})) all-gather-start(%x, %y), replica_groups=[1,8]<=[8]
  %b = ((f32[64,4]{1,0}), f32[64,4]{1,0}) all-to-all-start(%x), replica_groups=[1,8]<=[8]
  %c = ((f32[64,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]
  %d = (f32[64,4]{1,0}, f32[64,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %e = f32[64,4]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8]
  ROOT %done = f32[64,4]{1,0} all-reduce-done(%e)
}
"""
    assert cost(text).collectives == {
        "all-gather": [1, 7 / 8 * (8192 + 512)],
        "all-to-all": [1, 7 / 8 * 1024],
        "reduce-scatter": [1, 7 * 128],
        "collective-permute": [1, 1024],
        "all-reduce": [1, 2 * 7 / 8 * 1024],
    }


def test_a_program_for_a_gpu_counts_the_products_of_cublas_its_kernels_and_loops_of_which_the_length_is_noted():
    dimensions = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]'
    text = f"""
%body (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %w = f32[16,4]{{1,0}} constant({{...}})
  %y = (f32[8,4]{{1,0}}, s8[4096]{{0}}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{dimensions}}}}}}}
  ROOT %z = f32[8,16]{{1,0}} custom-call(%x, %y), custom_call_target="mosaic_gpu_v2"
}}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
  ROOT %loop = f32[8,16]{{1,0}} while(%x), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}},"known_init_step":{{"init":"0","step":"1"}}}}
}}
"""
    found = cost(text)
    assert found.flops == 5 * 2 * 8 * 16 * 4
    assert found.kernels.total() == 5 and found.unknown_loops == 0


def test_the_gpus_of_a_host_are_equally_near_and_those_of_several_hosts_are_refused():
    mesh = make_mesh("data=4,model=2", jax.devices()[:8], 64)
    assert spans(mesh) == {"all": Span(1, 7, 1), "data": Span(1, 3, 1), "model": Span(1, 1, 1)}
    many = SimpleNamespace(size=16, devices=mesh.devices)
    with pytest.raises(ValueError, match="of one host, 8 at most, got 16"):
        spans(many)


def test_what_stays_on_the_chip_is_no_traffic():
    loop = 6 * (512 + 2 * 512)  # the product reads x and writes to the chip's own memory; the sum reads and writes
    counter = 6 * 3 * 4
    assert cost(PROGRAM).bytes == loop + counter + 2 * (32 + 256)


def test_seconds_are_the_longer_of_products_and_traffic():
    assert cost(PROGRAM, rates=(1.0, float("inf"))).seconds == cost(PROGRAM).flops
    assert cost(PROGRAM, rates=(float("inf"), 1.0)).seconds == cost(PROGRAM).bytes


def test_a_loop_whose_length_the_program_does_not_say_counts_as_told():
    text = PROGRAM.replace("%limit = s32[] constant(12)", "%limit = s32[] parameter(1)")
    found = cost(text, unknown_trips=5)
    assert found.flops == 5 * 2 * 8 * 16 * 4 and found.unknown_loops == 1


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # a plain product, written as XLA for TPU writes it
        ("f32[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 4 * 16),
        # a product of 3 independent pairs: a window over 3 positions of which one meets
        (
            "f32[3,8,4]{2,1,0} convolution(%c, %d), window={size=3 stride=2 pad=2_2 lhs_dilate=3}, "
            "dim_labels=0bf_0io->0bf",
            2 * 3 * 8 * 4 * 16,
        ),
    ],
)
def test_products_are_counted_from_the_labels(line, flops):
    text = f"""
ENTRY %main (a: f32[8,16]) -> f32[8,4] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  %c = f32[3,8,16]{{2,1,0}} parameter(2)
  %d = f32[3,16,4]{{2,1,0}} parameter(3)
  ROOT %r = {line}
}}
"""
    assert cost(text).flops == flops


def test_a_program_that_was_really_compiled():
    def f(x, w):
        return jax.lax.fori_loop(0, 5, lambda i, x: jnp.tanh(x @ w), x)

    text = jax.jit(f).lower(np.ones((32, 64), "f4"), np.ones((64, 64), "f4")).compile().as_text()
    assert cost(text).flops == 5 * 2 * 32 * 64 * 64


@needs_tpu_compiler
def test_the_table_has_a_line_of_json_for_each_program_with_the_keys_of_the_recorded_ones():
    sizes = ["--max-seq-len=32", "--vocab-size=64", "--total-batch-size=64", "--slots=16", "--max-new-tokens=16"]
    command = [sys.executable, ROOT / "tools/predict/aot_table.py", "--cases", "d2:v5e-1", *sizes]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    recorded = (ROOT / "tools/bench/results/aot_2026-11-23.jsonl").read_text().splitlines()
    printed = list(map(json.loads, done.stdout.splitlines()))
    assert [line["program"] for line in printed] == ["sft", "decode"]
    assert list(map(list, printed)) == [list(json.loads(line)) for line in recorded[:2]]
    assert all(line["fits"] and line["seconds"]["at_least"] > 0 for line in printed)
