"""Exported UNets give eager's numbers at sizes not seen, in unmodified pipelines; what is unsound is refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sdgraph
from sdgraph import errors
from sdgraph.exporters.bundle import extra, manifest_file
from sdgraph.exporters.onnx import parity, translate
from sdgraph.exporters.onnx.export import export
from sdgraph.exporters.onnx.simplify import simplify
from sdgraph.exporters.ort.unet import ORTUNet
from sdgraph.ir.dims import evaluate

from .models import CROSS, answer, build, call_of

EXPORT = importlib.import_module("sdgraph.exporters.onnx.export")  # the package has the function by that name

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")


@dataclass(frozen=True)
class Exported:
    """A UNet, what it was exported as, and the report."""

    unet: Any
    directory: Path
    report: parity.ExportReport

    def load(self) -> ORTUNet:
        return ORTUNet.from_pretrained(self.directory, provider="CPUExecutionProvider")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Exports by name, each made once."""
    known: dict[str, Exported] = {}
    made: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "sd15": lambda: (sdgraph.apply(build("sd15")), {}),
        "pruned": lambda: (sdgraph.apply(build("sd15-levels"), "PruneBlocks('bk-sdm-base')"), {}),
        "sdxl": lambda: (build("sdxl"), {}),
        "controlled": lambda: (build("lcm", num_class_embeds=7), {"inputs": RESIDUALS}),
        "half": lambda: (sdgraph.apply(build("sdxl").half()), {}),  # joins its time ids in float32
    }

    def of(name: str) -> Exported:
        if name not in known:
            unet, options = made[name]()
            directory = tmp_path_factory.mktemp("export") / "made" / name
            known[name] = Exported(unet, directory, export(unet, directory, progress=False, **options))
        return known[name]

    return of


@pytest.fixture
def damaged(exported: Callable[..., Exported], tmp_path: Path) -> Path:
    """A copy of an export, to damage."""
    return shutil.copytree(exported("sd15").directory, tmp_path / "copy")


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "pruned"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 1, "H": 8, "W": 24, "L": 77, "timestep": 999},
        {"B": 3, "H": 13, "W": 9, "L": 2, "timestep": torch.tensor([1, 500, 998])},
        {"B": 2, "H": 17, "W": 16, "L": 1, "timestep": 3.75},
        {"B": 65, "H": 2, "W": 3, "L": 3, "timestep": torch.tensor(20)},
    ],
    ids=["wide", "odd, a timestep each", "half odd, between steps", "large batch"],
)
def test_gives_eagers_numbers_at_sizes_not_seen(
    exported: Callable[..., Exported], name: str, sizes: dict[str, Any]
) -> None:
    made = exported(name)
    call = call_of(made.unet, **sizes)
    torch.testing.assert_close(answer(made.load(), call), answer(made.unet, call), **CLOSE)


def test_inputs_of_other_architectures(exported: Callable[..., Exported]) -> None:
    made = exported("sdxl")
    for ids in (6, 5):
        call = call_of(made.unet, B=3, H=11, W=8)
        call["added_cond_kwargs"] = {
            "text_embeds": torch.randn(3, 16 + (6 - ids) * 8),
            "time_ids": torch.randint(0, 1024, (3, ids)),
        }
        torch.testing.assert_close(answer(made.load(), call), answer(made.unet, call), **CLOSE)


def test_optional_inputs_are_taken_when_exported(exported: Callable[..., Exported]) -> None:
    made = exported("controlled")
    loaded = made.load()
    call = call_of(made.unet, B=3, H=9, W=14)
    call["timestep_cond"] = call["timestep_cond"][:1]  # one for the whole batch
    call["class_labels"] = torch.tensor([4])
    down = [torch.randn(3, 16, 9, 14), torch.randn(3, 16, 9, 14), torch.randn(3, 16, 5, 7), torch.randn(3, 32, 5, 7)]
    control = dict(zip(RESIDUALS, (tuple(down), torch.randn(3, 32, 5, 7)), strict=True))
    torch.testing.assert_close(answer(loaded, call | control), answer(made.unet, call | control), **CLOSE)
    with pytest.raises(errors.CallError, match="exported with it"):
        loaded(**call)
    with pytest.raises(errors.CallError, match=r"expected \(3, 16, 5, 7\)"):
        loaded(**call | control | {RESIDUALS[0]: (*down[:2], down[0], down[3])})


