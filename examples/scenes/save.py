"""Save the trained model as a diffusers folder in float16, with the averaged weights of the last checkpoints.

    cd examples
    python -m scenes.save       # from ../out/scenes to scenes/model

The folder also gets the judge, `training.json` (the record of the training) and `loss.svg`. Weights of stages that the
working folder does not have are kept. Run `scenes.quality` and `scenes.card` afterwards for the model card.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import data, models
from .fit import AVERAGE, LOG, read_log
from .pipeline import CURVE, JUDGE, MODEL, RECORD, SUMS, load, write_sums

STAGES = {"vae-crops": (), "vae": ("vae",), "judge": (), "text": (), "unet": ("unet", "text_encoder")}


def save(work: Path, model: Path) -> None:
    tokenizer = models.tokenizer()
    parts = {"text_encoder": models.text_encoder(tokenizer), "vae": models.vae(), "unet": models.unet()}
    if (model / SUMS).exists():
        kept = load(model)
        for name, part in parts.items():
            part.load_state_dict(getattr(kept, name).state_dict())
    for stage, names in STAGES.items():
        for name in names if (work / stage).exists() else ():
            parts[name].load_state_dict(averaged(work, stage, name))
    parts["vae"].register_to_config(scaling_factor=data.scaling_factor(np.load(work / "latents.npy", mmap_mode="r")))
    models.pipeline(tokenizer, **{name: part.half() for name, part in parts.items()}).save_pretrained(model)
    # The weights are stored in half precision and run in single; transformers would load them in half precision.
    config = model / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    serve_older_transformers(model)
    if (work / "judge").exists():
        weights = {name: value.half() for name, value in averaged(work, "judge", "judge").items()}
        save_file(weights, model / JUDGE)
    record(work, model / RECORD)
    draw_losses(work, model / CURVE)
    write_sums(model)


def serve_older_transformers(model: Path) -> None:
    """Make the folder readable for transformers before 5.

    The weights of the text encoder get their older names, which transformers 5 reads as well. The vocabulary and the
    merges of the tokenizer are written to separate files.
    """
    file = model / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    folder = model / "tokenizer"
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokens["vocab"], ensure_ascii=False) + "\n")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokens["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def averaged(work: Path, stage: str, part: str) -> dict[str, torch.Tensor]:
    """Load the averaged weights of a part of a stage, by name."""
    state = load_file(work / stage / "state" / AVERAGE)
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def record(work: Path, file: Path) -> None:
    """Write the record of the training: earlier runs, and the run of this working folder."""
    before = work / RECORD
    runs = json.loads(before.read_text()) if before.exists() else {}
    stages = {}
    for stage in STAGES:
        if (work / stage).exists():
            log = read_log(work / stage / LOG)
            step, seconds, loss = log[-1]
            stages[stage] = {"steps": int(step), "minutes": round(seconds / 60, 1), "loss": loss}
    runs[(work / "begun").read_text().strip()] = {
        "stages": stages,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }
    file.write_text(json.dumps(runs, indent=2) + "\n")


def draw_losses(work: Path, file: Path) -> None:
    stages = [stage for stage in STAGES if (work / stage).exists()]
    figure, axes = plt.subplots(1, len(stages), figsize=(3 * len(stages), 2.4), layout="constrained", squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        step, _, loss = np.array(read_log(work / stage / LOG)).T
        axis.semilogy(step, loss, linewidth=0.6, color="#5b4bb7")
        axis.set(title=stage, xlabel="step")
    axes[0][0].set_ylabel("loss")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("../out/scenes"))
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()
    save(options.work, options.model)
