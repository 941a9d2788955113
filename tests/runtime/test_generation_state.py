"""`GenerationState`: a generation that is stopped, saved, and continued by other objects or another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from safetensors.torch import load_file, save_file

import sdgraph
from sdgraph import GenerationState, errors

from ..models import ONE_LEVEL, build
from ..pipelines import POOLED, PROMPT, SIZE, image, large, plain

STEPS = 6
OTHERS = ("DDIMParallel", "DDPMParallel", "IPNDM", "LCM", "SASolver", "TCD")
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{one.name: (one.name, {}) for one in KarrasDiffusionSchedulers},
    **{f"{name}Scheduler": (f"{name}Scheduler", {}) for name in OTHERS},
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ 3M Karras": ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    "UniPC trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "solver_order": 3}),
    "v-prediction": ("DDIMScheduler", {"prediction_type": "v_prediction"}),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return build(**ONE_LEVEL)


def pipeline(unet: Any, kind: str = "DDIMScheduler", **options: Any) -> Any:
    base = DDIMScheduler(steps_offset=1, clip_sample=False, beta_start=0.00085, beta_end=0.012).config
    return plain("StableDiffusionPipeline", unet, scheduler=getattr(diffusers, kind).from_config(base, **options))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call_of(**more: Any) -> dict[str, Any]:
    return {**PROMPT, **SIZE, "num_inference_steps": STEPS, "output_type": "latent", **more}


@pytest.mark.law("A generation that was stopped, saved and loaded ends in the same latents, bit for bit.")
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers' schedulers, in NumPy 2
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("calls", [1, 4])
def test_every_scheduler(unet: UNet2DConditionModel, name: str, calls: int, tmp_path: Path) -> None:
    kind, options = OPTIONS[name]
    try:
        pipe = pipeline(unet, kind, **options)
    except ImportError as missing:  # DPMSolverSDE's noise is another package's
        pytest.skip(str(missing))
    expected = pipe(**call_of(), generator=seeded()).images
    state = GenerationState.stop(pipeline(unet, kind, **options), calls, **call_of(), generator=seeded())
    state.save(tmp_path / "state.safetensors")
    again = GenerationState.load(tmp_path / "state.safetensors")
    assert again.calls == calls
    other = pipeline(unet, kind, **options)
    assert torch.equal(expected, again.resume(other).images)
    assert torch.equal(expected, other(**call_of(), generator=seeded()).images)  # the pipeline is as it was


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipelines_that_begin_with_an_image(unet: UNet2DConditionModel, kind: str) -> None:
    pictures: dict[str, Any] = {"image": image(1, 3, 32, 48)}
    call: dict[str, Any] = {**PROMPT, "strength": 0.7, "num_inference_steps": 8, "output_type": "latent"}
    if "Inpaint" in kind:
        mask = torch.zeros(1, 1, 32, 48)
        mask[..., 8:24] = 1
        pictures["mask_image"] = mask
        call |= SIZE
    pipe = plain(kind, unet)
    expected = pipe(**call, **pictures, generator=seeded()).images
    state = GenerationState.stop(pipe, 2, **call, **pictures, generator=seeded())
    with pytest.raises(errors.SavedError, match="the call also had image"):
        state.resume(pipe)
    assert torch.equal(expected, state.resume(pipe, **pictures).images)


@pytest.mark.slow
def test_sdxl_with_several_images() -> None:
    pipe = large("StableDiffusionXLPipeline", build("sdxl"))
    call = {**call_of(), **POOLED, "num_images_per_prompt": 2}
    expected = pipe(**call, generator=[seeded(1), seeded(2)]).images
    state = GenerationState.stop(pipe, 3, **call, generator=[seeded(1), seeded(2)])
    assert torch.equal(expected, state.resume(pipe).images)


@pytest.mark.slow
def test_a_plain_pipeline_goes_on_from_the_latents() -> None:
    unet, call = build("sdxl"), {**call_of(), **POOLED, "guidance_scale": 5.0}
    pipe = large("StableDiffusionXLPipeline", unet)
    expected = pipe(**call, generator=seeded()).images
    state = GenerationState.stop(pipe, 2, **call, generator=seeded())
    rest = {name: value for name, value in call.items() if name not in SIZE}
    plain_pipe = large("StableDiffusionXLImg2ImgPipeline", unet)
    found = plain_pipe(**rest, image=state.latents, denoising_start=state.denoising_start).images
    assert torch.equal(expected, found)


def test_a_unet_that_inherits_features_goes_on_at_a_call_that_computes_them(unet: UNet2DConditionModel) -> None:
    passes = "InheritFeatures('up_blocks.-1.resnets.-1', Uniform(3), part='entry')"
    pipe = pipeline(sdgraph.apply(unet, passes, verify=False))
    with sdgraph.attach(pipe):
        expected = pipe(**call_of(), generator=seeded()).images
        state = GenerationState.stop(pipe, 3, **call_of(), generator=seeded())
        assert torch.equal(expected, state.resume(pipe).images)


def test_a_switch_goes_on_where_it_was(unet: UNet2DConditionModel) -> None:
    members = {"large": unet, "small": build(**ONE_LEVEL, seed=1)}
    pipe = pipeline(sdgraph.switch(members, "InTurns(('large', 'small'), (2, 1))", verify=False))
    with sdgraph.attach(pipe):
        expected = pipe(**call_of(), generator=seeded()).images
        state = GenerationState.stop(pipe, 2, **call_of(), generator=seeded())
    pipe.unet.reset()
    with sdgraph.attach(pipe):
        assert torch.equal(expected, state.resume(pipe).images)
    with pipe.unet.expecting(STEPS), pytest.raises(errors.ModeError, match="counts calls from 0"):
        state.resume(pipe)


def test_another_unet_goes_on_where_that_is_asked_for(unet: UNet2DConditionModel) -> None:
    small = build(**ONE_LEVEL, seed=1)
    pipe = pipeline(unet)
    state = GenerationState.stop(pipe, 4, **call_of(), generator=seeded())
    pipe.unet = small
    with pytest.raises(errors.SavedError, match="the state is of another UNet"):
        state.resume(pipe)
    found = state.resume(pipe, other_model=True).images
    pipe.unet = sdgraph.switch({"large": unet, "small": small}, "ByCall(('large', 'small'), (4,))", verify=False)
    with sdgraph.attach(pipe):
        assert torch.equal(found, pipe(**call_of(), generator=seeded()).images)


@pytest.mark.slow
def test_another_process_goes_on(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    pipe = pipeline(unet, "DPMSolverMultistepScheduler")
    pipe.save_pretrained(tmp_path / "pipe")
    expected = pipe(**call_of(), generator=seeded()).images
    GenerationState.stop(pipe, 3, **call_of(), generator=seeded()).save(tmp_path / "state.safetensors")
    code = f"""
