"""What the CUDA compiler makes of the Hopper kernels, on a machine without a GPU, and how its words are read.

Run: tools/setup.sh --extra cuda13-aot && python -m pytest tests/tools/test_hopper_kernels.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from hopper_kernels import main_loop, read_machine_code, read_ptxas

from nanochat_jax.model.attention.hopper.primitives import SHARED_MEMORY
from tests.support.marks import needs_cuda_compiler

ROOT = Path(__file__).parents[2]


@needs_cuda_compiler
def test_no_register_is_spilled_and_no_product_serialised_in_relocatable_code_and_in_whole_programs():
    shapes = ["--heads", "1/1x128", "2/1x64", "--dtypes", "bfloat16", "--tokens", "256"]
    done = subprocess.run(
        [sys.executable, "tools/predict/hopper_kernels.py", *shapes],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert [line["kernel"] for line in lines] == 2 * ["attention_dkv", "attention_dq", "attention_forward"]
    for line in lines:
        assert line["ptxas"].keys() == {"relocatable", "whole program"}
        for said in line["ptxas"].values():
            assert (said["spilled"], said["warnings"]) == (0, [])
        assert line["shared_memory"] <= SHARED_MEMORY


def test_spills_and_warnings_are_read_from_what_ptxas_says():
    said = """
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored to maintain compatibility.
ptxas warning : Registers are spilled to local memory in function 'f', 1588 bytes spill stores, 1604 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    640 bytes stack frame, 1588 bytes spill stores, 1604 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 17 bytes smem
"""
    found = read_ptxas(said)
    assert (found["registers"], found["spilled"]) == (168, 1588)
    assert "C7504" in found["warnings"][0] and "spilled" in found["warnings"][1]


def test_the_loop_with_the_products_is_counted_without_what_its_branches_jump_over():
    text = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   FADD R5, R5, R6 ;
        /*0030*/                   FADD R5, R5, R6 ;
        /*0040*/                   FADD R5, R5, R6 ;
.L_x_4:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @!P2 BRA P4, `(.L_x_2) ;
        /*0080*/                   FSEL R5, R5, -INF , P1 ;
        /*0090*/                   FSEL R6, R6, -INF , P1 ;
.L_x_2:
        /*00a0*/                   MUFU.EX2 R5, R5 ;
        /*00b0*/              @!P1 BRA `(.L_x_3) ;
        /*00c0*/               @P0 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_4) ;
"""
    found = main_loop(read_machine_code(text))
    assert found["instructions"] == 10
    kinds = {"products": 2, "float arithmetic": 3, "waits": 1, "exponentials": 1, "addresses and the rest": 3}
    assert (found["kinds"], found["product_cycles"], found["between"]) == (kinds, 96, [])
