"""Where torch and transformers are, for tests that compare with them, and how their process is started."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("NANOCHAT_COMPARE") or ROOT / ".venv" / "compare") / "bin" / "python"
needs_transformers = pytest.mark.skipif(
    not PYTHON.exists(), reason="torch and transformers are not installed: tools/setup.sh --extra compare"
)


def run_transformers(*cases: Path) -> None:
    """Let tests/support/transformers_run.py fill these cases."""
    script = Path(__file__).with_name("transformers_run.py")
    names = ("PATH", "HOME", "LANG", "TMPDIR")
    env = {name: os.environ[name] for name in names if name in os.environ} | {"HF_HUB_OFFLINE": "1"}
    env["HF_HOME"] = str(cases[0].parent / "hf")  # where it copies code that a model's folder brings
    done = subprocess.run([PYTHON, script, *cases], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
