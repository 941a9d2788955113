"""Guards: the conditions on sizes under which a graph was traced or that passes require, and the check of a call."""

from __future__ import annotations

import ast
import itertools
import linecache
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import CallError, EditError, SpecError, did_you_mean
from .dims import Symbol, evaluate
from .inputs import Input

COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod)
REACH = 64  # how far above a size the search for one that satisfies a condition goes


@dataclass(frozen=True)
class Guard:
    """A condition on the sizes of a call, which must evaluate to `outcome` at every call.

    Args:
        condition: an expression in the call's sizes.
        outcome: its value in the trace.
        where: the code or the pass that the condition comes from.
    """

    condition: str
    outcome: bool
    where: str


def check_condition(condition: str, known: Collection[str]) -> None:
    """Refuse a text that is no comparison of sizes, such as `H % 2 == 0`.

    Args:
        known: the names of the sizes of a call.
    Raises:
        SpecError: the text is no such comparison; the error names the part that is not allowed.
    """
    hint = "compare two sizes once, as in 'H % 2 == 0': names of sizes, whole numbers, + - * // %"
    try:
        tree = ast.parse(condition, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"cannot read the condition {condition!r}: {error}", where="require", hint=hint) from error
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1 or not isinstance(tree.ops[0], COMPARISONS):
        raise SpecError(f"{condition!r} is no comparison", where="require", hint=hint)
    stack: list[ast.expr] = [tree.left, *tree.comparators]
    while stack:
        part = stack.pop()
        if isinstance(part, ast.BinOp) and isinstance(part.op, OPERATORS):
            stack += [part.left, part.right]
            if isinstance(part.op, ast.FloorDiv | ast.Mod) and not getattr(part.right, "value", 0):
                raise SpecError(f"{ast.unparse(part)!r} may divide by 0", where=condition, hint="divide by a number")
        elif isinstance(part, ast.Name):
            if part.id not in known:
                near = did_you_mean(part.id, known) or f"sizes of this UNet's calls: {', '.join(known)}"
                raise SpecError(f"there is no size {part.id!r} in a call", where=condition, hint=near)
        elif not isinstance(part, ast.Constant) or type(part.value) is not int:
            raise SpecError(f"{ast.unparse(part)!r} may not be in a condition", where=condition, hint=hint)


def sizes_in(guard: Guard) -> set[str]:
    """Return the names of the sizes in a guard."""
    return set(re.findall(r"[A-Z]\d*", guard.condition))


def satisfied(guard: Guard, sizes: Mapping[str, int]) -> bool:
    """Return whether sizes satisfy a guard. A guard with other sizes than these is satisfied."""
    return not sizes_in(guard) <= set(sizes) or bool(evaluate(guard.condition, sizes)) == guard.outcome


def raised(
    guards: Iterable[Guard], sizes: Mapping[str, int], fits: Callable[[Mapping[str, int]], bool] = lambda sizes: True
) -> dict[str, int]:
    """Return the sizes, enlarged as little as the guards require.

    Args:
        fits: a further condition on enlarged sizes.
    Raises:
        EditError: no sizes up to `REACH` above satisfy the guards.
    """
    enlarged, guards = dict(sizes), tuple(guards)
    while any(not satisfied(guard, enlarged) for guard in guards):
        broken = next(guard for guard in guards if not satisfied(guard, enlarged))
        names = sorted(sizes_in(broken))
        room = [range(enlarged[name], sizes[name] + REACH + 1) for name in names]
        trials = (
            enlarged | dict(zip(names, values, strict=True)) for values in sorted(itertools.product(*room), key=sum)
        )
        trial = next((trial for trial in trials if satisfied(broken, trial) and fits(trial)), None)
        if trial is None:
            at = ", ".join(f"{name}={sizes[name]}" for name in names)
            raise EditError(
                f"no sizes from {at} to {REACH} above satisfy {' and '.join(map(_said, guards))}",
                where=broken.where,
                hint="require less",
            )
        enlarged = trial  # larger than before, so this ends
    return enlarged


def _said(guard: Guard) -> str:
    return guard.condition if guard.outcome else f"not {guard.condition}"


def probing(guards: Iterable[Guard], symbols: Sequence[Symbol], levels: int) -> tuple[Symbol, ...]:
    """Return the free sizes with generic values that satisfy the guards and differ from the nominal ones everywhere.

    Args:
        levels: how often the UNet halves height and width.
    Raises:
        EditError: there are no such values, or the nominal sizes do not satisfy the guards.
    """
    nominal = {s.name: s.nominal for s in symbols}
    for guard in guards:
        if not satisfied(guard, nominal):
            at = ", ".join(f"{name}={nominal[name]}" for name in sorted(sizes_in(guard)))
            raise EditError(
                f"{_said(guard)} does not hold at the model's own size, {at}",
                where=guard.where,
                hint="require what this size satisfies; `sample_size` of the configuration says it",
            )

    def differs(sizes: Mapping[str, int]) -> bool:
        """Whether sizes differ from the nominal ones wherever they occur."""
        return all(
            math.ceil(sizes[name] / 2**level) != math.ceil(size / 2**level)
            for name, size in nominal.items()
            for level in range(levels + 1 if name in "HW" else 1)
        )

    generic = {s.name: s.generic for s in symbols}
    try:  # height and width should differ too, or dimensions of one would be named by the other
        chosen = raised(guards, generic, lambda sizes: differs(sizes) and sizes["H"] != sizes["W"])
    except EditError:
        chosen = raised(guards, generic, differs)
    return tuple(Symbol(s.name, s.nominal, chosen[s.name]) for s in symbols)


