"""How fast a model is on this device: generating, an SFT step, a step of RL. Settings and examples: flags/bench.py.

What each number means stands in benches/infer.py, benches/sft.py and benches/rl.py. The last line is JSON, and all that
goes to the standard output; what is said before goes to the standard error.
"""

import contextlib
import dataclasses
import json
import sys

import jax

from nanochat_jax.benches.infer import bench_infer
from nanochat_jax.benches.rates import facts
from nanochat_jax.benches.rl import bench_rl
from nanochat_jax.benches.sft import bench_sft
from nanochat_jax.benches.subject import config_of, subject_of
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import start_device
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import check_bounds
from nanochat_jax.distributed.processes import print0
from nanochat_jax.files.json_numbers import finite_or_null
from nanochat_jax.flags.bench import BenchConfig, ModelSizes
from nanochat_jax.model.cost import parameter_counts


def main(cfg: BenchConfig) -> int:
    """Print the numbers -> 0."""
    check_bounds(cfg)
    start_device(cfg.device_type)
    name, model = config_of(cfg)
    device = facts(jax.devices()[0])
    size = f"{parameter_counts(model)['total']:,} parameters, width {model.n_embd}, context {model.sequence_len:,}"
    with contextlib.redirect_stdout(sys.stderr):
        print0(f"{name}: {size}; {device['device']}")
        if cfg.what == "sft":
            found = bench_sft(cfg, model)
        else:
            found = (bench_rl if cfg.what == "rl" else bench_infer)(cfg, subject_of(cfg))
    real = {field.name for field in dataclasses.fields(ModelSizes)} - {"dtype"} if cfg.source else ()
    settings = {name: v for name, v in dataclasses.asdict(cfg).items() if v is not None and name not in real}
    result = {"what": cfg.what, "model": name, **rounded(found), **device, "settings": settings}
    print0(json.dumps(finite_or_null(result), allow_nan=False))
    return 0


def rounded(value):
    """Numbers with five significant digits, in any nesting."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    run_stage(main, parse(BenchConfig, prog="python -m nanochat_jax.bench"))
