"""`GraphUNet`: what `apply` returns, in the place of a diffusers UNet."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import fx, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from .accept import accept
from .call import UNetCall
from .errors import ModeError, PathError, did_you_mean
from .generation import Generations, apart
from .graph import Graph
from .inherit import step
from .inputs import Input, flatten
from .specialise import without

if TYPE_CHECKING:
    from .report import Report

_AGAIN = "do it on the source UNet, then call sdgraph.apply again"
_FUSE = "load and fuse LoRA in the source UNet (pipe.fuse_lora()), then call sdgraph.apply again"
_CURES = {
    "load_lora_adapter": _FUSE,
    "add_adapter": "train adapters on the source UNet, fuse them, then call sdgraph.apply again",
    "fuse_lora": _FUSE,
    "unfuse_lora": _FUSE,
    "set_adapters": _FUSE,
    "enable_freeu": "FreeU is not covered; leave it off",
    "disable_freeu": "FreeU is not covered, so there is none to disable",
}


class GraphUNet(UNetCall, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A UNet that runs a graph. Called like a diffusers `UNet2DConditionModel`, anywhere one is.

    Weights share storage with the source UNet until they are made its own: by `train()`, `load_state_dict()`,
    a move to another device or dtype. The source is never changed.

    Features are inherited between calls without gradients only; a call that gradients may come from, those of weights
    or of inputs, computes everything, and says so once.

    Args:
        graph: the graph; it belongs to this module from now on, and is no longer edited.
        report: what made it.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = False

    def __init__(self, graph: Graph, report: Report | None = None) -> None:
        from .report import Report

        super().__init__()
        self.register_to_config(**graph.config)
        self.graph = graph
        graph.frozen = True
        graph.dropped.clear()  # or the weights that pruning takes out would stay in memory
        self.report = report if report is not None else Report(())
        self._own_weights = False
        self._before_gradients: RemovableHandle | None = None
        self._variants: dict[tuple[frozenset[str], frozenset[str]], fx.GraphModule] = {}
        self._sites = graph.sites
        self._conditioning = tuple(i.name for i in graph.inputs if i.conditioning)
        self._compile: dict[str, Any] | None = None
        self.generations = Generations()
        self._accepted: set[Any] = set()
        for name, child in graph.weights.named_children():
            self.add_module(name, child)
        for name, parameter in graph.weights.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in graph.weights.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        _name_image_projections(graph)
        # `requires_grad` stays as in the source: PyTorch picks the kernel of a matrix product by it, so other flags
        # would give other last bits. What keeps an optimizer off the source's storage is `_take_weights`.
        super().train(False)

    # -- the call ------------------------------------------------------------------------------------------------

    def call_inputs(self) -> Sequence[Input]:
        return self.graph.inputs

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

    def _accept(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Refuse a call that the graph does not cover; each kind of call is looked at once."""
        casting = torch.is_autocast_enabled(flat["sample"].device.type)
        signature = (casting, *((name, v.shape, v.dtype, v.device) for name, v in flat.items()))
        if signature not in self._accepted:
            accept(self.graph.resolved_inputs(), self.graph.guards, flat, self.dtype)
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
                    cure=did_you_mean(site, known) or f"values are given of {', '.join(known) or 'none'}",
                )
        flat = flatten(call, self.graph.inputs)
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
            made = step(without(self.graph.fx, absent), inherited)
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
                        cure="use pipe.enable_model_cpu_offload() instead of enable_sequential_cpu_offload()",
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
        from .plain import to_diffusers

        return to_diffusers(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write `config.json`, `sdgraph.json` (the recipe) and the weights (safetensors); whole or not at all.

        Raises:
            ModeError: the graph holds what no recipe brings back (IP-Adapter layers, edits outside of passes).
            SavedError: the folder holds other files, or an option is not supported.
        """
        from .saved import save

        save(self, save_directory, variant=variant, safe_serialization=safe_serialization, **options)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> GraphUNet:
        """Read what `save_pretrained` wrote: trace the configuration, replay the recipe, load the weights.

        Raises:
            SavedError: missing, damaged or unsafe files.
        """
        from .saved import load

        return load(directory, **options)

    # -- what a diffusers UNet has and this has not --------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(UNet2DConditionModel, name):
                cure = _CURES.get(name, _AGAIN)
                raise ModeError(f"a traced UNet has no {name}", where="GraphUNet", cure=cure) from None
            raise

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        raise ModeError("a traced UNet has no gradient checkpointing", cure="train in smaller batches")

    def set_use_memory_efficient_attention_xformers(self, *args: Any, **kwargs: Any) -> None:
        raise ModeError(
            "a traced UNet uses PyTorch's fused attention", cure="leave xformers off; it would change nothing here"
        )

    enable_xformers_memory_efficient_attention = set_use_memory_efficient_attention_xformers
    disable_xformers_memory_efficient_attention = set_use_memory_efficient_attention_xformers
    set_attention_backend = reset_attention_backend = set_use_memory_efficient_attention_xformers

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphUNet:
        twin = GraphUNet(self.graph.copy(), self.report)
        twin._take_weights()
        return twin.train(True) if self.training else twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModeError("a GraphUNet is not pickled", cure="use save_pretrained(directory) and from_pretrained")


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


def _name_image_projections(graph: Graph) -> None:
    """Let pipelines count the IP-Adapters and tell their kinds, which they do by `len` and `isinstance`."""
    path = "encoder_hid_proj.image_projection_layers"
    layers = graph.weights.get(path)
    if layers is not None:
        layers.__class__ = nn.ModuleList
        for i, layer in layers.named_children():
            if graph.classes.get(f"{path}.{i}") == "ImageProjection":
                layer.__class__ = ImageProjection
