"""Training without `tune`: loops as diffusers' scripts have them, with a `GraphUNet` in the place of the UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdgraph
from sdgraph.tuning import Tensors

from ..models import answer, call_of
from .conftest import Tune, equal, tensors

pytestmark = pytest.mark.slow

ROWS = list(range(10))


def loss_of(unet: torch.nn.Module, data: Tensors, scheduler: DDPMScheduler) -> torch.Tensor:
    """The loss of `train_text_to_image.py`."""
    latents = data.samples(ROWS, [np.random.default_rng(0)] * len(ROWS)).latents
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    captions = data.conditions(ROWS)["encoder_hidden_states"]
    return F.mse_loss(unet(noisy, timesteps, captions, return_dict=False)[0], noise)


def train(unet: torch.nn.Module, data: Tensors, ema: EMAModel) -> tuple[accelerate.Accelerator, list[float]]:
    """Train a UNet as `train_text_to_image.py` does, and return accelerate's object and the losses."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    losses = []
    for _ in range(12):
        with accelerator.accumulate(unet):
            loss = loss_of(unet, data, DDPMScheduler())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
        losses.append(loss.item())
    return accelerator, losses


@pytest.mark.law("A tuned student trains as in diffusers' script.")
def test_the_loop_of_train_text_to_image(student: sdgraph.GraphUNet, data: Tensors, tmp_path: Path) -> None:
    """Accelerate, a moving average that diffusers saves and loads, and checkpoints by accelerate's hooks."""
    unet, plain = sdgraph.apply(student), student.to_diffusers()
    before = tensors(student)
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=type(unet), model_config=unet.config)
    accelerator, losses = train(unet, data, ema)
    assert losses == pytest.approx(train(plain, data, EMAModel(plain.parameters(), decay=0.5))[1], rel=1e-3)
    assert ema.optimization_step == 6
    assert equal(tensors(student), before)

    accelerator.unwrap_model(unet).save_pretrained(tmp_path / "unet")
    ema.save_pretrained(tmp_path / "unet_ema")
    loaded = sdgraph.GraphUNet.from_pretrained(tmp_path, subfolder="unet")
    assert equal(tensors(loaded), tensors(unet))
    average = EMAModel.from_pretrained(tmp_path / "unet_ema", sdgraph.GraphUNet)
    assert all(map(torch.equal, average.shadow_params, ema.shadow_params))
    average.copy_to(loaded.parameters())
    call = call_of(loaded)
    assert not torch.allclose(answer(loaded, call), answer(unet, call))


def train_lora(unet: Any, data: Tensors) -> list[float]:
    """Add a LoRA to a UNet, train it alone, and return the losses."""
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    for name, parameter in unet.named_parameters():
        if "lora_A" in name:  # whatever the order of modules is
            parameter.data = torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(12):
        loss = loss_of(unet, data, DDPMScheduler())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lora_on_a_tuned_student(tune: Tune, data: Tensors, tmp_path: Path) -> None:
    """It trains what it adds alone, and loads on the saved student."""
    tuned, _ = tune(max_train_steps=2)
    before = tensors(tuned)
    unet = sdgraph.apply(tuned)
    assert train_lora(unet, data) == pytest.approx(train_lora(tuned.to_diffusers(), data), rel=1e-3)
    assert equal(tensors(tuned), before)

    call = call_of(tuned)
    expected = answer(unet, call)
    assert not torch.allclose(expected, answer(tuned, call))
    again = sdgraph.GraphUNet.from_pretrained(tmp_path / "run" / "unet")
    again.load_lora_adapter(get_peft_model_state_dict(unet), prefix=None)
    torch.testing.assert_close(answer(again, call), expected, rtol=1e-3, atol=1e-5)
