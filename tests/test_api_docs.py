"""The pages that pdoc makes of the docstrings: everything on them says what it is, and they are made without a warning.

Run: python -m pytest tests/test_api_docs.py
"""

import ast
import functools
import subprocess
import sys

import pytest

from tests.test_layers import FILES, PACKAGE


@functools.cache
def trees():
    """{path: syntax tree} of every module."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_public_module_class_and_function_has_a_docstring():
    bare = []
    for path, tree in trees().items():
        public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
        nodes = [tree, *public] if tree.body else []
        bare += [f"{path}: {getattr(n, 'name', 'the module')}" for n in nodes if not ast.get_docstring(n)]
    assert bare == []


def test_every_public_method_has_a_docstring_or_overrides_one_that_has():
    """But for tasks/: token caches and runs that go on are known by a hash of its sources, and so of its docstrings."""
    read = [tree for path, tree in trees().items() if path.parent.name not in ("tasks", "sandbox")]
    classes = {node.name: node for tree in read for node in tree.body if isinstance(node, ast.ClassDef)}

    def methods(cls):
        return {node.name: ast.get_docstring(node) for node in cls.body if isinstance(node, ast.FunctionDef)}

    def documented(cls, name):
        bases = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in cls.bases]
        return methods(cls).get(name) or any(documented(classes[base], name) for base in bases if base in classes)

    bare = [
        f"{cls.name}.{name}"
        for cls in classes.values()
        for name in ({} if cls.name.startswith("_") else methods(cls))
        if not name.startswith("_") and not documented(cls, name)
    ]
    assert bare == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(folder, what pdoc said)"""
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, "-m", "pdoc", "nanochat_jax", "--no-show-source", "--no-search", "-o", str(folder)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return folder, done.stdout + done.stderr


def test_pdoc_makes_a_page_of_every_module_without_a_warning(pages):
    folder, said = pages
    assert said == ""
    made = {".".join(page.relative_to(folder).with_suffix("").parts) for page in folder.rglob("*.html")}
    assert {name for name in FILES if not name.endswith("__main__")} <= made
