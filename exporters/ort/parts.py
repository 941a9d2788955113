"""Text encoders and VAE of an exported pipeline on ONNX Runtime, called as those of diffusers' pipelines are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from msgspec import Meta

from sdgraph.errors import CallError, ModeError, SavedError, SpecError
from sdgraph.options import Bounds, checked
from sdgraph.untrusted import Width, as_kind, read_json

from ..bundle.manifest import CONFIG, DATA, MODEL
from ..bundle.pipeline_manifest import AGAIN, DECODER, ENCODER
from ..bundle.untrusted import check_model
from . import session_options
from .providers import Provider

Latents = Annotated[int, Bounds(ge=8, le=4096)]
OVERLAP = 4  # a tile shares a quarter of its side with the next one


class VAEConfig(msgspec.Struct, frozen=True):
    """The fields of a VAE's `config.json` that pipelines read."""

    latent_channels: Width
    block_out_channels: Annotated[tuple[Width, ...], Meta(min_length=1, max_length=8)]
    in_channels: Width = 3
    out_channels: Width = 3
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    force_upcast: bool | None = None


class TextConfig(msgspec.Struct, frozen=True):
    """The fields of a text encoder's `config.json` that pipelines read."""

    hidden_size: Width
    num_hidden_layers: Width
    projection_dim: Width | None = None
    use_attention_mask: bool | None = None


