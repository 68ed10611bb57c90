"""Settings from a command's flags and its --config file.

Precedence: flag > --config FILE.toml > what the checkpoint recorded > default.
"""

import argparse
import dataclasses
import difflib
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanochat_jax.cli.help import help_text
from nanochat_jax.cli.main import write_nowhere
from nanochat_jax.cli.settings import marks

CONSTRUCTORS = ConstructorRegistry()


@CONSTRUCTORS.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Paths as tyro reads them, except that an empty one, of a variable that is not set, is an error: it would be the
    working directory."""
    if info.type is not Path:
        return None

    def read(texts: list[str]) -> Path:
        if not texts[0]:
            raise ValueError("a path must not be empty (the working directory is a single dot)")
        return Path(texts[0])

    return PrimitiveConstructorSpec(1, "PATH", read, lambda value: isinstance(value, Path), lambda path: [str(path)])


def parse[T](cls: type[T], argv: list[str] | None = None, prog: str | None = None) -> T:
    """Settings from the command line and its --config file.

    Where the class has a field `given` it holds the names that the user set, on the command line or in the file."""
    argv = sys.argv[1:] if argv is None else argv
    grouped = dataclasses.is_dataclass(cls) and any(f.metadata.get("group") for f in dataclasses.fields(cls))
    if grouped and not {"-h", "--help"}.isdisjoint(argv):
        print_and_exit(help_text(cls, prog))
    finder = argparse.ArgumentParser(prog=prog, usage=f"{prog} [-h] [OPTIONS]", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    given = {_kebab_name(arg) for arg in argv if arg.startswith("--")}
    from_file = file_flags(cls, Path(file), given) if file else []
    style = (tyro.conf.UseAppendAction, tyro.conf.DisallowNone)
    try:
        cfg = tyro.cli(cls, args=[*from_file, *argv], prog=prog, config=style, registry=CONSTRUCTORS)
    except BrokenPipeError:  # --help | head
        write_nowhere()
        sys.exit(0)
    if not any(field.name == "given" for field in dataclasses.fields(cls)):
        return cfg
    given |= {_kebab_name(arg) for arg in from_file}
    return dataclasses.replace(cfg, given=frozenset(name.replace("-", "_") for name in given))


def print_and_exit(text: str) -> NoReturn:
    """Print what a command has been asked for instead of running; also into a pipe that is closed, as of `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        write_nowhere()
    sys.exit(0)


def _kebab_name(arg: str) -> str:
    """--no-some_flag=value -> some-flag"""
    return arg.split("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")


def file_flags(cls: type, file: Path, given: set[str]) -> list[str]:
    """The settings of a flat TOML file as flags, without those that the command line gives (kebab case, no dashes).

    SystemExit with one sentence: no such file, not TOML, a key that is not a flag, a value that is not flat.
    """
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"--config={file} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SystemExit(f"--config={file} must be a readable TOML file: {e}") from None
    except RecursionError:
        raise SystemExit(f"--config={file} must be a flat TOML file: it is nested too deeply") from None
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}
    flags = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name not in fields or name in ("config", "given"):
            near = "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name, fields, 1))
            raise SystemExit(f"{file}: {key} is not a flag of this stage{near}")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
            raise SystemExit(f"{file}: {key} must be a plain value or a list of them, got {value!r}")
        if name in given:
            continue
        if value is True and any(getattr(mark, "nargs", 1) == (0, 1) for mark in marks(fields[name])):
            flags.append(f"--{name}")  # such as resume = true
        elif isinstance(fields[name].default, bool):
            if not isinstance(value, bool):
                raise SystemExit(f"{file}: {key} must be true or false, got {value!r}")
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and not isinstance(fields[name].default, tuple):
            raise SystemExit(f"{file}: {key} must be one value, got {value!r}")
        else:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}={int(v) if isinstance(v, bool) else v}" for v in values]
    return flags
