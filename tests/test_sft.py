"""Fine-tuning from the command line to the checkpoint, on a tiny model: what it says, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import sft
from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import start_device
from nanochat_jax.data import conversations
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.metrics import read_metrics
from tests.support import columns, tiny
from tests.support.commands import run_command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("in_base")


@pytest.fixture(scope="module")
def base(base):
    tiny.write_conversations(base / "train.jsonl")
    tiny.write_conversations(base / "val.jsonl", 20, seed=1)
    return base


def arguments(base, tag, *more):
    """Flags of a short run on one device."""
    flags = ["--custom-json", str(base / "train.jsonl"), "--val-json", str(base / "val.jsonl"), "--eval-tokens", "512"]
    return [*tiny.FLAGS, *flags, "--mesh", "data=1", "--output-tag", tag, "--num-iterations", "3", *more]


def run(argv) -> int | str:
    return run_command(sft.main, sft.SFTConfig, *argv)


COMPILING = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def run_alone(base, argv) -> str:
    """What a run in a process of its own prints, with eight devices to choose from. It compiles as the tests do, so
    that those which train at its rates find its train step."""
    command = [sys.executable, "-m", "nanochat_jax.sft", *argv]
    env = {"NANOCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PATH": "/usr/bin:/bin"}
    env |= {name: os.environ[name] for name in COMPILING if name in os.environ}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RATES = ["--matrix-lr", "0.03", "--scalar-lr", "0.25"]  # those of `trained`: the train step is the same


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(folder, output) of a run of 3 steps from the command line with a --config file and an overriding flag."""
    preset = tmp_path_factory.mktemp("preset") / "preset.toml"
    preset.write_text("matrix_lr = 0.5\nsave_every = 2\neval_every = 2\nscalar_lr = 0.25\n")
    argv = arguments(base, "trained", "--config", str(preset), "--matrix-lr", "0.03")
    return base / "chatsft_checkpoints" / "trained", run_alone(base, argv)


def copy_of(trained, tag):
    """The trained run's folder under another tag."""
    folder = trained[0].with_name(tag)
    shutil.copytree(trained[0], folder)
    return folder


def final(folder, step=3):
    return store.read_arrays(folder / str(step), "params")


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# What it says and leaves behind


def test_the_console_tells_what_was_inherited_and_how_the_run_goes(base, trained):
    lines = trained[1].splitlines()
    for line in (
        f"Base model: {base}/base_checkpoints/d2/7",
        "Inherited from the base model: max_seq_len 64, device_batch_size 1, total_batch_size 512, embedding_lr 0.25",
        "NOTE: --matrix-lr=0.03 overrides the 0.01 that the base model was trained with",  # flag > file > checkpoint
        "Using the default of what the base model does not record: unembedding_lr 0.004",
        "Loaded the optimizer state of the base model (rates are this run's own)",
        "Total batch size: 512 tokens, as 8 micro-batches of 1 x 64",
        f"step 00003 | saving {trained[0]}/3",
    ):
        assert line in lines
    text = trained[1]
    assert lines[0].startswith("CPU: ") and " | devices: " in lines[0]
    assert len(lines[: next(i for i, line in enumerate(lines) if line.startswith("Parameters: "))]) < 20
    assert sum(line.startswith("float32, attention chunked, rematerialisation none (") for line in lines) == 1
    assert "WARNING" not in trained[1]  # a CPU has no faster attention
    assert "FLOPs per token: 8.1" in text and "steps: 3" in text
    assert "\x1b" not in text
    steps = [line for line in lines if line.startswith("step 0000") and "loss" in line]
    assert [line[:16] for line in steps] == ["step 00001/00003", "step 00002/00003", "step 00003/00003"]
    for part in ("| loss ", " | lrm 1.000 | ", " tok/s | mfu ", "33.3% | epoch 1"):
        assert part in steps[0]
    assert [line[:20] for line in lines if "val_bpb" in line] == [f"step 0000{k} | val_bpb" for k in (0, 2, 3)]


def test_metrics_say_the_same_as_the_console(trained):
    records = read_metrics(trained[0] / "metrics.jsonl")
    losses = {r["step"]: r for r in records if "loss" in r}
    assert list(losses) == [1, 2, 3]
    assert f"loss {losses[1]['loss']:.4f} |" in trained[1]  # right from step 1
    assert losses[1]["smoothed_loss"] == losses[1]["loss"]
    assert [r["step"] for r in records if "val_bpb" in r] == [0, 2, 3]
    assert losses[3]["percent"] == 100 and losses[3]["epoch"] == 1


