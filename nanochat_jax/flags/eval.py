"""The settings of the evaluation on tasks."""

import dataclasses
from pathlib import Path
from typing import Annotated

from nanochat_jax.cli.settings import (
    ANSWERS,
    DATA,
    DEVICES,
    LARGEST,
    RUN,
    Maybe,
    at_least,
    between,
    setting,
    short,
)
from nanochat_jax.flags.model import ModelConfig
from nanochat_jax.flags.tools import ToolConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig(ModelConfig, ToolConfig):
    """Evaluate a model on tasks: which share of their problems it solves. One-letter flags are those of nanochat.

    python -m nanochat_jax.eval                                 # the newest SFT model on all tasks
    python -m nanochat_jax.eval -i base -a "CORE|bpb|sample"    # the base model as nanochat's base_eval does
    python -m nanochat_jax.eval -i rl -a "GSM8K|Arithmetic" -n 8 -t 1.0 --json gsm8k.json
    """

    json: Maybe[Path] = setting(
        None, "new file for all numbers; they are also kept in a new file in the model's folder", group=RUN
    )
    output_dir: Maybe[Path] = setting(
        None, "base directory that this and downloads are written to; default: the one that is read", group=RUN
    )
    config: Maybe[Path] = setting(None, "TOML file of flags; flags on the command line win", group=RUN)
    task_name: Annotated[Maybe[str], short("-a")] = setting(
        None, 'such as "ARC-Easy|my_module:MyTask", of a base model "CORE|bpb|sample"; default: all tasks', group=DATA
    )
    max_problems: Annotated[Maybe[int], short("-x", "--max-per-task")] = setting(
        None, "of each task, the first ones; default: all", at_least(1), group=DATA
    )
    eval_tokens: Annotated[int, short("--split-tokens")] = setting(
        40 * 524288, "of the validation shard that bpb is measured on, at most all", at_least(1), group=DATA
    )
    data_dir: Maybe[Path] = setting(None, "folder of datasets on disk, looked at first", group=DATA)
    unsafe_exec: bool = setting(
        False, "run HumanEval's programs also where this machine cannot guard against them", group=DATA
    )
    temperature: Annotated[float, short("-t")] = setting(
        0.0, "of generated answers; 0 = the most likely one", group=ANSWERS
    )
    max_new_tokens: Annotated[int, short("-m")] = setting(
        512, "tokens of an answer, results of tools included", group=ANSWERS
    )
    max_turns: int = setting(
        8,
        "answers in a conversation with a task that responds; --max-new-tokens is the limit of all together",
        at_least(1),
        group=ANSWERS,
    )
    num_samples: Annotated[int, short("-n")] = setting(
        1, "answers to each problem, for pass@1 to pass@n", at_least(1), group=ANSWERS
    )
    top_k: Annotated[int, short("-k")] = setting(50, "sample among so many tokens; 0 = all", group=ANSWERS)
    seed: int = setting(42, "of the sampling", between(0, LARGEST, f"from 0 to {LARGEST}"), group=ANSWERS)
    batch_size: Annotated[Maybe[int], short("-b")] = setting(
        None, "multiple-choice questions, or texts of CORE and bpb, in a pass, per device", at_least(1), group=DEVICES
    )
    slots: int = setting(256, "answers that are generated together", at_least(1), group=DEVICES)
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", group=DEVICES)
    dtype: Annotated[str, short("-d")] = setting(
        "auto", "compute type: float32 or bfloat16; auto = float32 on CPU", group=DEVICES
    )
    attention: str = setting(
        "auto", "backend by name, see docs/training.md; auto = the fastest that passes a trial here", group=DEVICES
    )
    mesh: Maybe[str] = setting(None, "devices by axis, such as data=4,model=2; default: all on data", group=DEVICES)
    coordinator: Maybe[str] = setting(
        None, "of several processes: HOST:PORT where process 0 listens (TPU, SLURM, MPI: found)", group=DEVICES
    )
    num_processes: Maybe[int] = setting(None, "how many there are", group=DEVICES)
    process_id: Maybe[int] = setting(None, "which one this is, from 0", group=DEVICES)
