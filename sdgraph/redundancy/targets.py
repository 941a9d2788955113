"""The targets that an analysis times calls on: PyTorch, eager or compiled, and ONNX Runtime with a provider."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import SdgraphError, SpecError, did_you_mean
from ..extra import imported
from ..runtime.apply import apply
from ..runtime.unet import GraphUNet

TURNS = 7  # timed calls of a region, of which the first two warm up
KINDS = ("eager", "compiled")
ONNX = "onnx:"  # begins the name of a target on ONNX Runtime; the name of a provider follows
Run = Callable[[], object]


class Target:
    """A target with the whole UNet on it, which is timed in turns with the UNet without a region. It is a context.

    Args:
        name: "eager", "compiled", or "onnx:" and the name of a provider of ONNX Runtime.
        whole: the UNet with all of its regions.
        paths: the module paths of the regions that are going to be removed.
    Raises:
        SpecError: there is no such target, or ONNX Runtime has no such provider.
        ExtraError: the provider is not installed.
        ExportError: the UNet cannot be exported in its dtype.
    """

    def __init__(self, name: str, whole: GraphUNet, paths: Collection[str]) -> None:
        self.name, self._whole, self._paths = name, whole, paths
        self._open = ExitStack()
        self._models: Any = None
        self._timed: Run | None = None
        threads = f"{torch.get_num_threads()} threads"
        self._removed_regions: Any = None
        if name.startswith(ONNX):
            # found by name, because the core knows no exporter
            exported = imported("sdgraph.exporters.onnx.removed_regions", "onnx")
            self._removed_regions = exported.RemovedRegions(whole, name.removeprefix(ONNX) or None)
            self.on = f"{self._removed_regions.provider}, {threads}"
        elif name in KINDS:
            self.on = f"{name} on {whole.device}" + f", {threads}" * (whole.device.type == "cpu")
        else:
            known = (*KINDS, f"{ONNX}CPUExecutionProvider")
            raise SpecError(
                f"there is no target {name!r}", where="target",
                hint=did_you_mean(name, known) or f"{', '.join(known)} or another provider; or None to time nothing",
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._open.close()

    def share(self, path: str, without: GraphUNet, flat: Mapping[str, Tensor]) -> float:
        """Return the time of a call without a region relative to that of the whole UNet, the median of several turns.

        Args:
            path: the module path of the region.
            without: the UNet without it.
            flat: the flat inputs of the call.
        Raises:
            SpecError: PyTorch cannot compile the UNet.
        """
        if self._timed is None:
            if self._removed_regions is not None:
                self._models = self._open.enter_context(self._removed_regions.exported(self._paths, flat))
            self._timed = self._run("", self._whole, flat)
        run = self._run(path, without, flat)
        ratios = [
            seconds_of(run, self._whole.device) / seconds_of(self._timed, self._whole.device) for _ in range(TURNS)
        ]
        return statistics.median(ratios[2:] or ratios)

    def _run(self, path: str, unet: GraphUNet, flat: Mapping[str, Tensor]) -> Run:
        if self._models is not None:
            run: Run = self._models.run_without(path)
            return run
        if self.name == "eager":
            return lambda: unet.run(flat)
        compiled = apply(unet, (), verify=False)
        compiled.compile()
        try:
            with torch.no_grad():
                compiled.run(flat)
        except SdgraphError:
            raise
        except Exception as error:  # whatever compilers raise
            reason = str(error).strip().partition("\n")[0]
            raise SpecError(
                f"PyTorch cannot compile the UNet here: {reason}", where="target",
                hint="install a C++ compiler, or for a GPU Triton; or target='eager'",
            ) from error  # fmt: skip
        return lambda: compiled.run(flat)


@torch.no_grad()
def seconds_of(run: Run, device: torch.device) -> float:
    """Return the seconds of a call, until its device has finished.

    Args:
        run: the call.
        device: the device that it runs on.
    """
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
