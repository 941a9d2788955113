"""The parts of the documentation that show code: figures, text of a region, help of commands, settings,
conditions of passes, and laws.

    python docs/generate.py

Stable Diffusion 1.5 is at full size. Graphs do not look at weights, so its memory is asked for and never filled.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import architecture
import torch
from diffusers import UNet2DConditionModel

import sdgraph
from sdgraph import passes
from sdgraph.cli import COMMANDS, configuration
from sdgraph.cli import main as sdgraph_command

DOCS = Path(__file__).parent
FIGURE = DOCS / "sd15-bk-sdm-base.svg"
PASSES = "CleanUp, PruneBlocks('bk-sdm-base')"
SHOWN = "mid_block.attentions.0.transformer_blocks.0.attn2"
WIDTH = 100  # of the help, in characters
ROOMS = {
    "frontend": "Traces",
    "compiler": "Passes and their contracts",
    "passes": "The passes of sdgraph",
    "inheritance": "Features that calls reuse",
    "runtime": "A traced UNet in use",
    "exporters": "Exports",
    "tuning": "Training",
    "": "Text",
}


def graphs() -> tuple[sdgraph.Graph, sdgraph.Graph]:
    """Stable Diffusion 1.5 before and after the passes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    before = sdgraph.trace(unet.to_empty(device="cpu").eval())
    return before, sdgraph.apply(before, PASSES, verify=False).graph


def region(graph: sdgraph.Graph) -> str:
    """A region as text, with the call that prints it."""
    return f">>> print(unet.graph.text(within={SHOWN!r}))\n{graph.text(within=SHOWN)}"


def helps() -> str:
    """The help of every command, as sections."""
    sections = []
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        with (
            mock.patch.dict(os.environ, COLUMNS=str(WIDTH)),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.suppress(SystemExit),
        ):
            sdgraph_command([name, "--help"])
        sections.append(f"## sdgraph {name}\n\n```text\n{out.getvalue()}```\n")
    return "\n" + "\n".join(sections) + "\n"


def settings() -> str:
    """All settings of a training run, as a table."""
    lines = ["| name | values | default | meaning |", "|---|---|---|---|"]
    for name, *parts, meaning in configuration.known():
        values, default = parts[0], f"`{parts[1]}`" if parts[1] else "required"
        cells = [f"`{name}`", values, default, meaning[0].upper() + meaning[1:]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def laws() -> str:
    """The sentences of tests that are marked as laws, by the rooms of the tests."""
    sections = {room: [f"## {title}", ""] for room, title in ROOMS.items()}
    for path in sorted((DOCS.parent / "tests").rglob("test_*.py")):
        room = path.relative_to(DOCS.parent / "tests").parts[0]
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", ()):
                if ast.unparse(mark).startswith("pytest.mark.law("):
                    link = f"../{path.relative_to(DOCS.parent).as_posix()}"
                    law = ast.literal_eval(mark.args[0])
                    sections[room if room in ROOMS else ""].append(f"- {law} [`{node.name}`]({link})")
    return "\n" + "\n\n".join("\n".join(lines) for lines in sections.values()) + "\n\n"


def conditions() -> str:
    """The conditions of the passes, as a table."""
    lines = ["| pass | before | after |", "|---|---|---|"]
    for name in passes.__all__:
        found = getattr(passes, name)
        cells = [_sentences(found.preconditions), _sentences(found.postconditions)]
        if any(cells):
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sentences(of: Iterable[Callable[..., object]]) -> str:
    return " ".join((condition.__doc__ or "").partition("\n")[0] for condition in of)


def filled(page: Path, marker: str, text: str) -> str:
    """A page with a text between the markers of its kind."""
    start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    return before + start + text + end + after


def pages(after: sdgraph.Graph) -> dict[Path, str]:
    """The pages that show something generated, as they should be."""
    ideas, commands, tuning = DOCS / "how-it-works.md", DOCS / "command-line.md", DOCS / "tuning.md"
    return {
        ideas: filled(ideas, "region", f"```text\n{region(after).rstrip()}\n```\n"),
        commands: filled(commands, "commands", helps()),
        tuning: filled(tuning, "settings", settings()),
        DOCS / "passes.md": filled(DOCS / "passes.md", "conditions", conditions()),
        DOCS / "laws.md": filled(DOCS / "laws.md", "laws", laws()),
        architecture.PAGE: architecture.page(),
    }


def main() -> None:
    before, after = graphs()
    after.draw(FIGURE, before=before)
    architecture.FIGURE.write_text(architecture.draw(architecture.graph()))
    for page, text in pages(after).items():
        page.write_text(text)


if __name__ == "__main__":
    main()