def check_call(
    inputs: Sequence[Input], guards: Iterable[Guard], flat: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, int]:
    """Refuse a call that a graph does not cover.

    Args:
        inputs: all inputs with their shapes; None is the shape of a residual whose place was removed.
        guards: the conditions on the sizes.
        flat: the flat inputs, as `sdgraph.frontend.call.flatten` returns them.
        dtype: the dtype of the model.
    Returns:
        The sizes of the call by symbol.
    Raises:
        CallError: an input is not covered; the error says what it is and what it should be.
    """
    sizes: dict[str, int] = {}
    first = next(iter(flat), "")
    for spec in inputs:
        value = flat.get(spec.name)
        if value is None:
            continue
        if value.device != flat[first].device:
            raise CallError(
                f"{spec.name} is on {value.device}, {first} is on {flat[first].device}",
                where=f"input {spec.name}",
                hint=f"move it: .to('{flat[first].device}')",
            )
        _check_dtype(spec, value, dtype)
        if spec.shape is not None:
            _match(spec, spec.shape, tuple(value.shape), sizes)
    for guard in guards:
        if not satisfied(guard, sizes):
            values = ", ".join(f"{name}={sizes[name]}" for name in sorted(sizes_in(guard)))
            raise CallError(
                f"this graph is for calls where {guard.condition} is {guard.outcome}; here {values}",
                where=guard.where,
                hint="use sizes on that side, or the source UNet",
            )
    return sizes


def _check_dtype(spec: Input, value: torch.Tensor, dtype: torch.dtype) -> None:
    where, device = f"input {spec.name}", value.device.type
    cast = autocast_dtype(device)
    if spec.kind == "index" and (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool):
        raise CallError(f"{spec.name} is {value.dtype}", where=where, hint="pass integers")
    if spec.kind == "float" and not (value.dtype == dtype or (cast is not None and value.is_floating_point())):
        raise CallError(
            f"{spec.name} is {value.dtype}, the UNet is {dtype}", where=where, hint=f"cast it: .to({dtype})"
        )
    if cast is not None and spec.place[0] == "down_intrablock_additional_residuals" and value.dtype != cast:
        raise CallError(  # diffusers adds these in place, so without promotion
            f"{spec.name} is {value.dtype}, autocast computes in {cast}", where=where, hint=f"cast it: .to({cast})"
        )


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that PyTorch casts to on a kind of device, None if it does not."""
    available = torch.amp.is_autocast_available(device)  # not on the meta device, for one
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else None


def _match(spec: Input, dims: tuple[int | str, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Compare a shape with the expected one. Free sizes are taken from the first dimension that they occur in."""
    wanted: list[int | str] = []
    for i, dim in enumerate(dims):
        have = shape[i] if i < len(shape) else None
        if isinstance(dim, int):
            wanted.append(dim)
        elif dim == "?" or (i == 0 and spec.broadcast and have == 1):  # of no known expression; or for the whole batch
            wanted.append(dim if have is None else have)
        elif dim.isidentifier():
            wanted.append(dim if have is None else sizes.setdefault(dim, have))
        else:
            wanted.append(evaluate(dim, sizes))
    if list(shape) != wanted or 0 in shape:
        raise CallError(
            f"{spec.name} has shape {shape}, expected ({', '.join(map(str, wanted))})",
            where=f"input {spec.name}",
            hint="batch, height and width must agree over all inputs of a call",
        )


# Decisions in diffusers' code whose two branches give the same values, by function and source line. The trace takes
# the branch of the generic (odd) sizes. If diffusers changes such a line the decision becomes a guard again, and calls
# on its other side are refused instead of answered wrongly.
EQUIVALENT_BRANCHES: Mapping[tuple[str, str], str] = {
    (
        "UNet2DConditionModel.forward",
        "if dim % default_overall_up_factor != 0:",
    ): "up-sampling to the size of the skip is up-sampling by two whenever the size divides",
    ("Upsample2D.forward", "if hidden_states.shape[0] >= 64:"): "contiguous() keeps the values",
    (
        "Upsample2D.forward",
        'if dtype == torch.bfloat16 and is_torch_version("<", "2.1"):',
    ): "the cast is for PyTorch before 2.1",
    (
        "Upsample2D.forward",
        "2 if output_size is None else max([f / s for f, s in zip(output_size, hidden_states.shape[-2:])])",
    ): "only feeds the choice of a contiguous() that keeps the values",
    (
        "Upsample2D.forward",
        "if hidden_states.numel() * scale_factor > pow(2, 31):",
    ): "contiguous() keeps the values",
}


def calling_line(inside: Collection[str]) -> tuple[str, str, str]:
    """Return the function, the source line and the place of the traced code that is running.

    Args:
        inside: names of the tracer's own modules, whose frames are skipped.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in inside or frame.f_code.co_filename.endswith("enum.py"):
        assert frame.f_back is not None
        frame = frame.f_back
    while frame.f_code.co_name in ("<listcomp>", "<genexpr>"):
        assert frame.f_back is not None
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    file = "/".join(code.co_filename.split("/")[-2:])
    return code.co_qualname, line, f"{file}:{frame.f_lineno}"
