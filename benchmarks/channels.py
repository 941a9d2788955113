"""Fewer channels at one budget: PruneChannels beside Torch-Pruning, on the small trained Stable Diffusion.

    python -m benchmarks.channels
    python -m benchmarks.channels --budgets 0.9 --captions 4
    python -m benchmarks.channels --quick                        # a smoke test

Every way is given the same share of the parameters; PruneChannels also of multiply-accumulates and of time. Compared
are the error of the predicted noise before any tuning, at calls of real generations, the multiply-accumulates, and the
time of a call of the traced UNets in turns, beside the time that is predicted from the times of regions by width.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

import sdgraph
from examples.scenes.pipeline import load
from sdgraph import Importance, WidthTimes
from sdgraph.passes import PruneChannels

from .measuring.documents import report
from .measuring.record import add_options, begin, place, record
from .measuring.timing import in_turns

Calls = list[dict[str, Any]]
CAPTIONS = (
    "a large red circle above a small blue square",
    "a small green triangle left of a large yellow circle",
    "a blue circle",
    "a large orange square",
    "a small purple circle below a large green square",
    "a yellow triangle",
    "a small red square right of a small blue triangle",
    "a large green circle",
)
SHAPE = (4, 16, 16)  # of the latents
PARTS = {"attention": r"\.attn\d", "feed-forward": r"\.ff(\.|$)", "resnets": r"\.resnets\.", "rest": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="shares of the parameters")
    parser.add_argument("--captions", type=int, default=len(CAPTIONS), help="captions of the generations")
    parser.add_argument("--sampling", type=int, default=10, help="steps of a generation")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of timing")
    parser.add_argument("--threads", type=int, default=1)
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.budgets, args.captions, args.sampling, args.seconds = args.budgets[:1], 1, 2, 0.1
    torch.set_num_threads(args.threads)
    provenance = begin("channels", "cpu", args.draft or args.quick)
    out = place(args, "cpu-float32-channels.json")
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    captions = list(CAPTIONS[: args.captions])
    calls = recorded(pipe, captions, args.sampling)
    taylor = Importance.taylor(pipe, captions, calls=args.sampling, num_inference_steps=args.sampling)
    whole = sdgraph.apply(pipe.unet, [], verify=False)
    batch, length = calls[0]["encoder_hidden_states"].shape[:2]
    points = {"points": 2, "turns": 1} if args.quick else {}
    times = WidthTimes.measure(whole, B=batch, H=SHAPE[1], W=SHAPE[2], L=length, progress=False, **points)

    def channels(**options: Any) -> sdgraph.GraphUNet:
        return sdgraph.apply(whole, PruneChannels(**options), verify=False)

    ways: dict[tuple[str, str], Callable[[float], Any]] = {
        ("PruneChannels, magnitude", "parameters"): lambda share: channels(parameters=share),
        ("PruneChannels, Taylor", "parameters"): lambda share: channels(parameters=share, importance=taylor),
        ("PruneChannels, Taylor", "MACs"): lambda share: channels(macs=share, importance=taylor),
        ("PruneChannels, Taylor", "time"): lambda share: channels(time=share, times=times, importance=taylor),
        **{
            (f"Torch-Pruning, {name}", "parameters"): lambda share, options=options: to_budget(
                pipe.unet, calls, share, **options
            )
            for name, options in SETTINGS.items()
        },
    }
    unets, rows = {"whole": whole}, [{"name": "whole", "of": "parameters", "budget": 1.0}]
    for share in args.budgets:
        for (name, of), way in ways.items():
            row = {"name": name, "of": of, "budget": share}
            rows.append(row)
            try:
                unets[f"{name} {of} {share}"] = way(share)
            except Exception as error:  # whatever another library raises is its result
                row["failure"] = f"{type(error).__name__} {error}".strip()
            print(row, flush=True)
    timed = in_turns({name: lambda unet=unet: unet(**calls[0]) for name, unet in unets.items()}, "cpu", args.seconds, 5)
    for row in rows:
        name = "whole" if row["name"] == "whole" else f"{row['name']} {row['of']} {row['budget']}"
        if name in unets:
            unet = unets[name]
            row |= {"parameters": sum(p.numel() for p in unet.parameters()), "macs": unet.graph.macs}
            row |= {"error": error_of(unet, whole, calls), "samples": timed[name], "macs by part": macs_by_part(unet)}
            if name.startswith("PruneChannels"):
                row["predicted"] = predicted(times, whole, unet)
    result = {**provenance, "quick": args.quick, "captions": len(captions), "sampling": args.sampling, "rows": rows}
    result |= {"torch_pruning": version()}
    record(out, result)
    print(f"\n{report(result)}\n\nwritten to {out}")


def recorded(pipe: Any, captions: list[str], steps: int) -> Calls:
    """Return the arguments of the UNet's calls in a generation."""
    calls: Calls = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        calls.append({name: given[name] for name in names})

    handle = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    pipe(captions, num_inference_steps=steps, generator=generators, output_type="latent")
    handle.remove()
    return calls


