"""The tree is the architecture: folders import downwards only, host code stays free of JAX, modules stay small.

Run: python -m pytest tests/test_layers.py
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "nanochat_jax"

FOLDERS = [  # a folder imports itself and those before it in this list; commands import all, nobody imports a command
    *("distributed", "files", "model", "optim", "cli", "flags", "interop", "tasks", "data", "tokenizer", "inference"),
    *("serving", "evals", "checkpoints", "train", "rollouts", "benches", "reports"),
]
TOURS = {"quickstart"}  # commands that run other commands
WITHOUT_JAX = {  # folders, or modules of other folders, that must not load JAX: host code starts in a blink
    *("files", "flags", "tasks", "data", "tokenizer", "distributed.cluster", "distributed.coordinator"),
    *("distributed.processes", "distributed.rendezvous", "distributed.signals"),
    *("cli.command_line", "cli.settings", "inference.calculator", "inference.samples", "inference.shapes"),
    *("evals.intervals", "report", "reports", "serving.metrics"),
}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
HEAVY = {"torch", "tensorflow", "ray", "transformers", "datasets"}
MAX_LINES = 400


class Import(NamedTuple):
    target: str  # dotted: `from a.b import c` is a.b.c
    on_load: bool  # runs when the module is imported, not in a function or under TYPE_CHECKING


def dotted(path, package):
    """nanochat_jax/tasks/gsm8k.py -> nanochat_jax.tasks.gsm8k; a folder's __init__.py -> the folder's name"""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(path, package):
    """Every import in the file, those inside functions too."""
    name = dotted(path, package)
    here = name if path.name == "__init__.py" else name.rpartition(".")[0]  # where a relative import starts

    def walk(node, on_load):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, on_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (Import(f"{source}.{alias.name}", on_load) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in ast.iter_child_nodes(node):
                yield from walk(child, on_load and child in node.orelse)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, on_load and not inside)

    return list(walk(ast.parse(path.read_text(encoding="utf-8")), True))


def read_package(package):
    """Dotted name -> imports, for every file."""
    return {dotted(path, package): read_imports(path, package) for path in sorted(package.rglob("*.py"))}


def module_of(target, files):
    """The file that an import reaches: the longest known prefix of its dotted name; None outside the package."""
    parts = target.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in files), None)


def loads(files):
    """Dotted name -> the package's files that importing it runs directly."""
    return {
        name: {module_of(i.target, files) for i in imports if i.on_load} - {None, name}
        for name, imports in files.items()
    }


def layer_faults(files, root):
    """Sentences, one for each import that points up and for each folder that is not in FOLDERS."""
    for name, imports in files.items():
        user = "".join(name.split(".")[1:2])
        folder = any(other.startswith(f"{root}.{user}.") for other in files)
        if folder and user not in FOLDERS:
            yield f"{name} is in a folder without a place: add {user!r} to FOLDERS in tests/test_layers.py"
            continue
        for imported in (i for i in imports if i.target.split(".")[0] == root):
            target = imported.target
            used = "".join(target.split(".")[1:2])
            if not user:
                if imported.on_load:
                    yield f"{name}/__init__.py must not import {target}: every module would load it"
            elif used not in FOLDERS:
                if used != user and user not in TOURS:
                    yield f"{name} must not import the command {target}"
            elif folder and FOLDERS.index(used) > FOLDERS.index(user):
                yield f"{name} must not import {target}: {used}/ lies above {user}/"


def cycle(files):
    """Modules that import each other while loading, or None."""
    try:
        TopologicalSorter(loads(files)).prepare()
    except CycleError as error:
        return error.args[1]


def all_loaded(name, edges, seen):
    """`name` and everything that runs when it is imported: what it imports, and the folders it lies in."""
    if name and name not in seen:
        seen.add(name)
        for other in [name.rpartition(".")[0], *edges.get(name, ())]:
            all_loaded(other, edges, seen)
    return seen


