"""A Stable Diffusion pipeline before and after: traced, pruned, and exported to ONNX Runtime.

Nothing is downloaded. The pipeline has every part of Stable Diffusion 1.5 (tokenizer, text encoder, UNet with four
levels and two layers per block, VAE, scheduler) at small widths and with random weights, so its images are coloured
noise: they show which are equal, no more. With a trained checkpoint only `build_pipeline` changes.

    python examples/demo.py --out out/demo
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it recommends torchvision, which nothing here needs

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sdgraph
from sdgraph.exporters import onnx, ort

PASSES = "CleanUp, PruneBlocks('bk-sdm-base')"
PROMPT = "a photograph of an astronaut riding a horse"
TEXT_WIDTH = 64
STEPS = 10
TURNS, BUDGET = 9, 20.0  # timed turns, and the seconds after which no further one is begun


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of single letters, so that it reads any lower-case prompt."""
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small, with random weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64, 128, 128),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        latent_channels=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate(pipe: StableDiffusionPipeline, unet: Any, name: str, out: Path) -> torch.Tensor:
    """Final latents of the pipeline with `unet` in it; the image goes to `out`."""
    pipe.unet = unet
    pipe.set_progress_bar_config(desc=name.rjust(18))
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe(PROMPT, num_inference_steps=STEPS, generator=generator, output_type="latent").images
    with torch.no_grad():
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(image)[0].save(out / f"{name.replace(' ', '-')}.png")
    return latents


def forward_seconds(unets: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of one forward of each, taken in turns, so that whatever else the machine does hits all alike."""
    sample = torch.randn(2, 4, 32, 32)  # two samples: the prompt and the empty prompt of classifier-free guidance
    call: dict[str, Any] = {"timestep": 500, "encoder_hidden_states": torch.randn(2, 77, TEXT_WIDTH)}
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    end = time.perf_counter() + BUDGET
    for turn in tqdm(range(TURNS + 1), desc="timing".rjust(18)):
        if time.perf_counter() > end and turn > 3:
            break
        for name, unet in unets.items():
            with torch.no_grad():
                start = time.perf_counter()
                unet(sample, **call)
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def difference(latents: torch.Tensor, reference: torch.Tensor) -> str:
    return f"{float((latents - reference).abs().max()):.3g}"


def same_threads() -> Any:
    """ONNX Runtime with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pipe = build_pipeline()
    source = pipe.unet

    traced = sdgraph.apply(source, [])
    pruned = sdgraph.apply(source, PASSES)
    exported = onnx.export(pruned, out / "unet-onnx", overwrite=True)
    running = ort.ORTUNet.from_pretrained(
        out / "unet-onnx", provider="CPUExecutionProvider", session_options=same_threads()
    )

    unets = {"source": source, "traced": traced, "pruned": pruned, "pruned on ORT": running}
    latents = {name: generate(pipe, unet, name, out) for name, unet in unets.items()}
    seconds = forward_seconds(unets)

    (out / "graph-before.txt").write_text(f"{traced.graph}\n")
    (out / "graph-after.txt").write_text(f"{pruned.graph}\n")
    for suffix in ("svg", "png"):
        pruned.graph.picture(out / f"graph.{suffix}", before=traced.graph)

    def cost(graph: sdgraph.Graph) -> tuple[str, str]:
        parameters = sum(p.numel() for p in graph.parameters().values())
        return f"{parameters / 1e6:.2f} M", f"{graph.macs / 1e9:.2f}"

    def ratio(name: str) -> str:
        pairs = zip(seconds[name], seconds["source"], strict=True)
        return f"{statistics.median(mine / eager for mine, eager in pairs):.2f}"

    whole, smaller = cost(traced.graph), cost(pruned.graph)
    rows = [
        ("UNet", "nodes", "parameters", "GMACs", "time/eager", "largest difference of the final latents"),
        ("source, eager", "-", *whole, ratio("source"), "the reference"),
        (
            "traced, no passes",
            f"{len(traced.graph.nodes)}",
            *whole,
            ratio("traced"),
            f"{difference(latents['traced'], latents['source'])} from the source (must be 0)",
        ),
        (
            "pruned, PyTorch",
            f"{len(pruned.graph.nodes)}",
            *smaller,
            ratio("pruned"),
            f"{difference(latents['pruned'], latents['source'])} from the source (another function, on purpose)",
        ),
        (
            "pruned, ONNX Runtime",
            f"{exported.nodes}",
            *smaller,
            ratio("pruned on ORT"),
            f"{difference(latents['pruned on ORT'], latents['pruned'])} from the one pruned in PyTorch",
        ),
    ]
    print(f"\npasses: {PASSES}\n\n{pruned.report}\n\nexport, against the one pruned in PyTorch:\n{exported}\n")
    print(table(rows))
    turns, threads = len(seconds["source"]), torch.get_num_threads()
    print(
        f"""
GMACs: of one forward at batch 1. Time: median of {turns} forwards in turns, batch 2, {threads} thread(s).
Latents: after {STEPS} steps; the largest is {float(latents["source"].abs().max()):.3g}.
The weights are random, so the images are noise: they show what is equal, not what pruning does to quality.

{out}/
  source.png, traced.png, pruned.png, pruned-on-ORT.png   an image per row of the table
  graph.svg, graph.png                                    the graph, and what was removed
  graph-before.txt, graph-after.txt                       the graph as text
  unet-onnx/                                              the exported model"""
    )
    if not torch.equal(latents["traced"], latents["source"]):
        raise SystemExit("the traced UNet does not equal the source: this is a defect, please report it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for what it makes (out/demo)")
    torch.set_num_threads(1)  # operations this small gain nothing from more, and lose much where cores are busy
    main(parser.parse_args().out)
