"""GRI attention: its laws, at every size, and what it is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenes.pipeline import load

import sdgraph
from sdgraph.errors import PreconditionError, SpecError
from sdgraph.passes.gri_attention import attend

from ..models import ONE_LEVEL, answer, build, call_of, edits


def features(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, height * width, 8, generator=generator).to(dtype) for _ in range(3))


SIZES = [(16, 16), (8, 24), (13, 7), (1, 5), (9, 16)]


def test_attention_is_over_the_own_window_and_the_cells_of_the_others(small: sdgraph.Graph) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    after = sdgraph.apply(small, "GRIAttention(4, pool=2)").graph
    found = edits(small, after, within=path)
    assert [line for line in found if line.startswith("-")] == ["-% = sdpa(%, %, %)"]
    assert [line for line in found if "cat(" in line] == [
        "+% = cat(%, %, 2)",  # keys of the window and of the cells
        "+% = cat(%, %, 2)",  # their values
        "+% = cat(%, %, 3)",  # and what is added to the logits
    ]
    assert edits(small, after, within=path.replace("attn1", "attn2")) == []
    assert after.parameters().keys() == small.parameters().keys()


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cells_of_one_token_are_full_attention(height: int, width: int, shift: int) -> None:
    q, k, v = features(height, width)
    for window in (4, 6):
        found = attend(q, k, v, height, width, window, 1, shift)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_window_as_large_as_the_map_is_full_attention(height: int, width: int) -> None:
    q, k, v = features(height, width)
    for pool in (2, 4, 8):
        found = attend(q, k, v, height, width, 24, pool)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_position_counts_once(height: int, width: int, shift: int) -> None:
    """Equal keys: every value has the same weight, whatever cell it is in."""
    q, k, v = features(height, width)
    found = attend(q, torch.ones_like(k), v, height, width, 8, 4, shift)
    torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(v), rtol=1e-4, atol=1e-5)
    constant = attend(q, k, torch.ones_like(v), height, width, 8, 4, shift)
    torch.testing.assert_close(constant, torch.ones_like(v))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_padding_does_not_leak(height: int, width: int) -> None:
    """Against the definition, query by query."""
    q, k, v = features(height, width)
    window, pool, shift = 4, 2, 2
    found = attend(q, k, v, height, width, window, pool, shift).view(2, 3, height, width, 8)
    q, k, v = (x.view(2, 3, height, width, 8).double() for x in (q, k, v))
    for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        own = (y + shift) // window, (x + shift) // window
        logits, values = [], []
        cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for b in range(height):
            for a in range(width):
                if ((b + shift) // window, (a + shift) // window) == own:
                    logits.append((q[:, :, y, x] * k[:, :, b, a]).sum(-1) / 8**0.5)
                    values.append(v[:, :, b, a])
                else:
                    cells.setdefault(((b + shift) // pool, (a + shift) // pool), []).append((b, a))
        for members in cells.values():
            key = sum(k[:, :, b, a] for b, a in members) / len(members)
            value = sum(v[:, :, b, a] for b, a in members) / len(members)
            logits.append((q[:, :, y, x] * key).sum(-1) / 8**0.5 + torch.tensor(float(len(members))).log())
            values.append(value)
        weights = torch.stack(logits, -1).softmax(-1)
        expected = (weights[..., None] * torch.stack(values, 2)).sum(2)
        torch.testing.assert_close(found[:, :, y, x].double(), expected, rtol=1e-4, atol=1e-5)


def test_moving_the_map_by_whole_windows_moves_the_output() -> None:
    q, k, v = features(16, 24)
    found = attend(q, k, v, 16, 24, 8, 4).view(2, 3, 16, 24, 8)
    moved = [x.view(2, 3, 16, 24, 8).roll((8, 16), (2, 3)).reshape_as(x) for x in (q, k, v)]
    torch.testing.assert_close(attend(*moved, 16, 24, 8, 4).view(2, 3, 16, 24, 8), found.roll((8, 16), (2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    found = attend(*features(12, 20, dtype=dtype), 12, 20, 8, 4, 4)
    assert found.dtype == dtype
    expected = attend(*(x.float() for x in features(12, 20, dtype=dtype)), 12, 20, 8, 4, 4)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_every_attention_layout(name: str) -> None:
    """One token per cell: nothing changes at any size; four: something does, at every size."""
    source = build(name)
    level = 1 if name == "sdxl" else 0
    same = sdgraph.apply(source, f"GRIAttention(4, pool=1, levels=({level},))")
    other = sdgraph.apply(source, f"GRIAttention(2, pool=2, levels=({level},), shift=0)")
    for sizes in ({}, {"H": 12, "W": 8, "B": 3}, {"H": 16, "W": 20, "B": 1}):
        call = call_of(source, **sizes)
        expected = answer(source, call)
        torch.testing.assert_close(answer(same, call), expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(answer(other, call), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_gated_variant_starts_as_the_joint_one_and_learns() -> None:
    """The gates are those of the documentation: σ of the difference of the logarithms of sums of exponentials."""
    source = build()
    joint, gated = (
        sdgraph.apply(source, f"GRIAttention(4, pool=2, shift=2, variant='{name}')") for name in ("joint", "gated")
    )
    call = call_of(source, H=6, W=10)
    torch.testing.assert_close(answer(gated, call), answer(joint, call), rtol=1e-4, atol=1e-5)
    balances = {name: p for name, p in gated.named_parameters() if name.endswith("attn1.interaction.balance")}
    assert len(balances) == 3
    assert all(p.shape == (source.config.attention_head_dim,) for p in balances.values())
    gated.train()
    gated(**call)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in balances.values())

    q, k, v = features(8, 8)
    by = {b: attend(q, k, v, 8, 8, 4, 2, balance=torch.full((3,), b)) for b in (-40.0, 0.0, 1.5, 40.0)}
    near, far = by[-40.0], by[40.0]
    share = ((by[0.0] - near) * (far - near)).sum(-1, keepdim=True) / (far - near).square().sum(-1, keepdim=True)
    gate = torch.sigmoid(torch.logit(share) + 1.5)
    torch.testing.assert_close(by[1.5], near + gate * (far - near), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def trained() -> list[tuple[torch.Tensor, ...]]:
    """Queries, keys and values of the trained model's self-attentions on its 16x16 latents, amid a generation."""
    pipe = load()
    seen: list[tuple[torch.Tensor, ...]] = []
    attend_fully = F.scaled_dot_product_attention

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if q.shape[-2] == k.shape[-2] == 256:
            seen.append((q, k, v))
        return attend_fully(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", watch)
        pipe.set_progress_bar_config(disable=True)
        caption = "a large red circle left of a small blue square"
        pipe(caption, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent")
    return seen


def test_on_trained_features_the_error_falls_with_larger_windows_and_smaller_cells(
    trained: list[tuple[torch.Tensor, ...]],
) -> None:
    assert len(trained) == 4 * 5  # two layers down, three up

    def error(window: int, pool: int) -> float:
        pairs = [(attend(*each, 16, 16, window, pool), F.scaled_dot_product_attention(*each)) for each in trained]
        return sum(float((mine - full).square().sum()) for mine, full in pairs) / sum(
            float(full.square().sum()) for _, full in pairs
        )

    by_window = [error(window, 4) for window in (4, 8, 16)]
    assert by_window[0] > by_window[1] > by_window[2]
    by_pool = [error(8, pool) for pool in (8, 4, 2, 1)]
    assert by_pool == sorted(by_pool, reverse=True)
    assert by_pool[0] > 10 * max(by_pool[-1], 1e-9)


@pytest.mark.slow
def test_no_matrix_of_all_pairs_is_made() -> None:
    """At 128x128 tokens and two heads it would have 2.1 GB; the process grows by a tenth of that at most."""
    code = """
import resource, torch
from sdgraph.passes.gri_attention import attend
q, k, v = torch.randn(3, 1, 2, 128 * 128, 40)
attend(q, k, v, 32, 512, 16, 4)  # what the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    attend(q, k, v, 128, 128, 16, 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1024 * int(done.stdout) < 0.1 * 2 * (128 * 128) ** 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "error", "complaint"),
    [
        ("GRIAttention(6, pool=4)", SpecError, "do not go together"),
        ("GRIAttention(8, pool=4, shift=8)", SpecError, "do not go together"),
        ("GRIAttention(0)", SpecError, "window is 0"),
        ("GRIAttention(4, variant='sum')", SpecError, "variant is 'sum'"),
        ("GRIAttention(4, levels=())", SpecError, r"levels is \(\)"),
        ("GRIAttention(4, levels=(7,))", PreconditionError, r"level 7, where there is some at \[0, 1\]"),
        ("GRIAttention(16)", sdgraph.errors.NoChangeError, "a window of 16 holds the whole map of 8x8"),
    ],
)
def test_what_is_refused(spec: str, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        sdgraph.apply(build(), spec)


@pytest.mark.slow
def test_it_is_exported(tmp_path: Path) -> None:
    """With parity at two shapes, one of which its windows do not divide."""
    unet = sdgraph.apply(build(**ONE_LEVEL), "GRIAttention(4, pool=2, shift=2)")
    sdgraph.exporters.onnx.export(unet, tmp_path / "onnx", progress=False)
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    call = call_of(unet, B=3, H=6, W=14)
    torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_a_window_as_large_as_the_map_that_is_usually_traced_is_exported(tmp_path: Path) -> None:
    """There would be one window, exactly full, and torch.export would fix the size of the map."""
    one_level = {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    unet = sdgraph.apply(build(**one_level), "GRIAttention(4, pool=2)")
    sdgraph.exporters.onnx.export(unet, tmp_path / "onnx", progress=False)
    running = sdgraph.exporters.ort.ORTUNet.from_pretrained(tmp_path / "onnx", provider="CPUExecutionProvider")
    for height, width in ((2, 3), (6, 14)):
        call = call_of(unet, H=height, W=width)
        torch.testing.assert_close(answer(running, call), answer(unet, call), rtol=1e-3, atol=1e-4)