def jax_faults(files, without):
    """Sentences, one for each module that must not load JAX and does, itself or through another."""
    edges = loads(files)
    for name in files:
        place = name.partition(".")[2]
        if place.split(".")[0] in without:
            for target in (i.target for i in files[name] if i.target.split(".")[0] in JAX):
                yield f"{name} is host code and must not import {target}"
        if place in without or place.split(".")[0] in without:
            for through in sorted(all_loaded(name, edges, set())):
                if any(i.on_load and i.target.split(".")[0] in JAX for i in files.get(through, ())):
                    yield f"importing {name} loads JAX through {through}"


FILES = read_package(PACKAGE)


def test_imports_point_one_way():
    assert list(layer_faults(FILES, PACKAGE.name)) == []


def test_no_modules_import_each_other_while_loading():
    assert cycle(FILES) is None


def test_host_code_does_not_load_jax():
    assert list(jax_faults(FILES, WITHOUT_JAX)) == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_heavy_is_imported(name):
    assert {i.target.split(".")[0] for i in FILES[name]} & HEAVY == set()


def test_modules_are_small_and_named_for_what_they_do():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines, {MAX_LINES} is the most: split it, or simplify it"
        assert not re.search(r"utils?|helpers?|misc", path.stem), f"{path}: name the module for what it does"


# ---- the rules themselves, on packages of a few lines


def package_of(folder, sources):
    for name, source in {"__init__.py": "", **sources}.items():
        path = folder / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_package(folder / "pkg")


@pytest.mark.parametrize(
    "source",
    [
        "import pkg.train.step",
        "from pkg.train import step",
        "from pkg.train.step import TrainState",
        "from ..train import step",
        "from ..train.step import TrainState",
        "def f():\n    from pkg.train import step",
        "class A:\n    import pkg.train.step",
        "try:\n    from ..train.step import TrainState\nexcept ImportError:\n    TrainState = None",
    ],
)
def test_an_upward_import_is_found_in_every_form(tmp_path, source):
    files = package_of(tmp_path, {"model/gpt.py": source, "train/step.py": ""})
    (fault,) = layer_faults(files, "pkg")
    assert fault.startswith("pkg.model.gpt must not import pkg.train") and fault.endswith("train/ lies above model/")
    downward = source.replace("train", "model").replace("step", "gpt")
    assert list(layer_faults(package_of(tmp_path, {"train/step.py": downward, "model/gpt.py": ""}), "pkg")) == []


def test_a_folder_without_a_place_a_command_that_is_imported_and_a_root_that_imports_are_faults(tmp_path):
    sources = {"__init__.py": "from . import sft", "extras/a.py": "", "sft.py": "", "rl.py": "from pkg import sft"}
    sources |= {"train/loop.py": "from pkg.sft import main", "quickstart.py": "from pkg import rl, sft"}
    assert sorted(layer_faults(package_of(tmp_path, sources), "pkg")) == [
        "pkg.extras.a is in a folder without a place: add 'extras' to FOLDERS in tests/test_layers.py",
        "pkg.rl must not import the command pkg.sft",
        "pkg.train.loop must not import the command pkg.sft.main",
        "pkg/__init__.py must not import pkg.sft: every module would load it",
    ]


def test_a_cycle_is_found_and_a_late_import_makes_none(tmp_path):
    gpt = "import pkg.loss"
    files = package_of(tmp_path, {"gpt.py": gpt, "loss.py": "from pkg import gpt"})
    assert set(cycle(files)) == {"pkg.gpt", "pkg.loss"}
    late = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg import gpt\ndef f():\n    import pkg.gpt"
    assert cycle(package_of(tmp_path, {"gpt.py": gpt, "loss.py": late})) is None


def test_jax_is_found_in_a_function_and_through_another_module(tmp_path):
    files = package_of(
        tmp_path,
        {
            "data/rows.py": "from pkg.distributed import sharding",
            "data/packing.py": "def f():\n    from jax import numpy",
            "distributed/sharding.py": "import jax",
            "cli/settings.py": "import flax.nnx",
        },
    )
    assert sorted(jax_faults(files, {"data", "cli.settings"})) == [
        "importing pkg.cli.settings loads JAX through pkg.cli.settings",
        "importing pkg.data.rows loads JAX through pkg.distributed.sharding",
        "pkg.data.packing is host code and must not import jax.numpy",
    ]
