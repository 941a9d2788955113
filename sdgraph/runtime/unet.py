"""`GraphUNet`: what `apply` returns, in the place of a diffusers UNet."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import fx, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from ..compiler.report import Report
from ..errors import CallError, ModeError, PathError, SavedError, did_you_mean
from ..frontend.call import flatten
from ..graph import Graph
from ..inheritance.generation import Generations, apart
from ..ir.guards import check_call
from ..ir.inputs import Input
from ..ir.sites import step
from ..ir.specialize import drop_inputs, per_call
from .dropin import PASSES, DropIn, as_lists, follow_settings
from .recipe import plain_passes
from .serialization import load, save
from .to_diffusers import to_diffusers


class GraphUNet(DropIn):
    """A UNet that runs a graph: a `UNet2DConditionModel` to diffusers, anywhere one is called.

    Weights share storage with the source UNet until they are made its own: by `train()`, `load_state_dict()`,
    a move to another device or dtype. The source is never changed.

    Features are inherited between calls without gradients only; a call that gradients may come from, those of weights
    or of inputs, computes everything, and says so once.

    Args:
        graph: the graph; it belongs to this module from now on, and is no longer edited.
        report: what made it.
    """

    def __init__(self, graph: Graph, report: Report | None = None) -> None:
        ModelMixin.__init__(self)  # none of a UNet's own modules are made
        self.report = report if report is not None else Report(())
        self._own_weights = False
        self._before_gradients: RemovableHandle | None = None
        self._compile: dict[str, Any] | None = None
        self.generations = Generations()
        self.hold(graph)
        # `requires_grad` stays as in the source: PyTorch picks the kernel of a matrix product by it, so other flags
        # would give other last bits. What keeps an optimizer off the source's storage is `_take_weights`.
        super().train(False)

    def hold(self, graph: Graph) -> None:
        """Run this graph from now on; it belongs to this module."""
        self._graph = graph
        self.take_scales()
        graph.frozen = True
        graph.dropped.clear()  # or the weights that pruning takes out would stay in memory
        passes = {PASSES: plain_passes(graph.passes)} if graph.passes else {}
        self.register_to_config(**graph.config, **passes)
        self._sites = graph.sites
        self._inputs = graph.resolved_inputs()
        self._conditioning = tuple(i.name for i in graph.inputs if i.conditioning)
        for kind in (self._modules, self._parameters, self._buffers):
            kind.clear()
        as_lists(graph.weights)
        for name, child in graph.weights.named_children():
            self.add_module(name, child)
        for name, parameter in graph.weights.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in graph.weights.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        follow_settings(graph)
        self.changed()

    def changed(self) -> None:
        """Modules of this one are others than before: what was made of them is made anew."""
        self._variants: dict[tuple[frozenset[str], frozenset[str]], fx.GraphModule] = {}
        self._accepted: set[Any] = set()
        self.reset()

    # -- the call ------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The graph that is run; if the scale of an IP-Adapter was set since the last call, it is traced anew here."""
        self.follow_scales()
        return self._graph

    def call_inputs(self) -> Sequence[Input]:
        self.follow_scales()
        return self._inputs

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self._accept(flat)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if learning and not self._own_weights:
            self._take_weights_before_gradients()
        if not self._sites:
            return self._step(flat, frozenset(), no_value)[0]
        if learning or differentiated(flat.values()):
            if not self.training:
                self.generations.say(
                    "gradients are on, so everything is computed and nothing is inherited; where none are wanted, call "
                    "under torch.no_grad()"
                )
            return self._step(flat, frozenset(), no_value)[0]
        return self.generations.run(flat, self._conditioning, self._sites, self._step)

    def whole(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if all(isinstance(size, int) for value in flat.values() for size in value.shape):
            self._accept(flat)  # where sizes are free, torch.export states what must hold for them
        if flat["timestep"].shape[0] != 1 and any(node.target is per_call for node in self.graph.fx.nodes):
            raise CallError(
                "this graph has parts that depend on the timestep alone, and is exported for one timestep per call",
                where="argument timestep",
                hint="export it with a timestep of shape (1,)",
            )
        return self._step(flat, frozenset(), no_value)[0]

    def _accept(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Refuse a call that the graph does not cover; each kind of call is looked at once."""
        casting = torch.is_autocast_enabled(flat["sample"].device.type)
        signature = (casting, *((name, v.shape, v.dtype, v.device) for name, v in flat.items()))
        if signature not in self._accepted:
            check_call(self.graph.resolved_inputs(), self.graph.guards, flat, self.dtype)
            self._accepted.add(signature)

    def step(
        self, values: Mapping[str, torch.Tensor], inherited: Collection[str] | None = None, **call: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One call as a function: what it inherits goes in, what it refreshes comes out, nothing is kept here.

        For loops of one's own, which say at each call what is inherited:
        `output, fresh = unet.step(values, inherited, sample=..., timestep=..., ...); values |= fresh`.

        Args:
            values: of sites, as earlier calls returned them.
            inherited: the sites to take from `values`; by default all that are there.
            call: diffusers' arguments.
        Returns:
            the noise prediction, and the values of the refreshed sites that it needed.
        Raises:
            PathError: `inherited` names what is no site, or has no value.
            CallError: the graph does not cover the call.
        """
        stale = frozenset(values if inherited is None else inherited)
        for site in stale:
            if site not in self._sites or site not in values:
                known = [name for name in self._sites if name in values]
                raise PathError(
                    f"there is no value of a site {site!r}",
                    where="inherited",
                    hint=did_you_mean(site, known) or f"values are given of {', '.join(known) or 'none'}",
                )
        flat = flatten(call, self.call_inputs())
        self._accept(flat)
        output, fresh = self._step(flat, stale, values.__getitem__)
        fresh = apart(fresh, (*flat.values(), output))
        return apart({"output": output}, values.values())["output"], fresh

    def _step(
        self, flat: Mapping[str, torch.Tensor], stale: frozenset[str], value: Callable[[str], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output of a call at which the sites `stale` have the values that `value` says, and what it refreshed."""
        variant = self.variant(frozenset(flat), stale)
        result = variant(*flat.values(), *map(value, variant.meta["takes"]))
        if not self._sites:
            return result, {}
        output, *refreshed = result
        return output, dict(zip(variant.meta["gives"], refreshed, strict=True))

    def variant(self, given: frozenset[str], inherited: frozenset[str] = frozenset()) -> fx.GraphModule:
        """The straight-line module for one kind of call, over this module's weights; built once.

        Args:
            given: the inputs of the call.
            inherited: the sites that are not refreshed.
        Returns:
            a module whose arguments are those inputs, in graph order, and the values of the sites in
            `meta["takes"]`; it returns the output and the values of the sites in `meta["gives"]`, as one tuple. If the
            graph has no sites it returns the output.
        """
        key = given, inherited
        if key not in self._variants:
            absent = {i.name for i in self.graph.inputs} - given
            self._check_offload()
            made = step(drop_inputs(self.graph.fx, absent), inherited)
            self._variants[key] = fx.GraphModule(self, made.nodes, class_name="UNet")
            self._variants[key].meta |= {"takes": made.takes, "gives": made.gives}
            if self._compile is not None:
                self._variants[key].compile(**self._compile)
        return self._variants[key]

    def compile(self, **options: Any) -> None:
        """Let `torch.compile` compile each variant when it is first run.

        `torch.compile(unet)` would also trace the bookkeeping between calls, which is Python's business.

        Args:
            options: of `torch.compile`, such as `mode="max-autotune"`; there are no graph breaks, so `fullgraph=True`
                holds.
        """
        self._compile = options
        self._variants.clear()

    def _check_offload(self) -> None:
        # accelerate's sequential hooks bring weights in when a module is called; a parameter that the graph reads by
        # itself belongs to no call.
        for node in self.graph.fx.nodes:
            if node.op == "get_attr" and any(user.target is not getattr for user in node.users):
                path, _, name = str(node.target).rpartition(".")
                holder = self.get_submodule(path)
                if hasattr(holder, "_hf_hook") and getattr(holder, name).is_meta:
                    raise ModeError(
                        "this weight is read outside of any module, which sequential CPU offloading does not serve",
                        where=str(node.target),
                        hint="use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
                    )

    @property
    def graph_module(self) -> fx.GraphModule:
        """The `torch.fx.GraphModule` for a call without optional inputs that refreshes all sites, see `variant`."""
        return self.variant(frozenset(i.name for i in self.graph.inputs if not i.optional))

    # -- weights, modes, moves -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Training mode. The weights become this module's own (one copy), so that the source stays as it is."""
        if mode:
            self._take_weights()
        return super().train(mode)  # type: ignore[no-any-return]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            self._take_weights()
        return super().requires_grad_(requires_grad)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._take_weights()
        self._variants.clear()  # with assign=True they would go on reading the old tensors
        self.reset()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _take_weights_before_gradients(self) -> None:
        """See to it that the weights are this module's own before they have gradients: an optimizer may follow."""
        if self._before_gradients is not None:
            self._before_gradients.remove()
        learned = [p for p in self.parameters() if p.requires_grad]
        self._before_gradients = register_multi_grad_hook(learned, lambda _: self._take_weights(), mode="any")

    def _take_weights(self) -> None:
        if self._before_gradients is not None:
            self._before_gradients.remove()
            self._before_gradients = None
        if not self._own_weights:
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.data = tensor.data.clone()
            self._own_weights = True

    to = nn.Module.to  # diffusers' own only adds a warning about layers to keep in float32, of which there are none

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._variants.clear()  # they hold buffers, which a move replaces
        self._accepted.clear()
        self.reset()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    # -- back and to disk ----------------------------------------------------------------------------------------

    def to_diffusers(self) -> UNet2DConditionModel:
        """A plain diffusers model that computes the same, where one exists.

        Raises:
            ModeError: none does; with the first place where they differ.
        """

        self.graph.check_no_adapters()
        return to_diffusers(self.graph, self._tensors())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Write `config.json`, `sdgraph.json` (the recipe) and the weights (safetensors); whole or not at all.

        Args:
            is_main_process: other processes write nothing.
            safe_serialization: pickle is never written, which the log says where it was asked for.
            variant: part of the name of the file of weights.
            max_shard_size: of a file of weights; larger ones are split.
        Raises:
            ModeError: the graph holds what no recipe brings back (IP-Adapter layers, edits outside of passes), or
                LoRA that is not fused.
            SavedError: the folder holds other files, or an option is not supported.
        """

        self.graph.check_no_adapters()
        # Pipelines read this signature to find out what they may ask for.
        asked = {"is_main_process": is_main_process, "safe_serialization": safe_serialization, **options}
        save(
            self.graph,
            self._tensors(),
            self.config,
            save_directory,
            variant=variant,
            max_shard_size=max_shard_size,
            **asked,
        )

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> GraphUNet:
        """Read what `save_pretrained` wrote: trace the configuration, replay the recipe, load the weights.

        Args:
            options: diffusers' `torch_dtype`, `subfolder`, `variant`, `device_map` and `max_memory`.
        Raises:
            SavedError: missing, damaged or unsafe files.
        """

        device_map, max_memory = options.pop("device_map", None), options.pop("max_memory", None)
        dtype, torch_dtype = options.pop("dtype", None), options.pop("torch_dtype", None)
        graph, beside = load(directory, **options)
        unet = cls(graph, Report((), (f"loaded from {directory}",)))
        unet._own_weights = True
        unet.register_to_config(**beside)
        if dtype or torch_dtype:
            nn.Module.to(unet, dtype or torch_dtype)
        return unet if device_map is None else nn.Module.to(unet, _one_device(unet, device_map, max_memory))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, also those buffers that `state_dict` leaves out."""
        return {**dict(self.named_buffers()), **self.state_dict()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = vars(self)["_graph"].source if "_graph" in vars(self) else None
            if source is None or name not in (vars(source).keys() | source._modules.keys()):
                raise
            value = getattr(source, name)
            if value is None or isinstance(value, bool | int | float | str):
                return value  # a setting, or that the source has no such module
            raise ModeError(
                f"a traced UNet has no {name}", where="GraphUNet", hint="it was removed, or is no module of the graph"
            ) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphUNet:
        twin = GraphUNet(self.graph.copy(), self.report)
        twin._take_weights()
        return twin.train(True) if self.training else twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("a GraphUNet is not pickled", hint="use save_pretrained(directory) and from_pretrained")


def differentiated(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether derivatives may be taken with respect to one of the tensors, backward or forward."""
    return any(
        (torch.is_grad_enabled() and tensor.requires_grad)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def no_value(site: str) -> torch.Tensor:
    """For calls that inherit nothing."""
    raise KeyError(site)


def _one_device(unet: GraphUNet, device_map: Any, max_memory: Any) -> Any:
    """The device that a device map puts the whole UNet on.

    Raises:
        SavedError: it puts it on several.
    """
    if not isinstance(device_map, dict):
        if device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
            return device_map
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(unet, max_memory=max_memory)
    devices = list(dict.fromkeys(map(str, device_map.values())))
    if len(devices) != 1 or devices == ["disk"]:
        raise SavedError(
            f"the device map puts the UNet on {', '.join(devices)}, and a graph runs on one device",
            where="from_pretrained",
            hint="name one device, or offload the loaded pipeline (pipe.enable_model_cpu_offload())",
        )
    return next(iter(device_map.values()))
