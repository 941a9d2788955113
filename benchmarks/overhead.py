"""What sdgraph costs, and what pruning saves: on this machine, in one run.

    python benchmarks/overhead.py                                 # all cases on the CPU
    python benchmarks/overhead.py --device cuda --dtype float16   # on a GPU
    python benchmarks/overhead.py --quick                         # a minute: small models, few samples
    python benchmarks/overhead.py forward/sd15/32 apply/sdxl      # some cases

Cases are `forward/MODEL/SIZE` (a traced UNet without passes against eager, and eager against itself, which is the noise
of the machine), `apply/MODEL` (time and memory of tracing), `prune/MODEL/SIZE` (the presets, time against
multiply-accumulates) and `inherit/MODEL/SIZE` (feature inheritance, whole generations: time against
multiply-accumulates, and against the DeepCache package at the same settings), `experts/MODEL/SIZE` (a pruned UNet with
conditional convolutions against the same with plain ones), `layers/BATCH` (single convolutions of such),
`attention/MODEL/SIZE` (self-attention at the latents' resolution alone, and the whole UNet, with global-regional
attention against full), `export/MODEL` (time, memory and size of an export), `deploy/MODEL/SIZE` (ONNX Runtime on the
CPU against eager) and `memory/MODEL/SIZE` (what a process takes that runs a bundle). Each runs in a process of its own.
The figures and every sample go to a JSON file, which `benchmarks/table.py` prints.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import models
import psutil
import torch
import torch.nn.functional as F
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler
from onnxruntime import GraphOptimizationLevel
from table import report
from torch import nn
from tqdm import tqdm

import sdgraph
from sdgraph.exporters import onnx, ort
from sdgraph.passes import GRIAttention, HoistInvariants, InheritFeatures, MECondConv, PruneBlocks
from sdgraph.passes.gri_attention import attend, self_attentions
from sdgraph.passes.me_cond_conv import ConditionalConv2d
from sdgraph.schedules import Uniform

PRESETS = ("bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
CASES = (
    "forward/small/32",
    "forward/sd15/16",
    "forward/sd15/32",
    "forward/sd15/64",
    "apply/sd15",
    "apply/sdxl",
    "prune/sd15/64",
    "inherit/sd15/32",
    "experts/sd15/32",
    "layers/2",
    "layers/8",
    "attention/sd15/64",
    "attention/sd15/96",
    "attention/sd15/128",
    "export/sd15",
    "export/sdxl",
    "deploy/sd15/32",
    "memory/sd15/64",
)
QUICK = (
    *("forward/small/32", "apply/small", "prune/small/32", "inherit/tiny/16"),
    *("experts/tiny/16", "attention/small/32", "export/tiny", "deploy/tiny/16", "memory/tiny/16"),
)
LAYERS = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels and side of 3x3 convolutions
GRI = ((16, 4), (16, 8), (8, 4))  # windows and pools
CALLS = 10  # of a generation
DEEP_CACHE = ((2, 0), (3, 0), (5, 0), (5, 1), (5, 2))  # intervals and branches
_INHERIT = (HoistInvariants(), InheritFeatures.deep_cache(3))
# What runs a bundle, by settings of ONNX Runtime's sessions.
RUNNERS: dict[str, dict[str, Any]] = {
    "torch": {},
    "ONNX Runtime": {},
    "an arena for each session": {"session.use_env_allocators": 0},
    "no arena": {"enable_cpu_mem_arena": False},
    "weights as they lie in the file": {
        "session.disable_prepacking": 1,
        "graph_optimization_level": GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    },
}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        seconds: of timing, per case.
        at_least: samples of each call, whatever the time.
        dtype: of UNets on a GPU and of SDXL; on a CPU the others are in float32.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    seconds: float = 120.0
    at_least: int = 9
    quick: bool = False

    def of(self, model: str) -> torch.dtype:
        """SDXL in float32 takes 10 GB: on a CPU it is built in bfloat16."""
        name = "bfloat16" if model == "sdxl" and self.dtype == "float32" else self.dtype
        found: torch.dtype = getattr(torch, name)
        return found


def forward(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """A traced UNet without passes, against eager."""
    unet = models.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    traced = sdgraph.apply(unet, [])
    largest = float((unet(**call)[0] - traced(**call)[0]).abs().max())
    calls = {
        "eager": lambda: unet(**call),
        "traced": lambda: traced(**call),
        "eager again": lambda: unet(**call),
    }
    samples = measure.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    return {"samples": samples, "largest_difference": largest, "nodes": len(traced.graph.nodes)}


def apply(settings: Settings, model: str) -> dict[str, Any]:
    """Time and memory of `trace` and `apply`."""
    unet = models.build(model, settings.device, settings.of(model))
    parameters = sum(p.numel() for p in unet.parameters())
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    before, device = measure.resident(), measure.on_device(settings.device)
    start = time.perf_counter()
    graph = sdgraph.trace(unet)
    traced = time.perf_counter()
    result = sdgraph.apply(unet, [], verify=False)
    applied = time.perf_counter()
    nodes = len(graph.nodes)
    del graph
    after = measure.resident()
    checking = time.perf_counter()
    sdgraph.apply(unet, [])
    return {
        "parameters": parameters,
        "weight_bytes": weights,
        "nodes": nodes,
        "trace_seconds": traced - start,
        "apply_seconds": applied - traced,
        "apply_verified_seconds": time.perf_counter() - checking,
        "not_shared_bytes": measure.not_shared(result, unet),
        "resident_bytes": after - before,
        "device_bytes": measure.on_device(settings.device) - device,
    }


def prune(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """The presets: time of a forward against multiply-accumulates."""
    unet = models.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    whole = sdgraph.apply(unet, [], verify=False)
    results = {"traced": whole}
    for preset in PRESETS:
        results[preset] = sdgraph.apply(whole, ["CleanUp", f"PruneBlocks({preset!r})"], verify=False)
    calls: dict[str, Any] = {"eager": lambda: unet(**call)}
    calls |= {name: lambda result=result: result(**call) for name, result in results.items()}
    samples = measure.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    sizes = {
        name: {
            "nodes": len(result.graph.nodes),
            "parameters": sum(p.numel() for p in result.parameters()),
            "macs": result.graph.macs,
        }
        for name, result in results.items()
    }
    return {"samples": samples, "sizes": sizes}


def inherit(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """DeepCache's settings, ours and the package's: time of whole generations, and what is kept between calls."""
    unet = models.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    prompt = call.pop("encoder_hidden_states")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS, device=settings.device)
    kept: dict[str, int] = {}

    def generation(name: str, one: Any, bytes_kept: Callable[[], int]) -> torch.Tensor:
        own = prompt.clone()  # another tensor is another generation
        for timestep in scheduler.timesteps:
            output = one(call["sample"], timestep, encoder_hidden_states=own, **rest)[0]
        kept[name] = bytes_kept()
        return output

    rest = {key: value for key, value in call.items() if key not in ("sample", "timestep")}
    calls: dict[str, Any] = {"eager": partial(generation, "eager", unet, lambda: 0)}
    tables, largest = {}, {}
    for interval, branch in DEEP_CACHE:
        name = f"interval {interval}, branch {branch}"
        mine = sdgraph.apply(unet, InheritFeatures.deep_cache(interval, branch), verify=False)
        # the package replaces methods of modules: other modules, but the same weights
        theirs = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
        helper = DeepCacheSDHelper(SimpleNamespace(unet=theirs, scheduler=scheduler))
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        calls[name] = partial(generation, name, mine, mine.cache_bytes)
        calls[f"{name}, DeepCache"] = partial(
            generation, f"{name}, DeepCache", theirs, partial(_bytes, helper.cached_output)
        )
        tables[name] = mine.graph.timetable(CALLS)
        largest[name] = float((calls[name]() - calls[f"{name}, DeepCache"]()).abs().max())
    samples = measure.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    bounds = {name: {"bound": table.bound, "macs": table.macs} for name, table in tables.items()}
    return {"samples": samples, "timetables": bounds, "kept_bytes": kept, "largest_difference": largest}


def experts(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Conditional convolutions in a pruned UNet: what they cost in time and memory, by routing; whole generations."""
    unet = models.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    prompt = call.pop("encoder_hidden_states")
    del call["timestep"]
    prune, by_timestep = PruneBlocks("bk-sdm-base"), MECondConv(routing="timestep")
    passes = {
        "plain": (prune,),
        "timestep": (prune, by_timestep),
        "timestep, mixed at every 10th call": (prune, by_timestep, InheritFeatures("**.mix", Uniform(10))),
        "input": (prune, MECondConv(routing="input")),
    }
    made = {name: sdgraph.apply(unet, each, verify=False) for name, each in passes.items()}
    kept: dict[str, int] = {}

    def generation(name: str) -> None:
        own = prompt.clone()
        for timestep in range(999, 0, -1000 // CALLS):
            made[name](**call, timestep=timestep, encoder_hidden_states=own)
        kept[name] = made[name].cache_bytes()

    calls = {name: partial(generation, name) for name in made}
    samples = measure.in_turns(calls, settings.device, settings.seconds, settings.at_least)
    sizes = {
        name: {"parameters": sum(p.numel() for p in one.parameters()), "kept_bytes": kept[name]}
        for name, one in made.items()
    }
    return {"samples": samples, "sizes": sizes}


def layers(settings: Settings, batch: str) -> dict[str, Any]:
    """Single convolutions of Stable Diffusion 1.5 at 512x512 pixels: plain, and as four experts."""
    found = {}
    for channels, side in LAYERS:
        like = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}
        convs = [nn.Conv2d(channels, channels, 3, padding=1, **like) for _ in range(4)]
        experts = ConditionalConv2d(convs, 4, 1280, "softmax", 1.0)
        x, embedding = torch.randn(int(batch), channels, side, side, **like), torch.randn(int(batch), 1280, **like)
        by_input = ConditionalConv2d(convs, 4, channels, "softmax", 1.0)
        calls = {
            "plain": partial(convs[0], x),
            "timestep": partial(experts, x, embedding, torch.tensor([500], device=settings.device)),
            "input": partial(by_input, x),
        }
        seconds = settings.seconds / len(LAYERS)
        found[f"{channels} channels, {side}x{side}"] = measure.in_turns(
            calls, settings.device, seconds, settings.at_least
        )
    return {"layers": found}


