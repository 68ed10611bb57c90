"""Compile the train step, the decode call or the prefill of two layers for NVIDIA GPUs that are not there, and print a
JSON line for each. A process of its own, which compiles only from then on.

python -m tests.support.cuda_compiler a100 sft h100 decode
"""

import contextlib
import dataclasses
import json
import re
import sys

import jax

from nanochat_jax import sft
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import inherit
from nanochat_jax.distributed import compile_only
from nanochat_jax.distributed.device_memory import beside_arguments
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.gpt import window_sizes
from nanochat_jax.train import preflight, scaling_laws

RECORDED = {"max_seq_len": 512, "device_batch_size": 2, "total_batch_size": 16384}
LAYERS, WIDTH_OF_DEPTH = 2, 12  # two layers, of which one has a window, as wide as nanochat's d12


def compile_for(device: str, program: str) -> dict:
    """Bytes of the program's arguments over those that are known without it, what it needs beside them, and where it
    adds floats in an order that nobody knows."""
    model = scaling_laws.config_of_depth(
        WIDTH_OF_DEPTH, aspect_ratio=64, head_dim=128, window_pattern="SL", max_seq_len=512, vocab_size=1024
    )
    model = dataclasses.replace(model, n_layer=LAYERS, windows=window_sizes("SL", LAYERS, 512))
    with contextlib.redirect_stdout(sys.stderr):
        cfg = inherit(parse(sft.SFTConfig, [], prog="test"), RECORDED, "the test")
        plan = sft.plan_of(cfg, model, make_mesh("", compile_only.devices(device), model.n_embd))
    if program == "sft":
        compiled, known = plan.compile_train_step(), sum(preflight.state_bytes(plan).values())
    else:
        answers = preflight.Answers(2, 4, 8, 48, prompt_tokens=32)
        known = preflight.weight_copy_bytes(plan)
        if program == "decode":
            compiled = preflight.compile_decode(plan, answers)
            known += preflight.cache_bytes(plan, answers)
        else:
            programs = preflight.decode_programs(plan, answers)
            groups, rows, prompt, _ = preflight.decode_sizes(plan, answers)
            with jax.set_mesh(plan.mesh):
                compiled = programs.compile_prefill(plan.abstract_state.params, groups, prompt, groups, prompt)
            known += programs.cache_bytes(groups, rows, prompt, 0)
    arguments = compiled.memory_analysis().argument_size_in_bytes
    return {
        "device": device,
        "program": program,
        "arguments": arguments / known,
        "beside_them": beside_arguments(compiled),
        "float_scatters": re.findall(r"= b?f\d+\S* scatter\(.*", compiled.as_text()),
    }


if __name__ == "__main__":
    for device, program in zip(sys.argv[1::2], sys.argv[2::2]):
        print(json.dumps(compile_for(device, program)), flush=True)
