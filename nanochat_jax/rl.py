"""Reinforcement learning: a chat model gets better at a task whose answers can be judged.

python -m nanochat_jax.rl                                   # GSM8K, from the newest SFT model
python -m nanochat_jax.rl --task my_module:MyTask --num-steps 200 --run my-run
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.checkpoints import find, store
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings
from nanochat_jax.cli.device import choose_attention, compute_dtype, describe_device, start_device
from nanochat_jax.cli.settings import Maybe, StageConfig, require
from nanochat_jax.distributed import mesh as sharding
from nanochat_jax.distributed import processes
from nanochat_jax.distributed import sharding as distributed_sharding
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.signals import Interrupted, Signals
from nanochat_jax.evals.eval_set import EvalSet, judge, make_eval_set
from nanochat_jax.evals.intervals import pass_at_k
from nanochat_jax.files.paths import base_dir
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import SamplingParams, answer_text
from nanochat_jax.model.attention import check as check_attention
from nanochat_jax.optim import schedules as optim
from nanochat_jax.rollouts.batch_shape import plan_shape
from nanochat_jax.rollouts.collector import RESAMPLE_ROUNDS, RolloutCollector
from nanochat_jax.rollouts.log import RolloutLog
from nanochat_jax.rollouts.objective import ADVANTAGES, Objective, make_score
from nanochat_jax.rollouts.prompts import PromptStream
from nanochat_jax.tasks import GSM8K, Arithmetic, SpellingBee, Task, load_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight
from nanochat_jax.train.loop import Loop, Measurement, explaining_memory, session
from nanochat_jax.train.metrics import SmoothedLoss
from nanochat_jax.train.run import Run, check_settings, open_run
from nanochat_jax.train.step import make_train_step, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig):
    """Train a chat model on what its own answers to a task's problems are worth. Defaults are nanochat's."""

    # which model and run
    source: str = "sft"  # stage of the model to start from: sft, rl or base
    model_tag: Maybe[str] = None  # its tag; default: the largest d<number>
    model_step: Maybe[int] = None  # its step; default: the last
    output_tag: Maybe[str] = None  # folder under chatrl_checkpoints; default: the run's name, else d<depth>
    load_optimizer: int = 0  # 1 = start from that model's optimizer state, 0 = from an empty one
    seed: int = 42  # of the sampling, and of the order of the problems from the second epoch on
    # problems and length
    task: str = "gsm8k"  # gsm8k, arithmetic, spelling, or a class of your own with a reward, as module:Class
    eval_task: Maybe[str] = None  # the same for the held-out problems; default: the test split of --task
    data_dir: Maybe[Path] = None  # local mirror of the datasets; default: NANOCHAT_DATA_DIR, else <base dir>/task_data
    num_epochs: int = 1  # times that every problem is met
    num_steps: int = -1  # optimizer steps (-1 = as --num-epochs says)
    # rollouts
    examples_per_step: int = 16  # problems in a step, all devices together
    num_samples: int = 16  # answers to each of them
    max_new_tokens: int = 256  # tokens of an answer, the calculator's included
    temperature: float = 1.0  # of the sampling
    top_k: int = 50  # sample among so many tokens; 0 = all
    resample: bool = False  # draw more problems in place of those whose answers are all worth the same
    slots: int = 256  # answers that are generated together, all devices together
    # objective
    objective: str = "global"  # global = a step's tokens weigh alike; nanochat = its passes, end of turn not trained
    advantage: str = "mean"  # an answer's reward against its problem's others: mean, grpo or rloo
    clip_low: Maybe[float] = None  # a token's probability counts down to 1 - this times that of the sampling; e.g. 0.2
    clip_high: Maybe[float] = None  # and up to 1 + this times
    updates_per_batch: int = 1  # updates on the same answers; more than 1 needs a --clip
    kl_coef: float = 0.0  # penalty for leaving the model that the run started from
    is_cap: Maybe[float] = None  # weigh by policy / sampling distribution, at most this: corrects for top-k; e.g. 2
    device_batch_size: int = 8  # rows per device in one forward and backward pass
    max_seq_len: Maybe[int] = None  # tokens in a row of packed answers; default: the model's, or what the longest needs
    # optimizer
    embedding_lr: float = 0.2  # AdamW: token and value embeddings, scaled by width
    unembedding_lr: float = 0.004  # AdamW: lm_head, scaled by width
    matrix_lr: float = 0.02  # Muon: matrices inside blocks
    scalar_lr: float = 0.5  # AdamW: residual scalars
    weight_decay: float = 0.0  # Muon
    init_lr_frac: float = 0.05  # all rates start at this fraction, and fall to 0
    # evaluation, checkpoints, records
    eval_every: int = 60  # steps between measurements of pass@k on held-out problems (-1 = never)
    eval_examples: int = 400  # held-out problems
    eval_samples: int = 8  # answers to each, for pass@1 to pass@8
    save_every: int = 60  # steps between checkpoints (-1 = only at the end)
    keep_checkpoints: int = 2  # how many of them stay on disk
    log_rollouts: int = 2  # problems of each step whose answers rollouts.jsonl keeps


HARMLESS = {  # what may change when a run is resumed: it alters what is watched and kept, not what is computed
    *("run", "resume", "overwrite", "config", "output_tag", "data_dir", "eval_every", "eval_examples", "eval_samples"),
    *("eval_task", "save_every", "keep_checkpoints", "log_rollouts", "device_type", "mesh", "replicate"),
    *("device_batch_size", "slots", "remat"),
}
MADE_UP = 100_000  # training problems of a task that makes them up
TASKS = {  # name -> (split, problems if made up, data_dir) -> task
    "gsm8k": lambda split, size, data_dir: GSM8K(split, data_dir=data_dir),
    "arithmetic": lambda split, size, data_dir: Arithmetic(split, size, seed=int(split == "train")),  # not SFT's
    "spelling": lambda split, size, data_dir: SpellingBee(split, size, data_dir=data_dir),
}
MUON_MOMENTUM = 0.95  # nanochat has no schedule for it in RL
EVAL_STEP = -1  # in place of the step in the sampling's seeds: every evaluation draws alike, and as no step does
ADVICE = "Lower --slots and --device-batch-size first, which change no result, then --max-new-tokens"


def check(cfg: RLConfig) -> SamplingParams:
    """How to sample. ValueError for a setting that cannot work whatever the model and the problems are."""
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "init_lr_frac")
    counts = ("num_epochs", "examples_per_step", "eval_examples", "eval_samples", "slots", "device_batch_size")
    rules = (
        ("source", cfg.source in store.SOURCES, "sft, rl or base"),
        ("load_optimizer", cfg.load_optimizer in (0, 1), "0 or 1"),
        ("num_steps", cfg.num_steps == -1 or 1 <= cfg.num_steps < 2**31, "at least 1, or -1 for --num-epochs"),
        *((name, 1 <= getattr(cfg, name) <= 65536, "from 1 to 65536") for name in (*counts, "updates_per_batch")),
        ("num_samples", 2 <= cfg.num_samples <= 65536, "from 2 to 65536, as answers are compared with each other"),
        ("temperature", cfg.temperature > 0, "above 0: else all answers to a problem are the same"),
        ("log_rollouts", cfg.log_rollouts >= 0, "at least 0"),
        ("seed", cfg.seed < 2**31, "below 2147483648"),
        ("max_seq_len", cfg.max_seq_len is None or 1 <= cfg.max_seq_len < 2**31, "at least 1"),
        ("objective", cfg.objective in ("global", "nanochat"), "global or nanochat"),
        ("advantage", cfg.advantage in ADVANTAGES, f"one of {', '.join(ADVANTAGES)}"),
    )
    check_settings(cfg, rules, (), rates)
    clips = objective_of(cfg).clips
    require(
        clips or cfg.updates_per_batch == 1,
        f"--updates-per-batch={cfg.updates_per_batch} goes on with answers of an older policy: bound how far with "
        "--clip-low 0.2 --clip-high 0.2",
    )
    return SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens)


def objective_of(cfg: RLConfig) -> Objective:
    return Objective(**{name: getattr(cfg, name) for name in ("clip_low", "clip_high", "kl_coef", "is_cap")})


def main(cfg: RLConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n."""
    check(cfg)
    if cfg.preflight is not None:
        return fits(cfg)
    start_device(cfg.device_type, cfg)
    mesh = sharding.make_mesh(cfg.mesh or "")
    describe_device(mesh, print0)

    # The run: a new one from a chat model, or one to go on with
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    run = open_rl_run(cfg, tokenizer)
    cfg = run.cfg
    sampling = check(cfg)  # also what a checkpoint recorded
    check_attention(cfg.attention, mesh, packed=True)
    dtype = compute_dtype(cfg.dtype)

    # Problems: every prompt through the tokenizer, so that all sizes are known before anything is compiled
    with processes.process_zero_first("the problems"):
        task = make_task("--task", cfg.task, "train", MADE_UP, cfg.data_dir)
    run.check_data(task.fingerprint())
    total = cfg.num_steps if cfg.num_steps > 0 else len(task) // cfg.examples_per_step * cfg.num_epochs
    require(total > 0, f"{task.name} has {len(task)} problems, fewer than --examples-per-step={cfg.examples_per_step}")
    draws = total * cfg.examples_per_step * (RESAMPLE_ROUNDS if cfg.resample else 1)
    exercises = PromptStream(task, tokenizer, cfg.seed, draws)
    with processes.process_zero_first("the held-out problems"):
        paper = held_out(cfg, tokenizer)
    run.load(print0)
    mesh = sharding.make_mesh(cfg.mesh or "", n_embd=run.model_config.n_embd)
    longest = max([exercises.longest, *(len(prompt) for prompt in paper.prompts)] if paper else [exercises.longest])
    check_context(longest, cfg.max_new_tokens, run.model_config.sequence_len)
    shape = plan_shape(cfg, mesh, longest + cfg.max_new_tokens, run.model_config.sequence_len)
    print0(
        f"{task.name}: {len(task):,} problems, {cfg.examples_per_step} a step with {cfg.num_samples} answers each; the "
        f"longest prompt has {longest:,} tokens; answers are packed into at most {shape.micro_batches} x {shape.rows} "
        f"rows of {shape.T:,} tokens"
    )

    # Model, engine and loop
    where = {"dtype": dtype}
    where["attention"] = choose_attention(cfg.attention, run.model_config, shape.T, mesh=mesh, **where)
    sizes = {name: getattr(cfg, name) for name in ("slots", "device_batch_size", "max_new_tokens")}
    with explaining_memory(sizes, ADVICE), session(run, mesh, dtype, total, shape.T, shape.rows_per_device(mesh)) as on:
        objective = objective_of(cfg)
        how = where | {"remat": on.remat, "logprobs": True, "per_micro_batch": cfg.objective == "nanochat"}
        reference, score = None, None
        if cfg.kl_coef:
            params, reference = starting_model(cfg, run.record, on.abstract.params)
            score = functools.partial(make_score(run.model_config, params, mesh, **where), params)
        signals = Signals()
        own, slots = sharding.own_devices(mesh), max(1, cfg.slots // processes.count())
        practice = RolloutCollector(
            cfg=cfg,
            exercises=exercises,
            tokenizer=tokenizer,
            engine=Engine(run.model_config, tokenizer, own, **where, slots=slots, prompt_tokens=longest),
            sampling=sampling,
            objective=objective,
            shape=shape,
            mesh=mesh,
            update=make_train_step(run.model_config, on.tx, on.abstract, mesh, token_loss=objective.token_loss, **how),
            score=score,
            log=RolloutLog(run.folder, run.record.get("rollouts_bytes", 0)),
            reporter=on.reporter,
            signals=signals,
            total=total,
            position=run.record.get("problems_consumed", 0),
            without_signal=run.record.get("steps_without_signal", 0),
            smoothed=SmoothedLoss(0.9, *run.record.get("smoothed_reward", ())),
        )
        place = {"data": task.fingerprint(), "reference": reference}
        with contextlib.closing(practice.log):
            received = Loop(
                train_step=practice.train_step,
                next_batch=practice.next_batch,
                total=total,
                schedule=lambda step: (optim.rl_lr_multiplier(step, total), MUON_MOMENTUM),
                measurements=[examination(cfg, paper, practice)],
                saver=on.saver,
                save_every=cfg.save_every,
                meta=lambda step: run.meta(total) | place | practice.saved(),
                log=on.log,
                reporter=on.reporter,
                report=practice.report,
                report_late=False,
                skipped=run.record.get("skipped", 0),
                signals=signals,
            ).run(on.state)
    return 128 + received if received else 0


def fits(cfg: RLConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    place = preflight.start(cfg)

    def go_on():
        return open_rl_run(cfg, Tokenizer.load(base_dir() / "tokenizer"))

    model, cfg = preflight.model_for(cfg, cfg.source, {}, go_on)
    longest = preflight.PROMPT_TOKENS + cfg.max_new_tokens
    print0(f"NOTE: without data, prompts of up to {preflight.PROMPT_TOKENS} tokens are assumed")
    shape = plan_shape(cfg, place.mesh, longest, model.sequence_len)
    needed = {"logprobs": cfg.is_cap is not None, "reference_logprobs": cfg.kl_coef > 0}
    needed |= {"advantages": True, "old_logprobs": cfg.updates_per_batch > 1}
    fields = tuple(name for name, needs in needed.items() if needs)
    batch = preflight.Batch(shape.micro_batches, shape.rows, shape.T, fields)
    compiler = preflight.Compiler(cfg, place, model, batch, packed=True)
    how = {"token_loss": objective_of(cfg).token_loss, "per_micro_batch": cfg.objective == "nanochat"}
    rollouts = preflight.Rollouts(cfg.examples_per_step, cfg.num_samples, cfg.slots, cfg.max_new_tokens)
    extra = {"reference model": compiler.parameter_bytes} if cfg.kl_coef else {}
    phases = (
        preflight.rollout_phase(compiler, rollouts, extra),
        preflight.update_phase(compiler, extra, logprobs=True, **how),
    )
    return preflight.report(compiler.place, model, phases)


def open_rl_run(cfg: RLConfig, tokenizer: Tokenizer) -> Run:
    """The run, with the model that it started from in its settings; ValueError where that would be overwritten."""
    run = open_run(cfg, "rl", tokenizer, HARMLESS, {}, print0, source=cfg.source)
    if run.resumed:
        recorded = run.record["user_config"]["device_batch_size"]
        require(
            run.cfg.objective != "nanochat" or run.cfg.device_batch_size == recorded,
            f"--resume: with --objective nanochat the training depends on --device-batch-size, which was {recorded}",
        )
        return run
    require(
        run.base.folder.resolve() != run.folder.resolve(),
        f"{run.base} is the model to start from: choose another folder for this run with --output-tag",
    )
    started = {"model_tag": run.base.tag, "model_step": run.base.step}
    return dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, **started))


