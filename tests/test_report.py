"""The command report: which runs it takes, where the page goes, and what it says.

Run: python -m pytest tests/test_report.py
"""

import subprocess
import sys

import pytest

from nanochat_jax.report import ReportConfig, main
from tests.reports.folders import RL, Elements, answer, write


def test_every_run_of_the_base_directory_is_on_the_page(tmp_path, monkeypatch, capsys):
    write(tmp_path / "chatrl_checkpoints/d2", RL)
    write(tmp_path / "base_checkpoints/d2", [{"step": 0, "val_bpb": 3.0}, {"step": 1, "loss": 6.0, "val_bpb": 2.5}])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert main(ReportConfig()) == 0
    assert capsys.readouterr().out == f"2 runs -> {tmp_path / 'report.html'}\n"
    found = Elements((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.count("figure") == 2 + 2  # loss and bits per byte; loss and reward
    assert {"1 steps, 0.0 min, val bpb 2.5", "5 steps, 5.0 min, smoothed reward 0.25"} <= {*found.texts}


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"has no run with a metrics\.jsonl"):
        main(ReportConfig())
    with pytest.raises(ValueError, match="must be the folder of a run"):
        main(ReportConfig(folders=(tmp_path,)))


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    good, bad = write(tmp_path / "a/good", [*RL, {"step": "x"}], [answer(0, 1.0), {"step": 3}]), tmp_path / "a/bad"
    (bad / "metrics.jsonl").mkdir(parents=True)
    other = write(tmp_path / "a/other", RL)
    (other / "rollouts.jsonl").mkdir()
    assert main(ReportConfig(folders=(good, bad, other), output=tmp_path / "page.html")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"WARNING: left out: {good / 'metrics.jsonl'}: 1 line is no record of a step",
        f"WARNING: left out: {good / 'rollouts.jsonl'}: 1 line is no answer of a rollout",
        f"WARNING: left out: {bad / 'metrics.jsonl'}: Is a directory",
        f"WARNING: left out: {other / 'rollouts.jsonl'}: Is a directory",
        f"3 runs -> {tmp_path / 'page.html'}",
        f"rollouts -> {tmp_path / 'page-rollouts-good.html'}",
    ]
    assert "cannot be read: Is a directory" in (tmp_path / "page.html").read_text()


def test_the_command_loads_nothing_that_takes_long():
    """A page of eight runs is drawn in about a second; each of these takes longer than that, or draws it twice."""
    program = "import sys, nanochat_jax.report; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "numpy", "orbax", "wandb", "pyarrow", "matplotlib", "PIL"} & {*loaded}