def test_every_column_of_metrics_is_told_in_the_documentation(trained):
    assert columns.unknown(trained[0]) == set()


def test_the_checkpoint_records_everything_the_next_step_depends_on(trained):
    folder = trained[0]
    assert integrity.steps(folder) == [2, 3]
    meta = store.read_meta(folder / "3")
    assert (meta["step"], meta["rows_consumed"], meta["total_steps"]) == (3, 24, 3)
    assert meta["attention"] == {"backend": "chunked", "device": "cpu"}
    assert meta["user_config"]["matrix_lr"] == 0.03 and meta["user_config"]["max_seq_len"] == 64
    assert meta["user_config"]["scalar_lr"] == 0.25  # from the file
    assert meta["model_config"]["n_layer"] == 2 and "jax" in meta["versions"]
    assert meta["optimizer_groups"]["matrix"]["lr"] == pytest.approx(0.8 * 0.03)
    assert {"data", "tokenizer", "val_bpb", "smoothed_loss"} <= meta.keys()
    arrays = store.read_arrays(folder / "3", "optimizer")
    assert arrays["count/embedding"] == 10  # 7 of the base model and 3


def test_the_model_can_be_loaded_and_has_learned_something(trained):
    model, _, _ = find.load_model("sft", "trained")
    assert model.config == tiny.CONFIG
    bits = [r["val_bpb"] for r in read_metrics(trained[0] / "metrics.jsonl") if "val_bpb" in r]
    assert bits[2] < bits[0]


