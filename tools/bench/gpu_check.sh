#!/usr/bin/env bash
# One command for a fresh machine with a GPU (or TPU, or none): what it is, the tests of its kernels, all benches, and one
# folder of results. A part that fails is recorded and does not stop the others. Installs nothing, changes no setting.
set -uo pipefail
unset CDPATH

usage() {
  cat <<'END'
usage: tools/bench/gpu_check.sh [--quick] [--out DIR] [PART]...

Runs the PARTs (default: all of them that fit the device) and leaves in DIR, for each, NAME.jsonl (or .txt), NAME.log,
and a line in summary.tsv: name, exit status, seconds, command.
  environment       device, driver, versions
  tests             tests/model/attention/test_device.py: every backend on the device against the definition
  attention_h64, attention_h128                   tools/bench/bench_attention.py
  sft_cpu, sft_d12, sft_d20, sft_d26              python -m nanochat_jax.bench --what sft, one document a row
  packed_d12, packed_d20, packed_d26              the same, documents of 500 tokens in the mean
  profile_cpu, profile_d12, profile_d20, profile_d26   tools/bench/profile_step.py, where a step's time goes
  rl_cpu, rl_d12, rl_d20, rl_d26                  python -m nanochat_jax.bench --what rl
  infer_cpu, infer_d12, infer_d20, infer_d26      python -m nanochat_jax.bench, as nanochat's infer_bench
  serve_cpu, serve_d12, serve_d20, serve_d26      tools/bench/bench_serve.py
  core_cpu, core_d12, core_d20, core_d26          tools/bench/bench_core.py
  --quick     tiny sizes, to see that everything runs
  --out DIR   default: build/gpu_check
  --help      show this text
PYTHON names the interpreter (default: .venv/bin/python, else python3); JAX_PLATFORMS the device (default: JAX's choice).
Exit status: 0 if every part succeeded, 1 if one failed, 2 for a wrong argument.
END
}

fail() {
  echo "gpu_check.sh: $1" >&2
  exit 2
}

all=(environment tests attention_h64 attention_h128)
for model in cpu d12 d20 d26; do all+=("sft_$model"); done
for model in d12 d20 d26; do all+=("packed_$model"); done
for kind in profile rl infer serve core; do
  for model in cpu d12 d20 d26; do all+=("${kind}_$model"); done
done
quick="" out="" parts=()
while [ $# -gt 0 ]; do
  case "$1" in
    --quick) quick=1 ;;
    --out)
      [ $# -ge 2 ] && [ -n "$2" ] || fail "--out needs a folder"
      out=$2
      shift
      ;;
    --out=?*) out=${1#--out=} ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail "there is no option '$1': see --help" ;;
    *)
      [[ " ${all[*]} " == *" $1 "* ]] || fail "there is no part '$1': use ${all[*]}"
      parts+=("$1")
      ;;
  esac
  shift
done
[ -z "$out" ] || case "$out" in /*) ;; *) out=$PWD/$out ;; esac
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." || exit 2
out=${out:-$PWD/build/gpu_check}
mkdir -p -- "$out" || fail "the folder $out cannot be made"
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COLUMNS=160
export HF_HUB_OFFLINE=1 WANDB_MODE=offline NO_COLOR=1

# On CPU, tests and benches must not wait for a compiler of a device that is not there.
if ! platform=$("$python" -c 'import jax; print(jax.default_backend())' 2>"$out/platform.log"); then
  echo "gpu_check.sh: JAX finds no device with $python, see $out/platform.log" >&2
  platform=cpu
fi
if [ -z "${JAX_PLATFORMS:-}" ]; then
  case "$platform" in gpu) export JAX_PLATFORMS=cuda ;; *) export JAX_PLATFORMS=$platform ;; esac
fi
if [ ${#parts[@]} -eq 0 ]; then
  for part in "${all[@]}"; do
    case "$platform:${quick:-0}:$part" in
      *:1:*_d26 | *:1:*_d12) ;;  # quick ones differ in nothing but their names
      cpu:0:*_d12 | cpu:0:*_d20 | cpu:0:*_d26) ;;
      gpu:0:*_cpu | tpu:0:*_cpu) ;;
      *) parts+=("$part") ;;
    esac
  done
fi

environment() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  uname -srm
  echo "load:$(uptime | sed 's/.*load average: */ /')"
  git describe --always --dirty 2>/dev/null || echo "commit: not a git checkout"
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit,temperature.gpu --format=csv
  fi
  "$python" - <<'END'
import importlib.metadata as metadata
import sys

import jax

from nanochat_jax.cli.device import cpu_name

