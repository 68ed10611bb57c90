"""The TPU's attention through the TPU's compiler, on a machine without one; needs libtpu, which does not need a TPU.

Run: tools/setup.sh --extra aot && python -m pytest tests/train/test_tpu_aot.py
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: tools/setup.sh --extra aot"
)
TOPOLOGIES = {  # the mesh, and what the chip is called
    "v5e:1x1": ("data=1", "TPU v5 lite"),
    "v5p:2x2x1": ("data=2,model=2", "TPU v5"),
    "v6e:2x2": ("data=4", "TPU v6 lite"),
}


def test_splash_compiles_forward_and_backward_and_is_chosen_and_so_does_the_engines_prefill():
    """Two windows of a model with heads of 128 in rows of 2048 tokens, and heads of 64 in rows that no tile divides.
    In the prefill every device is alone. One process and one test, because most of the time goes into the compiler."""
    arguments = [word for topology, (mesh, _) in TOPOLOGIES.items() for word in (topology, mesh)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tpu_compiler", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *chosen, prefill = map(json.loads, done.stdout.splitlines())
    assert chosen == [
        {"topology": topology, "kind": kind, "name": "splash", "why": None, "small": "splash"}
        for topology, (_, kind) in TOPOLOGIES.items()
    ]
    assert prefill == {"topology": "prefill", "kernels": 1, "collectives": 0}
