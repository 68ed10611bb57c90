"""The settings of reinforcement learning."""

import dataclasses
from pathlib import Path

from nanochat_jax.cli.settings import (
    ANSWERS,
    BASE_HELP,
    DATA,
    EVALUATION,
    LARGEST,
    LENGTH,
    OBJECTIVE,
    OPTIMIZATION,
    RATE,
    RUN,
    SOURCES,
    Bounds,
    Maybe,
    ModelStep,
    at_least,
    between,
    one_of,
    setting,
)
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.flags.tools import ToolConfig
from nanochat_jax.optim.schedules import RL_SCHEDULES

COUNT = between(1, 65536, "from 1 to 65536")
ADVANTAGES = ("mean", "grpo", "rloo")  # of rollouts/objective.py
CUT_ANSWERS = ("wrong", "mask", "keep")  # of rollouts/collector.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig, ToolConfig):
    """Train a chat model on what its own answers to a task's problems are worth. Defaults are nanochat's.

    python -m nanochat_jax.rl                                   # GSM8K, from the newest SFT model
    python -m nanochat_jax.rl --task my_module:MyTask --num-steps 200 --run my-run
    """

    source: str = setting("sft", "stage of the model to start from", SOURCES, group=RUN)
    base: Maybe[Path] = setting(None, BASE_HELP, group=RUN)
    model_tag: Maybe[str] = setting(None, "its tag; default: the one saved last", group=RUN)
    model_step: ModelStep = setting(None, "its step; best = of the highest pass@1 in RL; default: the last", group=RUN)
    output_tag: Maybe[str] = setting(
        None, "folder under chatrl_checkpoints; default: the run's name, else d<depth>", resume="own", group=RUN
    )
    load_optimizer: int = setting(
        0, "1 = start from that model's optimizer state, 0 = from an empty one", one_of(0, 1), group=RUN
    )
    seed: int = setting(
        42,
        "of the sampling, and of the order of the problems from the second epoch on",
        between(0, LARGEST, "from 0 to 2147483647"),
        group=RUN,
    )
    task: str = setting(
        "gsm8k", "gsm8k, arithmetic, spelling, or a class of your own with a reward, as module:Class", group=DATA
    )
    eval_task: Maybe[str] = setting(
        None, "the same for the held-out problems; default: the test split of --task", resume="free", group=DATA
    )
    data_dir: Maybe[Path] = setting(
        None,
        "local mirror of the datasets; default: NANOCHAT_DATA_DIR, else <base dir>/task_data",
        resume="free",
        group=DATA,
    )
    num_epochs: int = setting(1, "times that every problem is met", COUNT, group=LENGTH)
    num_steps: int = setting(
        -1,
        "optimizer steps (-1 = as --num-epochs says); with --resume more than before",
        at_least(1, "at least 1, or -1 for --num-epochs", also=-1),
        resume="longer",
        group=LENGTH,
    )
    examples_per_step: int = setting(16, "problems in a step, all devices together", COUNT, group=LENGTH)
    num_samples: int = setting(
        16,
        "answers to each of them",
        between(2, 65536, "from 2 to 65536, as answers are compared with each other"),
        group=ANSWERS,
    )
    max_new_tokens: int = setting(256, "tokens of an answer, results of tools included", group=ANSWERS)
    max_turns: int = setting(
        8,
        "answers in a conversation with a task that responds; --max-new-tokens is the limit of all together",
        at_least(1),
        group=ANSWERS,
    )
    temperature: float = setting(
        1.0,
        "of the sampling",
        Bounds(lambda t: t > 0, "above 0: else all answers to a problem are the same"),
        group=ANSWERS,
    )
    top_k: int = setting(50, "sample among so many tokens; 0 = all", group=ANSWERS)
    resample: bool = setting(
        False, "draw more problems in place of those whose answers are all worth the same", group=ANSWERS
    )
    slots: int = setting(
        256, "answers that are generated together, all devices together", COUNT, resume="free", group=ANSWERS
    )
    objective: str = setting(
        "global",
        "global = a step's tokens weigh alike; nanochat = its passes, end of turn not trained",
        one_of("global", "nanochat"),
        group=OBJECTIVE,
    )
    advantage: str = setting(
        "mean",
        f"an answer's reward against its problem's others: {', '.join(ADVANTAGES)}",
        one_of(*ADVANTAGES, words=f"one of {', '.join(ADVANTAGES)}"),
        group=OBJECTIVE,
    )
    cut_answers: str = setting(
        "wrong",
        "answers that do not end: wrong = worth 0 at most, mask = not trained, keep = as judged (nanochat)",
        one_of(*CUT_ANSWERS, words=f"one of {', '.join(CUT_ANSWERS)}"),
        group=OBJECTIVE,
    )
    policy: str = setting(
        "full",
        "what is trained: full = the model's distribution (nanochat), truncated = the one that --top-k and "
        "--temperature sample from",
        one_of("full", "truncated"),
        group=OBJECTIVE,
    )
    clip_low: Maybe[float] = setting(
        None, "a token's probability counts down to 1 - this times that of the sampling; e.g. 0.2", group=OBJECTIVE
    )
    clip_high: Maybe[float] = setting(None, "and up to 1 + this times", group=OBJECTIVE)
    updates_per_batch: int = setting(
        1, "updates on the same answers; more than 1 needs a --clip", COUNT, group=OBJECTIVE
    )
    kl_coef: float = setting(0.0, "penalty for leaving the model that the run started from", group=OBJECTIVE)
    is_cap: Maybe[float] = setting(
        None,
        "weigh by policy / sampling distribution, at most this, e.g. 2: corrects for --temperature",
        group=OBJECTIVE,
    )
    device_batch_size: int = setting(
        8, "rows per device in one forward and backward pass", COUNT, resume="free", group=LENGTH
    )
    max_seq_len: Maybe[int] = setting(
        None,
        "tokens in a row of packed answers; default: the model's, or what the longest needs",
        at_least(1),
        group=LENGTH,
    )
    embedding_lr: float = setting(0.2, "AdamW: token and value embeddings, scaled by width", RATE, group=OPTIMIZATION)
    unembedding_lr: float = setting(0.004, "AdamW: lm_head, scaled by width", RATE, group=OPTIMIZATION)
    matrix_lr: float = setting(0.02, "Muon: matrices inside blocks", RATE, group=OPTIMIZATION)
    scalar_lr: float = setting(0.5, "AdamW: residual scalars", RATE, group=OPTIMIZATION)
    weight_decay: float = setting(0.0, "Muon", RATE, group=OPTIMIZATION)
    init_lr_frac: float = setting(0.05, "all rates start at this fraction", RATE, group=OPTIMIZATION)
    schedule: str = setting(
        "linear",
        f"how they fall to 0: {', '.join(RL_SCHEDULES)} (not at all)",
        one_of(*RL_SCHEDULES, words=f"one of {', '.join(RL_SCHEDULES)}"),
        group=OPTIMIZATION,
    )
    warmup_ratio: float = setting(
        0.0, "part of the run over which they rise first", between(0, 1, "from 0 to 1"), group=OPTIMIZATION
    )
    eval_every: int = setting(
        60, "steps between measurements of pass@k on held-out problems (-1 = never)", resume="free", group=EVALUATION
    )
    eval_examples: int = setting(400, "held-out problems", COUNT, resume="free", group=EVALUATION)
    eval_samples: int = setting(8, "answers to each, for pass@1 to pass@8", COUNT, resume="free", group=EVALUATION)
    stop_when_worse: int = setting(
        -1,
        "end the run after so many steps in a row without more than half of what the reward had gained (-1 = never)",
        at_least(1, "at least 1, or -1 for never", also=-1),
        resume="free",
        group=EVALUATION,
    )
    keep_best: bool = setting(
        False,
        "also keep the checkpoint with the best held-out pass@1; --model-step best finds it",
        resume="free",
        group=EVALUATION,
    )
    save_every: int = setting(60, "steps between checkpoints (-1 = only at the end)", resume="free", group=EVALUATION)
    log_rollouts: int = setting(
        2, "problems of each step whose answers rollouts.jsonl keeps", at_least(0), resume="free", group=EVALUATION
    )
