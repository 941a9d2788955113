"""`GraphUNet`: what `apply` returns, in the place of a diffusers UNet."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import fx, nn

from ..compiler.numerics import example
from ..compiler.report import Report
from ..compiler.runner import replay
from ..errors import CallError, ModeError, PathError, SavedError, SourceError, did_you_mean
from ..frontend.call import flatten
from ..frontend.capture import capture
from ..graph import Graph
from ..inheritance.cache import always, apart, no_value
from ..inheritance.tracker import GenerationTracker, arithmetic
from ..ir.guards import check_call
from ..ir.inputs import Input
from ..ir.sites import Site, sites
from ..ir.variants import per_call
from ..ir.weights import HOOKS, TREE, alteration
from ..options import checked
from .adapters import LORA, Adapters, show_settings
from .diffusers_api import REFUSED, UNetCall, refusal
from .gradients import Ownership, differentiated, transformed
from .recipe import FOLDED, PASSES, plain_passes, read_passes
from .serialization import load, one_device, save
from .to_diffusers import to_diffusers
from .torch_backend import TorchBackend
from .watch import Watch, global_hooks

WITH_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
Arguments = ParamSpec("Arguments")
log = logging.getLogger("sdgraph")


def _adapting(
    method: Callable[Concatenate[Adapters, Arguments], Graph | None],
) -> Callable[Concatenate[GraphUNet, Arguments], None]:
    """Return a method of a UNet that runs the graph which a method of its adapters makes."""

    @functools.wraps(method)
    def change(unet: GraphUNet, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        unet.follow_changes()
        graph = method(unet.adapters, *args, **kwargs)
        if graph is not None:
            unet._set_graph(graph)

    return change


def check_unguided(call: Mapping[str, Any]) -> None:
    """Refuse a call with guidance, which has all latents twice, of a UNet that guidance is folded into.

    Args:
        call: the arguments of the call by name.
    Raises:
        CallError: the first half of the samples is the second half.
    """
    sample = call.get("sample")
    if not isinstance(sample, torch.Tensor) or sample.is_meta or len(sample) % 2 or not len(sample):
        return
    if torch.equal(*sample.chunk(2)):
        raise CallError(
            "the UNet is called with guidance, which is folded into its weights already, so that negative prompts have "
            "no effect either",
            where="guidance_scale",
            hint="pass guidance_scale=1 to the pipeline; images of the same noise are generated one at a time",
        )


class GraphUNet(UNetCall, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet that runs a graph. To diffusers it is a `UNet2DConditionModel`, wherever one is called.

    It owns its graph, the `tracker` of its generations, the `backend` that computes its calls, and its `adapters`:
    LoRA, IP-Adapters and attention processors.

    Its weights share storage with the source UNet until it needs its own: for `train()`, `load_state_dict()`, or a move
    to another device or dtype. The source is never changed.

    Features are inherited only between calls without gradients. A call that may be differentiated, with respect to
    weights or inputs, computes everything, and a warning says so once.

    Args:
        graph: the graph. It belongs to this module from now on, and is no longer edited.
        report: what the passes did that made the graph.
    """

    __module__ = "sdgraph"  # which diffusers writes into the index of a pipeline, and asks its readers to import
    _supports_gradient_checkpointing = False
    backend: TorchBackend

    # -- the graph -----------------------------------------------------------------------------------------------

    @checked(SourceError)
    def __init__(self, graph: Graph, report: Report | None = None) -> None:
        ModelMixin.__init__(self)  # without UNet2DConditionModel's own, which would build its modules
        self.report = report if report is not None else Report(())
        self._ownership = Ownership()
        self._compile_options: dict[str, Any] | None = None
        self.tracker = GenerationTracker()
        self._set_graph(graph)
        # `requires_grad` stays as in the source: PyTorch picks the kernel of a matrix product by it, so other flags
        # would give other last bits. What keeps an optimizer off the source's storage is `_ownership`.
        super().train(False)

    def _set_graph(self, graph: Graph) -> None:
        """Run a graph from now on. It belongs to this module."""
        self._graph = graph
        self.adapters = Adapters(graph)
        graph.freeze()
        passes = {PASSES: plain_passes(graph.passes)} if graph.passes else {}
        self.register_to_config(**graph.config, **passes)
        self.call_inputs = graph.resolved_inputs()
        self._conditioning = tuple(i.name for i in graph.inputs if i.conditioning)
        graph.weights.settle(graph.source, {str(node.target) for node in graph.fx.nodes if node.op == "call_module"})
        for kind in TREE:  # one tree: what is exchanged in the one is exchanged in the other
            self.__dict__[kind] = graph.weights.__dict__[kind]
        show_settings(graph)
        self.watch = Watch(graph)
        self.backend = TorchBackend(graph, self._compile_options)
        self._invalidate()

    def _invalidate(self) -> None:
        """Drop what was derived from this module's submodules, because they have changed."""
        self.backend.clear()
        self._accepted: set[Any] = set()
        self.reset()

    @property
    def graph(self) -> Graph:
        """The graph that runs. What is set in modules and attention processors acts from the next call on."""
        return self._graph

    def follow_changes(self) -> None:
        """Take over what was set in modules and attention processors since the last call. Every call begins with this.

        Raises:
            ModeError: something was set that would never act, or that the graph needs is missing.
        """
        changed = self.adapters.follow()
        if changed is not None:
            self._set_graph(changed)
        if torch.compiler.is_compiling():
            return  # a compiler guards what it has read
        if not self.watch.check():
            self._accepted.clear()
        if self._compile_options is not None and not self.watch.same_code():
            self.backend.clear()
        if global_hooks():
            self.tracker.warn(
                "PyTorch's hooks for all modules are called for the leaves of a graph and for the UNet, not for blocks"
            )

    def reschedule(self, sites: Mapping[str, Site]) -> None:
        """Give sites other schedules and forecasts. Generations that are under way keep theirs.

        Args:
            sites: the sites that differ, by name.
        Raises:
            PathError: there is no site of a name.
        """
        self._graph = self._graph.rescheduled(sites)
        self.backend = self.backend.rescheduled(self._graph)
        self.adapters = self.adapters.rescheduled(self._graph)

    def variant(self, given: frozenset[str], reused: frozenset[str] = frozenset()) -> fx.GraphModule:
        """Return the straight-line module for the calls that reuse some sites. It is built once.

        Args:
            given: the inputs of the call.
            reused: the sites that are not computed.
        Returns:
            a module over this module's weights. Its arguments are those inputs, in graph order, and the values of the
            sites in `meta["reads"]`; it returns the output and the values of the sites in `meta["writes"]`, as one
            tuple. If the graph has no sites it returns the output.
        """
        return self.backend.module(given, reused)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The `torch.fx.GraphModule` for a call without optional inputs that computes all sites, see `variant`."""
        return self.variant(frozenset(i.name for i in self.graph.inputs if not i.optional))

    def note_few_steps(self, entries: Mapping[str, Any]) -> None:
        """Note in the configuration that guidance is folded into the weights, and for how many calls.

        Args:
            entries: the entries of the configuration.
        """
        self._graph.config = {**self._graph.config, **entries}
        self.register_to_config(**entries)

    def compile(self, **options: Any) -> None:
        """Let `torch.compile` compile each variant when it is first run.

        `torch.compile(unet)` would also trace the bookkeeping between calls, which is not for a compiler.

        Args:
            options: options of `torch.compile`, such as `mode="max-autotune"`. There are no graph breaks, so
                `fullgraph=True` holds.
        """
        self._compile_options = options
        self.backend = TorchBackend(self._graph, options)

    def check_unaltered(self) -> None:
        """Refuse to go on from this UNet if it was given what its graph does not say, and what would be lost.

        Raises:
            ModeError: there are LoRA layers that are not fused, hooks, methods that were exchanged on a module, modules
                that nothing calls, or weights that are not here because they are offloaded.
        """
        self.follow_changes()
        self._graph.check_unaltered()
        altered = alteration(self)
        if altered:
            raise ModeError(
                f"the UNet was given {altered}, which would be lost", where="GraphUNet", hint="remove it first"
            )
        offloaded = next((name for name, tensor in self.tensors().items() if tensor.is_meta), None)
        if offloaded is not None and any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ModeError("the weight is offloaded", where=offloaded, hint="pipe.remove_all_hooks() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphUNet:
        altered = alteration(self)
        if altered not in ("", "hooks"):
            raise ModeError(
                f"the UNet was given {altered}, which may be bound to it", where="GraphUNet", hint="remove it"
            )
        self.follow_changes()
        twin = GraphUNet(self._graph.copy(), self.report)
        for name in (*HOOKS, *WITH_HOOKS):
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], {**memo, id(self): twin})
        twin._ownership.take(twin)
        return twin.train(True) if self.training else twin

    def extra_repr(self) -> str:
        return f"passes: {', '.join(map(str, self._graph.passes)) or 'none'}"

    # -- the call ------------------------------------------------------------------------------------------------

    def predict(self, call: Mapping[str, Any]) -> torch.Tensor:
        if self.config.get(FOLDED) and not torch.compiler.is_compiling():
            check_unguided(call)
        self.follow_changes()
        if not self._hf_peft_config_loaded:
            return super().predict(call)
        with self.adapters.scaled(self, call) as unscaled:
            return super().predict(unscaled)

    def run(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return self._run_stateless(flat)
        if not self.prepare(flat):
            return self.backend.compute(flat, frozenset(), no_value)[0]
        return self.tracker.run(flat, self._conditioning, always(self.backend), self.watch.weights)

    def prepare(self, flat: Mapping[str, torch.Tensor]) -> bool:
        """Refuse a call that the graph does not cover, and prepare one that may be differentiated.

        Args:
            flat: the inputs of the call, by name.
        Returns:
            whether the call may inherit features.
        Raises:
            CallError: the graph does not cover it.
        """
        self._accept(flat)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if learning and not transformed():  # whose weights are no parameters of this module
            self._ownership.take_before_gradients(self)
        if not self.backend.sites or flat["sample"].is_meta:  # where no timestep can be read
            return False
        if learning or differentiated(flat.values()) or (transformed() and differentiated(self.tensors().values())):
            if not self.training:
                self.tracker.warn(
                    "gradients are on, so everything is computed and nothing is inherited; where none are wanted, call "
                    "under torch.no_grad()"
                )
            return False
        return True

    def _run_stateless(self, flat: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the prediction of a call without bookkeeping between calls, as `torch.export` exports it."""
        if all(isinstance(size, int) for value in flat.values() for size in value.shape):
            self._accept(flat)  # where sizes are free, torch.export states what must hold for them
        if flat["timestep"].shape[0] != 1 and any(node.target is per_call for node in self.graph.fx.nodes):
            raise CallError(
                "this graph has parts that depend on the timestep alone, and is exported for one timestep per call",
                where="argument timestep",
                hint="export it with a timestep of shape (1,)",
            )
        return self.backend.compute(flat, frozenset(), no_value)[0]

    def _accept(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Refuse a call that the graph does not cover. Calls of the same shapes and dtypes are checked once."""
        signature = (
            arithmetic(flat["sample"].device.type),
            *((n, v.shape, v.dtype, v.device) for n, v in flat.items()),
        )
        if signature not in self._accepted:
            check_call(self.call_inputs, self._graph.guards, flat, self.dtype)
            self._accepted.add(signature)

    def _accept_values(self, flat: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """Refuse values of sites that no call of these sizes has."""
        nodes = sites(self._graph.fx)
        for site, value in values.items():
            shape = self._graph.dims.expressions(nodes[site].meta["val"], nodes[site].meta["probe"])
            if "?" not in shape:
                known = (*self.call_inputs, Input(site, (f"values[{site!r}]",), shape, kind="mask"))
                check_call(known, self._graph.guards, {**flat, site: value}, self.dtype)

    @checked(CallError)
    def compute(
        self, values: Mapping[str, torch.Tensor], reused: Collection[str] | None = None, **call: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute one call as a function: values to reuse are arguments, computed values are returned, and nothing is
        kept between calls.

        It serves loops that decide themselves what each call reuses.

        Args:
            values: the values of sites, as earlier calls returned them.
            reused: the sites to reuse from `values`, and those to bypass; by default all that have values.
            call: diffusers' arguments.
        Returns:
            the noise prediction, and the values of the computed sites that it depends on.
        Raises:
            PathError: `reused` names something that is not a site, or has no value.
            CallError: the graph does not cover the call, or a value is not one of a call of these sizes.
        Example:
            `output, computed = unet.compute(values, reused, sample=..., timestep=..., ...); values |= computed`
        """
        self.follow_changes()
        chosen, known_sites = frozenset(values if reused is None else reused), self.backend.sites
        for site in chosen:
            if site not in known_sites or not (site in values or known_sites[site].bypassed):
                known = [name for name in known_sites if name in values]
                raise PathError(
                    f"there is no value of a site {site!r}",
                    where="reused",
                    hint=did_you_mean(site, known) or f"values are given of {', '.join(known) or 'none'}",
                )
        flat = flatten(call, self.call_inputs)
        self._accept(flat)
        self._accept_values(flat, {site: values[site] for site in chosen if site in values})
        output, computed = self.backend.compute(flat, chosen, values.__getitem__)
        computed = apart(computed, (*flat.values(), output))
        return apart({"output": output}, values.values())["output"], computed

    def foreseen(self, calls: Any) -> Iterable[tuple[TorchBackend, frozenset[str]]]:
        sets = frozenset().union(*(variant.reused for variant in self.graph.timetable(calls).variants))
        return [(self.backend, reused) for reused in (frozenset[str](), *sets)]

    def random_inputs(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        self.follow_changes()
        flat = example(self._graph, 0, False, **sizes)
        self._accept(flat)
        return flat

    # -- weights, modes, moves -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name, also those buffers that `state_dict` leaves out."""
        return {**dict(self.named_buffers()), **self.state_dict()}

    def train(self, mode: bool = True) -> Self:
        """Set training mode. The weights become this module's own (one copy), so that the source stays as it is.

        Args:
            mode: True for training, False for evaluation.
        Returns:
            the module.
        """
        if mode:
            self._ownership.take(self)
        return super().train(mode)  # type: ignore[no-any-return]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            self._ownership.take(self)
        return super().requires_grad_(requires_grad)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._ownership.take(self)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    to = nn.Module.to  # diffusers' own only adds a warning about layers to keep in float32, of which there are none

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.device, self.dtype
        super()._apply(fn, recurse)
        if (self.device, self.dtype) != before:
            self._invalidate()  # or what was kept would stay on the other device
        return self

    def enable_group_offload(self, onload_device: Any, *args: Any, **options: Any) -> None:
        """Offload as in diffusers, leaf by leaf.

        Args:
            onload_device: the device that computes.
            args: further options of diffusers, by position.
            options: further options of diffusers, by name; `offload_type` is "leaf_level".
        Raises:
            ModeError: `offload_type` asks for blocks, which a graph does not call.
        """
        if options.get("offload_type", args[1] if len(args) > 1 else "block_level") != "leaf_level":
            raise ModeError(
                "a graph calls its leaves, so blocks would never be brought in",
                where="enable_group_offload",
                hint="offload_type='leaf_level'",
            )
        super().enable_group_offload(onload_device, *args, **options)
        self._invalidate()

    def disable_gradient_checkpointing(self) -> None:
        """Change nothing: a graph has no gradient checkpointing."""

    def __getattr__(self, name: str) -> Any:
        kind = getattr(type(self), name, None)
        if isinstance(kind, property):  # it raised a ModeError, which is an AttributeError: once more, to raise it
            return kind.__get__(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            source = vars(self)["_graph"].source if "_graph" in vars(self) else None
            if source is None or name not in (vars(source).keys() | source._modules.keys()):
                raise
            value = getattr(source, name)
            if value is None or isinstance(value, bool | int | float | str):
                return value  # a setting, or None where the source has no such module
            raise ModeError(
                f"a traced UNet has no {name}", where="GraphUNet", hint="it was removed, or is no module of the graph"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder_hid_proj" and value is None:  # pipelines assign it, and set other processors then
            self.adapters.unload_images()
            return
        if "_graph" in vars(self) and not hasattr(type(self), name) and name not in vars(self):
            self._graph.weights.check_attribute(name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._graph.weights.check_attribute(name, module)
        super().add_module(name, module)

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors that were traced, by module path. The scale of an IP-Adapter may be set in them."""
        return self.adapters.processors

    set_attn_processor = _adapting(Adapters.set_attn_processor)
    set_default_attn_processor = _adapting(Adapters.set_default_attn_processor)
    fuse_qkv_projections = _adapting(Adapters.fuse_qkv_projections)
    unfuse_qkv_projections = _adapting(Adapters.unfuse_qkv_projections)
    enable_freeu = _adapting(Adapters.enable_freeu)
    disable_freeu = _adapting(Adapters.disable_freeu)
    _load_ip_adapter_weights = _adapting(Adapters.load_ip_adapter_weights)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Change nothing: PyTorch's fused attention keeps no matrix of attention that could be sliced.

        Args:
            slice_size: the size of a slice as in diffusers, which is ignored.
        """
        log.warning("attention slicing changes nothing in a traced UNet, whose fused attention needs no memory for it")

    # -- saving --------------------------------------------------------------------------------------------------

    @checked(SavedError)
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **options: Any,
    ) -> None:
        """Write `config.json`, `sdgraph.json` (the recipe) and the weights (safetensors), all or nothing.

        Args:
            save_directory: the folder to write. An earlier saved UNet there is replaced.
            is_main_process: if False, nothing is written.
            safe_serialization: pickle is never written. If this is False, the log says so.
            variant: part of the name of the file of weights.
            max_shard_size: largest size of a file of weights; larger ones are split.
            options: what diffusers' pipelines pass along; only defaults are accepted.
        Raises:
            ModeError: the graph cannot be rebuilt from a recipe (IP-Adapter layers, edits outside of passes), or has
                LoRA that is not fused.
            SavedError: the folder holds other files, or an option is not supported.
        """
        self.check_unaltered()
        # The arguments are spelled out because pipelines read this signature to find out what they may pass.
        save(
            self.graph,
            self.tensors(),
            self.config,
            save_directory,
            variant=variant,
            max_shard_size=max_shard_size,
            is_main_process=is_main_process,
            safe_serialization=safe_serialization,
            **options,
        )

    @classmethod
    @checked(SavedError)
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> GraphUNet:
        """Read what `save_pretrained` wrote: trace the configuration, replay the recipe, load the weights.

        Args:
            directory: the folder that was written.
            options: diffusers' `torch_dtype`, `subfolder`, `variant`, `device_map` and `max_memory`.
        Returns:
            the UNet, in evaluation mode.
        Raises:
            SavedError: files are missing, damaged or unsafe.
        """
        device_map, max_memory = options.pop("device_map", None), options.pop("max_memory", None)
        dtype, torch_dtype = options.pop("dtype", None), options.pop("torch_dtype", None)
        graph, beside = load(directory, **options)
        unet = cls(graph, Report((), (f"loaded from {directory}",)))
        unet._ownership = Ownership(owned=True)
        unet.register_to_config(**beside)
        if dtype or torch_dtype:
            nn.Module.to(unet, dtype or torch_dtype)
        return unet if device_map is None else nn.Module.to(unet, one_device(unet, device_map, max_memory))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any) -> Any:
        """Build the UNet of a configuration with random weights, as in diffusers, and apply the passes it lists.

        Args:
            config: the configuration, or the folder of a UNet.
            return_unused_kwargs: whether the entries that the UNet does not have are returned as well.
            options: further options of diffusers.
        Returns:
            the UNet, or the UNet and the unused entries.
        Raises:
            SavedError: the configuration cannot be read.
        """
        if not isinstance(config, Mapping):
            try:
                config = UNet2DConditionModel.load_config(config)
            except (OSError, ValueError, TypeError) as error:
                hint = "pass a configuration, or the folder of a UNet"
                raise SavedError(f"no configuration can be read: {error}", where=str(config), hint=hint) from error
        passes = config.get(PASSES, ())
        plain = {name: value for name, value in config.items() if name != PASSES} | {
            "_class_name": "UNet2DConditionModel"
        }
        known = UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        own = {name: value for name, value in plain.items() if name in known or name.startswith("_")}
        source, unused = UNet2DConditionModel.from_config(own, return_unused_kwargs=True, **options)
        unused |= {name: value for name, value in plain.items() if name not in own}  # such as that of a moving average
        graph = capture(source)  # which may be on the meta device: accelerate makes empty models to look at their sizes
        unet = cls(replay(read_passes(passes), graph))
        return (unet, unused) if return_unused_kwargs else unet

    def to_diffusers(self) -> UNet2DConditionModel:
        """Return a plain diffusers model that computes the same, with its own copy of the weights.

        Raises:
            ModeError: no plain model computes the same. The error names the first difference.
        """
        self.check_unaltered()
        return to_diffusers(self.graph, self.tensors())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("a GraphUNet is not pickled", hint="use save_pretrained(directory) and from_pretrained")


def _lora(name: str) -> Any:
    """Return diffusers' method of that name, which changes LoRA layers, for a UNet whose weights may be shared."""
    inherited = getattr(UNet2DConditionModel, name)

    @functools.wraps(inherited)
    def change(self: GraphUNet, *args: Any, **kwargs: Any) -> Any:
        if name == "fuse_lora":
            self._ownership.take(self)  # it edits them in place, and the source shares them
        try:
            with self.adapters.changing_lora(self, name):
                return inherited(self, *args, **kwargs)
        finally:
            self._invalidate()

    return change


for _name in LORA:
    setattr(GraphUNet, _name, _lora(_name))
for _name, _hint in REFUSED.items():
    setattr(GraphUNet, _name, refusal(_name, _hint))