class Model:
    """A session of one part.

    Args:
        folder: the folder of the part.
        provider: the provider.
        settings: the settings of its session.
    Raises:
        SavedError: the model is damaged or unsafe, or ONNX Runtime refuses it.
    """

    def __init__(self, folder: Path, provider: Provider, settings: Mapping[str, Any]) -> None:
        path = folder / MODEL
        check_model(path, (DATA,))
        threads = session_options.threads(settings)
        options = session_options.make({**settings, session_options.THREADS: threads}, {}, {})
        try:
            self.session = provider.session(str(path), options, threads)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise SavedError(f"ONNX Runtime refuses the model: {error}", where=str(path), hint=AGAIN) from error
        self.inputs = [port.name for port in self.session.get_inputs()]
        self.outputs = [port.name for port in self.session.get_outputs()]

    def require(self, path: Path, inputs: list[str], outputs: set[str]) -> None:
        """Refuse a model that has other inputs, or lacks an output."""
        if self.inputs != inputs or not outputs <= {*self.outputs}:
            raise SavedError(
                f"the model's inputs or outputs are not {inputs}, {sorted(outputs)}", where=str(path), hint=AGAIN
            )

    def __call__(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the outputs by name, on the CPU.

        Args:
            value: the one input.
        """
        results = self.session.run(None, {self.inputs[0]: value.detach().cpu().contiguous().numpy()})
        return {name: torch.from_numpy(result) for name, result in zip(self.outputs, results, strict=True)}


class _Part:
    """A part as diffusers' pipelines expect it, with a configuration, a dtype and a device."""

    config: FrozenDict
    dtype = torch.float32
    device = torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the part itself; a session does not move.

        Args:
            args: a device, a dtype or both; they are ignored, as inputs are cast when a part is called.
            kwargs: `device` and `dtype`.
        """
        return self

    def eval(self) -> Self:
        """Return the part itself; an exported model has no training mode."""
        return self

    def modules(self) -> Iterator[Any]:
        """Iterate over nothing: pipelines look for hooks of PyTorch's modules, and there are none."""
        return iter(())


class ORTTextEncoder(_Part):
    """A text encoder of CLIP on ONNX Runtime.

    Args:
        folder: the exported folder, already checked.
        provider: the provider.
        settings: the settings of its session.
        dtype: the dtype of its outputs.
    Raises:
        SavedError: the folder is damaged or unsafe.
    """

    def __init__(self, folder: Path, provider: Provider, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
        plain = read_json(folder / CONFIG, AGAIN)
        as_kind(plain, TextConfig, folder / CONFIG, AGAIN)
        self.config, self.dtype = FrozenDict(plain), dtype
        self.model = Model(folder, provider, settings)
        self.model.require(folder / MODEL, ["input_ids"], {"last_hidden_state"})

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Return the embeddings of a prompt, as the text encoders of transformers do.

        Args:
            input_ids: the tokens, integers (B, L).
            attention_mask: None; CLIP's text encoders have none in Stable Diffusion.
            output_hidden_states: whether to return the states between the layers.
            return_dict: whether to return them by name.
        Raises:
            CallError: there is an attention mask, or the states between the layers were not exported.
        """
        if attention_mask is not None:
            raise CallError(
                "the text encoder was exported without attention masks", where="attention_mask", hint="None"
            )
        values = self.model(input_ids.long())
        states = [values.pop(name) for name in self.model.outputs if name.startswith("hidden_states.")]
        if output_hidden_states:
            if not states:
                raise CallError(
                    "the text encoder was exported without the states between its layers",
                    where="clip_skip",
                    hint="leave clip_skip out; or run the text encoder in PyTorch, with ort.load_pipeline",
                )
            values["hidden_states"] = (*states, values["last_hidden_state"])  # type: ignore[assignment]
        result = BaseOutput(values)
        return result if return_dict else result.to_tuple()


class ORTVAE(_Part):
    """The VAE of an exported pipeline on ONNX Runtime; large images can be encoded and decoded in tiles.

    Args:
        folder: the folder of the pipeline, already checked.
        provider: the provider.
        settings: the settings of its sessions.
    Raises:
        SavedError: the folder is damaged or unsafe.
    """

    def __init__(self, folder: Path, provider: Provider, settings: Mapping[str, Any]) -> None:
        path = folder / DECODER / CONFIG
        plain = read_json(path, AGAIN)
        config = as_kind(plain, VAEConfig, path, AGAIN)
        self.config = FrozenDict(plain)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.tile: int | None = None
        self._decoder = Model(folder / DECODER, provider, settings)
        self._decoder.require(folder / DECODER / MODEL, ["latent_sample"], {"sample"})
        self._encoder: Model | None = None  # opened when it is first needed: images from text do not encode
        self._open_encoder = partial(Model, folder / ENCODER, provider, settings)

    @checked(SpecError)
    def enable_tiling(self, tile: Latents = 64) -> None:
        """Encode and decode in tiles that overlap by a quarter and are blended, which bounds the memory.

        The norms of an `AutoencoderKL` see one tile at a time, so that colours may differ slightly from those of the
        whole image. An image of one tile is unchanged.

        Args:
            tile: the side of a tile in latents; 32 to 64 are usual.
        Raises:
            SpecError: the side is no whole number from 8 to 4096.
        """
        self.tile = tile

    def disable_tiling(self) -> None:
        """Encode and decode whole images."""
        self.tile = None

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Return the distribution of the latents of images.

        Args:
            x: the images (B, C, height, width), from -1 to 1.
            return_dict: whether to return it by name.
        """
        if self._encoder is None:
            self._encoder = self._open_encoder()
        (name,) = self._encoder.outputs
        value = self._tiled(self._encoder, x.to(self.dtype), self.factor, 1)
        found = {"latents": value} if name == "latent_sample" else {"latent_dist": DiagonalGaussianDistribution(value)}
        return BaseOutput(found) if return_dict else tuple(found.values())

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Return the images of latents.

        Args:
            z: the latents (B, C, height, width), already divided by the scaling factor.
            return_dict: whether to return them by name.
            generator: ignored; decoding has no random numbers.
        """
        image = self._tiled(self._decoder, z.to(self.dtype), 1, self.factor)
        return BaseOutput({"sample": image}) if return_dict else (image,)

    def _tiled(self, model: Model, value: torch.Tensor, unit: int, scale: int) -> torch.Tensor:
        """Return the output of a model, computed in tiles if tiling is enabled and there is more than one.

        Args:
            model: the encoder or the decoder, with one output.
            value: its input.
            unit: the side of a latent in the input.
            scale: the side of a latent in the output.
        """
        height, width = (size // unit for size in value.shape[-2:])
        if self.tile is None or max(height, width) <= self.tile:
            return next(iter(model(value).values()))
        total = weights = None
        for y in _starts(height, self.tile):
            for x in _starts(width, self.tile):
                rows, columns = (slice(at * unit, (at + self.tile) * unit) for at in (y, x))
                part = next(iter(model(value[..., rows, columns]).values()))
                if total is None or weights is None:
                    total = part.new_zeros((*part.shape[:2], height * scale, width * scale))
                    weights = part.new_zeros(total.shape[-2:])
                weight = _ramp(part.shape[-2], self.tile * scale)[:, None] * _ramp(part.shape[-1], self.tile * scale)
                rows, columns = (
                    slice(at * scale, at * scale + size) for at, size in zip((y, x), part.shape[-2:], strict=True)
                )
                total[..., rows, columns] += part * weight
                weights[rows, columns] += weight
        assert total is not None
        assert weights is not None
        return total / weights

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModeError(f"an exported VAE has no {name}", where="ORTVAE", hint="use the VAE of diffusers for that")


def _starts(size: int, tile: int) -> Iterator[int]:
    """Iterate over the starts of tiles, in latents: all but the last one overlap the next by a quarter."""
    step = tile - tile // OVERLAP
    last = max(size - tile, 0)
    yield from range(0, last, step)
    yield last


def _ramp(size: int, tile: int) -> torch.Tensor:
    """Return the weights of the rows of a tile: they rise over a quarter of it, are 1, and fall."""
    edge = torch.arange(1, size + 1, dtype=torch.float32).clamp(max=tile // OVERLAP)
    return torch.minimum(edge, edge.flip(0)) / (tile // OVERLAP)