def make_task(flag: str, name: str, split: str, size: int, data_dir: Path | None) -> Task:
    """The task that the flag names; ValueError: there is none."""
    if ":" in name:
        return load_task(name, flag)
    near = "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name.lower(), TASKS, 1))
    require(name in TASKS, f"{flag} must be one of {', '.join(TASKS)}, or module:Class, got {name!r:.60}{near}")
    return TASKS[name](split, size, data_dir)


def held_out(cfg: RLConfig, tokenizer: Tokenizer) -> EvalSet | None:
    """The held-out problems; None where there is nothing to measure."""
    if cfg.eval_every < 1:
        return None
    if ":" in cfg.task and cfg.eval_task is None:
        print0("NOTE: no held-out problems, pass@k is not measured (give --eval-task)")
        return None
    task = make_task("--eval-task", cfg.eval_task or cfg.task, "test", cfg.eval_examples, cfg.data_dir)
    paper = make_eval_set(task.name, task, tokenizer, cfg.eval_examples)
    require(paper.letters is None, f"--eval-task {task.name} is multiple choice, pass@k is of generated answers")
    return paper


def check_context(longest: int, max_new_tokens: int, sequence_len: int) -> None:
    """ValueError where the longest prompt does not fit with its answer."""
    context = 10 * sequence_len
    require(
        longest + max_new_tokens <= context,
        f"the longest prompt has {longest:,} tokens and --max-new-tokens={max_new_tokens} more may follow, but the "
        f"model's context ends at {context:,}",
    )
    if longest + max_new_tokens > sequence_len:
        print0(
            f"NOTE: prompts of up to {longest:,} tokens with --max-new-tokens={max_new_tokens} go beyond the "
            f"{sequence_len:,} tokens that the model was trained on"
        )


