"""A command's settings: one frozen dataclass whose fields are its flags, with everything that is known of each.

Precedence: flag > --config FILE.toml > what the checkpoint recorded > default. A field that is None is inherited.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from nanochat_jax.cli.main import write_nowhere

T = TypeVar("T")
# The type of a setting that is None where the user does not give it; its help says what holds then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]
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
CONSTRUCTORS = ConstructorRegistry()
LARGEST = 2**31 - 1  # of an integer setting: JAX counts in int32

# What --resume does with a setting. "same": the checkpoint's value goes on, and another one is refused, since it would
# change the training. "free": the user may give another value, which changes what is watched and kept, or how the work
# is split, but not what is computed. "own": each start has its own value, and the checkpoint's does not matter.
OnResume = Literal["same", "free", "own"]


class Bounds(NamedTuple):
    """What a setting's value must be."""

    holds: Callable[[Any], bool]
    words: str  # for the error: "--flag must be <words>, got <value>"


def between(low: float, high: float, words: str | None = None, *, also: float | None = None) -> Bounds:
    """A number from `low` to `high`, or the single value `also`. words: default "between <low> and <high>"."""

    def holds(value: float) -> bool:
        return low <= value <= high or value == also

    return Bounds(holds, words or f"between {low} and {high}")


def at_least(low: float, words: str | None = None, *, also: float | None = None) -> Bounds:
    """An integer of at least `low`, or the single value `also`."""
    return between(low, LARGEST, words or f"at least {low}", also=also)


def one_of(*choices: Any, words: str | None = None) -> Bounds:
    """One of some values."""
    return Bounds(choices.__contains__, words or f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}")


FINITE = Bounds(math.isfinite, "a finite number")
RATE = between(0, 1000)  # of a learning rate, a weight decay, or a factor on rates
RATIO = between(0, 1)


