"""The parts of a pipeline besides its UNet as ONNX models: text encoders, the VAE's encoder and its decoder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sdgraph
from sdgraph.errors import ExportError
from sdgraph.ir.inputs import Dim, Input

from ..bundle.external_data import Weights
from ..bundle.manifest import CONFIG, DATA, MODEL
from ..bundle.pipeline_manifest import DECODER, ENCODER
from . import parity
from .parity import Comparison
from .simplify import simplify


@dataclass(frozen=True)
class Part:
    """A part of a pipeline that becomes one ONNX model.

    Args:
        name: the name of its folder.
        module: the module, whose outputs are tensors, in evaluation mode.
        inputs: its one input; names of sizes begin with the name of the folder, so that one set of options of ONNX
            Runtime's sessions can fix the sizes of one part alone.
        outputs: its outputs, in the order in which optimum reads them.
        config: the configuration to write.
        calls: two inputs of different sizes: the first is traced, and both are compared with PyTorch.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]
    config: Mapping[str, Any]
    calls: tuple[torch.Tensor, ...]


class _Text(torch.nn.Module):
    """A text encoder of CLIP, whose outputs are those that optimum knows."""

    def __init__(self, encoder: torch.nn.Module, projected: bool, hidden: bool) -> None:
        super().__init__()
        self.encoder, self.projected, self.hidden = encoder, projected, hidden

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.encoder(input_ids, output_hidden_states=self.hidden)
        states = tuple(result.hidden_states[:-1]) if self.hidden else ()
        if self.projected:
            return (result.text_embeds, result.last_hidden_state, *states)
        return (result.last_hidden_state, result.pooler_output, *states)


class _Encode(torch.nn.Module):
    """The encoder of a VAE, with the mean and the logarithm of the variance of the latents as its output."""

    def __init__(self, vae: Any, tiny: bool) -> None:
        super().__init__()
        self.vae, self.tiny = vae, tiny

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        encoded = self.vae.encode(sample)
        latents: torch.Tensor = encoded.latents if self.tiny else encoded.latent_dist.parameters
        return latents


class _Decode(torch.nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return image


def text_part(name: str, encoder: Any, dtype: torch.dtype, hidden: bool) -> Part:
    """Return a text encoder of CLIP as a part.

    Args:
        name: the name of its folder.
        encoder: the model of transformers, `CLIPTextModel` or `CLIPTextModelWithProjection`.
        dtype: the dtype to export.
        hidden: whether to return the states between its layers, which SDXL reads.
    Raises:
        ExportError: it is another kind of model, or it needs attention masks.
    """
    kind = type(encoder).__name__
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ExportError(
            f"the text encoder is a {kind}, which is not covered",
            where=name,
            hint="export a pipeline with CLIP's text encoders; or export the UNet alone (--unet-only), and use "
            "ort.load_pipeline, which runs this text encoder in PyTorch",
        )
    config = encoder.config.to_dict()
    if config.get("use_attention_mask"):
        raise ExportError(
            "the text encoder reads attention masks", where=name, hint="set use_attention_mask to False in its config"
        )
    projected = kind == "CLIPTextModelWithProjection"
    config |= {"architectures": [kind], "output_hidden_states": hidden}
    batch, length, width = f"{name}_batch_size", f"{name}_sequence_length", config["hidden_size"]
    pooled = Input("text_embeds", (), (batch, config["projection_dim"]))
    if not projected:
        pooled = Input("pooler_output", (), (batch, width))
    last = Input("last_hidden_state", (), (batch, length, width))
    layers = range(config["num_hidden_layers"] if hidden else 0)
    states = [Input(f"hidden_states.{i}", (), (batch, length, width)) for i in layers]
    longest = int(config["max_position_embeddings"])
    generator = torch.Generator().manual_seed(0)
    calls = tuple(
        torch.randint(0, config["vocab_size"], size, generator=generator) for size in ((2, longest), (3, longest - 1))
    )
    return Part(
        name,
        _Text(_in(encoder, dtype), projected, hidden),
        (Input("input_ids", (), (batch, length), "index"),),
        ((pooled, last) if projected else (last, pooled)) + tuple(states),
        config,
        calls,
    )


def vae_parts(vae: Any) -> tuple[Part, Part]:
    """Return the encoder and the decoder of a VAE as parts, in float32.

    Args:
        vae: an `AutoencoderKL` or an `AutoencoderTiny`.
    Raises:
        ExportError: it is another kind of model.
    """
    kind = type(vae).__name__
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ExportError(
            f"the VAE is a {kind}, which is not covered",
            where="vae",
            hint="export a pipeline with an AutoencoderKL or an AutoencoderTiny; or the UNet alone (--unet-only)",
        )
    config, tiny = dict(vae.config), kind == "AutoencoderTiny"
    factor, channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    public = {"_class_name": kind, **public}
    own = _in(vae, torch.float32)
    names = [(f"{part}_batch_size", f"{part}_{what}_height", f"{part}_{what}_width")
             for part, what in ((ENCODER, "sample"), (DECODER, "latent"))]  # fmt: skip
    (b, h, w), (B, H, W) = names
    latents: tuple[Dim, ...] = (b, channels if tiny else 2 * channels, f"{h} / {factor}", f"{w} / {factor}")
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 6, 10), (1, 12, 8))
    encoder = Part(
        ENCODER,
        _Encode(own, tiny),
        (Input("sample", (), (b, config["in_channels"], h, w)),),
        (Input("latent_sample" if tiny else "latent_parameters", (), latents),),
        public,
        tuple(
            torch.rand((n, config["in_channels"], y * factor, x * factor), generator=generator) * 2 - 1
            for n, y, x in sizes
        ),
    )
    decoder = Part(
        DECODER,
        _Decode(own),
        (Input("latent_sample", (), (B, channels, H, W)),),
        (Input("sample", (), (B, config["out_channels"], f"{H} * {factor}", f"{W} * {factor}")),),
        public,
        tuple(torch.randn((n, channels, y, x), generator=generator) for n, y, x in sizes),
    )
    return encoder, decoder


