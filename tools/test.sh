#!/usr/bin/env bash
# Set up if needed, then run the tests on the CPU, a file on each core. Arguments go to pytest:
# tools/test.sh tests/model/test_gpt.py -k smear; -n 0 runs them in one process, as --pdb needs.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
tools/setup.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" WANDB_MODE=offline
if [ ! -t 1 ]; then
  unset FORCE_COLOR
  export PY_COLORS=0 NO_COLOR=1 # no escape codes in a log
fi
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