def predicted(times: WidthTimes, whole: sdgraph.GraphUNet, pruned: sdgraph.GraphUNet) -> float:
    """Return the time of a narrowed UNet as a share of that of the whole one, by the times of regions by width."""
    before, after = whole.graph.widths(), pruned.graph.widths()
    left = {path: after[path].slices if path in after else 1 for path in times.table}  # the last slice is no width
    saved = [times.seconds(path, before[path].slices) - times.seconds(path, count) for path, count in left.items()]
    return 1 - sum(saved) / times.whole


def macs_by_part(unet: sdgraph.GraphUNet) -> dict[str, int]:
    """Return the multiply-accumulates of a call in resnets, attentions, feed-forward layers and the rest."""
    found = dict.fromkeys(PARTS, 0)
    for node in unet.graph.nodes:
        path = unet.graph.module_path(node)
        part = next((name for name, pattern in PARTS.items() if re.search(pattern, path)), "rest")
        found[part] += unet.graph.macs_of(node)
    return found


@torch.no_grad()
def error_of(unet: Any, whole: Any, calls: Calls) -> float:
    """Return the squared error of the predicted noise relative to its square, the mean over the calls."""
    errors = []
    for call in calls:
        expected = whole(**call).sample.double()
        off = (unet(**call).sample.double() - expected).square().mean()
        errors.append(float(off / expected.square().mean()))
    return sum(errors) / len(errors)


# -- Torch-Pruning ----------------------------------------------------------------------------------------------------

INSIDE = ("conv1", "time_emb_proj", "to_q", "to_k", "to_v", "net.0.proj")
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "as it comes": {"inside": False, "mended": False},
    "all layers": {"inside": False, "mended": True},
    "inside blocks": {"inside": True, "mended": True},
    "inside blocks, globally": {"inside": True, "mended": True, "globally": True},
    "inside blocks, globally, Taylor": {"inside": True, "mended": True, "globally": True, "taylor": True},
}


def version() -> str:
    """Return the version of Torch-Pruning, "none" if it is not installed."""
    try:
        return importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def to_budget(
    unet: UNet2DConditionModel, calls: Calls, share: float, mended: bool, **options: bool
) -> sdgraph.GraphUNet:
    """Return a UNet that Torch-Pruning has pruned, traced, with at most a share of the parameters.

    Its option is a ratio of channels, which is found by bisection.

    Args:
        unet: the UNet.
        calls: the arguments of calls.
        share: the share of the parameters.
        mended: whether the numbers that diffusers' modules keep of their channels are corrected afterwards.
        options: options of `pruned_by`.
    """
    whole = sum(p.numel() for p in unet.parameters())
    low, high = 0.0, 0.95
    best = None
    for _ in range(9):
        ratio = (low + high) / 2
        pruned = pruned_by(unet, calls, ratio, **options)
        if sum(p.numel() for p in pruned.parameters()) <= share * whole:
            high, best = ratio, pruned
        else:
            low = ratio
    if best is None:
        raise ValueError(f"no ratio of channels leaves {share} of the parameters")
    if mended:
        mend(best)
    with torch.no_grad():
        best(**calls[0])
    return sdgraph.apply(best, [], verify=False)


def pruned_by(
    unet: UNet2DConditionModel, calls: Calls, ratio: float, inside: bool, globally: bool = False, taylor: bool = False
) -> UNet2DConditionModel:
    """Return a copy that Torch-Pruning has pruned at a ratio of channels.

    Args:
        unet: the UNet.
        calls: the arguments of calls, for gradients.
        ratio: the share of the channels to remove.
        inside: whether only channels inside resnets, attentions and feed-forward layers are pruned.
        globally: whether the ratio is that of all layers together, and not of each.
        taylor: whether the importance is Torch-Pruning's first-order one, and not the magnitude.
    """
    import torch_pruning as tp

    unet = copy.deepcopy(unet).requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    for call in calls if taylor else ():
        output = unet(**call).sample
        (output * (torch.randint(0, 2, output.shape, generator=draw) * 2 - 1)).sum().backward()
    projections = {m: m.heads for m in unet.modules() if hasattr(m, "to_q")}
    ignored: list[nn.Module] = [unet.conv_out]
    if inside:
        ignored = [module for name, module in layers(unet) if not name.endswith(INSIDE)]
    pruner = tp.pruner.BasePruner(
        unet,
        {name: value[:1] if value.ndim else value[None] for name, value in calls[0].items()},
        importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(),
        global_pruning=globally,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={getattr(m, name): heads for m, heads in projections.items() for name in ("to_q", "to_k", "to_v")},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
    )
    pruner.step()
    for attention in projections:
        attention.heads = pruner.num_heads[attention.to_q]
    return unet.requires_grad_(False)


def layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions and linear layers with their paths."""
    yield from ((name, m) for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))


def mend(unet: nn.Module) -> None:
    """Correct the numbers of channels that diffusers' samplers keep, and compare in their calls."""
    for module in unet.modules():
        if type(module).__name__ in ("Downsample2D", "Upsample2D") and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels


if __name__ == "__main__":
    main()
