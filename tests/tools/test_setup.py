"""tools/setup.sh on a machine of fake programs: which Python it takes, what it installs, when it does nothing.

Run: python -m pytest tests/tools/test_setup.py
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable).resolve()  # the one this test's environment was made from
TOOLS = ["bash", "cat", "dirname", "env", "find", "flock", "mkdir", "mv", "rm", "sleep", "sort", "timeout"]

SHIM = "echo 'pyenv: command not found' >&2; exit 127"
GARBAGE = "echo '*** welcome to python 3.12 ***'"
OLD = f'exec {PYTHON} -I -c "import sys; sys.version_info = (3, 11, 7)\n$3" "$4"'
NO_ENSUREPIP = f'exec {PYTHON} -I -c "import sys; sys.modules[\'ensurepip\'] = None\n$3" "$4"'

# An environment whose python is real, but `-m pip` only writes its arguments to the log and ends with $INSTALL_STATUS.
MAKE_VENV = f"""
mkdir -p .venv/bin
echo 'home = {PYTHON.parent}' >.venv/pyvenv.cfg
{shutil.which("ln")} -sf {PYTHON} .venv/bin/real
cat >.venv/bin/python <<'END'
#!/bin/sh
if [ "$1 $2" = "-m pip" ] && [ "$3" = "--version" ]; then exit 0; fi
case "$*" in *" --target "*) mkdir -p "$8" ;; esac
if [ "$1 $2" = "-m pip" ]; then echo "$@" >>"$LOG"; sleep "${{INSTALL_SECONDS:-0}}"; exit "${{INSTALL_STATUS:-0}}"; fi
exec "${{0%/*}}/real" "$@"
END
{shutil.which("chmod")} +x .venv/bin/python
"""
WORKS = f"""
if [ "$1 $2" = "-m venv" ]; then echo "${{0##*/}}" "$@" >>"$LOG"; {MAKE_VENV} else exec {PYTHON} "$@"; fi
"""
UV = f"""
case "$1 $2" in
  "--version "*) exit 0 ;;
  "python find") exit 2 ;;
  "venv "*) echo uv "$@" >>"$LOG"; {MAKE_VENV} ;;
  "pip install") echo uv "$@" >>"$LOG"; exit "${{INSTALL_STATUS:-0}}" ;;
esac
"""

# One that makes environments in which `-m pip` only writes to the log, and ends with {status}.
WITH_TORCH = f"""
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && {shutil.which("cp")} "$0" "$3/bin/python" ;;
  "-m pip") echo "$@" >>"$LOG"; exit {{status}} ;;
