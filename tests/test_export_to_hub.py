"""nanochat_export --format hf and --push: a folder that is whole or not there, a card, and an upload that asks first.

Run: python -m pytest tests/test_export_to_hub.py
"""

import base64
import contextlib
import json
import os
import pty
import subprocess
import sys
import time

import pytest
import yaml
from huggingface_hub import constants

from nanochat_jax import nanochat_export
from nanochat_jax.checkpoints import find
from nanochat_jax.checkpoints.store import write
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files import safetensors_write
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.interop import transformers_model
from nanochat_jax.interop.nanochat_model import ERAS
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.nanochat_export import ExportConfig
from nanochat_jax.reports.model_card import Described, model_card
from tests.reports.folders import result
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.loopback import Answer, isolate, servers, use_hub
from tests.support.models import random_params

REPO = "me/small-model"
OURS = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
OURS |= {"tokenizer.json", "tokenizer_config.json"}
CODE = "modeling_nanochat_jax.py"


@pytest.fixture
def folder(base, monkeypatch, tmp_path):
    """A base directory with a model; no token, hub or terminal of this machine."""
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base


def run(*argv) -> int | str:
    return run_command(nanochat_export.main, ExportConfig, "--format", "hf", *argv)


# ----------------------------------------------------------------------------------------------------------- the folder
def test_the_folder_has_the_files_of_a_repository_and_code_only_where_the_library_lacks_it(
    folder, tmp_path, monkeypatch
):
    assert run("--output", tmp_path / "out/new") == 0
    made = {path.name for path in (tmp_path / "out/new").iterdir()}
    assert made == OURS | {CODE} and list((tmp_path / "out").iterdir()) == [tmp_path / "out/new"]
    config, params = transformers_model.read_model(tmp_path / "out/new")
    want_config, want, _ = find.load_params(find.find_model("base", base=folder))
    assert config == want_config
    assert all((flatten_by_path(params)[path] == array).all() for path, array in flatten_by_path(want).items())
    of_2025 = GPTConfig(**vars(tiny.CONFIG) | ERAS["A"].fields | {"windows": (-1, -1)})
    tiny.write_base(tmp_path / "old", config=of_2025)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "old"))
    (tmp_path / "empty").mkdir()
    assert run("--output", tmp_path / "empty", "--dtype", "bfloat16") == 0
    assert {path.name for path in (tmp_path / "empty").iterdir()} == OURS
    config = json.loads((tmp_path / "empty/config.json").read_text())
    assert config["architectures"] == ["NanoChatForCausalLM"] and config["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "empty/generation_config.json").read_text())
    assert generation["eos_token_id"] == [260, 256]  # nanochat ends at a new text too


def test_a_folder_for_transformers_is_talked_to_and_becomes_nanochats_files_again(folder, tmp_path):
    assert run("--output", tmp_path / "m") == 0
    assert run("--base", tmp_path / "m", "--format", "nanochat", "--output", tmp_path / "theirs") == 0
    (file,) = (tmp_path / "theirs/base_checkpoints/d2").glob("*.pt")  # it had no optimizer state
    want, again = (find.load_params(find.find_model("base", base=base)) for base in (folder, tmp_path / "theirs"))
    assert file.name == "model_000000.pt" and again[0] == want[0]
    assert all((flatten_by_path(again[1])[path] == array).all() for path, array in flatten_by_path(want[1]).items())
    short = SamplingParams(temperature=0.0, max_new_tokens=8)
    ours, theirs = (find.load_chat_model("base", base=base).answer("Hi", short) for base in (folder, tmp_path / "m"))
    assert ours == theirs != ""


def test_what_is_there_is_never_touched_and_a_failure_leaves_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    assert "must be new or empty for --format=hf: choose another with --output" in run("--output", tmp_path / "mine")
    assert f"{tmp_path}/mine/file is not a folder" in run("--output", tmp_path / "mine/file")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine"]

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors_write, "write_safetensors", full)
    assert run("--output", tmp_path / "out/new") == "error: No space left on device"
    assert list((tmp_path / "out").iterdir()) == []


def test_flags_that_do_not_go_together_end_in_one_sentence(folder, tmp_path):
    out = ("--output", tmp_path / "out")
    for argv, match in (
        (("--ranks", "2"), "--ranks=2: --format=hf has no optimizer's state"),
        (("--output-tag", "x"), "--output-tag: with --format=hf, --output is the model's own folder"),
        (("--push", REPO, "--format", "nanochat"), "--push uploads what --format=hf writes: add it"),
        (("--push", REPO), "--push=me/small-model asks before it uploads, and there is no terminal: add --yes"),
        (("--push", "model", "--yes"), "--push must be OWNER/NAME, got 'model'"),
        (("--push", "a/b/c", "--yes"), "--push must be OWNER/NAME: "),
        (("--push", "me/my model", "--yes"), "--push must be OWNER/NAME: "),
        (("--push", REPO, "--yes"), "cannot be uploaded without a token: set HF_TOKEN, or hf auth login"),
        (("--format", "gguf"), "--format must be nanochat or hf"),
    ):
        message = run(*out, *argv)
        assert message.startswith("error: ") and match in message and "\n" not in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- the card
