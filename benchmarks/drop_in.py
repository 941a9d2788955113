"""diffusers' own pipeline tests, with sdgraph's UNet in the place of diffusers'.

    python -m benchmarks.drop_in DIFFUSERS                                # all suites, all modes
    python -m benchmarks.drop_in DIFFUSERS --suites controlnet -k save    # some tests

DIFFUSERS is a checkout of diffusers at the tag of the installed version; where there is no such folder, git clones one.
Only its `tests/` are used, the library is the installed one.

Each suite runs with diffusers' UNet, and once per mode with `get_dummy_components` returning `sdgraph.apply(unet,
passes)`; both in inference mode, because diffusers' last bits may differ in training mode. The script prints, per mode,
how many tests fail only with ours, and why: a refusal of ours, with its hint, or an error. It also compares all outputs
of the UNets, and lists tests that pass with both although an output differs in one bit. Nothing is downloaded: the
tests' tokenizer is replaced by one of bytes, and tests that need another file of the hub fail with both UNets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

import sdgraph
from sdgraph.runtime.diffusers_api import UNetCall

from .measuring.record import add_options, begin, place, record

OWN = "diffusers"
MODES = {
    "traced": (),
    "clean": ("CleanUp", "HoistInvariants"),
    "inheriting": ("InheritFeatures.deep_cache(interval=1)",),  # inherits nothing, so it must change nothing
}
SUITES = (
    "stable_diffusion",
    "stable_diffusion_2",
    "stable_diffusion_xl",
    "latent_consistency_models",
    "controlnet",
    "stable_diffusion_adapter",
)
REPOSITORY = "https://github.com/huggingface/diffusers"
Outcomes = dict[str, dict[str, dict[str, Any]]]  # of tests, by mode and name


class Recorder:
    """A pytest plugin that puts our UNet in, and keeps the outcomes of the tests.

    Args:
        mode: a name of `MODES`, or `OWN`.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.tests: dict[str, dict[str, Any]] = {}
        self._outputs = hashlib.sha256()
        self.broken: list[str] = []
        self._applying = False
        for holder in (UNet2DConditionModel, UNetCall):
            holder.forward = self._noting(holder.forward)  # type: ignore[method-assign]
        bytes_only = byte_tokenizer()
        CLIPTokenizer.from_pretrained = _offline(CLIPTokenizer.from_pretrained, bytes_only)

    def _noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same forward, whose outputs go into the digest of the test."""

        @functools.wraps(forward)
        def noting(unet: Any, *args: Any, **kwargs: Any) -> Any:
            result = forward(unet, *args, **kwargs)
            if type(result[0]) is torch.Tensor and not self._applying:  # no proxy: nothing is being traced
                output = result[0].detach().float().cpu().contiguous()
                self._outputs.update(repr(output.shape).encode() + output.numpy().tobytes())
            return result

        return noting

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for cls in {cls for item in items for cls in getattr(item, "cls", None).__mro__ if hasattr(item, "cls")}:
            for name, method in list(vars(cls).items()):
                if name.startswith("get_dummy_components") and not hasattr(method, "__wrapped__"):
                    setattr(cls, name, self._in_inference_mode(method))

    def _in_inference_mode(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def components(*args: Any, **kwargs: Any) -> Any:
            made = method(*args, **kwargs)
            if type(made.get("unet")) is not UNet2DConditionModel:
                return made
            made["unet"].eval()
            if self.mode != OWN:
                self._applying = True
                try:
                    state = torch.get_rng_state()
                    made["unet"] = sdgraph.apply(made["unet"], MODES[self.mode])
                    torch.set_rng_state(state)
                finally:
                    self._applying = False
            return made

        return components

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self._outputs = hashlib.sha256()
        torch.manual_seed(0)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
        report: pytest.TestReport = yield
        test = self.tests.setdefault(item.nodeid, {"outcome": "passed", "cause": "", "refusal": False})
        if report.failed and test["outcome"] != "failed":
            error = call.excinfo.value if call.excinfo is not None else None
            test |= {"outcome": "failed", "cause": cause(error), "refusal": refusal(error)}
        elif report.skipped:
            test["outcome"] = "skipped"
        if call.when == "call":
            test["outputs"] = self._outputs.hexdigest()
        return report


def cause(error: BaseException | None) -> str:
    """Return the class and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def refusal(error: BaseException | None) -> bool:
    """Return whether the error comes from one of ours with a hint."""
    while error is not None:
        if isinstance(error, sdgraph.SdgraphError):
            return bool(error.hint)
        error = error.__cause__ or error.__context__
    return False


