"""An exported UNet without one of its regions at a time: one export, from whose graph regions are removed.

To capture and translate a UNet takes as long as hundreds of its calls, so that exporting each pruned UNet would be most
of the time of an analysis.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir
import onnx_ir.passes.common as common
import torch

from sdgraph import GraphUNet
from sdgraph.errors import ExportError, ExtraError
from sdgraph.extra import require_onnx
from sdgraph.ir.dims import evaluate
from sdgraph.ir.inputs import Input
from sdgraph.ir.variants import copy_nodes, drop_inputs

from ..bundle.describe import describe
from ..bundle.example_calls import example_call
from ..bundle.external_data import SharedWeights, Weights
from ..bundle.manifest import DATA, MODEL, NAMES
from . import translate
from .exporter import OPSETS
from .request import as_graph

if TYPE_CHECKING:
    from ..ort.providers import Provider


class RemovedRegions:
    """A UNet that runs on ONNX Runtime without one of its regions at a time.

    Args:
        unet: the traced UNet, in float32 or float16.
        provider: the name of a provider of ONNX Runtime; None for the fastest that is installed.
    Raises:
        ExportError: the UNet cannot be exported in its dtype.
        SpecError: ONNX Runtime has no such provider.
        ExtraError: the extra `onnx` or `openvino` is not installed, or the provider does not start on this machine.
    """

    def __init__(self, unet: GraphUNet, provider: str | None = None) -> None:
        require_onnx()
        from ..ort.providers import choose

        self.unet = as_graph(unet, None)
        self.provider = choose(provider, None, None, str(self.unet.dtype).removeprefix("torch."))
        _check_start(self.provider)

    @contextmanager
    def exported(self, paths: Collection[str], flat: Mapping[str, torch.Tensor]) -> Iterator[Models]:
        """Export the UNet to a temporary folder, for calls like one.

        Args:
            paths: the module paths of the regions that can be removed.
            flat: the flat inputs of the call, for whose sizes ONNX Runtime optimises.
        """
        with tempfile.TemporaryDirectory(prefix="sdgraph-analyse-") as folder, torch.no_grad():
            yield Models(self, Path(folder), paths, flat)


class Models:
    """The exported UNet in a folder, and sessions of it with and without regions.

    Args:
        of: the UNet and the provider.
        folder: the folder, which is empty.
        paths: the module paths of the regions that can be removed.
        flat: the flat inputs of the calls.
    """

    def __init__(
        self, of: RemovedRegions, folder: Path, paths: Collection[str], flat: Mapping[str, torch.Tensor]
    ) -> None:
        self._provider, self._folder, self._graph = of.provider, folder, of.unet.graph
        given = frozenset(spec.name for spec in self._graph.inputs if spec.optional and spec.name in flat)
        self._manifest = describe(of.unet, given, "portable", "variants", OPSETS[-1], 1)
        self._sizes = self._manifest.check(flat)
        regions = {path: self._graph.region(path) for path in paths}
        self._stand_ins = {
            path: [tuple(node.name for node in region.stand_in(output)) for output in region.outputs]
            for path, region in regions.items()
        }
        self._names: Mapping[str, str] = {}
        self._write(of.unet)
        self._weights = SharedWeights(folder, self._device)
        specs = self._manifest.inputs_of(self._manifest.variants[0])
        self._inputs = {
            s.name: flat[s.name].detach().to(self._device, self._manifest.dtype_of(s)).contiguous() for s in specs
        }

    @property
    def _device(self) -> torch.device:
        from ..ort.providers import CUDA

        return torch.device("cuda" if self._provider.name == CUDA and torch.cuda.is_available() else "cpu")

    def _write(self, unet: GraphUNet) -> None:
        """Write the model, with a name for every value that a removal replaces, or puts in its place."""
        wanted = dict.fromkeys(name for pairs in self._stand_ins.values() for pair in pairs for name in pair)
        nodes = copy_nodes(self._graph.fx)
        copies, end = {node.name: node for node in nodes.nodes}, nodes.output_node()
        end.args = ((end.args[0], *(copies[name] for name in wanted)),)
        nodes = drop_inputs(nodes, {spec.name for spec in self._graph.inputs} - set(self._manifest.given))
        inputs = self._manifest.inputs_of(self._manifest.variants[0])
        outputs = [
            *self._manifest.outputs_of(self._manifest.variants[0]),
            *(Input(name, (name,), ()) for name in wanted),
        ]
        module = torch.fx.GraphModule(self._graph.weights, nodes)
        program = translate.capture(module, example_call(unet, self._manifest), inputs)
        model = translate.translate(program, self._manifest.opset)
        translate.compact(model, inputs, outputs)
        self._names = {name: str(value.name) for name, value in zip(wanted, model.graph.outputs[1:], strict=True)}
        for value in model.graph.outputs[1:]:
            value.shape = value.type = None
        del model.graph.outputs[1:]
        Weights(self._folder / DATA).take(model)
        onnx_ir.save(model, self._folder / MODEL)

    def run_without(self, path: str = "") -> Callable[[], torch.Tensor]:
        """Return a function that computes the call without a region, and returns the output.

        Args:
            path: the module path of the region; "" for the whole UNet.
        Raises:
            ExportError: ONNX Runtime refuses the model.
        """
        from ..ort import session_options as options
        from ..ort.io_binding import run

        file = self._folder / (f"{path}.onnx" if path else MODEL)
        if path:
            model = onnx_ir.load(self._folder / MODEL)
            remove(model, [(self._names[old], self._names[new]) for old, new in self._stand_ins[path]])
            onnx_ir.save(model, file)
        threads = options.threads({})
        settings = {**options.one_arena(self._provider.name, self._provider.options), options.THREADS: threads}
        sizes = {NAMES[name]: size for name, size in self._sizes.items() if name in NAMES}
        try:
            made = options.make(settings, sizes, self._weights.of(file))
            session = self._provider.session(str(file), made, threads)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise ExportError(
                f"ONNX Runtime refuses the UNet without the region: {error}", where=path, hint="please report it"
            ) from error
        finally:
            if path:
                file.unlink()
        shape = [size if isinstance(size, int) else evaluate(size, self._sizes) for size in self._manifest.output]
        output = torch.empty(shape, dtype=self._manifest.torch_dtype, device=self._device)
        name = str(session.get_outputs()[0].name)

        def call() -> torch.Tensor:
            run(session, self._inputs, {name: output})
            return output

        return call


def _check_start(provider: Provider) -> None:
    """Refuse a provider that does not start, which ONNX Runtime would replace by its CPU provider.

    Raises:
        ExtraError: it does not start.
    """
    import onnxruntime

    value = onnx_ir.Value(name="value", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape([1]))
    node = onnx_ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "same", value.type, value.shape
    graph = onnx_ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": OPSETS[-1]}, name="start")
    model = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    options, reason = onnxruntime.SessionOptions(), "ONNX Runtime falls back to its CPU provider"
    options.log_severity_level = 4  # it prints what it then does instead
    try:
        started = provider.name in provider.session(model, options, 1).get_providers()
    except Exception as error:  # ONNX Runtime's errors have no common base
        started, reason = False, str(error).strip().partition("\n")[0]
    if not started:
        hint = "check the device, its driver and libraries, or name another provider"
        raise ExtraError(f"{provider.name} does not start here: {reason}", where="target", hint=hint)


def remove(model: onnx_ir.Model, stand_ins: Sequence[tuple[str, str]]) -> None:
    """Replace values of a model by others, and remove what nothing uses any more.

    Args:
        model: the model, which is changed.
        stand_ins: the name of each value that is replaced, and of the value that replaces it.
    """
    known = {str(v.name): v for node in model.graph for v in node.outputs} | {
        str(v.name): v for v in model.graph.inputs
    }
    for old, new in stand_ins:
        known[old].replace_all_uses_with(known[new])
    common.RemoveUnusedNodesPass()(model)
