"""A stage's settings: one frozen dataclass whose fields are its flags; TOML presets; inheritance from a checkpoint.

Precedence: flag > --config FILE.toml > what the checkpoint recorded > default. A field that is None is inherited.
"""

import argparse
import dataclasses
import difflib
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanochat_jax.cli.main import _write_nowhere

T = TypeVar("T")
# The type of a setting that is None where the user does not give it; its comment says what holds then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
CONSTRUCTORS = ConstructorRegistry()
HERE = "here"
# The type of --preflight, whose value may be left out: then it is HERE. None where the flag is not given.
Preflight = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        (0, 1),
        "[SLICE]",
        lambda texts: texts[0] if texts else HERE,
        lambda value: value is None or isinstance(value, str),
        lambda value: [] if value is None else [value],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]


@CONSTRUCTORS.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """As tyro has it, but that an empty path, of a variable that is not set, is not the working directory."""
    if info.type is not Path:
        return None

    def read(texts: list[str]) -> Path:
        if not texts[0]:
            raise ValueError("a path must not be empty (the working directory is a single dot)")
        return Path(texts[0])

    return PrimitiveConstructorSpec(1, "PATH", read, lambda value: isinstance(value, Path), lambda path: [str(path)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The settings that base, sft and rl have in common."""

    # where and how
    run: str = "dummy"  # name of the run; "dummy" = no wandb
    device_type: str = "auto"  # auto, cuda, tpu or cpu
    dtype: str = "auto"  # compute type: float32 or bfloat16; auto = bfloat16 on GPU and TPU, float32 on CPU
    attention: str = "auto"  # reference, chunked, mosaic_gpu, splash or cudnn; auto = the fastest here
    remat: str = "auto"  # computed again instead of kept: none, elementwise or block; auto = the least that fits
    preflight: Preflight = None  # compile only and say whether it fits: here, or on a TPU slice such as v5e-8
    mesh: Maybe[str] = None  # devices by axis, as data=4,model=2 or replica=2,data=4; default: by width and number
    replicate: bool = False  # whole parameters on every device, instead of shards over data (for small models)
    verbose: bool = False  # print how every parameter is split over the devices
    coordinator: Maybe[str] = None  # of several processes: HOST:PORT where process 0 listens (TPU, SLURM, MPI: found)
    num_processes: Maybe[int] = None  # how many there are
    process_id: Maybe[int] = None  # which one this is, from 0
    resume: bool = False  # go on from the newest intact checkpoint of this run, if there is one
    overwrite: bool = False  # delete the checkpoints that an earlier run left in the folder
    config: Maybe[Path] = None  # TOML file of flags; flags on the command line win


def holds_paths(kind: Any) -> bool:
    """Whether a field of this type is a path, perhaps None, or several."""
    return kind is Path or any(map(holds_paths, get_args(kind)))


def parse(cls: type, argv: list[str] | None = None, prog: str | None = None) -> Any:
    """Settings of a stage from the command line and its --config file; a field's comment is its flag's help.

    The result also has `given`, beside its fields: the names that the user set, here or there.
    """
    argv = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(prog=prog, usage=f"{prog} [-h] [OPTIONS]", add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    given = {arg.split("=")[0].removeprefix("--").removeprefix("no-") for arg in argv if arg.startswith("--")}
    given = {name.replace("_", "-") for name in given}
    from_file = file_flags(cls, Path(file), given) if file else []
    style = (tyro.conf.UseAppendAction, tyro.conf.DisallowNone)
    try:
        cfg = tyro.cli(cls, args=[*from_file, *argv], prog=prog, config=style, registry=CONSTRUCTORS)
    except BrokenPipeError:  # --help | head
        _write_nowhere()
        sys.exit(0)
    given |= {flag.split("=")[0].removeprefix("--").removeprefix("no-") for flag in from_file}
    object.__setattr__(cfg, "given", frozenset(name.replace("-", "_") for name in given))
    return cfg


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
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}
    flags = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name not in fields or name == "config":
            near = "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name, fields, 1))
            raise SystemExit(f"{file}: {key} is not a flag of this stage{near}")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
            raise SystemExit(f"{file}: {key} must be a plain value or a list of them, got {value!r}")
        if name in given:
            continue
        if isinstance(fields[name].default, bool):
            if not isinstance(value, bool):
                raise SystemExit(f"{file}: {key} must be true or false, got {value!r}")
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and not isinstance(fields[name].default, tuple):
            raise SystemExit(f"{file}: {key} must be one value, got {value!r}")
        else:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}={int(v) if isinstance(v, bool) else v}" for v in values]
    return flags


def inherit(cfg: Any, recorded: Mapping[str, Any], fallbacks: Mapping[str, Any], log: Callable = print) -> Any:
    """Fill the fields named in `fallbacks` that are None: from the checkpoint's record, else from the fallback.

    Every resolution is announced through `log`, also where a flag overrides what the base model was trained with.
    """
    for name, fallback in fallbacks.items():
        ours, theirs = getattr(cfg, name), recorded.get(name)
        if isinstance(theirs, bool) or not isinstance(theirs, int | type(fallback)):  # absent, or no number to use
            theirs = None
        if ours is None and theirs is not None:
            cfg = dataclasses.replace(cfg, **{name: theirs})
            log(f"Inherited {name}={theirs} from pretrained checkpoint")
        elif ours is None:
            cfg = dataclasses.replace(cfg, **{name: fallback})
            log(f"Using {name}={fallback} (not recorded in pretrained checkpoint)")
        elif theirs is not None and ours != theirs:
            log(f"NOTE: --{name.replace('_', '-')}={ours} overrides pretrained value of {theirs}")
        else:
            log(f"Using {name}={ours}")
    return cfg


def require(condition: bool, message: str) -> None:
    """ValueError with the message where what a user typed cannot work."""
    if not condition:
        raise ValueError(message)