def attention(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Global-regional attention against full attention: the operation alone, and the whole UNet."""
    unet = models.build(model, settings.device, settings.of(model), sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    whole = sdgraph.apply(unet, (), verify=False)
    node = next(node for node, _, level in self_attentions(whole.graph) if level == 0)
    shape = (settings.batch, *node.args[0].meta["val"].shape[1:])
    q, k, v = torch.randn(3, *shape, dtype=unet.dtype, device=unet.device)
    side = int(size)
    alone: dict[str, Any] = {"full": lambda: F.scaled_dot_product_attention(q, k, v)}
    inside: dict[str, Any] = {"full": partial(whole, **call)}
    for window, pool in GRI:
        if window >= side:
            continue
        name = f"window {window}, pool {pool}"
        alone[name] = partial(attend, q, k, v, side, side, window, pool)
        inside[name] = partial(sdgraph.apply(whole, GRIAttention(window, pool), verify=False), **call)
    seconds = settings.seconds / 2
    return {
        "alone": measure.in_turns(alone, settings.device, seconds, settings.at_least),
        "samples": measure.in_turns(inside, settings.device, seconds, settings.at_least),
    }


def export(settings: Settings, model: str) -> dict[str, Any]:
    """Time, memory and size of an export of a UNet that inherits, in float16 where float32 would be too large."""
    dtype = torch.float16 if model == "sdxl" else torch.float32
    unet = models.build(model, "cpu", dtype)
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    before = measure.resident()
    start = time.perf_counter()
    inheriting = sdgraph.apply(unet, _INHERIT, verify=False)
    with tempfile.TemporaryDirectory() as folder, measure.Peak() as peak:
        report = onnx.export(inheriting, Path(folder) / "bundle", progress=False)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": weights,
        "file_bytes": report.file_bytes,
        "models": len(report.nodes),
        "seconds": time.perf_counter() - start,
        "stages": report.seconds,
        "resident_before": before,
        "own_peak": peak.own,
        "resident_peak": peak.total,
    }


def deploy(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """ONNX Runtime on the CPU against eager: each kind of call, and whole generations."""
    unet = models.build(model, "cpu", torch.float32, sample_size=int(size))
    call = models.call(unet, settings.batch, int(size), int(size))
    inheriting = sdgraph.apply(unet, _INHERIT, verify=False)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS)
    prompt = call.pop("encoder_hidden_states")

    def generation(one: Any) -> torch.Tensor:
        own = prompt.clone()
        for timestep in scheduler.timesteps:
            output = one(call["sample"], timestep, encoder_hidden_states=own, return_dict=False)[0]
        return output

    with tempfile.TemporaryDirectory() as folder:
        onnx.export(inheriting, Path(folder) / "bundle", calls=CALLS, progress=False)
        running = ort.ORTUNet.from_pretrained(Path(folder) / "bundle", provider="CPUExecutionProvider")
        ways = {"eager": partial(generation, unet), "inherit": partial(generation, inheriting)}
        ways |= {"ONNX Runtime, inherit": partial(generation, running)}
        flat = {"sample": call["sample"], "timestep": torch.tensor([500.0]), "encoder_hidden_states": prompt}
        sizes = running.manifest.check(flat)
        first = running.manifest.models[0]
        known = dict(zip(first.gives, running.models.run(first, flat, sizes)[1:], strict=True))
        for one in running.manifest.models:
            given = {**flat, **{f"inherited.{site}": known[site] for site in one.takes}}
            module = inheriting.variant(frozenset(flat), frozenset(one.takes))
            ways[f"{one.file}, torch"] = partial(module, *given.values())
            ways[f"{one.file}, ONNX Runtime"] = partial(running.models.run, one, given, sizes)
        largest = float((ways["inherit"]() - ways["ONNX Runtime, inherit"]()).abs().max())
        samples = measure.in_turns(ways, "cpu", settings.seconds, settings.at_least)
    return {"samples": samples, "largest_difference": largest}


def memory(settings: Settings, model: str, size: str) -> dict[str, Any]:
    """What a process takes that runs a UNet that inherits, by what runs it; each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        unet = sdgraph.apply(models.build(model, "cpu", torch.float32), _INHERIT, verify=False)
        report = onnx.export(unet, bundle, calls=CALLS, progress=False)
        del unet
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            ways = {way: pool.submit(_taken, way, bundle, settings, model, size).result() for way in RUNNERS}
    return {"weight_bytes": report.weight_bytes, "ways": ways}


@torch.no_grad()
def _taken(way: str, bundle: Path, settings: Settings, model: str, size: str) -> dict[str, Any]:
    """Memory that this process takes, when all is open and at most in the first generation; and a generation's time."""
    before = measure.resident()
    files = measure.mapped(psutil.Process().memory_info())
    unet: Any
    if way == "torch":
        unet = sdgraph.apply(models.build(model, "cpu", torch.float32), _INHERIT, verify=False)
    else:
        unet = ort.ORTUNet.from_pretrained(bundle, provider=ort.CPU, session_options=RUNNERS[way], verify=False)
    config = SimpleNamespace(config=SimpleNamespace(**unet.config), device=unet.device, dtype=unet.dtype)
    call = models.call(config, settings.batch, int(size), int(size))  # type: ignore[arg-type]
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(CALLS)
    opened = measure.resident()

    def generation() -> None:
        own = call["encoder_hidden_states"].clone()
        for timestep in scheduler.timesteps:
            unet(**{**call, "timestep": timestep, "encoder_hidden_states": own})

    with measure.Peak() as peak:
        generation()
    seconds = [measure.timed(generation, "cpu") for _ in range(settings.at_least)]
    sizes = {"opened": opened, "own": peak.own + files, "total": peak.total}
    return {"seconds": seconds, **{name: size - before for name, size in sizes.items()}}


def _bytes(kept: Any) -> int:
    """Of all storages of tensors in nested containers."""
    found: dict[int, int] = {}

    def look(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            look(list(one.values()))
        elif isinstance(one, list | tuple):
            for each in one:
                look(each)

    look(kept)
    return sum(found.values())


@torch.no_grad()
def run(case: str, settings: Settings) -> dict[str, Any]:
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "forward": forward,
        "apply": apply,
        "prune": prune,
        "inherit": inherit,
        "experts": experts,
        "layers": layers,
        "attention": attention,
        "export": export,
        "deploy": deploy,
        "memory": memory,
    }
    kind, *rest = case.split("/")
    return {"case": case, **kinds[kind](settings, *rest)}


def run_all(cases: list[str], settings: Settings) -> dict[str, Any]:
    done = []
    spawn = multiprocessing.get_context("spawn")  # each case starts with an empty memory, and CUDA does not fork
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for case in (bar := tqdm(cases, unit="case")):
            bar.set_description(case)
            done.append(pool.submit(run, case, settings).result())
    return {**measure.circumstances(settings.device), "settings": asdict(settings), "cases": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of timing per case (120; 5 with --quick)")
    parser.add_argument("--at-least", type=int, help="samples of each call, whatever the time (9; 3 with --quick)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file (benchmarks/results/DATE-DEVICE.json; not with --quick)")
    chosen = parser.parse_args()

    settings = Settings(
        device=chosen.device,
        dtype=chosen.dtype,
        batch=chosen.batch,
        seconds=chosen.seconds or (5.0 if chosen.quick else 120.0),
        at_least=chosen.at_least or (3 if chosen.quick else 9),
        quick=chosen.quick,
    )
    result = run_all(chosen.cases or list(QUICK if chosen.quick else CASES), settings)
    name = f"{result['date'][:10]}-{torch.device(settings.device).type}-{settings.dtype}.json"
    out = chosen.out or (Path("out/bench") if chosen.quick else RESULTS) / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{report(result)}\n\nwritten to {out}")


if __name__ == "__main__":
    main()