def front_matter(text):
    begin, yaml_text, body = text.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(yaml_text), body


def test_the_card_tells_stage_data_steps_and_what_was_measured_and_no_place_of_the_machine(tmp_path, monkeypatch):
    settings = {"smoltalk_epochs": 1, "mmlu_epochs": 0, "gsm8k_epochs": 2, "custom_epochs": 3, "matrix_lr": 0.02}
    settings |= {"custom_json": ["/home/ann/secret/mine.jsonl", "hub:ann/talks:train"], "data_dir": "/home/ann/data"}
    meta = tiny.meta(tiny.random_state()[1], step=5, tokenizer=tiny.tokenizer().digest())
    meta |= {"total_steps": 9, "user_config": settings | {"run": "secret"}, "val_bpb": 1.25}
    tiny.tokenizer().save(tmp_path / "tokenizer")
    tag = tmp_path / "chatsft_checkpoints" / "d2"
    write(tag / "5", flatten_by_path(random_params(tiny.CONFIG)), None, meta)
    facts = {"checkpoint": find.identity(find.Found(tag, 5, True)), "time": 1}
    (tag / "a.json").write_text(json.dumps(result(5, GSM8K=0.25, Mine=0.5) | facts))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run("--source", "sft", "--output", tmp_path / "my-model") == 0
    text = (tmp_path / "my-model/README.md").read_text()
    head, body = front_matter(text)
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "text-generation"
    assert {"nanochat", "conversational"} < set(head["tags"])
    assert head["datasets"] == ["HuggingFaceTB/smol-smoltalk", "openai/gsm8k", "ann/talks"]
    (measured,) = head["model-index"][0]["results"]
    assert measured["dataset"]["type"] == "openai/gsm8k" and measured["metrics"][0]["value"] == 0.25
    for row in (
        "| stage | chat model (supervised fine-tuning) |",
        "| steps | 5 of 9 |",
        "| validation bits per byte | 1.2500 |",
        "| GSM8K | 25.0% |",
        "| Mine | 50.0% |",
        "| `--gsm8k-epochs` | 2 |",
        "| `--custom-json` | mine.jsonl, hub:ann/talks:train |",
        "| `--matrix-lr` | 0.02 |",
    ):
        assert row in body, row
    assert 'from_pretrained("my-model", trust_remote_code=True)' in body and "apply_chat_template" in body
    assert "/home" not in text and "secret" not in text and str(tmp_path) not in text


def test_a_card_of_any_metadata_is_made():
    sizes = dict.fromkeys(("n_layer", "n_embd", "n_head", "n_kv_head", "sequence_len", "vocab_size"), 2)
    for stage in ("base", "mid", "sft", "rl"):
        for settings in (None, 7, {}, {"task": "gsm8k", "custom_json": 3, "total_batch_size": "a | b\n# c"}):
            meta = {"user_config": settings, "val_bpb": "x", "total_steps": None}
            described = Described(
                name="m",
                stage=stage,
                step=1,
                parameters=1,
                sizes=sizes,
                meta=meta,
                evaluated={},
                own_code=False,
            )
            head, body = front_matter(model_card(described))
            assert head["model_name"] == "m" and "Results" not in body and "\n# c" not in body
            assert head.get("datasets") == (["openai/gsm8k"] if stage == "rl" and settings and settings != 7 else None)


# ----------------------------------------------------------------------------------------------------------- the upload
@pytest.fixture
def hub(folder, monkeypatch):
    """A hub that has no repository yet and takes what it is sent; HF_TOKEN is a token of me."""
    with servers(1) as (server,):
        use_hub(monkeypatch, server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        server.answers |= {
            f"/api/models/{REPO}": Answer(b'{"error": "no"}', 404, X_Error_Code="RepoNotFound"),
            f"/api/models/{REPO}/tree/main": Answer(b"[]"),
            "POST /api/repos/create": Answer(json.dumps({"url": f"{server.url}/{REPO}"}).encode()),
            "POST /api/validate-yaml": Answer(b'{"errors": [], "warnings": []}'),
            f"POST /api/models/{REPO}/preupload/main": Answer(preupload(OURS | {CODE})),
            f"POST /api/models/{REPO}/commit/main": Answer(
                json.dumps({"commitUrl": f"{server.url}/{REPO}/commit/1", "commitOid": "1" * 40}).encode()
            ),
        }
        yield server


def preupload(names):
    """The hub wants these files inside the commit itself."""
    files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in sorted(names)]
    return json.dumps({"files": files}).encode()


def posted(server, path):
    return [body for where, body in server.posted if where == path]