print("python", sys.version.split()[0], "| cpu", cpu_name())
for name in sorted({d.name.lower() for d in metadata.distributions()}):
    if name.startswith(("jax", "flax", "optax", "numpy", "nvidia-", "libtpu", "orbax")):
        print(name, metadata.version(name))
for device in jax.devices():
    print(device, device.device_kind, getattr(device, "compute_capability", ""), device.memory_stats() or "")
END
}

tiny=(--depth 2 --head-dim 64 --vocab-size 512 --max-seq-len 128)
sizes() { # MODEL: nanochat's of this depth, or the small one that CPUs are measured with
  if [ "$1" = cpu ]; then echo --depth 4 --head-dim 64 --vocab-size 4096 --max-seq-len 512; else echo --depth "${1#d}"; fi
}

failed=0
run() { # NAME EXTENSION COMMAND...
  local name=$1 file=$out/$1.$2 began=$SECONDS status=0
  shift 2
  echo "== $name: $*"
  "$@" >"$file" 2>"$out/$name.log" || status=$?
  [ "$status" -eq 0 ] || failed=1
  if [ -f "$out/summary.tsv" ]; then # of an earlier run in this folder
    awk -F '\t' -v name="$name" '$1 != name' "$out/summary.tsv" >"$out/.summary" && mv "$out/.summary" "$out/summary.tsv"
  fi
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" "$*" >>"$out/summary.tsv"
  echo "   exit status $status after $((SECONDS - began)) s"
  if [ "$status" -ne 0 ]; then tail -n 5 "$out/$name.log" "$file" 2>/dev/null; fi
}

for part in "${parts[@]}"; do
  model=${part#*_} size=()
  case "$part" in
    environment) run "$part" txt environment ;;
    tests)
      run "$part" txt env NANOCHAT_TEST_OPTIMIZED=1 \
        "$python" -m pytest -p no:cacheprovider -rs --durations=5 tests/model/attention/test_device.py
      ;;
    attention_h*)
      [ -z "$quick" ] || size=(--quick)
      run "$part" jsonl "$python" tools/bench/bench_attention.py --head-dims "${model#h}" ${size[@]+"${size[@]}"}
      ;;
    sft_* | packed_* | profile_*)
      [ "${part%%_*}" != packed ] || size=(--document-tokens 500)
      case "$model" in # 65,536 tokens a step: a device's share of nanochat's, of eight
        d12) size+=(--device-batch-size 16 --total-batch-size 65536) ;;
        d20) size+=(--device-batch-size 8 --total-batch-size 65536) ;;
        d26) size+=(--device-batch-size 4 --total-batch-size 65536) ;;
      esac
      [ -z "$quick" ] || size+=("${tiny[@]}" --device-batch-size 2 --total-batch-size -1 --repeats 3)
      command=(-m nanochat_jax.bench --what sft)
      [ "${part%%_*}" != profile ] || command=(tools/bench/profile_step.py)
      run "$part" jsonl "$python" "${command[@]}" $(sizes "$model") ${size[@]+"${size[@]}"}
      ;;
    rl_*)
      [ "$model" != cpu ] || size=(--prompt-tokens 100 --decode-tokens 128)
      [ -z "$quick" ] || size=("${tiny[@]}" --examples-per-step 2 --num-samples 4 --slots 8 --repeats 1)
      [ -z "$quick" ] || size+=(--prompt-tokens 20 --decode-tokens 20)
      run "$part" jsonl "$python" -m nanochat_jax.bench --what rl $(sizes "$model") ${size[@]+"${size[@]}"}
      ;;
    infer_*)
      [ -z "$quick" ] || size=("${tiny[@]}" --batch-sizes 1,4 --decode-tokens 20 --repeats 1)
      run "$part" jsonl "$python" -m nanochat_jax.bench $(sizes "$model") ${size[@]+"${size[@]}"}
      ;;
    serve_*)
      [ "$model" = cpu ] || size=(--prompt-chars 150 --new-tokens 256)
      [ -z "$quick" ] || size=("${tiny[@]}" --clients 1 4 --requests 1 --rounds 1 --slots 4 --new-tokens 20)
      run "$part" jsonl "$python" tools/bench/bench_serve.py $(sizes "$model") ${size[@]+"${size[@]}"}
      ;;
    core_*)
      [ -z "$quick" ] || size=("${tiny[@]}" --examples 2 --rounds 1)
      run "$part" jsonl "$python" tools/bench/bench_core.py $(sizes "$model") ${size[@]+"${size[@]}"}
      ;;
  esac
done
echo
cat "$out/summary.tsv"
echo "Results are in $out."
exit "$failed"
