"""The engines of this machine, measured side by side on the images of one pipeline: `compare`.

A row of the comparison is a way to run the pipeline, and a way is a few lines of Python. These lines are measured, in a
separate process, and printed for the best way.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch

import sdgraph
from sdgraph.compiler.passes import as_passes
from sdgraph.errors import SdgraphError, SourceError, SpecError, did_you_mean
from sdgraph.evaluation.metrics import Images, psnr
from sdgraph.options import Bounds, Count, Text, checked
from sdgraph.progress import Bar
from sdgraph.schedules import Steps
from sdgraph.views.format import format_table

from .ort.providers import CPU, CUDA, OPENVINO, choose

__all__ = ["Comparison", "Job", "Row", "Way", "compare"]


def __dir__() -> list[str]:
    return __all__


ENGINES = ("PyTorch", "compiled", "ONNX Runtime", "OpenVINO")
BUNDLES = "unet-onnx"
PROMPTS = ("a photograph of a mountain lake at dawn", "a red bicycle in front of a brick wall")


@dataclass(frozen=True)
class Job:
    """The images that every way makes.

    Args:
        pipeline: the folder of a diffusers pipeline, or its name on the hub.
        prompts: the prompts; an image is made of each.
        call: the arguments of the pipeline's call, as plain data: `num_inference_steps`, `height`, `width` ...
        scheduler: the class and the options of a scheduler of diffusers; None for the pipeline's own.
        variant: the variant of the files of weights, such as "fp16".
        imports: modules that define passes.
        threads: threads of the CPU; None for the default of each engine.
        device: the device of PyTorch.
        bundles: the folder of exported UNets.
    """

    pipeline: str
    prompts: tuple[str, ...]
    call: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]] | None = None
    variant: str | None = None
    imports: tuple[str, ...] = ()
    threads: int | None = None
    device: str = "cpu"
    bundles: str = BUNDLES


@dataclass(frozen=True)
class Way:
    """One way to run a pipeline.

    Args:
        engine: one of `ENGINES`.
        dtype: the dtype that the engine computes in, "float32", "float16" or "bfloat16".
        passes: passes as text; "" for the source UNet.
        channels_last: whether PyTorch keeps the channels of an image side by side.
        steps: inference steps; None for those of the job. Another number is the honest baseline of the passes.
    """

    engine: str
    dtype: str
    passes: str = ""
    channels_last: bool = False
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype}{' channels_last' * self.channels_last}"

    @property
    def exported(self) -> bool:
        return self.engine in ("ONNX Runtime", "OpenVINO")

    def bundle(self, job: Job) -> str:
        """Return the folder of the exported UNet that this way runs.

        Args:
            job: the images to make.
        """
        return os.path.join(job.bundles, "with-passes" if self.passes else "source")

    def export(self, job: Job) -> tuple[str, ...]:
        """Return the words of the command that writes the bundle.

        Args:
            job: the images to make.
        """
        words = ["sdgraph", "export", job.pipeline, "--unet-only", "--out", self.bundle(job)]
        words += ["--passes", self.passes] * bool(self.passes)
        words += [word for name in job.imports for word in ("--import", name)]
        words += [] if job.variant is None else ["--variant", job.variant]
        words += ["--dtype", "float16", "--target", "cuda"] * (job.device != "cpu")
        return (*words, "--calls", str(job.call["num_inference_steps"]))

    def code(self, job: Job) -> str:
        """Return the lines of Python that load the pipeline, ready to be called as `pipe`.

        Args:
            job: the images to make.
        """
        options = f", variant={job.variant!r}" * (job.variant is not None)
        imports = [
            "import torch",
            "import sdgraph",
            "from diffusers import DiffusionPipeline",
            *map("import {}".format, job.imports),
        ]
        lines = [] if job.threads is None else [f"torch.set_num_threads({job.threads})"]
        if self.exported:
            imports.append("from sdgraph.exporters import ort")
            arguments = [f"provider={self._provider(job)!r}"]
            if self.engine == "OpenVINO":
                arguments.append(f"precision={self.dtype!r}")
            lines.append(f"unet = ort.ORTUNet.from_pretrained({self.bundle(job)!r}, {', '.join(arguments)})")
            lines.append(f"pipe = ort.load_pipeline({job.pipeline!r}, unet{options})")
        else:
            dtype = f"torch_dtype=torch.{self.dtype}"
            lines.append(f"pipe = DiffusionPipeline.from_pretrained({job.pipeline!r}, {dtype}{options})")
        if job.device != "cpu":
            lines.append(f"pipe.to({job.device!r})")
        if job.scheduler is not None:
            name, settings = job.scheduler
            imports[imports.index("from diffusers import DiffusionPipeline")] += f", {name}"
            changes = "".join(f", {key}={value!r}" for key, value in settings.items())
            lines.append(f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{changes})")
        if self.passes and not self.exported:
            lines.append(f"pipe.unet = sdgraph.apply(pipe.unet, {self.passes!r})")
        if self.channels_last:
            lines.append("pipe.unet.to(memory_format=torch.channels_last)")
        if self.engine == "compiled":
            lines.append("pipe.unet.compile()")
        if self.passes:
            lines.append("sdgraph.attach(pipe)")
        return "\n".join([*imports, "", *lines])

    def _provider(self, job: Job) -> str:
        return OPENVINO if self.engine == "OpenVINO" else CPU if job.device == "cpu" else CUDA


@dataclass(frozen=True)
class Row:
    """The figures of one way.

    Args:
        way: the way.
        seconds: seconds per image, the median.
        first: seconds from the start of a process to its first image, the median over the rounds.
        memory: the most memory that the process held, in bytes: on the CPU, or of PyTorch's tensors on a GPU.
        psnr: PSNR of the images to those of the source in float32 with all steps, in dB.
        failure: the reason if this way does not run here, else None; then the figures are NaN.
    """

    way: Way
    seconds: float = math.nan
    first: float = math.nan
    memory: float = math.nan
    psnr: float = math.nan
    failure: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The ways to run a pipeline on this machine, in the order in which they were measured. It prints as a table.

    Args:
        job: the images.
        rows: the ways and their figures.
        missing: the reason of each engine that does not run here.
        on: the machine, the threads and the versions.
    """

    job: Job
    rows: tuple[Row, ...]
    missing: Mapping[str, str]
    on: Mapping[str, Any]

    @property
    def best(self) -> Row:
        """The fastest row: of those with passes, if passes were given."""
        ran = [row for row in self.rows if row.failure is None and row.way.steps is None]
        return min([row for row in ran if row.way.passes] or ran, key=lambda row: row.seconds)

    def __str__(self) -> str:
        first, steps = self.rows[0], self.job.call["num_inference_steps"]
        table: list[tuple[str, ...]] = [("way", "UNet", "steps", "s/image", "x", "first image", "memory", "PSNR")]
        for row in self.rows:
            way = row.way
            table.append(
                (
                    str(way), "with passes" if way.passes else "source", str(way.steps or steps),
                    f"{row.seconds:.3g}", f"{row.seconds / first.seconds:.3f}", f"{row.first:.3g} s",
                    f"{row.memory / 1e9:.2f} GB", f"{row.psnr:.1f} dB",
                )
                if row.failure is None
                else (str(way), "with passes" if way.passes else "source", str(way.steps or steps), "fails", *[""] * 4)
            )  # fmt: skip
        parts = [", ".join(f"{name} {value}" for name, value in self.on.items()), format_table(table)]
        parts += [f"{row.way} fails: {row.failure}" for row in self.rows if row.failure is not None]
        for reason in dict.fromkeys(self.missing.values()):
            engines = ", ".join(engine for engine, why in self.missing.items() if why == reason)
            parts.append(f"{engines}: not measured, because {reason}")
        parts.append(
            "x: time relative to the first row. First image: from the start of a process, without the export.\n"
            f"PSNR: to the images of the first row; {len(self.job.prompts)} images. A row with fewer steps is what the "
            "passes have to beat in the same time."
        )
        best = self.best.way
        if best.exported:
            command = shlex.join(best.export(self.job))
            parts.append(f"The fastest{' with the passes' * bool(best.passes)}, exported once by\n\n  {command}")
        else:
            parts.append(f"The fastest{' with the passes' * bool(best.passes)}:")
        parts.append("\n".join(f"  {line}".rstrip() for line in best.code(self.job).splitlines()))
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data; what was not measured is None."""
        rows = [
            asdict(row.way)
            | {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in vars(row).items()
                if name != "way"
            }
            for row in self.rows
        ]
        return {"job": asdict(self.job), "rows": rows, "missing": dict(self.missing), "on": dict(self.on)}


def ways(passes: str, device: str = "cpu", leave_out: Collection[str] = ()) -> tuple[tuple[Way, ...], dict[str, str]]:
    """Return the ways to run a pipeline on this machine, the reference first, and the engines that do not run here.

    Args:
        passes: passes as text; every engine runs the source, and the source with the passes.
        device: the device of PyTorch.
        leave_out: engines to leave out.
    Returns:
        The ways, and the reason of each engine that is missing.
    Raises:
        SpecError: `leave_out` names no engine.
    """
    for name in leave_out:
        if name not in ENGINES:
            hint = did_you_mean(name, ENGINES) or f"the engines are {', '.join(ENGINES)}"
            raise SpecError(f"there is no engine {name!r}", where="leave_out", hint=hint)
    small = "bfloat16" if device == "cpu" else "float16"
    kinds = [("PyTorch", "float32", False), ("PyTorch", small, False), ("PyTorch", small, True)]
    kinds += [("compiled", small, True)]
    missing = {}
    if importlib.util.find_spec("onnxruntime") is None:
        missing["ONNX Runtime"] = "the extra 'onnx' is not installed"
    else:
        kinds.append(("ONNX Runtime", "float32" if device == "cpu" else "float16", False))
        for precision in ("float32", "bfloat16") if device == "cpu" else ():
            try:
                choose(OPENVINO, precision, None, "float32")
                kinds.append(("OpenVINO", precision, False))
            except SdgraphError as error:
                missing[f"OpenVINO {precision}"] = error.what
    kinds = [kind for kind in kinds if kind[0] not in leave_out]
    reference = ("PyTorch", "float32", False)
    kinds = [reference, *(kind for kind in kinds if kind != reference)]
    return tuple(
        Way(engine, dtype, of, channels_last)
        for of in dict.fromkeys(("", passes))
        for engine, dtype, channels_last in kinds
    ), missing


@checked(SpecError)
def compare(
    pipeline: Text | os.PathLike[str],
    passes: Any = "",
    *,
    prompts: Annotated[Sequence[str], Bounds(length=1)] = PROMPTS,
    steps: Steps = 25,
    call: Mapping[str, Any] | None = None,
    scheduler: tuple[str, Mapping[str, Any]] | None = None,
    variant: str | None = None,
    imports: Sequence[str] = (),
    threads: Count | None = None,
    device: str = "cpu",
    leave_out: Collection[str] = (),
    rounds: Count = 2,
    repeats: Count = 2,
    bundles: Text | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure the engines of this machine on images of a pipeline, with passes and without.

    Every way runs in a separate process, one process at a time, so that memory and the first image are those of a
    deployment. The rounds alternate between the order of the ways and its reverse, so that a drift of the machine's
    speed affects all of them equally.

    Args:
        pipeline: the folder of a diffusers pipeline, or its name on the hub.
        passes: passes as `sdgraph.apply` accepts them.
        prompts: the prompts; an image is made of each, with the seeds 0, 1, 2 ...
        steps: inference steps.
        call: further arguments of the pipeline's call, such as `{"height": 256, "width": 256}`, in pixels.
        scheduler: the class of a scheduler of diffusers and its options; by default the pipeline's own.
        variant: the variant of the files of weights, such as "fp16".
        imports: modules that define passes, importable from the current folder.
        threads: threads of the CPU, for all engines; by default those that PyTorch chooses.
        device: the device of PyTorch.
        leave_out: names of `ENGINES` to leave out.
        rounds: processes per way.
        repeats: measured images per prompt and process, after the first.
        bundles: the folder to keep exported UNets in; by default they are temporary.
        progress: whether a progress bar over the processes is shown.
    Returns:
        A `Comparison`.
    Raises:
        SpecError: an option has a value out of range, or there is no such engine.
        SourceError: the pipeline makes no image in PyTorch in float32. Any other way that fails is a row that says so.
    Example:
        `print(compare("stable-diffusion-v1-5", "InheritFeatures.damped(2)", call={"height": 256, "width": 256}))`
    """
    text = ", ".join(map(str, as_passes(passes)))
    threads = threads or torch.get_num_threads()
    chosen, missing = ways(text, device, leave_out)
    with tempfile.TemporaryDirectory(prefix="sdgraph-bench-") as scratch:
        job = Job(
            os.fspath(pipeline), tuple(prompts), {"num_inference_steps": steps, **(call or {})}, scheduler, variant,
            tuple(imports), threads, device, os.fspath(bundles or os.path.join(scratch, BUNDLES)),
        )  # fmt: skip
        measured = _Measured(job, Path(scratch), repeats)
        with Bar(total=rounds * (len(chosen) + bool(text)), desc="bench", unit="run", disable=not progress) as bar:
            for number in range(rounds):
                for way in chosen[:: -1 if number % 2 else 1]:
                    bar.set_postfix_str(str(way))
                    measured.run(way)
                    bar.update()
                if number == 0 and text and (fewer := measured.baseline(chosen)) is not None:
                    chosen = (*chosen, fewer)
                    measured.run(fewer)
                    bar.update()
        rows = tuple(measured.row(way) for way in chosen)
    kept = job if bundles is not None else replace(job, bundles=BUNDLES)  # what was temporary has another name
    return Comparison(kept, rows, missing, _circumstances(job))


