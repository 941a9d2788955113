"""Calls of generations are recorded, all of them or the first."""

from typing import Any

import pytest
import torch

import sdgraph
from sdgraph.errors import ScheduleError
from sdgraph.runtime.recorded_calls import CallRecorder, first_call

from ..models import answer, call_of


def test_calls_are_recorded_as_they_were_made(small: sdgraph.Graph) -> None:
    recorder = CallRecorder(small)
    calls = [call_of(recorder, seed=seed) for seed in (0, 1)]
    outputs = [answer(recorder, call) for call in calls]
    calls[0]["sample"].zero_()
    again = sdgraph.GraphUNet(small.copy())
    assert [call["sample"].abs().sum().item() > 0 for call in recorder.calls] == [True, True]
    for recorded, output in zip(recorder.calls, outputs, strict=True):
        with torch.no_grad():
            assert torch.equal(again.run(recorded), output)


def test_a_generation_stops_at_its_first_call(small: sdgraph.Graph) -> None:
    reached: list[Any] = []

    def generate(unet: sdgraph.GraphUNet) -> None:
        for seed in (5, 6):
            reached.append(call_of(unet, seed=seed))
            answer(unet, reached[-1])

    assert torch.equal(first_call(small, generate)["sample"], reached[0]["sample"])
    assert len(reached) == 1


def test_a_generation_has_a_call(small: sdgraph.Graph) -> None:
    with pytest.raises(ScheduleError, match="the generation makes no call"):
        first_call(small, lambda unet: None)