def test_half_precision(exported: Callable[..., Exported]) -> None:
    made = exported("half")
    call = call_of(made.unet, B=1, H=13, W=9)
    result = answer(made.load(), call)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, answer(made.unet, call), rtol=2e-2, atol=5e-3)
    with pytest.raises(errors.CallError, match=r"is torch\.float32, the UNet is torch\.float16"):
        made.load()(**call | {"sample": call["sample"].float()})


# -- in pipelines ----------------------------------------------------------------------------------------------------


DDIM = DDIMScheduler(steps_offset=1, clip_sample=False)


def clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=99,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=CROSS,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def pipeline(unet: UNet2DConditionModel, scheduler: Any) -> Any:
    """A Stable Diffusion or SDXL pipeline of tiny parts; prompts are given as embeddings."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**kinds, block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=4).eval()
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": clip(), "tokenizer": None}
    if unet.config.addition_embed_type == "text_time":
        pipe: Any = StableDiffusionXLPipeline(**parts, text_encoder_2=clip(projection=True), tokenizer_2=None)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(2, 2, 7, CROSS, generator=generator)
    prompts = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    call = {**prompts, "generator": generator, "output_type": "pt", **options}
    # latents of 9 by 11, which no level divides
    return pipe(height=72, width=88, num_inference_steps=4, **call).images  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheduler", [DDIM, EulerDiscreteScheduler(steps_offset=1)], ids=["DDIM", "Euler"])
def test_stands_in_for_the_unet_of_a_pipeline(exported: Callable[..., Exported], scheduler: Any) -> None:
    pipe = pipeline(build("sd15"), scheduler)
    expected = images(pipe)
    pipe.unet = exported("sd15").load()
    torch.testing.assert_close(images(pipe), expected, rtol=1e-3, atol=1e-3)


def test_stands_in_for_the_unet_of_an_sdxl_pipeline(exported: Callable[..., Exported]) -> None:
    pipe = pipeline(exported("sdxl").unet, EulerDiscreteScheduler())
    pooled = torch.randn(2, 2, 16)
    options = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    expected = images(pipe, **options)
    pipe.unet = exported("sdxl").load()
    torch.testing.assert_close(images(pipe, **options), expected, rtol=1e-3, atol=1e-3)


# -- what is written -------------------------------------------------------------------------------------------------


def test_files_hold_the_weights_once_under_their_names(exported: Callable[..., Exported]) -> None:
    made = exported("pruned")
    names = {path.name for path in made.directory.iterdir()}
    assert names == {"config.json", "model.onnx", "model.onnx.data", "sdgraph.json", "export.json"}
    model = onnx.load(made.directory / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, parameter in made.unet.named_parameters():
        found = [n for n in stored if n == name or n.startswith(f"{name}.")]
        assert len(found) == 1, name
        assert torch.Size(stored[found[0]].dims).numel() == parameter.numel()
    size = sum(p.numel() * p.element_size() for p in made.unet.parameters())
    assert sum((made.directory / name).stat().st_size for name in names - {"export.json"}) == made.report.file_bytes
    # Constants of the graph are a fixed cost: 2 % of a real UNet's weights is many megabytes.
    assert (made.directory / "model.onnx.data").stat().st_size <= 1.02 * size
    assert "/" + str(Path(torch.__file__).parent) not in (made.directory / "model.onnx").read_text(errors="ignore")


def test_manifest_and_report(exported: Callable[..., Exported]) -> None:
    made = exported("pruned")
    loaded = made.load()
    said = json.loads((made.directory / "sdgraph.json").read_text())
    assert said["version"] == sdgraph.__version__
    assert said["recipe"] == [str(p) for p in made.unet.graph.passes] != []
    assert (said["opset"], said["dtype"], said["format"]) == (20, "float32", 2)
    assert said["given"] == ["sample", "timestep", "encoder_hidden_states"]
    assert [each["file"] for each in said["models"]] == ["model.onnx"]
    for name in ("config.json", "model.onnx", "model.onnx.data"):
        assert said["files"][name] == hashlib.sha256((made.directory / name).read_bytes()).hexdigest()
    session = loaded.models.session(loaded.manifest.models[0])
    assert [each.shape for each in session.get_inputs()] == [
        ["batch", 4, "height", "width"],
        ["timestep_batch"],
        ["batch", "sequence", CROSS],
    ]
    assert made.report.as_dict() | {"comparisons": None} == json.loads((made.directory / "export.json").read_text()) | {
        "comparisons": None
    }
    assert len(made.report.comparisons) == 2
    assert all(c.holds for c in made.report.comparisons)
    assert "difference" in str(made.report)
    assert "3x4x16x24" in str(made.report)


def test_the_source_is_left_as_it_was(tmp_path: Path, exported: Callable[..., Exported]) -> None:
    made = exported("sd15")
    assert not made.unet.training
    call = call_of(made.unet)
    torch.testing.assert_close(answer(made.unet, call), answer(build("sd15"), call), rtol=0, atol=0)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_out_of_bounds_leaves_nothing(exported: Callable[..., Exported], tmp_path: Path) -> None:
    with pytest.raises(errors.ParityError, match="OUT OF BOUNDS") as caught:
        export(exported("sd15").unet, tmp_path / "deep" / "out", atol=0.0, rtol=0.0, progress=False)
    assert "sample" in caught.value.where
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_survives_a_failure(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, target = exported("sd15").unet, tmp_path / "out"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(errors.ExportError, match="directory exists"):
        export(unet, target)
    with pytest.raises(errors.ExportError, match="not an earlier export"):
        export(unet, target, overwrite=True)
    (target / "sdgraph.json").touch()

    def fail(*args: Any) -> Any:
        raise errors.ExportError("no")

    monkeypatch.setattr(EXPORT, "_export", fail)
    with pytest.raises(errors.ExportError, match="no"):
        export(unet, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"mine", "sdgraph.json"}
    (report,) = [exported("sd15").report]
    monkeypatch.setattr(EXPORT, "_export", lambda *args: report)
    export(unet, target, overwrite=True)
    assert {path.name for path in target.iterdir()} == {"export.json"}
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_exported_says_why(exported: Callable[..., Exported], tmp_path: Path) -> None:
    unet = exported("sd15").unet
    with pytest.raises(errors.ExportError, match=r"bfloat16.*Resize"):
        export(sdgraph.apply(build("sd15").bfloat16(), verify=False), tmp_path / "out")
    with pytest.raises(errors.ExportError, match=r"pass pipe\.unet"):
        export(pipeline(build("sd15"), DDIM), tmp_path / "out")
    with pytest.raises(errors.SpecError, match="did you mean 'mid_block_additional_residual'"):
        export(unet, tmp_path / "out", inputs=["mid_block_residual"])
    with pytest.raises(errors.SpecError, match="18 to 20"):
        export(unet, tmp_path / "out", opset=23)
    (tmp_path / "file").touch()
    with pytest.raises(errors.ExportError, match="cannot write"):
        export(unet, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Calls(torch.nn.Module):
    def __init__(self, code: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(x)


def test_operators_that_passes_may_bring() -> None:
    def program(code: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
        made = torch.export.export(Calls(code), (torch.rand(4, 3),))
        simplify(made.graph)
        return made

    decomposed = translate.translate(program(torch.special.entr), 20)
    assert "entr" not in {node.op_type for node in decomposed.graph}
    with pytest.raises(errors.ExportError, match=r"No ONNX function found for .*rrelu"):
        translate.translate(program(torch.nn.functional.rrelu), 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("include_self", [True, False])
def test_what_torch_translates_wrongly_or_not_at_all(dtype: torch.dtype, include_self: bool) -> None:
    """Means that are scattered, which became the last value; sorts, for which everything was decomposed."""
    place = torch.tensor([[0, 2, 2, 0, 2]])
    own, source = (torch.tensor(values).to(dtype) for values in ([[7.0, 5, -3]], [[2.0, -9, 4, 4, 8]]))

    class Codes(torch.nn.Module):
        def forward(self, own: torch.Tensor, place: torch.Tensor, source: torch.Tensor) -> Any:
            mean = own.scatter_reduce(1, place, source, "mean", include_self=include_self)
            total = own.scatter_add(1, place, source)
            order = source.argsort(1, descending=True)  # -9 4 4: the first 4 comes first
            values, back = torch.sort(order, dim=1, stable=True)
            return mean, total, order, values, back, (source > 3).argsort(dim=1, stable=True)

    program = torch.export.export(Codes(), (own, place, source))
    simplify(program.graph)
    model = translate.translate(program, 20)
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    given = {value.name: tensor.numpy() for value, tensor in zip(model.graph.inputs, (own, place, source), strict=True)}
    for mine, theirs in zip(session.run(None, given), Codes()(own, place, source), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), theirs)


def test_what_onnx_runtime_cannot_run_is_said(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("MLFloat16 data type is not supported")

    monkeypatch.setattr("sdgraph.exporters.ort.sessions.run", fail)
    with pytest.raises(errors.ExportError, match=r"cannot run it: MLFloat16"):
        export(exported("sd15").unet, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_says_that_a_sort_decides_by_rounding(exported: Callable[..., Exported]) -> None:
    report = exported("sd15").report
    beyond = replace(report, comparisons=(replace(report.comparisons[0], bound=0.0),))
    with pytest.raises(errors.ParityError, match="3 operators choose by values"):
        parity.require(beyond, choosing=3)
    with pytest.raises(errors.ParityError, match=r"else report it$"):
        parity.require(beyond)


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(errors.ExtraError, match=r"pip install sdgraph\[onnx\]"):
        extra.require_onnx()


def test_calls_that_are_not_covered(exported: Callable[..., Exported]) -> None:
    loaded = exported("sd15").load()
    call = call_of(loaded)
    for change, message in (
        ({"sample": call["sample"][:, :3]}, r"sample has shape \(2, 3, 8, 12\), expected \(2, 4, 8, 12\)"),
        ({"sample": call["sample"][0]}, r"sample has shape \(4, 8, 12\)"),
        ({"sample": call["sample"].half()}, "float16, the UNet is torch.float32"),
        ({"encoder_hidden_states": call["encoder_hidden_states"][:1]}, "encoder_hidden_states has shape"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep has shape \(3,\)"),
        ({"timestep": "7"}, "timestep is a str"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "not covered"),
        ({"class_labels": torch.tensor([1])}, "class_labels is not covered"),
        (dict.fromkeys(RESIDUALS, None) | {RESIDUALS[1]: torch.zeros(2, 32, 4, 6)}, "only one was given"),
        (
            {RESIDUALS[0]: (torch.zeros(2, 16, 8, 12),) * 4, RESIDUALS[1]: torch.zeros(2, 32, 4, 6)},
            "exported without down_block_additional_residuals",
        ),
    ):
        with pytest.raises(errors.CallError, match=message):
            loaded(**call | change)


def test_what_a_session_cannot_do(exported: Callable[..., Exported]) -> None:
    loaded = exported("sd15").load()
    assert loaded.to("cpu").to(torch.float32).to(device=torch.device("cpu"), dtype=torch.float32).eval() is loaded
    assert (loaded.config.in_channels, loaded.config["in_channels"], loaded.dtype) == (4, 4, torch.float32)
    assert loaded(**call_of(loaded), return_dict=False)[0].shape == (2, 4, 8, 12)
    with pytest.raises(errors.ModeError, match="export unet"):
        loaded.to(torch.float16)
    with pytest.raises(errors.ModeError, match="CUDAExecutionProvider"):
        loaded.to("cuda")
    with pytest.raises(errors.ModeError, match="source UNet"):
        _ = loaded.set_attn_processor
    assert not hasattr(loaded, "anything")


def test_unknown_provider(exported: Callable[..., Exported]) -> None:
    with pytest.raises(errors.SpecError, match=r"available: .*CPUExecutionProvider"):
        ORTUNet.from_pretrained(exported("sd15").directory, provider="CoreMLProvider")


@pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs ONNX Runtime with CUDA on a machine without it",
)
def test_a_provider_that_does_not_start_is_no_silent_cpu(exported: Callable[..., Exported]) -> None:
    with pytest.raises(errors.ExtraError, match="does not start"):
        ORTUNet.from_pretrained(exported("sd15").directory, provider="CUDAExecutionProvider")


def truncate(path: Path, share: float = 0.5) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def edit_manifest(directory: Path, signed: bool = True, **changes: Any) -> None:
    """Change the manifest; with a hash that fits, as somebody who means harm would."""
    path = directory / "sdgraph.json"
    said = json.loads(path.read_text()) | changes
    if signed:
        said.pop("sha256")
        said["sha256"] = manifest_file.digest(said)
    path.write_text(json.dumps(said))


def edit_model(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change the model, and the manifest's hash of it."""
    edit(directory / "model.onnx", change)
    manifest_file.write_manifest(manifest_file.read_manifest(directory), directory)


