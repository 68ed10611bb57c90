"""README's commands can be typed as they are; tools/check/readme_walk.py runs them.

Run: python -m pytest tests/test_readme.py
"""

import re
import shlex
from pathlib import Path

from nanochat_jax import base, chat, eval, nanochat_export, report, rl, sft
from nanochat_jax.cli import settings
from nanochat_jax.tokenizer.__main__ import Show, Train
from tools.check import readme_walk as walk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = {
    "base": base.BaseConfig,
    "sft": sft.SFTConfig,
    "rl": rl.RLConfig,
    "eval": eval.EvalConfig,
    "chat": chat.ChatConfig,
    "report": report.ReportConfig,
    "nanochat_export": nanochat_export.ExportConfig,
    "tokenizer train": Train,
    "tokenizer show": Show,
}


def test_every_command_is_one_that_a_stage_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    parsed = set()
    for command in walk.commands(README):
        if not (found := re.match(r"\.venv/bin/python -m nanochat_jax\.(tokenizer \w+|\w+)(.*)", command)):
            assert command.startswith((".venv/bin/python", *walk.ELSEWHERE))
            continue
        stage, flags = found.groups()
        if stage != "nanochat_import":  # its parser is its main's
            walked = walk.sized(command).partition(f"nanochat_jax.{stage}")[2]
            for typed in (flags, walked):
                settings.parse(SETTINGS[stage], shlex.split(typed))
        parsed.add(stage)
    assert parsed == {*SETTINGS, "nanochat_import"}


def test_every_tool_and_preset_that_is_named_is_there():
    named = set(re.findall(r"(?:tools|configs)/[\w.]+\.(?:sh|py|toml)", README))
    assert {"tools/quickstart.sh", "tools/test.sh", "configs/base_h100.toml"} <= named
    assert all((ROOT / name).is_file() for name in named)


def test_every_module_is_in_the_table_of_layers():
    table = README[README.index("| layer | modules |") : README.index("A module imports its own layer")]
    named = set(re.findall(r"`(\w+)/?`", table))
    modules = {path.stem for path in (ROOT / "nanochat_jax").glob("*.py")} | {
        path.parent.name for path in (ROOT / "nanochat_jax").glob("*/__init__.py")
    }
    assert named == modules - {"__init__"}