@dataclass
class _Measured:
    """Runs ways in processes, and keeps what they reported."""

    job: Job
    scratch: Path
    repeats: int
    reports: dict[Way, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[Way, str] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def run(self, way: Way) -> None:
        if way in self.failures:
            return
        if way.exported and way.bundle(self.job) not in self.written:
            command = (sys.executable, "-m", *way.export(self.job), "--overwrite")
            if failure := self._failure(command):
                self.failures[way] = failure
                return
            self.written.add(way.bundle(self.job))
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        call = {**self.job.call} | ({} if way.steps is None else {"num_inference_steps": way.steps})
        task = {
            "code": way.code(self.job), "call": call, "prompts": self.job.prompts, "repeats": self.repeats,
            "start": time.time(), "device": self.job.device,
        }  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task))
        if failure := self._failure((sys.executable, "-m", __name__, str(folder))):
            if not self.reports:
                raise SourceError(
                    f"the pipeline makes no image with {way}, which all other ways are compared with: {failure}",
                    where=self.job.pipeline,
                    hint="check the folder, and that its images of this size fit into the memory",
                )
            self.failures[way] = failure
            return
        report = json.loads((folder / "report.json").read_text())
        self.reports.setdefault(way, []).append(report | {"images": np.load(folder / "images.npy")})

    def _failure(self, command: Sequence[str]) -> str | None:
        """Run a command, and return the last line of its errors if it fails."""
        log = self.scratch / "errors.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.job.threads)}
        with log.open("w") as errors:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        if done.returncode == 0:
            return None
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if line.startswith(("sdgraph: ", "sdgraph.errors."))]
        return (named or lines or [f"the process ended with status {done.returncode}"])[-1].strip()

    def baseline(self, chosen: Sequence[Way]) -> Way | None:
        """Return the source on the engine of the fastest way with passes, with fewer steps in the same time."""
        ran = [way for way in chosen if way.passes and way in self.reports]
        if not ran:
            return None
        best = min(ran, key=self._seconds)
        plain = replace(best, passes="")
        if plain not in self.reports:
            return None
        steps = self.job.call["num_inference_steps"]
        fewer = max(1, round(steps * self._seconds(best) / self._seconds(plain)))
        return replace(plain, steps=fewer) if fewer < steps else None

    def _seconds(self, way: Way) -> float:
        return float(statistics.median(seconds for report in self.reports[way] for seconds in report["seconds"]))

    def row(self, way: Way) -> Row:
        if way not in self.reports or way in self.failures:
            return Row(way, failure=self.failures[way])
        reports = self.reports[way]
        reference = next(iter(self.reports.values()))[0]["images"]  # that of the first way
        images: Images = reports[0]["images"]
        return Row(
            way,
            seconds=self._seconds(way),
            first=statistics.median(report["first"] for report in reports),
            memory=max(report["memory"] for report in reports),
            psnr=psnr(reference, images),
        )