def _in(module: Any, dtype: torch.dtype) -> Any:
    """Return a module in a dtype and in evaluation mode; the caller's is not changed."""
    if module.training or any(p.dtype != dtype or p.device.type != "cpu" for p in module.parameters()):
        module = copy.deepcopy(module).to("cpu", dtype).eval()
    return module


def write_part(part: Part, folder: Path, opset: int) -> tuple[Comparison, ...]:
    """Write a part as `model.onnx`, its weights and its configuration, and compare it with PyTorch.

    Args:
        part: the part.
        folder: the folder to write, which does not exist yet.
        opset: the version of the ONNX operators.
    Returns:
        the comparisons with PyTorch.
    Raises:
        ExportError: the translation failed.
    """
    import onnx_ir

    from . import translate

    folder.mkdir()
    (spec,) = part.inputs
    dynamic = ({i: torch.export.Dim.DYNAMIC for i, dim in enumerate(spec.shape or ()) if isinstance(dim, str)},)
    try:
        with torch.no_grad(), translate.quiet():
            program = torch.export.export(part.module, (part.calls[0],), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export failed: {type(error).__name__}: {error}",
            where=part.name,
            hint="the versions of PyTorch and transformers may not fit together; the cause is chained",
        ) from error
    simplify(program.graph)
    model = translate.translate(program, opset)
    translate.compact(model, part.inputs, part.outputs)
    Weights(folder / DATA).take(model)
    model.producer_name, model.producer_version = "sdgraph", sdgraph.__version__
    onnx_ir.save(model, folder / MODEL)
    (folder / CONFIG).write_text(json.dumps(part.config, indent=2, sort_keys=True, default=str) + "\n")
    return _compared(part, folder)


def _compared(part: Part, folder: Path) -> tuple[Comparison, ...]:
    """Return the comparison of a part with PyTorch on ONNX Runtime's CPU provider, at two sizes."""
    import onnxruntime

    from ..ort.providers import CPU

    session = onnxruntime.InferenceSession(str(folder / MODEL), providers=[CPU])
    dtype = next((p.dtype for p in part.module.parameters()), torch.float32)
    atol, rtol = parity.BOUNDS[dtype]
    comparisons = []
    for call in part.calls:
        with torch.no_grad():
            eager = part.module(call)
        eager = eager if isinstance(eager, tuple) else (eager,)
        given = {part.inputs[0].name: call}
        exported = [torch.from_numpy(value) for value in session.run(None, {k: v.numpy() for k, v in given.items()})]
        on = (CPU, str(dtype).removeprefix("torch."))
        comparisons.append(parity.compare(f"{part.name}/{MODEL}", eager, exported, given, atol, rtol, on))
    return tuple(comparisons)