def test_a_run_that_is_done_can_be_resumed_and_has_nothing_to_do(base, trained, capsys):
    folder = copy_of(trained, "done")
    assert run(["--resume", "--output-tag", "done", "--mesh", "data=1"]) == 0
    out = capsys.readouterr().out
    assert f"Resuming {folder} from step 3" in out and "All 3 steps are done already" in out
    (line,) = (line for line in out.splitlines() if line.startswith("Inherited from the checkpoint: "))
    assert "num_iterations 3, " in line  # what is not given is the run's own
    assert integrity.steps(folder) == [2, 3]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_whose_output_goes_elsewhere_leaves_the_base_directory_as_it_was(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_OUTPUT_DIR", "")  # is given back afterwards
    before = contents(base)
    assert run(arguments(base, "away", "--output-dir", str(tmp_path / "out"), "--eval-every", "-1", *RATES)) == 0
    assert contents(base) == before
    out = capsys.readouterr().out
    folder = tmp_path / "out" / "chatsft_checkpoints" / "away"
    assert f"The model is in {folder}/3" in out
    assert f"Next: NANOCHAT_BASE_DIR={tmp_path / 'out'} python -m nanochat_jax.chat --model-tag away" in out
    assert any((tmp_path / "out" / "token_cache").iterdir())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("NANOCHAT_OUTPUT_DIR", "")
    model, _, _ = find.load_model("sft")  # with its tokenizer
    assert model.config == tiny.CONFIG


def test_a_run_that_has_ended_can_be_made_longer_as_a_new_stretch_with_a_schedule_of_its_own(base, trained, capsys):
    folder = copy_of(trained, "longer")
    assert run(["--resume", "--output-tag", "longer", "--mesh", "data=1", "--num-iterations", "5"]) == 0
    out = capsys.readouterr().out
    assert "NOTE: --num-iterations=5 overrides the checkpoint's value of 3" in out
    assert "each with its own schedule: steps 0 to 3, 3 to 5" in out
    multipliers = [r["lr_multiplier"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert multipliers[3:] == [1.0, 1.0] and multipliers[2] < 1.0  # it falls in the second half of a stretch
    meta = store.read_meta(folder / "5")
    assert meta["stretches"] == [[0, 3], [3, 5]] and (meta["total_steps"], meta["rows_consumed"]) == (5, 40)
    assert run(["--resume", "--output-tag", "longer", "--mesh", "data=1"]) == 0
    message = run(["--resume", "--output-tag", "longer", "--mesh", "data=1", "--num-iterations", "4"])
    assert "has 5 of 5 steps and cannot be made one of 4" in message


def test_a_damaged_newest_checkpoint_is_named_and_the_run_ends_the_same(base, trained):
    folder = copy_of(trained, "damaged")
    data = next(p for p in (folder / "3" / "params").rglob("*") if p.is_file() and p.stat().st_size > 10_000)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    out = run_alone(base, ["--resume", "--output-tag", "damaged", "--mesh", "data=1", "--eval-every", "-1"])
    assert f"WARNING: checkpoint {folder}/3 is damaged; using the one before it" in out
    assert f"Resuming {folder} from step 2" in out
    assert "NOTE: --eval-every=-1 overrides the checkpoint's value of 2" in out
    assert same(final(folder), final(trained[0]))


def test_resume_auto_without_anything_to_resume_and_overwrite_both_begin_anew(base, trained, capsys):
    message = run(arguments(base, "anew", "--resume", "--eval-every", "-1", *RATES))
    assert "anew has no checkpoint to go on from; the runs that have some, the newest first: " in message
    assert "trained" in message and "or give --resume=auto" in message
    assert run(arguments(base, "anew", "--resume=auto", "--eval-every", "-1", *RATES)) == 0
    assert "anew: a new run" in capsys.readouterr().out
    folder = base / "chatsft_checkpoints" / "anew"
    first = final(folder)
    masked = read_metrics(folder / "metrics.jsonl")
    assert run(arguments(base, "anew", "--overwrite", "--no-document-mask", "--eval-every", "-1", *RATES)) == 0
    assert not same(final(folder), first)
    unmasked = read_metrics(folder / "metrics.jsonl")
    assert len(unmasked) == len(masked) == 3 and unmasked[0]["loss"] != masked[0]["loss"]


def test_a_task_of_the_current_directory_is_trained_on(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_sft_task.py").write_text(
        "class Echo:\n"
        "    def __len__(self):\n        return 30\n"
        "    def __getitem__(self, i):\n"
        "        say = f'number {i}'\n"
        "        return {'messages': [{'role': r, 'content': say} for r in ('user', 'assistant')]}\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [*tiny.FLAGS, "--mesh", "data=1", "--output-tag", "echo", "--task", "my_sft_task:Echo"]
    assert run([*flags, "--num-iterations", "1", *RATES]) == 0
    out = capsys.readouterr().out
    assert "Echo: 30 rows" in out
    assert "NOTE: no validation data" in out and "val_bpb" not in out


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses


def files_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_with_another_runs_checkpoints_is_refused_and_not_touched(base, trained):
    before = files_of(trained[0])
    message = run(arguments(base, "trained"))
    assert "holds checkpoints of another run (steps 2, 3): --resume goes on with it, --overwrite deletes it" in message
    assert "--resume and --overwrite contradict" in run(arguments(base, "trained", "--resume", "--overwrite"))
    assert files_of(trained[0]) == before


def test_overwrite_deletes_nothing_before_everything_else_is_checked(base, trained):
    before = files_of(trained[0])
    assert "must be a multiple" in run(arguments(base, "trained", "--overwrite", "--total-batch-size", "100"))
    assert "does not exist" in run(arguments(base, "trained", "--overwrite", "--custom-json", "no.jsonl"))
    assert files_of(trained[0]) == before


def test_a_folder_of_nanochats_own_is_refused_whatever_the_flags(base):
    folder = base / "chatsft_checkpoints" / "theirs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_000005.pt").write_bytes(b"weights")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert "theirs holds checkpoints of nanochat's own" in run(arguments(base, "theirs", *more))
    assert [p.name for p in folder.iterdir()] == ["model_000005.pt"]


def test_two_processes_do_not_train_in_one_folder(base):
    from filelock import FileLock

    folder = base / "chatsft_checkpoints" / "busy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        assert f"another process is training in {folder}" in run(arguments(base, "busy", "--eval-every", "-1"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--total-batch-size", "100"],
            "must be a multiple of 64 tokens (--device-batch-size=1 x --max-seq-len=64 x 1",
        ),
        (["--total-batch-size", "500"], "nearest: 512"),
        (["--device-batch-size", "0"], "--device-batch-size must be from 1 to 2147483647, got 0"),
        (["--max-seq-len", "1000"], "--max-seq-len=1000 must be at most 640 for this model"),
        (["--num-iterations", "0"], "--num-iterations must be from 1 to 2147483647, or -1 for one epoch, got 0"),
        (["--keep-checkpoints", "0"], "--keep-checkpoints must be at least 1, got 0"),
        (["--warmdown-ratio", "1.5"], "--warmdown-ratio must be between 0 and 1, got 1.5"),
        (["--load-optimizer", "2"], "--load-optimizer must be 0 or 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device-type", "gpus"], "--device-type must be one of auto, cuda, tpu, cpu, got 'gpus'"),
        (["--device-type", "mps"], "use --device-type=cpu"),
        (["--dtype", "float16"], "--dtype must be auto, float32 or bfloat16, got 'float16'"),
        (["--mesh", "data=100"], "--mesh=data=100 needs 100 x 1 devices, got"),
        (["--mesh", "rows=1"], "--mesh must look like data=4,model=2"),
        (["--output-tag", "../../elsewhere"], "must be the name of one folder, got '../../elsewhere'"),
        (["--model-tag", "d9"], "d9 does not exist; tags in"),
        (["--model-step", "8"], "--model-step=8 is not in"),
        (
            ["--smoltalk-epochs", "1"],
            "dataset HuggingFaceTB/smol-smoltalk (subset default, split train) is not on this",
        ),
        (["--task", "nowhere:Task"], "--task nowhere:Task: cannot import nowhere"),
        (["--task", "json"], "or module:Class, got 'json'"),
        (["--custom-epochs", "0"], "the mixture is empty"),
        (["--custom-epochs", "-1"], "--custom-epochs must be from 0 to 1000"),
        (["--smoltalk-epochs", "99999999999999999999"], "--smoltalk-epochs must be from 0 to 1000"),
        (["--num-iterations", "99999999999999999999"], "--num-iterations must be from 1 to 2147483647"),
        (["--total-batch-size", "64000000000000"], "--total-batch-size must be from 1 to 2147483647"),
        (["--matrix-lr", "nan"], "--matrix-lr must be between 0 and 1000, got nan"),
        (["--scalar-lr", "inf"], "--scalar-lr must be between 0 and 1000, got inf"),
        (["--weight-decay", "-1"], "--weight-decay must be between 0 and 1000, got -1"),
        (["--init-lr-frac", "-1"], "--init-lr-frac must be between 0 and 1000, got -1"),
        (["--eval-tokens", "0"], "--eval-tokens must be at least 1 (--eval-every -1 measures nothing), got 0"),
        (["--val-json", "no.jsonl"], "no.jsonl does not exist"),
        (["--task", "sys:exit"], "--task sys:exit: exit() failed, SystemExit"),
        (["--task", "builtins:list"], "--task builtins:list must have from 1 to 2147483647 conversations, it has 0"),
    ],
)
def test_what_cannot_work_is_refused_with_one_sentence_that_names_the_flag(base, flags, words):
    message = run(arguments(base, "refused", *flags))
    assert message.startswith("error: ") and words in message, message
    assert not (base / "chatsft_checkpoints" / "refused").exists()