def exists(server, *, private, files=()):
    """Let the repository be there already."""
    server.answers[f"/api/models/{REPO}"] = Answer(json.dumps({"id": REPO, "private": private}).encode())
    listing = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files]
    server.answers[f"/api/models/{REPO}/tree/main"] = Answer(json.dumps(listing).encode())


def test_with_yes_the_folder_is_one_commit_to_a_new_private_repository(hub, tmp_path, capsys):
    assert run("--output", tmp_path / "m", "--push", REPO, "--yes") == 0
    (made,) = map(json.loads, posted(hub, "/api/repos/create"))
    assert made == {"organization": "me", "name": "small-model", "visibility": "private"} | made
    (commit,) = posted(hub, f"/api/models/{REPO}/commit/main")
    head, *operations = map(json.loads, commit.splitlines())
    assert head["value"]["summary"] == "base d2, step 7, exported by nanochat_jax"
    sent = {op["value"]["path"]: base64.b64decode(op["value"]["content"]) for op in operations}
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in sent["README.md"].decode()
    assert all(headers["Authorization"] == "Bearer hf_x" for _, headers in hub.requests)
    assert f"uploaded: {hub.url}/{REPO}" in capsys.readouterr().out


def test_a_repository_that_is_there_keeps_its_files_but_for_old_weights(hub, tmp_path):
    old = ("LICENSE", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors")
    exists(hub, private=True, files=old)
    assert run("--output", tmp_path / "m", "--push", REPO, "--yes") == 0
    (commit,) = posted(hub, f"/api/models/{REPO}/commit/main")
    operations = [json.loads(line) for line in commit.splitlines()[1:]]
    assert {op["value"]["path"] for op in operations if op["key"] == "deletedFile"} == {*old[1:3]}


def test_a_public_repository_gets_a_model_only_from_who_says_so(hub, tmp_path):
    exists(hub, private=False)
    message = run("--output", tmp_path / "m", "--push", REPO, "--yes")
    assert "me/small-model is there already and public: to show everybody the model, add --no-private" in message
    assert hub.posted == [] and not (tmp_path / "m").exists()
    assert run("--output", tmp_path / "m", "--push", REPO, "--yes", "--no-private") == 0
    assert len(posted(hub, f"/api/models/{REPO}/commit/main")) == 1


def test_what_the_hub_refuses_is_a_sentence_and_the_folder_stays(hub, tmp_path, monkeypatch):
    hub.answers[f"/api/models/{REPO}"] = Answer(b'{"error": "no"}', 401)
    message = run("--output", tmp_path / "m", "--push", REPO, "--yes")
    assert "model me/small-model answered 401" in message and "a token that may write to it" in message
    assert "\n" not in message and not (tmp_path / "m").exists()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        message = run("--output", tmp_path / "m", "--push", REPO, "--yes")
        assert message == "error: model me/small-model is not uploaded because HF_HUB_OFFLINE is set: unset it"
    hub.answers[f"/api/models/{REPO}"] = Answer(b'{"error": "no"}', 404, X_Error_Code="RepoNotFound")
    hub.answers["POST /api/repos/create"] = Answer(b'{"error": "You have no rights"}', 403)
    message = run("--output", tmp_path / "m", "--push", REPO, "--yes")
    assert message.startswith("error: model me/small-model answered 403") and "\n" not in message
    assert message.endswith(f"; later, hf upload {REPO} {tmp_path / 'm'} does it")
    assert (tmp_path / "m/config.json").exists() and posted(hub, f"/api/models/{REPO}/commit/main") == []


@pytest.mark.parametrize(
    ("answer", "uploads"), [("y", 1), (" Yes ", 1), ("", 0), ("no", 0), ("yes please", 0), (None, 0)]
)
def test_only_yes_uploads(hub, tmp_path, monkeypatch, answer, uploads):
    asked = []

    def typed(question):
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert run("--output", tmp_path / "m", "--push", REPO) == 0
    assert asked == [f"Upload {tmp_path / 'm'} to {REPO}, a new private repository? [y/N] "]
    assert len(posted(hub, f"/api/models/{REPO}/commit/main")) == uploads and (tmp_path / "m/config.json").exists()


def test_the_question_is_asked_on_a_terminal(hub, tmp_path):
    argv = ["--format", "hf", "--output", str(tmp_path / "m"), "--push", REPO, "--no-private"]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nanochat_jax.nanochat_export", *argv]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, deadline = b"", time.monotonic() + 60
    while b"[y/N]" not in said and time.monotonic() < deadline:
        said += os.read(ours, 4096)
    os.write(ours, b"y\n")
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 4096):
            said += chunk
    assert process.wait(60) == 0
    os.close(ours)
    assert b"a new PUBLIC repository? [y/N]" in said and b"uploaded: http://127.0.0.1" in said
    assert len(posted(hub, f"/api/models/{REPO}/commit/main")) == 1