esac
"""
LOCKED = "-m pip install --quiet --no-compile --no-deps -r requirements.lock -e ."


class Machine:
    """A repository in a folder with a space in its name, and a PATH that holds what a test puts there."""

    def __init__(self, folder):
        self.repo, self.bin, self.pyenv = folder / "a repo", folder / "bin", folder / "pyenv"
        self.log_file, self.venv = folder / "log", self.repo / ".venv"
        (self.repo / "tools").mkdir(parents=True)
        for path in (ROOT / "tools/setup.sh", ROOT / "pyproject.toml", *ROOT.glob("requirements*.lock")):
            shutil.copy(path, self.repo / path.relative_to(ROOT))
        self.bin.mkdir()
        for name in TOOLS:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)

    def has(self, **programs):
        for name, body in programs.items():
            self.add(self.bin / re.sub(r"python3(\d+)", r"python3.\1", name), body)
        return self

    def add(self, path, body):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def start(self, *args, **env):
        env = {"PATH": self.bin, "HOME": self.repo.parent, "PYENV_ROOT": self.pyenv, "LOG": self.log_file, **env}
        return subprocess.Popen(
            [self.repo / "tools" / "setup.sh", *args],
            cwd=self.repo.parent,  # the script must find its own way home
            env={name: os.fspath(value) for name, value in env.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def setup(self, *args, **env):
        """(exit status, stdout, stderr)"""
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def log(self):
        """What was asked of the fake programs since the last look."""
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        self.log_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def one_sentence(err):
    return err.startswith("setup.sh: ") and err.count("\n") == 1


def test_a_shim_that_fails_is_passed_over(machine):
    status, out, err = machine.has(python313=SHIM, python312=WORKS, python3=WORKS).setup()
    assert (status, err) == (0, "")
    assert machine.log() == ["python3.12 -m venv .venv", LOCKED]
    assert ".venv is ready" in out
    assert (machine.venv / "stamp").exists()


def test_garbage_and_old_versions_are_passed_over_and_the_newest_of_pyenv_is_taken(machine):
    machine.has(python312=GARBAGE, python3=OLD)
    for version, body in {"3.9.18": OLD, "3.12.11": SHIM, "3.12.9": WORKS, "3.12.1": WORKS}.items():
        machine.add(machine.pyenv / "versions" / version / "bin" / "python", body)
    status, out, err = machine.setup()
    assert (status, err) == (0, "")
    assert "3.12.9/bin/python" in out
    assert machine.log() == ["python -m venv .venv", LOCKED]


def test_without_python_one_sentence_says_what_to_install(machine):
    status, _, err = machine.has(python313=SHIM, python3=OLD).setup()
    assert status == 1
    assert one_sentence(err)
    assert "install Python 3.12 or 3.13, or uv" in err
    assert not machine.venv.exists()


def test_without_ensurepip_one_sentence_says_so_unless_another_python_has_it(machine):
    status, _, err = machine.has(python312=NO_ENSUREPIP).setup()
    assert status == 1
    assert one_sentence(err)
    assert "lacks ensurepip" in err
    assert machine.has(python3=WORKS).setup()[0] == 0
    assert machine.log()[0] == "python3 -m venv .venv"


@pytest.mark.parametrize("args", [["--extra", "cuda99"], ["--extra=gpu"], ["--extra"], ["--gpu"], ["cuda13"]])
def test_an_unknown_argument_is_one_sentence_and_changes_nothing(machine, args):
    status, out, err = machine.has(python3=WORKS).setup(*args)
    assert (status, out) == (2, "")
    assert one_sentence(err)
    assert machine.log() == []


def test_help_names_the_extras(machine):
    status, out, _ = machine.setup("--help")
    assert status == 0
    assert "--extra cuda13" in out
    assert "--extra tpu" in out
    assert "--extra aot" in out


def test_a_second_run_does_nothing(machine):
    machine.has(python3=WORKS).setup()
    machine.log()
    assert machine.setup() == (0, ".venv is up to date\n", "")
    assert machine.log() == []


@pytest.mark.parametrize("changed", ["pyproject.toml", *(path.name for path in ROOT.glob("requirements*.lock"))])
def test_a_changed_file_installs_again_into_the_same_environment(machine, changed):
    machine.has(python3=WORKS).setup()
    machine.log()
    with open(machine.repo / changed, "a") as f:
        f.write("\n")
    assert machine.setup()[0] == 0
    assert machine.log() == [LOCKED]


def test_a_moved_repository_installs_again_so_that_the_project_is_found_in_its_new_place(machine):
    machine.has(python3=WORKS).setup()
    machine.log()
    machine.repo = machine.repo.rename(machine.repo.with_name("moved"))
    assert machine.setup()[0] == 0
    assert machine.log() == [LOCKED]


def test_a_failed_installation_leaves_no_stamp_and_the_next_run_goes_on(machine):
    machine.has(python3=WORKS)
    assert machine.setup(INSTALL_STATUS="1")[0] == 1
    assert not (machine.venv / "stamp").exists()
    machine.log()
    assert machine.setup()[0] == 0
    assert machine.log() == [LOCKED]
    assert machine.setup("--extra=tpu", INSTALL_STATUS="1")[0] == 1
    assert not (machine.venv / "stamp").exists()  # the one of the good run is gone too


def test_a_broken_environment_is_made_anew(machine):
    machine.has(python3=WORKS).setup()
    machine.log()
    (machine.venv / "bin" / "real").unlink()
    (machine.venv / "leftover").touch()
    assert machine.setup()[0] == 0
    assert machine.log() == ["python3 -m venv .venv", LOCKED]
    assert not (machine.venv / "leftover").exists()


def test_extras_are_constrained_by_the_lock_file_and_stay(machine):
    cuda = "-m pip install --quiet --no-compile -c requirements.lock -c requirements-gcs.lock -e .[cuda13]"
    both = "-m pip install --quiet --no-compile -c requirements.lock -c requirements-gcs.lock -e .[cuda13,tpu]"
    all_three = "-m pip install --quiet --no-compile -c requirements.lock -c requirements-gcs.lock -e .[cuda13,tpu,aot]"
    machine.has(python3=WORKS).setup("--extra", "cuda13")
    assert machine.log()[1:] == [LOCKED, cuda]
    machine.setup()
    machine.setup("--extra=cuda13")
    assert machine.log() == []
    machine.setup("--extra", "tpu", "--extra", "cuda13")
    assert machine.log() == [LOCKED, both]
    machine.setup("--extra", "aot")
    assert machine.log() == [LOCKED, all_three]
    (machine.venv / "bin" / "real").unlink()
    machine.setup()
    assert machine.log()[1:] == [LOCKED, all_three]


def test_the_cuda_compiler_has_a_folder_of_its_own_and_is_fetched_once(machine):
    folder, lock = machine.venv / "compilers" / "cuda13", "requirements-cuda13-aot.lock"
    fetch = f"-m pip install --quiet --no-compile --no-deps --target .venv/compilers/cuda13.new -r {lock}"
    gcs = "-m pip install --quiet --no-compile -c requirements.lock -c requirements-gcs.lock -e .[gcs]"
    machine.has(python3=WORKS).setup("--extra", "cuda13-aot", "--extra", "gcs")
    assert machine.log()[1:] == [LOCKED, gcs, fetch]
    (folder / "kept").touch()
    with (machine.repo / "requirements.lock").open("a") as file:
        file.write("# other packages\n")
    machine.setup()
    assert machine.log() == [LOCKED, gcs] and (folder / "kept").exists()
    with (machine.repo / lock).open("a") as file:
        file.write("# another compiler\n")
    machine.setup()
    assert machine.log() == [LOCKED, gcs, fetch] and not (folder / "kept").exists()
    (machine.repo / lock).write_text("# one that cannot be fetched\n")
    assert machine.setup(INSTALL_STATUS="1")[0] == 1
    assert not (machine.venv / "stamp").exists()


def test_torch_has_an_environment_of_its_own_with_the_first_python_for_which_it_is_there(machine):
    folder, lock = machine.venv / "compare", "requirements-compare.lock"
    fetch = f"-m pip install --quiet --no-compile --no-deps -r {lock}"
    machine.has(python3=WORKS).setup()
    without, has_it = (WITH_TORCH.format(status=status) for status in (1, 0))
    ours = machine.venv / "bin" / "python"
    ours.rename(ours.with_name("packages"))
    machine.add(ours, f'case "$0 $2" in *compare* | *" venv") {without} exit ;; esac; exec "${{0%/*}}/packages" "$@"')
    status, _, err = machine.setup("--extra", "compare")
    assert status == 1 and one_sentence(err) and "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS" in err
    assert not folder.exists() and not (machine.venv / "stamp").exists()
    machine.add(machine.bin / "python3.11", has_it)
    machine.log()
    assert machine.setup()[0] == 0  # the extra stays
    assert machine.log() == [LOCKED, fetch, fetch] and (folder / lock).read_text() == (machine.repo / lock).read_text()
    (folder / "kept").touch()
    (machine.venv / "stamp").unlink()
    machine.setup()
    assert (folder / "kept").exists()
    with (machine.repo / lock).open("a") as file:
        file.write("# another torch\n")
    machine.setup()
    assert not (folder / "kept").exists()


def test_uv_is_used_where_it_runs(machine):
    machine.has(python313=SHIM, python312=WORKS, uv=UV).setup("--extra", "tpu")
    assert machine.log() == [
        f"uv venv --quiet --python {machine.bin / 'python3.12'} .venv",
        "uv pip install --quiet --python .venv/bin/python --no-deps -r requirements.lock -e .",
        "uv pip install --quiet --python .venv/bin/python -c requirements.lock -c requirements-gcs.lock -e .[tpu]",
    ]
    machine.has(uv=SHIM)
    (machine.venv / "stamp").unlink()
    assert machine.setup()[0] == 0
    assert machine.log()[0] == LOCKED


def test_uv_may_bring_a_python_where_there_is_none(machine):
    status, out, _ = machine.has(python3=OLD, uv=UV).setup()
    assert status == 0
    assert "uv downloads" in out
    assert machine.log()[0] == "uv venv --quiet --python 3.12 .venv"


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock nothing orders two set-ups")
def test_of_two_set_ups_at_once_one_installs(machine):
    machine.has(python3=WORKS)
    both = [machine.start(INSTALL_SECONDS="0.3") for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert machine.log() == ["python3 -m venv .venv", LOCKED]
    assert sum("waiting for another set-up" in out and "up to date" in out for out in outputs) == 1


def test_the_lock_files_pin_every_dependency_and_nothing_heavy():
    def pins_of(file):
        lines = (ROOT / file).read_text().splitlines()
        assert lines == sorted(lines)
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*(\+cpu)?", line)] == []
        return dict(line.split("==") for line in lines)

    pins, gcs = pins_of("requirements.lock"), pins_of("requirements-gcs.lock")
    compiler, compared = pins_of("requirements-cuda13-aot.lock"), pins_of("requirements-compare.lock")
    assert compared["torch"].endswith("+cpu") and compared["transformers"].startswith("5.")
    assert compiler["jax-cuda13-plugin"] == compiler["jax-cuda13-pjrt"] == pins["jax"]
    assert not set(pins) & set(gcs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for table, named in ((pins, project["dependencies"] + extras["dev"]), (gcs, extras["gcs"])):
        for wanted in map(Requirement, named):
            name = wanted.name.lower().replace("_", "-")
            assert name in table, f"{name} is in pyproject.toml and not pinned"
            assert wanted.specifier.contains(table[name], prereleases=True), f"{name}=={table[name]} is not {wanted}"
    pins |= gcs
    assert not {"torch", "tensorflow", "ray", "transformers", "datasets", "vllm"} & set(pins)