def set_place(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == key).value = value

    return change


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.external_data)


def set_dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external(model).dims.__setitem__(slice(None), dims)


def set_kind(kind: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(external(model), "data_type", kind)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def forge(directory: Path, value: Any, *place: Any) -> None:
    """Put a value into the manifest, with a hash that fits."""
    said = json.loads((directory / "sdgraph.json").read_text())
    inner = said
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    edit_manifest(directory, **said)


def drop(directory: Path, field: str, name: str) -> None:
    said = json.loads((directory / "sdgraph.json").read_text())
    del said[field][name]
    edit_manifest(directory, **said)


def edit_config(directory: Path, **changes: Any) -> None:
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    forge(directory, hashlib.sha256(config.read_bytes()).hexdigest(), "files", "config.json")


def link(path: Path) -> None:
    """What is there lies outside now, and is linked to."""
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DATA = "model.onnx.data"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no config": ("config.json cannot be read", lambda d: (d / "config.json").unlink()),
    "config no JSON": ("config.json is not JSON", lambda d: (d / "config.json").write_text("{")),
    "another config": ("config.json is not the file", lambda d: (d / "config.json").write_text('{"in_channels": 9}')),
    "no model": ("model.onnx is missing", lambda d: (d / "model.onnx").unlink()),
    "model cut": ("model.onnx is not the file", lambda d: truncate(d / "model.onnx")),
    "no weights": ("model.onnx.data is missing", lambda d: (d / "model.onnx.data").unlink()),
    "weights cut": ("model.onnx.data is not the file", lambda d: truncate(d / "model.onnx.data", 0.9)),
    "other weights": ("model.onnx.data is not the file", lambda d: flip(d / "model.onnx.data")),
    "no manifest": ("sdgraph.json cannot be read", lambda d: (d / "sdgraph.json").unlink()),
    "manifest cut": ("sdgraph.json is not JSON", lambda d: truncate(d / "sdgraph.json")),
    "a recipe": ("not that of an export", lambda d: (d / "sdgraph.json").write_text('{"format": 1, "passes": []}')),
    "manifest edited": ("was edited", lambda d: edit_manifest(d, signed=False, opset=19)),
    "newer": ("format 4.*up to 3", lambda d: edit_manifest(d, format=4)),
    "bad inputs": ("is damaged", lambda d: edit_manifest(d, inputs=[{"name": "sample"}])),
    "code": (
        "is damaged",
        lambda d: edit_manifest(d, guards=[{"condition": "().__class__", "outcome": True, "where": ""}]),
    ),
    "a path": (r"is damaged.*models\[0\]\.file", lambda d: edit_manifest(d, models=[{"file": "../model.onnx"}])),
    "another file": ("no file name of a model", lambda d: forge(d, "passwd", "models", 0, "file")),
    "files null": ("files: expected `object`, got `null`", lambda d: forge(d, None, "files")),
    "files a list": ("files: expected `object`, got `array`", lambda d: forge(d, ["model.onnx"], "files")),
    "a size beyond all": ("is no size", lambda d: forge(d, "H*999999999*999999999", "inputs", 0, "shape", 2)),
    "a large size": ("is no size", lambda d: forge(d, "H*999999999", "output", 2)),
    "a shift": ("is no size", lambda d: forge(d, "1<<999999999", "output", 2)),
    "no size at all": ("is no size", lambda d: forge(d, -1, "output", 1)),
    "format true": ("format: expected `int`, got `bool`", lambda d: forge(d, True, "format")),
    "format -1": ("format: expected `int` >= 1", lambda d: forge(d, -1, "format")),
    "macs a text": (r"models\[0\]\.macs: expected `int`", lambda d: forge(d, "x", "models", 0, "macs")),
    "weights without a hash": ("files: there is no hash of model.onnx.data", lambda d: drop(d, "files", DATA)),
    "config without a hash": ("files: there is no hash of config.json", lambda d: drop(d, "files", "config.json")),
    "other weights without a hash": ("x.data has no hash", lambda d: edit_model(d, set_place("location", "x.data"))),
    "in_channels": ("in_channels: expected `int`, got `str`", lambda d: edit_config(d, in_channels="x")),
    "many layers": ("layers_per_block: expected `int` <= 1000", lambda d: edit_config(d, layers_per_block=10**9)),
    "sample_size": ("sample_size: expected `array` of length >= 2", lambda d: edit_config(d, sample_size=[64])),
    "a graph elsewhere": ("model.onnx is a link out of its folder", lambda d: link(d / "model.onnx")),
    "data elsewhere": ("model.onnx.data is a link out of its folder", lambda d: link(d / DATA)),
    "a manifest elsewhere": ("sdgraph.json is a link out of its folder", lambda d: link(d / "sdgraph.json")),
    "another width": ("inputs are not those", lambda d: forge(d, 5, "inputs", 0, "shape", 1)),
    "a schedule": (
        "is damaged",
        lambda d: edit_manifest(d, values=[{"site": "x", "schedule": "open('x')", "forecast": 0, "shape": [1]}]),
    ),
    "a pass for a schedule": (
        "is damaged.*no schedule",
        lambda d: edit_manifest(d, values=[{"site": "x", "schedule": "CleanUp()", "forecast": 0, "shape": [1]}]),
    ),
    "no models": ("is damaged", lambda d: edit_manifest(d, models=[])),
    "other inputs": ("inputs are not those", lambda d: edit_manifest(d, given=["sample"])),
    "weights elsewhere": ("outside of the directory", lambda d: edit_model(d, set_place("location", "../x.data"))),
    "weights from the root": (
        "outside of the directory",
        lambda d: edit_model(d, set_place("location", "/etc/passwd")),
    ),
    "weights beyond the end": ("truncated", lambda d: edit_model(d, set_place("offset", str(1 << 40)))),
    "weights of another place": ("is damaged", lambda d: edit_model(d, set_place("offset", "-64"))),
    "more weights than there are": ("truncated", lambda d: edit_model(d, set_dims(1 << 40, 4))),
    "weights of no kind": ("is damaged", lambda d: edit_model(d, set_kind(99))),
    "no operator": (
        "ONNX Runtime refuses",
        lambda d: edit_model(d, lambda model: setattr(model.graph.node[5], "op_type", "Nothing")),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_before_anything_runs(damaged: Path, name: str) -> None:
    message, damage = DAMAGE[name]
    damage(damaged)
    with pytest.raises(errors.SavedError, match=f"(?s){message}") as caught:
        ORTUNet.from_pretrained(damaged, provider="CPUExecutionProvider")
    assert caught.value.hint
    assert caught.value.where


def test_a_missing_directory_is_a_saved_error(tmp_path: Path) -> None:
    with pytest.raises(errors.SavedError, match="No such file"):
        ORTUNet.from_pretrained(tmp_path / "nothing")


BEYOND = ["1<<999999999", "H*999999999*999999999", "H//0", "Q", "True", "+".join("H" * 99), "(" * 999, "1e400"]


@pytest.mark.parametrize(
    "text", ["().a", "__import__('os')", "9**9", "[1]", "B;H", "'a'", "lambda: 1", "B\nH", "", "{1}", *BEYOND]
)
def test_expressions_are_arithmetic(text: str) -> None:
    with pytest.raises(errors.SpecError, match="no size"):
        evaluate(text, {"B": 2, "H": 8})