def _circumstances(job: Job) -> dict[str, Any]:
    sizes = [str(job.call[name]) for name in ("height", "width") if name in job.call]
    on = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "size": "x".join(sizes) or "of the pipeline",
        "threads": job.threads,
        "sdgraph": sdgraph.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        on["ONEDNN_MAX_CPU_ISA"] = os.environ["ONEDNN_MAX_CPU_ISA"]  # PyTorch leaves out newer instructions
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        on["onnxruntime"] = onnxruntime.__version__
    return on


def processor() -> str:
    """Return the name of the model of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _measure(folder: Path) -> None:
    """Run the code of a way, and write its times, its memory and its images: the process of one row."""
    task = json.loads((folder / "task.json").read_text())
    names: dict[str, Any] = {}
    exec(compile(task["code"], "<way>", "exec"), names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)

    def image(number: int) -> tuple[float, Any]:
        start, generator = time.perf_counter(), torch.Generator().manual_seed(number)
        made = pipe(task["prompts"][number], generator=generator, output_type="np", **task["call"]).images
        return time.perf_counter() - start, made  # NumPy's arrays, so a GPU is done

    made = [image(0)[1]]
    first = time.time() - task["start"]
    made += [image(number)[1] for number in range(1, len(task["prompts"]))]
    seconds = [image(number)[0] for _ in range(task["repeats"]) for number in range(len(task["prompts"]))]
    np.save(folder / "images.npy", np.concatenate(made))
    report = {"first": first, "seconds": seconds, "memory": _peak(task["device"])}
    (folder / "report.json").write_text(json.dumps(report))


def _peak(device: str) -> int:
    """Return the most memory that this process held, in bytes."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)


if __name__ == "__main__":
    _measure(Path(sys.argv[1]))
