#!/usr/bin/env python3
"""Cloud TPU VMs, v4 to v6e: make one, run a command on all its workers, follow it, make the TPU again when it is lost.

tools/tpu_vm.py up --config configs/tpu/v6e8_spot.toml --base-dir gs://my-bucket/nanochat -- \\
    .venv/bin/python -m nanochat_jax.sft

All verbs: tools/tpu_vm.py --help. This file finds the project's environment; tpu_vm/launcher.py is what runs in it.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:  # not in the project's environment
        python = ROOT / ".venv/bin/python"
        if not python.exists():
            sys.exit("error: the launcher needs the project's environment: run tools/setup.sh first")
        os.execv(python, [str(python), *sys.argv])
    sys.path.insert(0, str(ROOT))
    from nanochat_jax.cli.main import run_stage
    from tools.tpu_vm import launcher

    run_stage(launcher.main, None)