def byte_tokenizer() -> Any:
    """Return CLIP's tokenizer without merges, instead of hf-internal-testing/tiny-random-clip (1000 tokens)."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<unused>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _offline(original: Any, tokenizer: Any) -> Any:
    import copy

    @functools.wraps(original)
    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name).startswith("hf-internal-testing/"):
            return copy.deepcopy(tokenizer)
        return original(name, *args, **kwargs)

    return load


def run(sources: Path, suites: tuple[str, ...], expression: str, mode: str) -> dict[str, dict[str, Any]]:
    """Return the outcome of each test, in a separate process, because it patches classes."""
    os.chdir(sources)
    sys.path.insert(0, str(sources))
    recorder = Recorder(mode)
    folders = [f"tests/pipelines/{suite}" for suite in suites]
    options = [
        "-c",
        os.devnull,
        "--rootdir",
        ".",
        "-p",
        "no:cacheprovider",
        "-q",
        "--no-header",
        "--tb=no",
        "-W",
        "ignore",
    ]
    code = pytest.main(
        [*options, *folders, "--ignore-glob=*test_onnx_*", *(["-k", expression] if expression else [])],
        plugins=[recorder],
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError("\n".join([f"pytest ended with {code!r} in {sources}", *recorder.broken]))
    return recorder.tests


def table(outcomes: Outcomes) -> str:
    """Return the failures that occur only with ours, by mode and cause."""
    own = outcomes[OWN]
    ran = {name for name, test in own.items() if test["outcome"] != "skipped"}
    failing = sum(own[name]["outcome"] == "failed" for name in ran)
    lines = [f"diffusers {diffusers.__version__}: {len(ran)} tests, {failing} fail with diffusers' UNet", ""]
    for mode, tests in outcomes.items():
        if mode == OWN:
            continue
        passing = [name for name in ran if own[name]["outcome"] == "passed"]
        failed = [name for name in passing if tests[name]["outcome"] == "failed"]
        mended = sum(tests[name]["outcome"] == "passed" for name in ran if own[name]["outcome"] == "failed")
        both = [name for name in passing if tests[name]["outcome"] == "passed"]
        differing = sorted(name for name in both if tests[name]["outputs"] != own[name]["outputs"])
        lines += [
            f"{mode}: {len(failed)} fail only with ours, {mended} only with diffusers'; "
            f"{len(differing)} of {len(both)} that pass with both give other numbers",
        ]
        causes = Counter((tests[name]["refusal"], tests[name]["cause"]) for name in failed)
        for (refused, why), count in causes.most_common():
            lines.append(f"  {count:4}  {'refused ' if refused else 'ERROR   '} {why}")
        lines += [f"        DIFFERS  {name}" for name in differing]
        lines.append("")
    return "\n".join(lines)


def summary(outcomes: Outcomes, suites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the figures of each mode and suite, and the tests that fail only with ours or give other numbers."""
    modes: dict[str, dict[str, Any]] = {}
    for mode in (mode for mode in outcomes if mode != OWN):
        for suite in suites:
            own = {name: test for name, test in outcomes[OWN].items() if f"tests/pipelines/{suite}/" in name}
            own = {name: test for name, test in own.items() if test["outcome"] != "skipped"}
            ours = {name: outcomes[mode][name] for name in own}
            passing = [name for name in own if own[name]["outcome"] == "passed"]
            failed = {name: ours[name] for name in passing if ours[name]["outcome"] == "failed"}
            both = [name for name in passing if ours[name]["outcome"] == "passed"]
            modes.setdefault(mode, {})[suite] = {
                "tests": len(own),
                "fail with diffusers' own": len(own) - len(passing),
                "fail only with ours": {
                    name: {key: test[key] for key in ("cause", "refusal")} for name, test in failed.items()
                },
                "pass with both": len(both),
                "of these, other numbers": [name for name in both if ours[name]["outputs"] != own[name]["outputs"]],
            }
    return modes


def checkout(folder: Path) -> Path:
    """Return the folder, which is cloned if it does not exist."""
    if not (folder / "tests" / "pipelines").is_dir():
        tag = f"v{diffusers.__version__}"
        clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, REPOSITORY, str(folder)]
        if folder.exists() or subprocess.run(clone).returncode:
            raise SystemExit(f"{folder} has no tests/pipelines; put a checkout of {REPOSITORY} at {tag} there")
    return folder.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="a checkout of diffusers", metavar="DIFFUSERS")
    parser.add_argument("--suites", nargs="+", default=SUITES, metavar="SUITE", help="folders of tests/pipelines")
    parser.add_argument("--modes", nargs="+", default=tuple(MODES), choices=MODES)
    parser.add_argument("-k", default="", dest="expression", help="as pytest's: only tests whose names match")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    add_options(parser)
    args = parser.parse_args()
    provenance = begin("drop_in", "cpu", args.draft or args.quick)
    out = place(args, "drop-in.json")
    if args.quick:
        args.suites, args.modes = args.suites[:1], args.modes[:1]
    sources = checkout(args.sources)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # read when the processes below import diffusers
    modes = (OWN, *args.modes)
    one = functools.partial(run, sources, tuple(args.suites), args.expression)
    spawn = multiprocessing.get_context("spawn")
    # A process per run: what a run patches goes with it.
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        try:
            outcomes: dict[str, Any] = {}
            for mode, outcome in zip(modes, pool.map(one, modes), strict=True):
                outcomes[mode] = outcome
                if mode != OWN:  # now, because a mode takes long and the next may be stopped
                    record(out, {**provenance, "modes": summary(outcomes, args.suites)})
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
    print(f"{table(outcomes)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
