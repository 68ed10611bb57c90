#!/usr/bin/env bash
# Set up .venv in the repository's root with the pinned packages of requirements.lock and this project, editable.
# Safe to run again: with nothing to do it says so, in well under two seconds and without network.
set -euo pipefail

usage() {
  cat <<'END'
usage: tools/setup.sh [--extra cuda13|tpu|aot|cuda13-aot|gcs|compare]...

Makes .venv (Python >= 3.12) with everything that nanochat_jax and its tests need, for CPU.
  --extra cuda13   add JAX's CUDA 13 packages (NVIDIA GPUs)
  --extra tpu      add JAX's TPU packages, and those for base directories in buckets
  --extra aot      add the TPU compiler, to compile for TPUs where there is none (214 MB to fetch, 640 MB on disk)
  --extra cuda13-aot
                   add the CUDA compiler, to compile for NVIDIA GPUs where there is none, in a folder of its own that
                   nothing else looks into (299 MB to fetch, 820 MB on disk)
  --extra gcs      add the packages for base directories in buckets of Google Cloud Storage
  --extra compare  add torch's CPU build and transformers, for the tests that compare with them, in an environment of
                   their own, .venv/compare (300 MB to fetch, 1.2 GB on disk; Linux on x86-64). pip must know where
                   to find it: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name a place
  --help           show this text
Extras stay on later runs without the flag; to drop one, delete .venv and run again.
Uses uv if it is on the PATH, else pip.
END
}

fail() { # MESSAGE [STATUS]
  echo "setup.sh: $1" >&2
  exit "${2:-1}"
}

quickly() { # run a command that might hang
  if command -v timeout >/dev/null; then timeout -k 1 20 "$@"; else "$@"; fi
}

extras=""
add_extra() {
  case "$1" in
    cuda13 | tpu | aot | cuda13-aot | gcs | compare) extras="$extras $1" ;;
    *) fail "there is no extra '$1': use --extra cuda13, tpu, aot, cuda13-aot, gcs or compare" 2 ;;
  esac
}
while [ $# -gt 0 ]; do
  case "$1" in
    --extra)
      [ $# -ge 2 ] || fail "--extra needs a name: cuda13, tpu, aot, cuda13-aot, gcs or compare" 2
      add_extra "$2"
      shift
      ;;
    --extra=*) add_extra "${1#--extra=}" ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown argument '$1' (see tools/setup.sh --help)" 2 ;;
  esac
  shift
done

unset CDPATH PYTHONHOME PYTHONPATH # packages found through PYTHONPATH would count as installed
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)

# One set-up at a time: the folder itself is the lock. Where a folder cannot be locked (NFS), go on without.
if command -v flock >/dev/null && exec 9<.; then
  if ! flock -n 9 2>/dev/null; then
    echo "waiting for another set-up of this folder"
    flock 9 2>/dev/null || true
  fi
fi

wanted=" $(cat .venv/extras 2>/dev/null || true) $extras " # with those of earlier runs
extras=""
for name in cuda13 tpu aot cuda13-aot gcs compare; do
  case "$wanted" in *" $name "*) extras="${extras:+$extras }$name" ;; esac
done

# What the installation depends on, in one line; empty where .venv/bin/python does not run or is no environment of its own.
fingerprint() {
  [ -x .venv/bin/python ] || return 0
  .venv/bin/python -I -c '
import hashlib, pathlib, sys
assert sys.version_info >= (3, 12) and sys.prefix != sys.base_prefix
names = ["pyproject.toml", *sorted(map(str, pathlib.Path().glob("requirements*.lock")))]
files = [pathlib.Path(name).read_bytes() for name in names]
facts = [hashlib.sha256(data).hexdigest() for data in files] + [sys.version, *sys.argv[1:]]
print(hashlib.sha256(repr(facts).encode()).hexdigest())
' "$root" "$extras" 2>/dev/null || true
}

now=$(fingerprint)
if [ -n "$now" ] && [ -f .venv/stamp ] && [ "$(cat .venv/stamp)" = "$now" ]; then
  echo ".venv is up to date"
  exit 0
fi

uv=""
if command -v uv >/dev/null && quickly uv --version >/dev/null 2>&1; then uv=uv; fi

# "ok" if $1 can make the environment: it runs (a shim on the PATH may not), it is a released CPython >= 3.12 with
# the GIL (the pinned wheels are built for that), and without uv it has ensurepip. Anything else it prints is no answer.
judge() {
  quickly "$1" -I -c '
import sys
if sys.version_info >= (3, 12) and sys.implementation.name == "cpython" and sys.version_info.releaselevel == "final":
    import importlib.util, sysconfig
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        print("ok" if sys.argv[1] or importlib.util.find_spec("ensurepip") else "no ensurepip")
' "$uv" 2>/dev/null </dev/null || true
}

