"""Fill the figures into the model cards of the model and of its student, from `training.json` and `quality.json`.

cd examples
python -m scenes.card       # after scenes.save and scenes.quality, or scenes.student
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdgraph.tuning import Settings

from .pipeline import MODEL, QUALITY, RECORD, STUDENT

MARKED = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)
CARD = "README.md"


def filled(folder: Path = MODEL) -> str:
    """Return the text of the model card in a folder, with the figures between the markers."""
    training, quality = (json.loads((folder / name).read_text()) for name in (RECORD, QUALITY))
    trained = _tuning(training) if isinstance(training, list) else _training(training)
    figures = f"{_quality(quality)}\n\n{trained}\n"
    return MARKED.sub(lambda match: match[1] + figures + match[2], (folder / CARD).read_text())


def _quality(quality: dict[str, Any]) -> str:
    sides = quality["figures"]
    rows: list[Sequence[str]] = [("of held-out captions", *sides)]
    for name in sides["drawn"]:
        if name != "frechet":
            rows.append((name, *(f"{100 * side[name]:.1f} %" for side in sides.values())))
    rows.append(("Fréchet distance to other drawn scenes", *(f"{side['frechet']:.3g}" for side in sides.values())))
    return (
        f"{quality['count']} captions, {quality['steps']} DDIM steps, guidance {quality['guidance']:g}, "
        f"{quality['seconds per image']:.2g} s per image on {quality['machine']}.\n\n{markdown(rows)}\n\n"
        f"The column `drawn` is what the judge can tell at all, and the floor of the Fréchet distance; the VAE "
        f"reproduces drawn scenes at {sides['through the VAE']['psnr']:.1f} dB."
    )


def _training(runs: dict[str, Any]) -> str:
    rows = [("begun", "stage", "steps", "minutes", "last loss")]
    for begun, run in runs.items():
        for stage, done in run["stages"].items():
            rows.append((begun, stage, f"{done['steps']}", f"{done['minutes']:.0f}", f"{done['loss']:.4g}"))
    last = [*runs.values()][-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    return f"{markdown(rows)}\n\nOn {last['machine']}; {versions}."


def _tuning(rounds: Sequence[dict[str, Any]]) -> str:
    default = {field.name: field.default for field in dataclasses.fields(Settings)}
    chosen = [default | record["settings"] for record in rounds]
    unusual = [name for name in default if any(settings[name] != default[name] for settings in chosen)]
    rows = [
        ("setting", *(f"round {number}" for number in range(1, len(rounds) + 1))),
        ("losses", *(f"`{record['losses']}`" for record in rounds)),
        *((f"`{name}`", *(f"{settings[name]}" for settings in chosen)) for name in unusual),
    ]
    passes = ", ".join(f"`{one}`" for one in rounds[-1]["passes"])
    version = rounds[-1].get("versions", rounds[-1])["sdgraph"]  # older records have it beside the settings
    return (
        f"Passes: {passes}.\n\n{markdown(rows)}\n\n"
        f"All other settings are the defaults of `sdgraph.tune`, version {version}."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


if __name__ == "__main__":
    for folder in (MODEL, STUDENT):
        (folder / CARD).write_text(filled(folder))
