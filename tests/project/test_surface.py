"""The public surface: names, reference pages and docstrings agree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph.exporters.ort import ORTUNet

from ..documents import ROOT
from .prose import arguments

PACKAGES = (
    "sdgraph",
    "sdgraph.errors",
    "sdgraph.exporters",
    "sdgraph.exporters.engines",
    "sdgraph.exporters.onnx",
    "sdgraph.exporters.ort",
    "sdgraph.forecasts",
    "sdgraph.options",
    "sdgraph.passes",
    "sdgraph.schedules",
    "sdgraph.testing",
    "sdgraph.tuning",
)
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
SHOWN = set(re.findall(r"^::: (\S+)", "".join(page.read_text() for page in PAGES), re.MULTILINE))

# Classes whose constructors users do not call, and whose methods also serve other rooms of the package.
MADE_FOR_USERS = (
    "sdgraph.Attachment",
    "sdgraph.Graph",
    "sdgraph.GraphUNet",
    "sdgraph.SwitchUNet",
    "sdgraph.exporters.ort.ORTUNet",
)
UNETS = (sdgraph.GraphUNet, sdgraph.SwitchUNet, ORTUNet)


def public() -> Iterator[tuple[str, Any]]:
    """Yield the public names that are no modules, with what they are."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if not isinstance(getattr(module, name), ModuleType):
                yield f"{package}.{name}", getattr(module, name)


NAMES = dict(public())
OBJECTS = {id(value) for value in NAMES.values()}


def methods(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public methods that a class, or a class of ours that is not public itself, defines for it."""
    for part in owner.__mro__:
        if part.__module__.partition(".")[0] != "sdgraph" or (part is not owner and id(part) in OBJECTS):
            continue
        for name, member in vars(part).items():
            function = getattr(member, "__func__", member)
            like_diffusers = owner in UNETS and hasattr(UNet2DConditionModel, name)
            if not name.startswith("_") and inspect.isfunction(function) and (not like_diffusers or name == "forward"):
                yield name, function


DOCUMENTED = {name: value for name, value in NAMES.items() if inspect.isclass(value) or inspect.isfunction(value)} | {
    f"{name}.{method}": function
    for name, value in NAMES.items()
    if inspect.isclass(value) and (not issubclass(value, Exception) or name.startswith("sdgraph.errors."))
    for method, function in methods(value)
}


def gaps(name: str, value: Any) -> list[str]:
    """Return the parts that the docstring of a function, a method or a class does not have."""
    owner, _, method = name.rpartition(".")
    docstring = inspect.getdoc(getattr(NAMES[owner], method) if owner in NAMES else value) or ""
    if not docstring:
        return ["docstring"]
    if inspect.isfunction(value) and not value.__doc__:
        return []  # the method that it overrides documents it
    if (
        name in MADE_FOR_USERS
        or getattr(value, "_is_protocol", False)
        or (inspect.isclass(value) and "__init__" not in vars(value) and not is_dataclass(value))
    ):
        return []
    parameters = [
        parameter.name
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name not in ("self", "cls") and not parameter.name.startswith("_")
    ]
    documented = [name.lstrip("*") for name, _ in arguments(docstring)]
    bases = " ".join(f"{base.__doc__}\n" for base in getattr(value, "__mro__", ())[1:] if id(base) in OBJECTS)
    inherited = {name for name, _ in arguments(inspect.cleandoc(bases))}
    found = [f"argument {parameter}" for parameter in parameters if parameter not in (*documented, *inherited)]
    found += [f"argument {parameter} that there is not" for parameter in documented if parameter not in parameters]
    if inspect.isclass(value):
        return found
    returns = inspect.signature(value).return_annotation
    if returns not in (None, "None", "NoReturn", inspect.Signature.empty):
        found += [] if re.match(r"Return|Yield|Iterate", docstring) or "Returns:\n" in docstring else ["Returns"]
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    raises = {
        ast.unparse(node.exc).split("(")[0] for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc
    }
    found += ["Raises"] if raises - {"NotImplementedError"} and "Raises:\n" not in docstring else []
    found += ["Example"] if name in NAMES and "Example:\n" not in docstring else []
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_shows_the_public_names(package: str) -> None:
    module = importlib.import_module(package)
    shown = {name for name in dir(module) if not name.startswith("_")}
    inside = {one.removeprefix(f"{package}.") for one in PACKAGES if one.rpartition(".")[0] == package}
    assert shown == {*module.__all__} | inside


def test_the_reference_shows_the_public_names_and_no_others() -> None:
    text = "".join(page.read_text() for page in PAGES)
    modules = SHOWN & {*PACKAGES}
    assert SHOWN - modules <= {*NAMES}
    shown = {
        id(value)
        for name, value in NAMES.items()
        if name in SHOWN or (name.rpartition(".")[0] in modules and value.__doc__)
    }
    assert not [
        name for name, value in NAMES.items() if id(value) not in shown and f"{name.rpartition('.')[2]}`" not in text
    ]


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes that an annotation names."""
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from classes_in(argument)


@pytest.mark.parametrize(
    "name",
    [name for name, value in DOCUMENTED.items() if inspect.isfunction(value) and not name.startswith(MADE_FOR_USERS)],
)
def test_return_types_are_public(name: str) -> None:
    function = inspect.unwrap(DOCUMENTED[name])
    try:
        hint = typing.get_type_hints(function).get("return")
    except (NameError, TypeError):  # an annotation that only a type checker can resolve
        hint = None
    ours = [one for one in classes_in(hint) if one.__module__.partition(".")[0] == "sdgraph"]
    assert all(id(one) in OBJECTS for one in ours), ours


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_docstrings_are_complete(name: str) -> None:
    found = gaps(name, DOCUMENTED[name])
    assert not found, f"{name} does not document: {', '.join(found)}"