candidates() {
  local name
  for name in python3.13 python3.12 python3; do command -v "$name" || true; done
  printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python | sort -rV
  if [ -n "$uv" ]; then UV_MANAGED_PYTHON=1 quickly uv python find --system '>=3.12' 2>/dev/null || true; fi
}

make_venv() {
  local candidate python="" lacking=""
  while IFS= read -r candidate; do
    case "$(judge "$candidate")" in
      ok) python=$candidate && break ;;
      "no ensurepip") lacking=${lacking:-$candidate} ;;
    esac
  done < <(candidates)
  if [ -z "$python" ] && [ -n "$lacking" ]; then
    fail "$lacking cannot make an environment because it lacks ensurepip: install its venv package (Debian, Ubuntu: apt install python3-venv), or uv"
  elif [ -z "$python" ] && [ -z "$uv" ]; then
    fail "no Python >= 3.12 that runs was found: install Python 3.12 or 3.13, or uv, and run this again"
  fi
  if [ -d .venv ]; then find -H .venv -mindepth 1 -delete; fi # its contents: .venv may be a link to a larger disk
  if [ -n "$uv" ] && [ -z "$python" ]; then
    echo "making .venv with a Python 3.12 that uv downloads"
    UV_MANAGED_PYTHON=1 uv venv --quiet --python 3.12 .venv || # managed: uv gives up at a shim that fails
      fail "no Python >= 3.12 that runs was found and uv could not get one: install Python 3.12 or 3.13, and run this again"
  elif [ -n "$uv" ]; then
    echo "making .venv with uv and $python"
    uv venv --quiet --python "$python" .venv
  else
    echo "making .venv with $python"
    "$python" -m venv .venv
  fi
  now=$(fingerprint)
  [ -n "$now" ] || fail "the new .venv/bin/python does not run: delete .venv and check ${python:-the Python that uv chose}"
}

install() {
  if [ -n "$uv" ]; then
    uv pip install --quiet --python .venv/bin/python "$@"
  else
    .venv/bin/python -m pip install --quiet --no-compile "$@"
  fi
}

# Not with the packages: JAX would load it at every start and complain that there is no GPU.
install_cuda_compiler() {
  local folder=.venv/compilers/cuda13 lock=requirements-cuda13-aot.lock
  if [ "$(cat "$folder/$lock" 2>/dev/null)" = "$(cat "$lock")" ]; then return; fi
  echo "installing the CUDA compiler into $folder"
  rm -rf "$folder" "$folder.new"
  install --no-deps --target "$folder.new" -r "$lock"
  cat "$lock" >"$folder.new/$lock"
  mv "$folder.new" "$folder" # only when it is whole
}

# Not with the packages: it has other versions of them, and perhaps another Python, one that has a CPU build of torch.
install_compare() {
  local folder=.venv/compare lock=requirements-compare.lock pyenv="${PYENV_ROOT:-${HOME:-}/.pyenv}" python said=""
  if [ "$(cat "$folder/$lock" 2>/dev/null)" = "$(cat "$lock")" ]; then return; fi
  for python in .venv/bin/python python3.13 python3.12 python3.11 "$pyenv"/versions/3.1[123]*/bin/python; do
    "$python" -c "" >/dev/null 2>&1 || continue
    echo "installing torch and transformers into $folder with $python"
    rm -rf "$folder"
    "$python" -m venv "$folder"
    if said=$("$folder/bin/python" -m pip install --quiet --no-compile --no-deps -r "$lock" 2>&1); then
      cat "$lock" >"$folder/$lock" # only when it is whole
      return
    fi
  done
  rm -rf "$folder"
  said=${said#*ERROR: } # the first of what pip complains of
  said="torch and transformers could not be installed (${said%%$'\n'*})"
  fail "$said: name a place that has torch's CPU build with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS"
}

if [ -z "$now" ]; then make_venv; fi
rm -f .venv/stamp # it comes back when everything below has succeeded
echo "$extras" >.venv/extras
if [ -z "$uv" ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  .venv/bin/python -m ensurepip >/dev/null # uv made this .venv, or the last run was cut off
fi
echo "installing the packages of requirements.lock (a minute or two the first time)"
install --no-deps -r requirements.lock -e .
packages="" # the extras that lie with the packages
for name in $extras; do
  case "$name" in cuda13-aot | compare) continue ;; esac
  packages="${packages:+$packages,}$name"
done
if [ -n "$packages" ]; then
  echo "installing the extras: ${packages//,/ }"
  install -c requirements.lock -c requirements-gcs.lock -e ".[$packages]"
fi
case " $extras " in *" cuda13-aot "*) install_cuda_compiler ;; esac
case " $extras " in *" compare "*) install_compare ;; esac
# Bytecode, which pip would make on one core. What cannot be compiled is none of ours.
if [ -d .venv/lib ]; then .venv/bin/python -m compileall -qq -j 0 .venv/lib || true; fi
fingerprint >.venv/stamp.new
mv .venv/stamp.new .venv/stamp
echo ".venv is ready: source .venv/bin/activate, or call .venv/bin/python"
