"""README.md, CONTRIBUTING.md and docs/: their code runs, what they name is there, and what is generated is current."""

from __future__ import annotations

import importlib
import re
import shlex
import xml.etree.ElementTree as ET
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from scenes import models

import sdgraph
from sdgraph.cli import COMMANDS, main
from sdgraph.cli.configuration import read
from sdgraph.spec import read as read_spec
from sdgraph.tuning import Loss

from ..documents import ROOT, assert_runs, blocks, commands, inline_code, links, prose
from ..models import build
from ..photos import write_photos

DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
RUN = [document for document in DOCUMENTS if blocks(document, "python")]
QUICKER = {
    "num_inference_steps=25": "num_inference_steps=2",
    '"num_inference_steps": 25': '"num_inference_steps": 2',
    "num_inference_steps=16": "num_inference_steps=1",
    "steps=5000": "steps=2",
    "LearnedPruning(1000": "LearnedPruning(1",
    "LearnedRouting(1000": "LearnedRouting(1",
    "resolution=512": "resolution=64",
}
QUICK = ["drop-in.md"]  # the others run pipelines, passes and exports
# More than ten seconds each; README.md and others of the kind stay in `make test`.
LONG = ["deploying.md", "getting-started.md", "passes.md", "serving.md", "tuning.md"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name)