import torch, diffusers, sdgraph
absent = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor"))
kind = diffusers.StableDiffusionPipeline
pipe = kind.from_pretrained({str(tmp_path / "pipe")!r}, requires_safety_checker=False, **absent)
torch.set_num_threads({torch.get_num_threads()})
latents = sdgraph.GenerationState.load({str(tmp_path / "state.safetensors")!r}).resume(pipe).images
torch.save(latents, {str(tmp_path / "latents.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(expected, torch.load(tmp_path / "latents.pt"))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(unet: UNet2DConditionModel) -> GenerationState:
    return GenerationState.stop(pipeline(unet, "DPMSolverMultistepScheduler"), 3, **call_of(), generator=seeded())


def test_what_differs_is_named(state: GenerationState, unet: UNet2DConditionModel) -> None:
    kind = "DPMSolverMultistepScheduler"
    with pytest.raises(errors.SavedError, match="the scheduler is 'DDIMScheduler' here"):
        state.resume(pipeline(unet))
    with pytest.raises(errors.SavedError, match="the scheduler's solver_order is 3 here, and 2 in the state"):
        state.resume(pipeline(unet, kind, solver_order=3))
    with pytest.raises(errors.SavedError, match="the run is '9 calls"):
        state.resume(pipeline(unet, kind), num_inference_steps=9)
    other = {name: -tensor for name, tensor in PROMPT.items()}
    with pytest.raises(errors.SavedError, match="encoder_hidden_states differs from that of the state"):
        state.resume(pipeline(unet, kind), **other)
    with pytest.raises(errors.SavedError, match="first is"):
        state.resume(pipeline(unet, kind), height=48)
    with pytest.raises(errors.SavedError, match="the pipeline is 'StableDiffusionImg2ImgPipeline' here"):
        state.resume(plain("StableDiffusionImg2ImgPipeline", unet))


def test_stopping_too_late_or_without_a_generator(unet: UNet2DConditionModel) -> None:
    with pytest.raises(errors.SpecError, match="no more than 6 calls"):
        GenerationState.stop(pipeline(unet), 7, **call_of(), generator=seeded())
    with pytest.raises(errors.SpecError, match="nothing is left"):
        GenerationState.stop(pipeline(unet), 6, **call_of(), generator=seeded())
    with pytest.raises(errors.SpecError, match="there is no generator"):
        GenerationState.stop(pipeline(unet), 3, **call_of())
    with pytest.raises(errors.SpecError, match="calls is 0"):
        GenerationState.stop(pipeline(unet), 0, **call_of(), generator=seeded())


def rewritten(path: Path, tensors: Callable[[dict[str, Any]], None], about: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors and the description of a saved state."""
    with safetensors.safe_open(path, "pt") as file:
        plain = json.loads(file.metadata()["sdgraph_state"])
    held = load_file(path)
    tensors(held)
    about(plain)
    save_file(held, path, {"sdgraph_state": json.dumps(plain)})


def nothing(_: dict[str, Any]) -> None:
    """Change nothing."""


LATENTS = (1, 4, 16, 24)
TENSORS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nan": (lambda held: held["latents"].fill_(torch.nan), "latents has numbers that are not finite"),
    "no latents": (lambda held: held.pop("latents"), "the state has no latents"),
    "other sizes": (lambda held: held.update({"scheduler.model_outputs.1": torch.zeros(7, 7)}), "has the shape"),
    "other dtypes": (lambda held: held.update(latents=torch.zeros(LATENTS, dtype=torch.int8)), "latents is of"),
    "numbers as latents": (lambda held: held.update(latents=torch.zeros(LATENTS, dtype=torch.int64)), "latents have"),
    "too few timesteps": (lambda held: held.update(timesteps=torch.zeros(3)), "3 of 3 calls were made"),
    "no generator": (lambda held: held.pop("generator.0.now"), "has no generator.0.now"),
}  # fmt: skip
ABOUT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a newer format": (lambda about: about.update(format=9), "has format 9"),
    "no calls": (lambda about: about.update(calls=0), "calls"),
    "no scheduler": (lambda about: about.pop("scheduler"), "scheduler"),
    "no such tensor": (lambda about: about["changed"].update(x={"tensor": "scheduler.x"}), "has no scheduler.x"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TENSORS, *ABOUT])
def test_damaged_and_forged_files(state: GenerationState, name: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path)
    change, message = (TENSORS | ABOUT)[name]
    rewritten(path, *((change, nothing) if name in TENSORS else (nothing, change)))
    with pytest.raises(errors.SavedError, match=message):
        GenerationState.load(path)


def test_files_that_are_no_states(state: GenerationState, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(errors.SavedError, match="cannot be read"):
        GenerationState.load(path)
    state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.SavedError, match="cannot be read"):
        GenerationState.load(path)
    save_file({"latents": torch.zeros(1)}, path)
    with pytest.raises(errors.SavedError, match="no state of a generation"):
        GenerationState.load(path)


@pytest.mark.parametrize("name", ["step", "set_timesteps", "_internal_dict"])
def test_a_state_that_would_change_methods(state: GenerationState, unet: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state.save(path)
    rewritten(path, nothing, lambda about: about["changed"].update({name: {"value": 1}}))
    with pytest.raises(errors.SavedError, match=f"the state changes {name} of the scheduler"):
        GenerationState.load(path).resume(pipeline(unet, "DPMSolverMultistepScheduler"))
