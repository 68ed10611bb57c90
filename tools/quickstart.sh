#!/usr/bin/env bash
# From a fresh clone to a small chat model, in minutes, on the CPU: set up if needed, then train and show it.
# Arguments go to the quickstart: tools/quickstart.sh --seed 1 --output somewhere
set -euo pipefail
unset CDPATH
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/tools/setup.sh"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" WANDB_MODE=offline # models this small gain nothing from a GPU
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # large pages: fewer page faults
exec "$root/.venv/bin/python" -m nanochat_jax.quickstart "$@"
