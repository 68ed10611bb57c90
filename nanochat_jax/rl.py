"""Reinforcement learning: a chat model gets better at a task whose answers can be judged.

Its settings, with examples: flags/rl.py."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Mapping

from jax.sharding import Mesh

from nanochat_jax.checkpoints.find import BEST_BY
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import describe_device, start_device
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.cli.waiting import saying
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.device_memory import bytes_on_device, check_room
from nanochat_jax.distributed.mesh import make_mesh, own_devices
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.eval_set import EvalSet, make_eval_set
from nanochat_jax.files.paths import write_to
from nanochat_jax.flags.rl import RLConfig
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import make_toolbox
from nanochat_jax.model.attention import check_attention_backend
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import NO_LIMITS, Limits
from nanochat_jax.optim.groups import Groups
from nanochat_jax.optim.schedules import rl_scalars
from nanochat_jax.rollouts.collector import RESAMPLE_ROUNDS, RolloutCollector
from nanochat_jax.rollouts.log import RolloutLog
from nanochat_jax.rollouts.objective import Objective, make_score
from nanochat_jax.rollouts.pass_at_k import pass_at_k_measurement
from nanochat_jax.rollouts.prompts import PromptStream, check_context
from nanochat_jax.rollouts.reference import load_reference
from nanochat_jax.rollouts.statistics import FIRST_STEPS, far_apart, little_signal
from nanochat_jax.rollouts.update import make_update, rl_batch_shape, rows_of, token_loss_of
from nanochat_jax.rollouts.watch import warnings, watch_of
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import preflight
from nanochat_jax.train.base_model import run_tokenizer
from nanochat_jax.train.loop import exit_code, open_run
from nanochat_jax.train.plan import Plan, make_plan
from nanochat_jax.train.start import Start, find_start, fine_tuning_groups, initial_state

TRAINING_PROBLEMS = 100_000  # of a task that makes them up
MEMORY_ADVICE = "Lower --slots and --device-batch-size first, which change no result, then --max-new-tokens"


def main(cfg: RLConfig) -> int:
    """Train -> the exit code: 0, or 128 + n after signal n; of --preflight 0 where it fits, else 1."""
    check(cfg)
    if cfg.preflight is not None:
        return preflight_of(cfg)
    write_to(cfg.output_dir)
    start_device(cfg.device_type, cfg)
    mesh = make_mesh(cfg.mesh or "")
    describe_device(mesh, print0)

    # The run: a new one from a chat model, or one to go on with
    tokenizer = run_tokenizer(cfg)
    start = find_rl_start(cfg, tokenizer)
    cfg = start.cfg
    sampling = check(cfg)  # also what a checkpoint recorded
    check_attention_backend(cfg.attention, mesh, packed=True)
    tools = make_toolbox(cfg.tool, cfg.tool_tokens)

    # Problems: every prompt through the tokenizer, so that all sizes are known before anything is compiled
    with processes.process_zero_first("the problems"):
        task = make_task(cfg.task, "train", TRAINING_PROBLEMS, cfg.data_dir, flag="--task")
    task_digest = task.fingerprint()
    processes.agree("the task", {"task": task_digest})  # also how each rewards
    total = cfg.num_steps if cfg.num_steps > 0 else len(task) // cfg.examples_per_step * cfg.num_epochs
    require(total > 0, f"{task.name} has {len(task)} problems, fewer than --examples-per-step={cfg.examples_per_step}")
    stretches = start.stretches(total, lambda first, last: first, "num_steps", print0)  # rates fall from the first step
    step_draws = cfg.examples_per_step * (RESAMPLE_ROUNDS if cfg.resample else 1)
    prompts = PromptStream(task, tokenizer, cfg.seed, total * step_draws)
    start.check_data(prompts.fingerprint(start.record.get("total_steps", total) * step_draws))
    if start.resumed and start.record.get("task_digest") != task_digest:
        print0(
            f"NOTE: the data or the source of {task.name} has changed since step {start.first_step}; its prompts are "
            "the same, its rewards may be others"
        )
    with processes.process_zero_first("the held-out problems"):
        eval_set = held_out(cfg, tokenizer)
    model = start.model_config()
    longest = max(map(len, [*prompts.prompts, *(eval_set.prompts if eval_set else [])]))
    check_context(longest, cfg.max_new_tokens, model.sequence_len)
    mesh = make_mesh(cfg.mesh or "", n_embd=model.n_embd)
    plan = plan_of(cfg, model, mesh, longest, start.recorded_groups(), start.recorded_attention())
    flags = f"--examples-per-step={cfg.examples_per_step} or --num-samples={cfg.num_samples}"
    check_room("the batch of a step", bytes_on_device(plan.abstract_batch), mesh.local_devices[0], flags)
    print0(
        f"{task.name}: {len(task):,} problems, {cfg.examples_per_step} a step with {cfg.num_samples} answers each; the "
        f"longest prompt has {longest:,} tokens; answers are packed into at most {plan.batch.micro_batches} x "
        f"{plan.batch.rows} rows of {plan.batch.T:,} tokens"
    )

    # Model, engine, and what is done with its answers
    with saying("placing the model on the devices"):
        initial = initial_state(start, plan, print0)
    plan = initial.plan
    objective = objective_of(cfg)
    reference, score = None, None
    if cfg.kl_coef:
        with plan.scope():
            params, reference = load_reference(
                cfg.source,
                cfg.model_tag,
                cfg.model_step,
                start.record.get("reference"),
                plan.abstract_state.params,
                base=start.started_from,
            )
        score = functools.partial(
            make_score(plan.model, params, plan.mesh, dtype=plan.dtype, attention=plan.attention), params
        )
    engine = Engine(
        plan.model,
        tokenizer,
        own_devices(plan.mesh),
        dtype=plan.dtype,
        attention=plan.attention,
        slots=max(1, cfg.slots // processes.count()),
        tools=tools,
        prompt_tokens=longest,
    )
    collector = RolloutCollector(
        prompts=prompts,
        engine=engine,
        mesh=plan.mesh,
        sampling=sampling,
        examples_per_step=cfg.examples_per_step,
        num_samples=cfg.num_samples,
        advantage=cfg.advantage,
        cut_answers=cfg.cut_answers,
        max_turns=cfg.max_turns,
        seed=cfg.seed,
        resample=cfg.resample,
    )
    update = make_update(plan, objective, updates_per_batch=cfg.updates_per_batch, score=score)
    pass_at_k = pass_at_k_measurement(
        eval_set,
        engine,
        plan.mesh,
        sampling,
        tokenizer,
        samples=cfg.eval_samples,
        seed=cfg.seed,
        every=cfg.eval_every,
        cut_answers=cfg.cut_answers,
        max_turns=cfg.max_turns,
    )

    # Train. Beside the state, a step depends on the position of its first problem; a checkpoint keeps it.
    position = start.record.get("problems_consumed", 0)
    without_signal = start.record.get("steps_without_signal", 0)
    first_steps: list[tuple[float, float]] = []
    warned = False
    watch, told = watch_of(start.record.get("watch", {})), set()
    log = RolloutLog(start.folder, start.record.get("rollouts_bytes", 0))

    def record(step: int) -> dict:
        return {
            "data": prompts.fingerprint(),
            "task_digest": task_digest,
            "stretches": stretches,
            "reference": reference,
            "problems_consumed": position,
            "steps_without_signal": without_signal,
            "rollouts_bytes": log.saved(),
            "watch": watch.record(),
        }

    with (
        contextlib.closing(log),
        open_run(
            start,
            initial,
            total=total,
            record=record,
            console=console_line,
            measurements=[pass_at_k],
            smoothed="reward",
            keep_best=BEST_BY if cfg.keep_best else None,
            log_late=False,  # the next step's answers wait for this one anyway
            in_force={name: getattr(cfg, name) for name in ("slots", "device_batch_size", "max_new_tokens")},
            advice=MEMORY_ADVICE,
        ) as run,
    ):
        for step, state in run.steps():
            rollouts = collector.collect(state.params, position, step, run.progress("answers"))
            kept = rollouts.groups[: cfg.log_rollouts]
            answers = [row for group in kept for row in log.write(step + 1, group, tokenizer.decode)]
            run.log.table(step + 1, "rollouts", answers)
            began = time.perf_counter()
            groups = rollouts.to_train_on(cfg.examples_per_step)
            rows = rows_of(groups, plan, objective, cfg.objective, tokenizer)
            first, last = stretches[-1]
            scalars = rl_scalars(step - first, last - first, schedule=cfg.schedule, warmup_ratio=cfg.warmup_ratio)
            state, metrics, statistics = update(state, rows, scalars)
            seconds = time.perf_counter() - began
            position = rollouts.position
            without_signal += rows is None
            found = rollouts.statistics() | statistics
            run.record(
                state,
                metrics,
                lr_multiplier=scalars["lr_multiplier"],
                epoch=1 + (position - 1) // prompts.size,
                update_seconds=seconds,
                update_tokens_per_second=float(metrics.tokens) / seconds,
                steps_without_signal=without_signal,
                compiles=engine.compiles,
                **found,
            )
            if not warned and (warning := far_apart(found, plan.dtype.name)):
                run.say(warning)
                warned = True
            first_steps.append((1 - found["no_signal"], found["pass_rate"]))
            if step + 1 == FIRST_STEPS:
                run.say(little_signal(first_steps))
            watch = watch.after(found)
            for what, sentence in warnings(watch, plan.dtype.name, cfg.cut_answers).items():
                if what not in told:
                    run.say(f"WARNING: step {step + 1}: {sentence}")
                    told.add(what)
            if watch.worse == cfg.stop_when_worse:
                watch = watch._replace(worse=0)
                run.end(f"for {cfg.stop_when_worse} steps more than half of what the reward had gained was lost")
    return exit_code(run)


def plan_of(
    cfg: RLConfig,
    model: GPTConfig,
    mesh: Mesh,
    longest: int,
    groups: Groups | None = None,
    attention: Mapping[str, str] | None = None,
) -> Plan:
    """What is compiled for these settings; longest: tokens of the longest prompt; groups: of the optimizer, default: as
    the settings say. ValueError: sizes that do not fit together."""
    return make_plan(
        cfg,
        model,
        mesh,
        batch=rl_batch_shape(cfg, mesh, longest + cfg.max_new_tokens, model.sequence_len),
        loss=token_loss_of(objective_of(cfg), cfg.objective),
        scalars=tuple(rl_scalars(0, 1)),
        groups=groups or fine_tuning_groups(cfg, model, abstract_gpt(model)[1]),
        attention=attention,
        packed=True,
        logprobs=True,
    )


def preflight_of(cfg: RLConfig) -> int:
    """--preflight -> the exit code: 0 where it fits, else 1."""
    devices = preflight.start(cfg)
    model, cfg = preflight.model_for(cfg, cfg.source, lambda: find_rl_start(cfg, run_tokenizer(cfg)))
    print0(f"NOTE: without data, prompts of up to {preflight.PROMPT_TOKENS} tokens are assumed")
    plan = plan_of(cfg, model, make_mesh(cfg.mesh or "", devices, model.n_embd), preflight.PROMPT_TOKENS)
    answers = {"rollouts": preflight.Answers(cfg.examples_per_step, cfg.num_samples, cfg.slots, cfg.max_new_tokens)}
    if cfg.eval_every > 0:
        held_out = preflight.Answers(cfg.eval_examples, cfg.eval_samples, cfg.slots, cfg.max_new_tokens)
        answers["held-out answers"] = held_out
    extra = {"reference model": bytes_on_device(plan.abstract_state.params)} if cfg.kl_coef else {}
    updated = cfg.updates_per_batch > 1  # the later updates need most
    last = dataclasses.replace(plan, loss=token_loss_of(objective_of(cfg), cfg.objective, updated))
    advice = f"lower --slots (now {cfg.slots}) or --max-new-tokens"
    phases = [preflight.generation_phase(name, plan, sizes, advice, extra) for name, sizes in answers.items()]
    return preflight.report(plan, [*phases, preflight.update_phase(last, extra)])


def check(cfg: RLConfig) -> SamplingParams:
    """How to sample. ValueError for a setting that cannot work whatever the model and the problems are."""
    check_bounds(cfg)
    require(
        objective_of(cfg).clips or cfg.updates_per_batch == 1,
        f"--updates-per-batch={cfg.updates_per_batch} goes on with answers of an older policy: bound how far with "
        "--clip-low 0.2 --clip-high 0.2",
    )
    return SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens)


def objective_of(cfg: RLConfig) -> Objective:
    """The terms of the loss that the settings ask for."""
    return Objective(
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        kl_coef=cfg.kl_coef,
        is_cap=cfg.is_cap,
        limits=Limits(cfg.temperature, cfg.top_k) if cfg.policy == "truncated" else NO_LIMITS,
    )


def find_rl_start(cfg: RLConfig, tokenizer: Tokenizer) -> Start:
    """The run, with the model that it started from in its settings; ValueError where that would be overwritten."""
    start = find_start(cfg, "rl", tokenizer, print0, source=cfg.source)
    if start.resumed:
        recorded = start.record["user_config"]["device_batch_size"]
        require(
            start.cfg.objective != "nanochat" or start.cfg.device_batch_size == recorded,
            f"--resume: with --objective nanochat the training depends on --device-batch-size, which was {recorded}",
        )
    return start


def held_out(cfg: RLConfig, tokenizer: Tokenizer) -> EvalSet | None:
    """The held-out problems; None where there is nothing to measure."""
    if cfg.eval_every < 1:
        return None
    if ":" in cfg.task and cfg.eval_task is None:
        print0("NOTE: no held-out problems, pass@k is not measured (give --eval-task)")
        return None
    task = make_task(cfg.eval_task or cfg.task, "test", cfg.eval_examples, cfg.data_dir, flag="--eval-task")
    eval_set = make_eval_set(task.name, task, tokenizer, cfg.eval_examples)
    require(eval_set.letters is None, f"--eval-task {task.name} is multiple choice, pass@k is of generated answers")
    return eval_set


def console_line(record: Mapping[str, float]) -> str:
    """The console's line of a step."""
    updated = "delta_logp_mean" in record
    return (
        f"reward {record['reward']:.3f} (smoothed {record['smoothed_reward']:.3f}) | rewarded "
        f"{record['pass_rate']:.1%} | signal "
        f"{1 - record['no_signal']:.0%} | length {record['length_mean']:.0f} | "
        f"{f'dlogp {record["delta_logp_mean"]:.0e}' if updated else 'no signal, no update'} | "
        f"lrm {record['lr_multiplier']:.3f} | rollout {record['rollout_tokens_per_second']:,.0f} tok/s "
        f"{record['rollout_seconds']:.1f} s, update {record['update_seconds']:.1f} s | {record['percent']:.1f}%"
    )


if __name__ == "__main__":
    cli_main.run_stage(main, parse(RLConfig, prog="python -m nanochat_jax.rl"))