def test_a_missing_custom_file_is_warned_of_and_refused(base, tmp_path, capsys):
    message = run(arguments(base, "refused", "--custom-json", f"{tmp_path}/identity_conversations.jsonl"))
    assert f"Warning: File {tmp_path}/identity_conversations.jsonl does not exist" in capsys.readouterr().out
    assert "does not exist; to download it: curl" in message


def test_bad_lines_of_a_custom_file_are_listed(base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('[{"role": "user", "content": "hi"}]\n{"role"\n')
    message = run(arguments(base, "refused", "--custom-json", str(bad)))
    assert "2 lines are no conversation" in message and f"{bad}:1:" in message and f"{bad}:2:" in message


def test_a_short_run_tokenizes_what_it_reads_and_ends_as_if_it_had_tokenized_all(base, monkeypatch, capsys):
    many = ["--arithmetic-rows", "20000", *RATES, "--save-every", "2"]
    assert run(arguments(base, "short", *many)) == 0
    assert "Training data, the first 2,000 of 20,060 conversations:" in capsys.readouterr().out
    caches = (base / "token_cache").glob("Arithmetic-*/meta.json")
    assert sum(json.loads(path.read_bytes())["conversations"] for path in caches) < 2500  # with those to validate on
    shutil.rmtree(base / "chatsft_checkpoints/short/3")
    assert run(arguments(base, "short", *many, "--resume")) == 0  # which finds the same data
    monkeypatch.setattr(conversations, "FEWEST", 1 << 30)
    assert run(arguments(base, "long", *many)) == 0
    assert "20,060" not in capsys.readouterr().out.split("Training data")[-1].splitlines()[0]
    finished = {tag: final(base / "chatsft_checkpoints" / tag) for tag in ("short", "long")}
    assert same(finished["short"], finished["long"])

    monkeypatch.setattr(conversations, "FEWEST", 2000)  # a run that began with all data goes on with all
    shutil.rmtree(base / "chatsft_checkpoints/long/3")
    assert run(arguments(base, "long", *many, "--resume")) == 0
    assert same(finished["short"], final(base / "chatsft_checkpoints/long"))


def test_own_files_of_every_kind_are_trained_and_validated_on(tmp_path):
    def turns(value):
        return {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": value}]}

    (tmp_path / "array.json").write_text(json.dumps([turns("a"), turns("")]))
    folder = tmp_path / "mirror" / "o--n" / "default" / "test"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["u"], "completion": ["b"]}), folder / "x.parquet")
    (folder / "manifest.json").write_text('["x.parquet"]')
    files = ["--custom-json", f"{tmp_path}/array.json", "--val-json", "hub:o/n:test"]
    files += ["--data-dir", f"{tmp_path}/mirror"]
    cfg = parse(sft.SFTConfig, [*tiny.FLAGS, *files, "--allow-empty"])
    trained, held_out = sft.training_tasks(cfg), sft.validation_tasks(cfg)
    assert [[c["messages"][1]["content"] for c in task] for task in (*trained, *held_out)] == [["a", ""], ["b"]]
    with pytest.raises(ValueError, match=r"row 2 .line 1.: message 1, the assistant's, is empty"):
        sft.training_tasks(parse(sft.SFTConfig, [*tiny.FLAGS, *files]))


