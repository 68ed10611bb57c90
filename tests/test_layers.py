"""Imports point one way, host code stays free of JAX, modules stay small.

Run: python -m pytest tests/test_layers.py
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "nanochat_jax"

LAYERS = [  # a module imports its own row and the rows above it, nothing else; a folder is one module
    {"cluster", "line", "processes", "common", "config", "storage", "sealed", "sharding", "safe_pickle", "torch_save"},
    {
        *("tokenizer", "calculator", "sandbox", "download", "tasks", "packing", "token_cache", "data", "documents"),
        *("rollouts", "samples", "statistics"),
    },
    {"attention", "gpt", "loss", "muon", "optim", "scaling", "objective", "sampling"},
    {"train", "checkpoint", "nanochat_import", "nanochat_optimizer", "nanochat_export", "decode", "engine", "memory"},
    {"evals", "chatcore", "metrics", "report", "device", "runs", "interruption", "loop", "practice", "preflight"},
    {"base", "sft", "rl", "eval", "chat", "quickstart"},
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
HOST_ONLY = LAYERS[1] | {"common", "config", "safe_pickle", "torch_save"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
HEAVY = {"torch", "tensorflow", "ray", "transformers", "datasets"}
MAX_LINES = 420


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
    """Sentences, one for each import that points down the table and each module that is not in it."""
    for name, imports in files.items():
        user = "".join(name.split(".")[1:2])  # "" is the package's own __init__.py
        if user and user not in ROW:
            yield f"{name} is in no layer: add {user!r} to LAYERS in tests/test_layers.py and to the design's table"
            continue
        for target in (i.target for i in imports if i.target.split(".")[0] == root):
            used = "".join(target.split(".")[1:2])
            if not user:
                yield f"{name}/__init__.py must not import {target}: every module would load it"
            elif used in ROW and ROW[used] > ROW[user]:
                yield f"{name} (layer {ROW[user]}) must not import {target} (layer {ROW[used]})"


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
        for other in [name.rpartition(".")[0], *edges[name]]:
            all_loaded(other, edges, seen)
    return seen


def jax_faults(files):
    """Sentences, one for each host module that imports JAX (layer 1: in functions too) or loads it through another."""
    edges = loads(files)
    for name in files:
        top = "".join(name.split(".")[1:2])
        if top in LAYERS[1]:
            for target in (i.target for i in files[name] if i.target.split(".")[0] in JAX):
                yield f"{name} is host code and must not import {target}"
        if top in HOST_ONLY:
            for through in sorted(all_loaded(name, edges, set())):
                if any(i.on_load and i.target.split(".")[0] in JAX for i in files[through]):
                    yield f"importing {name} loads JAX through {through}"


FILES = read_package(PACKAGE)


def test_imports_point_one_way():
    assert list(layer_faults(FILES, PACKAGE.name)) == []


def test_no_modules_import_each_other_while_loading():
    assert cycle(FILES) is None


def test_host_code_does_not_load_jax():
    assert list(jax_faults(FILES)) == []


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
        "import pkg.sft",
        "from pkg import sft",
        "from pkg.sft import main",
        "from . import sft",
        "from .sft import main",
        "def f():\n    from pkg import sft",
        "class A:\n    import pkg.sft",
        "try:\n    from .sft import main\nexcept ImportError:\n    main = None",
    ],
)
def test_an_upward_import_is_found_in_every_form(tmp_path, source):
    (fault,) = layer_faults(package_of(tmp_path, {"gpt.py": source, "sft.py": ""}), "pkg")
    assert fault.startswith("pkg.gpt (layer 2) must not import pkg.sft")
    downward = source.replace("sft", "gpt")
    assert list(layer_faults(package_of(tmp_path, {"gpt.py": "", "sft.py": downward}), "pkg")) == []


def test_a_relative_import_from_a_folder_is_resolved(tmp_path):
    files = package_of(tmp_path, {"tasks/__init__.py": "", "tasks/arc.py": "from ..sft import main\nfrom . import hub"})
    assert [i.target for i in files["pkg.tasks.arc"]] == ["pkg.sft.main", "pkg.tasks.hub"]
    (fault,) = layer_faults(files, "pkg")
    assert fault == "pkg.tasks.arc (layer 1) must not import pkg.sft.main (layer 5)"


def test_an_unknown_module_is_a_fault_and_so_is_a_root_that_imports(tmp_path):
    root, unknown = layer_faults(package_of(tmp_path, {"__init__.py": "from . import gpt", "trainer2.py": ""}), "pkg")
    assert root == "pkg/__init__.py must not import pkg.gpt: every module would load it"
    assert unknown.startswith("pkg.trainer2 is in no layer")


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
            "packing.py": "def f():\n    from jax import numpy",
            "data.py": "from pkg import sharding",
            "sharding.py": "import jax",
            "common.py": "def f():\n    import jax",
        },
    )
    assert sorted(jax_faults(files)) == [
        "importing pkg.data loads JAX through pkg.sharding",
        "pkg.packing is host code and must not import jax.numpy",
    ]
