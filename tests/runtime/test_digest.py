"""Hashes tell contents apart, whatever differs and wherever it does, and nothing but contents."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdgraph
from sdgraph.passes import PruneBlocks
from sdgraph.runtime import digest
from sdgraph.runtime.digest import hash_files, hash_model, hash_rows, hash_tensors, hash_tokenizer

from ..models import build

SHAPES = {"latents": (4, 8, 8), "encoder_hidden_states": (77, 24)}


def rows(count: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *shape, generator=draw) for name, shape in SHAPES.items()}


# -- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.law("A change of any number in the data makes another training run.")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_number_of_any_row_counts(data: st.DataObject) -> None:
    tensors = rows(130)  # more than one thread hashes at a time
    before = hash_rows(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    row = data.draw(st.integers(0, 129))
    place = data.draw(st.integers(0, tensors[name][row].numel() - 1))
    tensors[name][row].view(-1)[place] += 1e-3
    assert [a == b for a, b in zip(before, hash_rows(tensors), strict=True)] == [number != row for number in range(130)]
    assert hash_tensors({"": tensors[name]}) != hash_tensors({"": rows(130)[name]})


def test_the_layout_in_memory_does_not_count_and_dtypes_and_shapes_do(tmp_path: Path) -> None:
    plain = rows()
    torch.save(plain, tmp_path / "rows.pt")
    mapped = torch.load(tmp_path / "rows.pt", mmap=True)
    other = plain | {"latents": plain["latents"].to(memory_format=torch.channels_last)}
    assert hash_rows(plain) == hash_rows(mapped) == hash_rows(other)
    kinds = [plain["latents"], plain["latents"].half(), plain["latents"].bfloat16(), plain["latents"].flatten(1)]
    assert len({hash_rows({"latents": kind})[0] for kind in kinds}) == len(kinds)
    assert len({hash_tensors({"": kind}) for kind in kinds}) == len(kinds)
    assert hash_tensors({"": torch.zeros(0, 2)}) != hash_tensors({"": torch.zeros(0, 3)})


# -- models -----------------------------------------------------------------------------------------------------------


def last_weight(unet: Any) -> None:
    with torch.no_grad():
        parameter = max(unet.parameters(), key=torch.Tensor.numel)
        parameter.view(-1)[-1] += 1e-3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the last number of a weight": last_weight,
    "FreeU": lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "the attention processor": lambda unet: unet.set_attn_processor(
        diffusers.models.attention_processor.AttnProcessor()
    ),
    "an option of a module": lambda unet: setattr(unet.conv_norm_out, "eps", 0.1),
    "a module": lambda unet: setattr(unet, "conv_act", torch.nn.GELU()),
    "the dtype": lambda unet: unet.half(),
    "the configuration": lambda unet: unet.register_to_config(sample_size=99),
    "a buffer": lambda unet: unet.register_buffer("scale", torch.ones(1), persistent=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_of_a_model_counts(name: str) -> None:
    unet = build("sd15")
    before = hash_model(unet)
    assert hash_model(build("sd15")) == before
    CHANGES[name](unet)
    assert hash_model(unet) != before


def test_what_decides_nothing_does_not_count(tmp_path: Path) -> None:
    unet = build("sd15")
    before = hash_model(unet)
    unet.save_pretrained(tmp_path / "moved")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "moved")
    loaded.enable_gradient_checkpointing()
    loaded.train().requires_grad_(False)
    assert hash_model(loaded) == hash_model(copy.deepcopy(unet)) == before


def test_the_passes_of_a_model_count_with_the_same_weights(tmp_path: Path) -> None:
    texts = [
        "",
        "InheritFeatures.deep_cache(2)",
        "InheritFeatures.deep_cache(3)",
        "HoistInvariants",
        "PruneBlocks('mid_block')",
    ]
    unet = build("sd15")
    found = {text: hash_model(sdgraph.apply(unet, text, verify=False)) for text in texts}
    assert len(set(found.values())) == len(texts)
    sdgraph.apply(unet, [PruneBlocks("mid_block")], verify=False).save_pretrained(tmp_path)
    assert hash_model(sdgraph.GraphUNet.from_pretrained(tmp_path)) == found["PruneBlocks('mid_block')"]


def test_tokenizers_are_told_apart_and_calls_do_not_count(pipe: Any) -> None:
    before = hash_tokenizer(pipe.tokenizer)
    pipe.tokenizer("a red circle", padding="max_length", max_length=9, truncation=True)
    assert hash_tokenizer(pipe.tokenizer) == before
    other = copy.deepcopy(pipe.tokenizer)
    other.add_tokens("<new>")
    shorter = copy.deepcopy(pipe.tokenizer)
    shorter.model_max_length = 8
    assert len({before, hash_tokenizer(other), hash_tokenizer(shorter)}) == 3


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_read_once_and_again_when_somebody_has_written_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.bin" for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 9)
    read: list[str] = []
    hashed = digest.hash_file
    monkeypatch.setattr(digest, "hash_file", lambda path: (read.append(path.stem), hashed(path))[1])
    monkeypatch.setattr(digest, "SETTLED", 0)
    known = tmp_path / "files.json"
    before = hash_files(paths, known)
    assert (sorted(read), hash_files(paths, known), sorted(read)) == (["a", "b", "c"], before, ["a", "b", "c"])

    times = paths[1].stat()
    time.sleep(0.02)  # the clock of a file system has ticks
    paths[1].write_bytes(b"x" * times.st_size)
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    after = hash_files(paths, known)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert sorted(read) == ["a", "b", "b", "c"]

    known.write_text("damaged")
    assert hash_files(paths, known) == after


def test_files_that_have_just_been_written_are_not_trusted(tmp_path: Path) -> None:
    path, known = tmp_path / "a.bin", tmp_path / "files.json"
    for content in (b"one", b"two"):  # within one tick, perhaps
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        found = hash_files([path], known)
    assert not known.exists()
    assert found == [digest.hash_file(path)]