def test_an_empty_file_and_held_out_data_that_nothing_can_be_measured_on_are_refused(base, tmp_path):
    empty, silent = tmp_path / "empty.jsonl", tmp_path / "silent.jsonl"
    empty.write_text("\n")
    talk = [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b"}]
    silent.write_text(json.dumps(talk))
    for flag in ("--custom-json", "--val-json"):
        assert f"{flag} {empty} must hold at least one" in run(arguments(base, "refused", flag, str(empty)))
    only = [*tiny.FLAGS, "--mesh", "data=1", "--output-tag", "refused", "--custom-json", str(base / "train.jsonl")]
    assert "error: validation data: no conversation" in run([*only, "--val-json", str(silent)])
    assert not (base / "chatsft_checkpoints" / "refused").exists()


def test_a_batch_that_no_device_could_hold_is_refused_before_anything_is_allocated(base):
    rows = str(1 << 22)
    message = run(arguments(base, "refused", "--device-batch-size", rows, "--total-batch-size", str(1 << 30)))
    assert "error: the parameters, the optimizer's state and one activation would take" in message
    assert "lower --device-batch-size or --max-seq-len, or use more devices" in message
    assert not (base / "chatsft_checkpoints" / "refused").exists()


@pytest.mark.parametrize(
    ("length", "item", "words"),
    [
        ("10", "return None", "Own, row 0 cannot be rendered"),
        ("10", "return {}[i]", "Own, row 0 cannot be read: KeyError: 0"),
        ("10", "raise SystemExit(3)", "Own, row 0 cannot be read: SystemExit: 3"),
        ("2.5", "return i", "its length and name must be known, TypeError"),
        ("-3", "return i", "its length and name must be known, ValueError"),
        ("10**12", "return i", "must have from 1 to 2147483647 conversations, it has 1000000000000"),
        ("3\n    name = 5 / 0", "return i", "cannot import"),
        ("3\n    def fingerprint(self): return b'x'", "return i", "fingerprint() must return text, TypeError"),
    ],
)
def test_a_task_of_the_users_that_misbehaves_is_a_sentence(base, tmp_path, monkeypatch, length, item, words):
    name = f"own_{tmp_path.name}"
    code = f"class Own:\n    def __getitem__(self, i): {item}\n    def __len__(self): return {length}\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    message = run(arguments(base, "refused", "--task", f"{name}:Own"))
    assert message.startswith("error: ") and words in message, message


def test_a_closed_pipe_ends_without_a_traceback(base):
    command = f"{sys.executable} -m nanochat_jax.sft {' '.join(arguments(base, 'pipe'))} | head -n 1"
    env = {"NANOCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, shell=True, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("error: whoever read the output has closed it") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("settings", [None, "text", {"matrix_lr": float("nan")}, {"device_batch_size": True}])
def test_settings_of_a_base_model_that_are_none_do_not_end_in_a_traceback(tmp_path, monkeypatch, settings):
    tiny.write_nanochat_base(tmp_path)
    tiny.write_conversations(tmp_path / "train.jsonl")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    file = tmp_path / "base_checkpoints" / "d2" / "meta_000007.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"user_config": settings}))
    message = run([*arguments(tmp_path, "refused"), "--total-batch-size", "100", "--max-seq-len", "64"])
    expected = "--matrix-lr must be" if isinstance(settings, dict) and "matrix_lr" in settings else "must be a multiple"
    assert message.startswith("error: ") and expected in message, message


def test_a_tokenizer_of_another_size_or_other_tokens_is_refused(base, tmp_path, monkeypatch):
    shutil.copytree(base / "base_checkpoints", tmp_path / "base_checkpoints")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    made = tiny.tokenizer()
    specials = {name: i + 1 for name, i in made.special_tokens.items()}
    Tokenizer("larger", made.pattern, made.mergeable_ranks | {b"ab": 256}, specials).save(tmp_path / "tokenizer")
    assert (
        f"the tokenizer in {tmp_path} (266 tokens) is not the one that the model was trained with (265 tokens): set"
        in run(arguments(base, "refused"))
    )
    swapped = {bytes([255 - i]): i for i in range(256)}
    Tokenizer("other", made.pattern, swapped, made.special_tokens).save(tmp_path / "tokenizer")
    assert "is not the one that the model was trained with" in run(arguments(base, "refused"))
    shutil.rmtree(tmp_path / "tokenizer")
    assert "no tokenizer.json or tokenizer.pkl" in run(arguments(base, "refused"))


def test_without_a_base_model_the_sentence_says_where_it_was_looked_for(base, tmp_path, monkeypatch):
    shutil.copytree(base / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert f"no base model: {tmp_path}/base_checkpoints does not exist" in run(arguments(base, "refused"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--matrix-lr", "0.05"], "--matrix-lr was 0.03 and is 0.05"),
        (["--scalar-lr", "0.5"], "--scalar-lr was 0.25 and is 0.5"),  # also where it is typed as the default
        (["--warmdown-ratio", "0.3"], "--warmdown-ratio was 0.5 and is 0.3"),
        (["--no-document-mask"], "--document-mask was True and is False"),
    ],
)
def test_a_resumed_run_does_not_change_its_training(base, trained, flags, words):
    message = run(["--resume", "--output-tag", "trained", "--mesh", "data=1", *flags])
    assert words in message and "use another --output-tag" in message


def test_a_resumed_run_does_not_change_its_data(base, trained):
    file = base / "train.jsonl"
    before = file.read_bytes()
    changed = json.dumps([{"role": "user", "content": "new"}, {"role": "assistant", "content": "new"}]).encode()
    try:
        file.write_bytes(before + changed + b"\n")
        message = run(["--resume", "--output-tag", "trained", "--mesh", "data=1"])
    finally:
        file.write_bytes(before)
    assert "the data of" in message and "has changed since step 3" in message


def test_resume_with_nothing_intact_left_says_so(base, trained):
    folder = copy_of(trained, "broken")
    for step in (2, 3):
        (folder / str(step) / "meta" / "data.json").unlink()
    assert "no checkpoint in" in run(["--resume", "--output-tag", "broken", "--mesh", "data=1"])


# ---------------------------------------------------------------------------------------------------------------------
# The command itself


def test_help_is_readable_and_starts_no_device(base):
    env = {"JAX_PLATFORMS": "no_such_platform", "COLUMNS": "100"}
    command = [sys.executable, "-m", "nanochat_jax.sft", "--help"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert "--max-seq-len N           tokens in a row; default: inherited" in done.stdout
    assert "None" not in done.stdout


def test_a_wrong_value_ends_without_a_traceback(base):
    command = [sys.executable, "-m", "nanochat_jax.sft", "--device-type", "mps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: --device-type=mps") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("wanted", [None, "elsewhere"])
def test_compiled_programs_are_kept_in_the_base_directory_or_where_the_user_wants_them(base, monkeypatch, wanted):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if wanted:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", wanted)
    start_device("auto")
    assert changed == ({} if wanted else {"jax_compilation_cache_dir": f"{base}/compilation_cache"})


@pytest.mark.parametrize(("device", "flag"), [("cuda", "--extra cuda13"), ("tpu", "--extra tpu"), ("auto", "setup.sh")])
def test_a_device_that_is_not_there_is_named_with_what_to_install(device, flag, monkeypatch):
    def no_devices():
        raise AssertionError

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(ValueError, match=f"--device-type={device} cannot be started .*{flag}, or choose"):
        start_device(device)
