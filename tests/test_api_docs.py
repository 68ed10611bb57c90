"""The pages that pdoc makes of the docstrings: everything on them says what it is, and they are made without a warning.

Run: python -m pytest tests/test_api_docs.py
"""

import ast
import subprocess
import sys

import pytest

from tests.test_layers import FILES, PACKAGE

PATHS = sorted(PACKAGE.rglob("*.py"))


def test_every_public_module_class_and_function_has_a_docstring():
    bare = []
    for path in PATHS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
        nodes = [tree, *public] if tree.body else []
        bare += [f"{path}: {getattr(n, 'name', 'the module')}" for n in nodes if not ast.get_docstring(n)]
    assert bare == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(folder, what pdoc said)"""
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, "-m", "pdoc", "nanochat_jax", "-o", str(folder)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return folder, done.stdout + done.stderr


def test_pdoc_makes_a_page_of_every_module_without_a_warning(pages):
    folder, said = pages
    assert said == ""
    made = {".".join(page.relative_to(folder).with_suffix("").parts) for page in folder.rglob("*.html")}
    assert {name for name in FILES if not name.endswith("__main__")} <= made