# -- code and commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(
            one,
            id=name(one),
            marks=() if one.name in QUICK else pytest.mark.long if one.name in LONG else pytest.mark.slow,
        )
        for one in RUN
    ],
)
def test_the_python_blocks_run_in_order(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with a tiny pipeline in the place of a download, and few steps."""

    def tiny(*args: Any, **options: Any) -> Any:
        tokenizer = models.tokenizer()
        unet = build(sample_size=16, layers_per_block=2, cross_attention_dim=models.TEXT_WIDTH)
        pipe = models.pipeline(tokenizer, models.text_encoder(tokenizer), models.vae(), unet)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", tiny)
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos")
    assert_runs(document, monkeypatch, QUICKER)


def test_documents_have_code_that_runs() -> None:
    named = {name(document) for document in RUN}
    assert {"README.md", "docs/getting-started.md", "docs/passes.md", "docs/inheriting-features.md"} <= named
    assert {"docs/deploying.md", "docs/drop-in.md", "docs/writing-a-pass.md", "docs/tuning.md"} <= named


@every_document
def test_every_block_is_checked(document: Path) -> None:
    assert {block.language for block in blocks(document)} <= {"python", "sh", "toml", "text"}
    assert not re.search(r"\n\n {4}\S", prose(document)), "an indented block is not checked: fence it"


@every_document
def test_commands_are_as_their_parsers_have_them(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen: list[Namespace] = []
    for module in COMMANDS:
        monkeypatch.setattr(module, "run", chosen.append)
    written = re.findall(r"`(sdgraph [a-z]+ [^`]+)`", prose(document))
    for program, *words in [*commands(document), *(shlex.split(" ".join(line.split())) for line in written)]:
        if program == "make":
            assert words[0] in TARGETS, words
        elif program == "accelerate":
            assert main(words[words.index("sdgraph") + 1 :]) == 0, (words, capsys.readouterr().err)
        elif program == "python":
            file = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
            assert (ROOT / file).is_file(), words
        elif program == "sdgraph" and "--settings" in words:  # as --help does
            with pytest.raises(SystemExit, match="0"):
                main(words)
        elif program == "sdgraph" and not {"COMMAND", "--import"} & set(words):
            assert main(words) == 0, (words, capsys.readouterr().err)
        else:
            assert program in ("pip", "sdgraph"), program
    for one in chosen:
        for text in (getattr(one, "passes", ""), *getattr(one, "candidates", ())):
            if "ScaleSkips" not in text:  # of the package that the guide makes
                sdgraph.parse(text)


@every_document
def test_configurations_of_runs_are_complete(document: Path, tmp_path: Path) -> None:
    for block in blocks(document, "toml"):
        if "max_train_steps" in block.text:
            (tmp_path / "tuning.toml").write_text(block.text)
            config, settings = read(tmp_path / "tuning.toml")
            assert sdgraph.parse(", ".join(config.passes))
            assert [str(read_spec(text, Loss)) for text in config.losses]
            assert settings.max_train_steps > 1


# -- names and links --------------------------------------------------------------------------------------------------


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        assert (document.parent / link).is_file(), link
    if document.parent == ROOT:
        assert not [link for link in links(document) if link.startswith("..")]


@every_document
def test_names_are_there(document: Path) -> None:
    for code in inline_code(document):
        for path in re.findall(r"(?:tests|examples|benchmarks|docs|passes|exporters|sdgraph)/[\w/.-]*\w", code):
            assert (ROOT / path).exists(), code
        for target in re.findall(r"^(?:\S+=\S+ )*make ([a-z-]+)", code):
            assert target in TARGETS, code
        for command in re.findall(r"^sdgraph ([a-z]+)", code):
            assert command in {module.__name__.rpartition(".")[2] for module in COMMANDS}, code
        for dotted in re.findall(r"^sdgraph\.([\w.]+)", code):
            assert dotted == "json" or exists(dotted), code
        for holder, attribute in re.findall(r"^(graph|Graph|unet|GraphUNet)\.(\w+)", code):
            assert hasattr(sdgraph.Graph if holder.lower() == "graph" else sdgraph.GraphUNet, attribute), code


def exists(dotted: str) -> bool:
    """Whether a name can be reached from `sdgraph`, through its modules and their members."""
    found: Any = sdgraph
    for part in dotted.split("."):
        if not hasattr(found, part) and isinstance(found, ModuleType):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ImportError:
                return False
        found = getattr(found, part, None)
    return found is not None


def test_the_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    assert sum(block.text.count("\n") for block in blocks(ROOT / "README.md", "python")) <= 30


# -- what is generated ------------------------------------------------------------------------------------------------


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generate")


def test_the_architecture_is_drawn_from_the_code_of_today(generate: ModuleType) -> None:
    """If this fails: `python docs/architecture.py`, and look whether the picture is what you meant."""
    architecture = generate.architecture
    assert architecture.draw(architecture.graph()) == architecture.FIGURE.read_text()
    assert architecture.page() == architecture.PAGE.read_text()


def test_the_architecture_has_folders_and_circles(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = generate.architecture
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    files = {
        "sdgraph/__init__.py": "from .runtime.apply import apply",
        "sdgraph/errors.py": '"""Every error. More."""',
        "sdgraph/ir/__init__.py": '"""What a graph is: nodes. It imports errors."""',
        "sdgraph/ir/state.py": "from ..errors import Error\nfrom . import state",
        "sdgraph/runtime/__init__.py": "",
        "sdgraph/runtime/apply.py": "from ..ir.state import State\nfrom ..a import a",
        "sdgraph/a.py": "from .b import b",
        "sdgraph/b.py": "def b():\n    from .a import a",
        "passes/__init__.py": "",
        "passes/one.py": "from sdgraph import apply\nfrom sdgraph.errors import Error",
        "exporters/__init__.py": "",
        "exporters/ort/unet.py": "import sdgraph",
        "exporters/ort/__init__.py": "",
        "exporters/onnx/__init__.py": "",
        "exporters/onnx/export.py": "def export():\n    from ..ort.unet import ORTUNet",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    boxes = architecture.graph()
    facade = architecture.FACADE
    assert set(boxes.edges) == {
        (facade, "sdgraph/runtime"),
        ("sdgraph/ir", "sdgraph/errors.py"),
        ("sdgraph/runtime", "sdgraph/ir"),
        ("sdgraph/runtime", "sdgraph/a.py"),
        ("sdgraph/a.py", "sdgraph/b.py"),
        ("sdgraph/b.py", "sdgraph/a.py"),
        ("passes", facade),
        ("passes", "sdgraph/errors.py"),
        ("exporters/ort", facade),
        ("exporters/onnx", "exporters/ort"),
    }
    assert not boxes.edges["sdgraph/b.py", "sdgraph/a.py"]["at_once"]
    words = [element.text for element in ET.fromstring(architecture.draw(boxes)).iter() if element.text]
    assert {"sdgraph/ir/", "What a graph is", "a.py, b.py", "exporters/onnx/", "passes/"} <= set(words)


def test_the_help_of_commands_is_current(generate: ModuleType) -> None:
    """If this fails: `python docs/generate.py`, and read what changed."""
    page = DOCS / "command-line.md"
    assert generate.filled(page, "commands", generate.helps()) == page.read_text()


@pytest.mark.slow
def test_what_is_shown_of_graphs_is_current(generate: ModuleType) -> None:
    """If this fails: `python docs/generate.py`, and read what changed."""
    before, after = generate.graphs()
    for page, text in generate.pages(after).items():
        assert page.read_text() == text, page
    words = " ".join("".join(e.itertext()) for e in ET.parse(generate.FIGURE).iter("{http://www.w3.org/2000/svg}text"))
    assert f"{len(before.nodes)} → {len(after.nodes)} nodes" in words
