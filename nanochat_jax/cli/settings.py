"""A command's settings: one frozen dataclass whose fields are its flags, with everything that is known of each.

Precedence: flag > --config FILE.toml > what the checkpoint recorded > default. A field that is None is inherited.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")
# The type of a setting that is None where the user does not give it; its help says what holds then.
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]


def with_optional_value(alone: Any, metavar: str, kind: type = str) -> Any:
    """The type of a flag whose value, of this kind, may be left out: then it is `alone`. None where the flag is not
    given."""
    constructor = PrimitiveConstructorSpec(
        (0, 1),
        metavar,
        lambda texts: kind(texts[0]) if texts else alone,
        lambda value: value is None or isinstance(value, kind),
        lambda value: [] if value is None else [str(value)],
    )
    return Annotated[kind | None, constructor, tyro.conf.arg(help_behavior_hint="")]


HERE = "here"
Preflight = with_optional_value(HERE, "[SLICE]")
BEST = "best"  # as a model's step: the one that did best on held-out problems
ModelStep = Annotated[
    int | str | None,
    PrimitiveConstructorSpec(
        1,
        "N|best",
        lambda texts: BEST if texts[0] == BEST else int(texts[0]),
        lambda value: value in (None, BEST) or isinstance(value, int),
        lambda value: [] if value is None else [str(value)],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]
AUTO = "auto"
Resume = with_optional_value("run", "[auto]")  # AUTO: begins a new run where there is none to go on with
# Groups of settings, in the order in which --help shows them: what is used most comes first.
RUN = "model and run"
OUTPUT = "output"
DATA = "data"
MODEL = "model"
LENGTH = "length and batch"
SERVER = "server"
REQUESTS = "what requests may ask for"
ANSWERS = "answers"
OBJECTIVE = "objective"
OPTIMIZATION = "optimization"
EVALUATION = "evaluation and checkpoints"
DEVICES = "devices and processes"
GROUPS = (RUN, OUTPUT, DATA, MODEL, LENGTH, SERVER, REQUESTS, ANSWERS, OBJECTIVE, OPTIMIZATION, EVALUATION, DEVICES)
LARGEST = 2**31 - 1  # of an integer setting: JAX counts in int32

# What --resume does with a setting. "same": the checkpoint's value goes on, and another one is refused, since it would
# change the training. "free": the user may give another value, which changes what is watched and kept, or how the work
# is split, but not what is computed. "longer": free too, as far as the stage can do it. "own": each start has its own
# value, and the checkpoint's does not matter.
OnResume = Literal["same", "free", "longer", "own"]


class Bounds(NamedTuple):
    """What a setting's value must be."""

    holds: Callable[[Any], bool]
    words: str  # for the error: "--flag must be <words>, got <value>"
    choices: tuple = ()  # all values, where they are few


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
    return Bounds(choices.__contains__, words or f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}", choices)


BASE_HELP = "where it is: a base directory, a folder of one model, or hub:OWNER/NAME[@REVISION][/PREFIX]"
SOURCES = one_of("base", "mid", "sft", "rl")  # stages that make models; "mid" is one of nanochat's first eras
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
    group: str = "",
) -> Any:
    """A field of a settings dataclass; default: dataclasses.MISSING where it must be given.

    help: the flag's line in --help. group: title of the lines among which it stands there. bounds: what `check_bounds`
    demands of a value that is not None. inherited: the value of a field that is None, neither given nor recorded by the
    model that a run starts from; without it the field is not inherited (see `inherit`). resume: see OnResume.
    """
    properties = {"help": help, "bounds": bounds, "inherited": inherited, "resume": resume, "group": group}
    return dataclasses.field(default=default, metadata=properties)


def short(*names: str) -> Any:
    """Other names of a flag, such as one letter, as an annotation of its field."""
    return tyro.conf.arg(aliases=names)


def is_positional(field: dataclasses.Field) -> bool:
    """Whether the setting is given without its name, by its place among the words."""
    return tyro.conf.Positional[int].__metadata__[0] in marks(field)


def marks(field: dataclasses.Field) -> tuple:
    """What the type of a field is annotated with."""
    return getattr(field.type, "__metadata__", ())


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
            raise ValueError(f"{flag(field.name)} must be {bounds.words}, got {value!s:.60}")


def require(condition: bool, message: str) -> None:
    """ValueError with the message where what a user typed cannot work."""
    if not condition:
        raise ValueError(message)


# --------------------------------------------------------------------------------------------- from a checkpoint
def inherit[T](cfg: T, recorded: Mapping[str, Any], model: str, log: Callable = print) -> T:
    """Fill the settings that are inherited and None: from what a model's checkpoint records, else with their fallback.

    model: what it is, such as "the base model". `log` is told in one line what comes from it, in another what is a
    fallback, and of each flag that overrides what the model was trained with.
    """
    inherited, fallbacks = {}, {}
    for field in dataclasses.fields(cfg):
        name, fallback = field.name, field.metadata.get("inherited")
        if fallback is None:
            continue
        ours, theirs = getattr(cfg, name), recorded.get(name)
        if isinstance(theirs, bool) or not isinstance(theirs, int | type(fallback)):  # absent, or no number to use
            theirs = None
        if ours is None and theirs is not None:
            inherited[name] = theirs
        elif ours is None:
            fallbacks[name] = fallback
        elif theirs is not None and ours != theirs:
            log(f"NOTE: {flag(name)}={ours} overrides the {theirs} that {model} was trained with")
    if inherited:
        log(f"Inherited from {model}: {_listed(inherited)}")
    if fallbacks:
        log(f"Using the default of what {model} does not record: {_listed(fallbacks)}")
    return dataclasses.replace(cfg, **inherited, **fallbacks)


def _listed(values: Mapping[str, Any]) -> str:
    """The settings with their values, in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


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
        elif on_resume in ("free", "longer"):
            log(f"NOTE: {flag(name)}={_to_json(ours)} overrides the checkpoint's value of {recorded[name]}")
        else:
            changed.append(f"{flag(name)} was {recorded[name]} and is {_to_json(ours)}")
    if changed:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(changed)}; use another {another}")
    if restored:
        log(f"Inherited from the checkpoint: {_listed({name: recorded[name] for name in restored})}")
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
