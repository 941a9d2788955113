"""The tests themselves: each asserts something, needs all of its arguments, and none depends on the time."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..documents import ROOT

FILES = sorted((ROOT / "tests").rglob("test_*.py"))
CLOCK = re.compile(r"\btime\.(time|perf_counter|monotonic|process_time|thread_time)(_ns)?\(")
CHECKS = ("assert", "check", "raises", "warns", "fail", "refuses")  # how names of functions that assert begin


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield the tests of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def called(node: ast.AST) -> Iterator[str]:
    """Yield the last names of the functions that a piece of code calls."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield ast.unparse(call.func).rpartition(".")[2]


def asserting(tree: ast.AST) -> set[str]:
    """Return the functions of a file that assert something, directly or by calling another one."""
    defined = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found: set[str] = set()
    while True:
        more = {
            name
            for name, node in defined.items()
            if any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
            or "check=True" in ast.unparse(node)  # a command that must not fail
            or any(call in found or call.lstrip("_").startswith(CHECKS) for call in called(node))
        }
        if more <= found:
            return found
        found |= more


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_every_test_asserts_something_and_needs_its_arguments(path: Path) -> None:
    tree = ast.parse(path.read_text())
    missing = {node.name for node in functions(tree)} - asserting(tree)
    assert not missing
    for node in functions(tree):
        used = {name.id for line in node.body for name in ast.walk(line) if isinstance(name, ast.Name)}
        assert {one.arg for one in (*node.args.args, *node.args.kwonlyargs)} - {"self"} <= used, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_no_assertion_depends_on_the_time(path: Path) -> None:
    tree = ast.parse(path.read_text())
    clocks = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and CLOCK.search(ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            names = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
            assert not names & clocks, ast.unparse(node)
            assert not CLOCK.search(ast.unparse(node.test)), ast.unparse(node)