def starting_model(cfg: RLConfig, record: dict, like: Any) -> tuple[Any, str]:
    """(parameters on the shardings of `like`, their sha256) of the model that the run started from.

    ValueError: a run that goes on does not find it again as it was."""
    try:
        _, params, _ = find.load_params(find.find_model(cfg.source, cfg.model_tag, cfg.model_step))
    except FileNotFoundError as e:
        raise ValueError(f"--kl-coef needs the model that the run started from: {e}") from e
    digest = hashlib.sha256()
    for name, leaf in sorted(distributed_sharding.flatten_by_path(params).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    require(
        record.get("reference") in (None, digest.hexdigest()),
        f"--kl-coef needs the model that the run started from, but {cfg.source} {cfg.model_tag}, step "
        f"{cfg.model_step}, is another one now",
    )
    return place(params, like), digest.hexdigest()


def examination(cfg: RLConfig, paper: EvalSet | None, practice: RolloutCollector) -> Measurement:
    """pass@k on the held-out problems, k = 1..--eval-samples, with 95 % intervals as pass@k_low and pass@k_high."""
    if paper is None:
        return Measurement(-1, lambda params: {})

    def progress(done, total):
        practice.signals.check()
        practice.reporter.doing(f"held-out answers {done:,}/{total:,}")

    def measure(params):
        how = {"samples": cfg.eval_samples, "seed": cfg.seed, "step": EVAL_STEP, "progress": progress}
        numbers = processes.mine(range(len(paper.prompts)))
        try:
            with practice.engine.holding(params, practice.mesh):
                prompts = [paper.prompts[i] for i in numbers]
                groups = practice.engine.generate(prompts, practice.sampling, examples=numbers, **how)
            passed = [
                [judge(paper, i, answer_text(practice.tokenizer, sample)) for sample in group]
                for i, group in zip(numbers, groups)
            ]
        except Interrupted:
            passed = None
        parts = processes.exchange("held-out answers", passed)
        if None in parts:
            raise Interrupted
        passed = [None] * len(paper.prompts)
        for i, part in enumerate(parts):
            passed[i :: len(parts)] = part
        shares = pass_at_k(passed)
        found = {f"pass@{k}": share.value for k, share in shares.items()}
        return found | {
            f"pass@{k}_{end}": getattr(share, end) for k, share in shares.items() for end in ("low", "high")
        }

    def shown(found):
        return " | ".join(
            f"pass@{k} {found[f'pass@{k}']:.1%} ({found[f'pass@{k}_low']:.1%} to {found[f'pass@{k}_high']:.1%})"
            for k in sorted({1, cfg.eval_samples})
        )

    return Measurement(cfg.eval_every, measure, at_start=True, shown=shown)


if __name__ == "__main__":
    cli_main.run_stage(main, settings.parse(RLConfig, prog="python -m nanochat_jax.rl"))