def setting(
    default: Any,
    help: str,
    bounds: Bounds | None = None,
    *,
    inherited: Any = None,
    resume: OnResume = "same",
) -> Any:
    """A field of a settings dataclass.

    help: the flag's line in --help. bounds: what `check_bounds` demands of a value that is not None. inherited: the
    value of a field that is None, neither given nor recorded by the model that a run starts from; without it the field
    is not inherited (see `inherit`). resume: see OnResume.
    """
    properties = {"help": help, "bounds": bounds, "inherited": inherited, "resume": resume}
    return dataclasses.field(default=default, metadata=properties)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The settings that base, sft and rl have in common."""

    # where and how
    run: str = setting("dummy", 'name of the run; "dummy" = no wandb', resume="free")
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", resume="own")
    dtype: str = setting("auto", "compute type: float32 or bfloat16; auto = bfloat16 on GPU and TPU, float32 on CPU")
    attention: str = setting(
        "auto", "backend by name, see docs/training.md; auto = the best that passes a trial here", resume="own"
    )
    remat: str = setting(
        "auto",
        "computed again instead of kept: none, elementwise or block; auto = the least that fits",
        one_of("auto", "none", "elementwise", "block"),
        resume="free",
    )
    preflight: Preflight = setting(
        None, "compile only and say whether it fits: here, or on a TPU slice such as v5e-8", resume="own"
    )
    mesh: Maybe[str] = setting(
        None,
        "devices by axis, as data=4,model=2 or replica=2,data=4; default: by width and number",
        resume="own",
    )
    replicate: bool = setting(
        False, "whole parameters on every device, instead of shards over data (for small models)", resume="free"
    )
    verbose: bool = setting(False, "print how every parameter is split over the devices", resume="own")
    coordinator: Maybe[str] = setting(
        None,
        "of several processes: HOST:PORT where process 0 listens (TPU, SLURM, MPI: found)",
        resume="own",
    )
    num_processes: Maybe[int] = setting(None, "how many there are", resume="own")
    process_id: Maybe[int] = setting(None, "which one this is, from 0", resume="own")
    resume: bool = setting(False, "go on from the newest intact checkpoint of this run, if there is one", resume="own")
    keep_checkpoints: int = setting(2, "how many checkpoints of the run stay on disk", at_least(1), resume="free")
    save_patience: float = setting(
        600.0, "seconds that a run's last save is tried again before it gives up", at_least(0), resume="free"
    )
    overwrite: bool = setting(False, "delete the checkpoints that an earlier run left in the folder", resume="own")
    config: Maybe[Path] = setting(None, "TOML file of flags; flags on the command line win", resume="own")
    # names of the settings that the user gave, here or in the file
    given: Annotated[frozenset[str], tyro.conf.Suppress] = dataclasses.field(default=frozenset(), compare=False)


def flag(name: str) -> str:
    """What a user types for the setting with this name."""
    return f"--{name.replace('_', '-')}"


def values_of(cfg: Any) -> dict[str, Any]:
    """The settings by name, without which of them the user has given."""
    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "given"}


def holds_paths(kind: Any) -> bool:
    """Whether a field of this type is a path, perhaps None, or several."""
    return kind is Path or any(map(holds_paths, get_args(kind)))


def check_bounds(cfg: Any) -> None:
    """Validate the settings one by one; the ValueError names the first flag that breaks its bounds."""
    for field in dataclasses.fields(cfg):
        bounds, value = field.metadata.get("bounds"), getattr(cfg, field.name)
        if bounds and value is not None and not bounds.holds(value):
            raise ValueError(f"{flag(field.name)} must be {bounds.words}, got {value}")


def require(condition: bool, message: str) -> None:
    """ValueError with the message where what a user typed cannot work."""
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------ from the command line
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


# --------------------------------------------------------------------------------------------- from a checkpoint
def inherit[T](cfg: T, recorded: Mapping[str, Any], log: Callable = print) -> T:
    """Fill the settings that are inherited and None: from the checkpoint's record, else with their own fallback.

    Every resolution is announced through `log`, also where a flag overrides what the base model was trained with.
    """
    for field in dataclasses.fields(cfg):
        name, fallback = field.name, field.metadata.get("inherited")
        if fallback is None:
            continue
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
            log(f"NOTE: {flag(name)}={ours} overrides pretrained value of {theirs}")
        else:
            log(f"Using {name}={ours}")
    return cfg


def resumed_settings[T](cfg: T, recorded: Mapping[str, Any], another: str, log: Callable) -> T:
    """The settings of a run that goes on: those of its checkpoint, with what the user may give anew (see OnResume).

    recorded: what `recorded_settings` wrote. another: the flag that names another run. ValueError: the user gives a
    value that would change the training.
    """
    changed, restored = [], {}
    for field in dataclasses.fields(cfg):
        name, ours = field.name, getattr(cfg, field.name)
        on_resume = field.metadata.get("resume", "own")
        if on_resume == "own" or name not in recorded:
            continue
        theirs = _from_json(recorded[name], field.type)
        if _to_json(ours, Path.resolve) == _to_json(theirs, Path.resolve):
            continue
        if name not in cfg.given and ours == field.default:
            restored[name] = theirs
            log(f"Inherited {name}={recorded[name]} from the checkpoint")
        elif on_resume == "free":
            log(f"NOTE: {flag(name)}={_to_json(ours)} overrides the checkpoint's value of {recorded[name]}")
        else:
            changed.append(f"{flag(name)} was {recorded[name]} and is {_to_json(ours)}")
    if changed:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(changed)}; use another {another}")
    return dataclasses.replace(cfg, **restored)


def recorded_settings(cfg: Any) -> dict[str, Any]:
    """The settings as a checkpoint keeps them: JSON values, paths made absolute."""
    return {name: _to_json(value) for name, value in values_of(cfg).items()}


def _to_json(value: Any, whole: Callable[[Path], Path] = Path.absolute) -> Any:
    """whole: how a path becomes one that holds in any working directory."""
    if isinstance(value, tuple):
        return [_to_json(v, whole) for v in value]
    if not isinstance(value, Path):
        return value
    if str(value).startswith("hub:"):  # hub:owner/dataset is one in any working directory
        return str(value)
    return str(whole(Path(os.path.expanduser(value))))


def _from_json(value: Any, kind: Any) -> Any:
    """The setting of a field of this type that `_to_json` has recorded."""
    if isinstance(value, list):
        return tuple(_from_json(v, kind) for v in value)
    return Path(value) if isinstance(value, str) and holds_paths(kind) else value
