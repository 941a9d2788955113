"""Sizes, schedulers and steps of the images that commands make: what is refused, before anything is loaded."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from scenes.pipeline import MODEL, load

import sdgraph
from sdgraph.__main__ import main
from sdgraph.cli.generation import check_graph_size, made_scheduler, with_calls
from sdgraph.errors import SpecError

KARRAS = "DPMSolverMultistepScheduler(use_karras_sigmas=True)"


@pytest.mark.parametrize(
    ("given", "complaints"),
    [
        (["--height", "100"], ["cannot run at a height of 100 pixels", "96 or 104: multiples of 8 pixels"]),
        (["--width", "3"], ["cannot run at a width of 3 pixels", "hint:  8: multiples of 8 pixels"]),
        (["--scheduler", "DPMSolverMultistep"], ["no scheduler 'DPMSolverMultistep'", "'DPMSolverMultistepScheduler'"]),
        (["--scheduler", "euler"], ["did you mean 'EulerDiscreteScheduler' or 'EulerAncestralDiscreteScheduler'"]),
        (["--scheduler", "nothing like it"], ["no scheduler 'nothing like it'", "usual: DDIMScheduler, "]),
        (["--scheduler", "DDIMScheduler("], ["cannot read the scheduler 'DDIMScheduler('"]),
        (["--scheduler", "DDIMScheduler(0.1)"], ["cannot read the scheduler", "options have names"]),
        (["--scheduler", "__import__('os').system('true')"], ["cannot read the scheduler"]),
        (["--scheduler", "DDIMScheduler(beta=0.1)"], ["no option 'beta'", "did you mean 'beta_end'"]),
        (["--scheduler", "DPMSolverMultistepScheduler(algorithm_type='x')"], ["cannot be made: x is not implemented"]),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], ["does not fit a pipeline with DDIMScheduler"]),
        (["--steps", "5000"], ["DDIMScheduler cannot make 5000 steps", "1 to 1000 steps"]),
        (["--steps", "5000", "--scheduler", KARRAS], ["DPMSolverMultistepScheduler cannot make 5000 steps"]),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "search"])
@pytest.mark.usefixtures("nothing_loads")
def test_what_no_pipeline_does(
    command: str, given: list[str], complaints: list[str], prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "evaluate": ["evaluate", str(MODEL), "CleanUp", "--prompts", str(prompts)],
        "search": ["search", str(MODEL), "--prompts", str(prompts), "--held-out", str(prompts), "--budget", "0.5"],
    }[command]
    assert main([*words, *given]) == 2
    said = capsys.readouterr().err
    assert all(complaint in said for complaint in complaints), said


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--height", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "-2"], "'-2' is not a whole number"),
        (["--guidance-scale", "nan"], "'nan' is not a number"),
        (["--guidance-scale", "much"], "'much' is not a number"),
        (["--seeds", "-1"], "'-1' is not a whole number"),
        (["--seeds", str(2**70)], "is not a whole number from 0"),
        (["--reference-steps", "0"], "'0' is not a whole number"),
        (["--guidance", "3"], "did you mean '--guidance-scale'?"),
        (["--hieght", "64"], "did you mean '--height'"),
    ],
)
def test_values_that_no_option_has(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(MODEL), "CleanUp", "--prompts", "prompts.txt", *given])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_loads")
def test_a_size_that_a_pass_does_not_have_is_refused_before_weights_are_read(
    prompts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "even_passes.py").write_text(
        "from dataclasses import dataclass\nimport sdgraph\n\n"
        "@dataclass(frozen=True)\nclass FourRows(sdgraph.Pass):\n"
        '    """Require it."""\n    may_change_nothing = True\n'
        "    def run(self, graph):\n        graph.require('H % 4 == 0')\n        return sdgraph.Findings()\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", str(MODEL), "FourRows", "--prompts", str(prompts), "--import", "even_passes"]
    assert main([*words, "--height", "72"]) == 2
    said = capsys.readouterr().err
    assert "the UNet cannot run at a height of 72 pixels" in said
    assert "64 or 80: of FourRows" in said
    with pytest.raises(SystemExit, match="something is loaded"):
        main([*words, "--height", "80", "--width", "72"])


def test_a_plain_unet_has_every_size() -> None:
    check_graph_size(Namespace(height=72, width=None), str(MODEL), load().unet)
    check_graph_size(Namespace(height=72, width=None), str(MODEL), sdgraph.trace(load().unet))


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()])
def test_as_many_calls_as_are_wanted(scheduler: DDIMScheduler) -> None:
    assert len(with_calls(scheduler, 11).timesteps) == 11
    if isinstance(scheduler, HeunDiscreteScheduler):
        with pytest.raises(SpecError, match=r"no generation of 10 calls(.|\n)*9 or 11 calls"):
            with_calls(scheduler, 10)


def test_a_scheduler_has_the_noise_of_the_model() -> None:
    own = load().scheduler
    other = made_scheduler(KARRAS, own)
    assert other.config.prediction_type == own.config.prediction_type
    assert other.config.use_karras_sigmas
    assert made_scheduler(None, own).config == own.config
