"""README: short, with the tree as it is, a status table in five words, and a snippet that runs.

Its links and commands are tested in tests/test_docs.py. Run: python -m pytest tests/test_readme.py
"""

import contextlib
import io
import re
import shutil
from pathlib import Path

from nanochat_jax.inference.chat_model import ChatModel
from nanochat_jax.inference.sampling import SamplingParams
from tests.golden.data import SUBSET
from tests.test_layers import FOLDERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STATUS = ("measured", "compiled only", "simulated", "predicted", "not yet", "")


def test_readme_is_short():
    assert len(README.encode()) <= 10_000


def test_the_two_commands_and_a_preset_are_named():
    assert {"tools/quickstart.sh", "tools/test.sh", "configs/base_h100.toml"} <= set(
        re.findall(r"(?:tools|configs)/[\w.]+\.(?:sh|py|toml)", README)
    )


def test_the_tree_shows_every_command_and_every_folder_from_high_to_low():
    (tree,) = re.findall(r"^```\nnanochat_jax/\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^  (\S+) +\S", tree, re.MULTILINE)
    commands = {path.name for path in (ROOT / "nanochat_jax").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in shown if name.endswith(".py")} == commands
    assert [name for name in shown if name.endswith("/")] == [f"{name}/" for name in reversed(FOLDERS)]
    for name in re.findall(r"^(\w+/)", tree, re.MULTILINE):
        assert (ROOT / name).is_dir()


def test_the_status_table_uses_its_five_words():
    rows = README.partition("| feature | CPU | H100 | TPU |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(rows) > 8
    for row in rows:
        feature, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        assert feature and len(cells) == 3
        assert {re.sub(r" \(.*\)", "", cell) for cell in cells} <= set(STATUS), row
    assert all(f"*{word}*:" in README for word in STATUS if word)


def test_the_python_snippet_runs_on_files_of_nanochat_where_they_lie(tmp_path, monkeypatch):
    folder = tmp_path / "base"
    shutil.copytree(SUBSET / "checkpoints/c2_gqa", folder)
    (folder / "base_checkpoints").rename(folder / "chatsft_checkpoints")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setattr(ChatModel.answer, "__defaults__", (SamplingParams(0.0, 0, 4),))  # 256 take long to compile
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, names)
    answer, *scores = printed.getvalue().rsplit("\n", 3)[:-1]
    assert answer == names["chat"].answer("What is 2+2?")
    assert [score.rpartition(" ")[0] for score in scores] == ["'4'", "'<|assistant_end|>'"]
    assert all(float(score.rpartition(" ")[2]) < 0 for score in scores)
