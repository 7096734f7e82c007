"""Runs an explained module as one graph, inside ``torch.compile``.

The tracer of ``torch.compile`` is not led through rules, modes and hooks: it takes an explanation as one function of
tensors (``nonstrict_trace``), which runs as it always does, on tensors that note what is done to them. The parameters
and buffers of the model are arguments of that function, so that a graph computes with those of the moment.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.models.entries import leaves_of
from tdhook.models.state import swapped
from tdhook.passes.graphs import Graphs, Remembers
from tdhook.tape.conditions import assuming_nonnegative, deferred
from tdhook.tape.internals import hooks_on_saved_tensors, mode_options, nonstrict

__all__ = ["inline", "run"]

_Results: TypeAlias = "tuple[dict[NestedKey, Tensor], dict[str, Tensor], Tensor]"
"""What a call writes, what the model holds anew by the number of its slot, and whether what was assumed holds."""

# Batch shapes, sets of keys, dtypes and modes each take a graph.
_LIMIT = 64
# So many calls in a row may turn out to need another way than that of the graph.
_MISSES = 8
_ASSUMED = "how it is explained depends on values, and not as in the graph"


def inline(graphs: Graphs, td: TensorDictBase) -> dict[NestedKey, Tensor]:
    """What a call writes into ``td``, as a part of the graph that is being traced."""
    keys, values = _inputs(graphs, td)
    written, changed, _ = _graph(graphs, str(td.batch_dims), "", (), keys, values)
    for number, value in changed.items():
        registry, name = graphs.slots[int(number)]
        registry[name] = value
    return written


def run(graphs: Graphs, td: TensorDictBase) -> dict[NestedKey, Any]:
    """What a call writes into ``td``, by a graph of its own; operation by operation where there can be none."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return run(graphs, td)
    keys, values = _inputs(graphs, td)
    if not values or not all(map(Tensor.numel, values)) or not graphs.filled:
        return graphs.explain(td)
    if graphs.way_of(td) not in graphs.rehearsed:
        try:
            stands = graphs.rehearse(td)
        except Remembers as error:
            _give_up(graphs, error)
            return error.written
        if stands is not None:
            return stands
    if graphs.function is None:
        graphs.function = _compiled(graphs.options or {})
    try:
        signs = _nonnegative(graphs, keys, values)
        written, changed, holds = _called(graphs, str(td.batch_dims), graphs.learnt(), signs, keys, values)
    except Exception as error:
        eagerly = graphs.explain(td)  # raises where the call is at fault
        _give_up(graphs, error)
        return eagerly
    if not holds:
        written = graphs.explain(td)  # raises where the call is at fault
        graphs.missed += 1
        if graphs.missed == _MISSES:
            _give_up(graphs, ValueError(_ASSUMED))
        return written
    graphs.missed = 0
    graphs.hold(changed)
    return written


def _give_up(graphs: Graphs, error: Exception) -> None:
    graphs.clear()
    warnings.warn(
        f"{type(graphs.root).__name__} cannot be explained as one graph and runs without, operation by "
        f"operation ({_origin(error)})",
        stacklevel=4,
    )


def _called(graphs: Graphs, *args: Any) -> _Results:
    assert graphs.function is not None
    with torch.no_grad():
        if not graphs.replays:
            return graphs.function(graphs, *args)  # type: ignore[no-any-return]
        torch.compiler.cudagraph_mark_step_begin()
        written, changed, holds = graphs.function(graphs, *args)
        # The next run overwrites what this one returned.
        own = {key: value.clone() for key, value in written.items()}
        return own, {number: value.clone() for number, value in changed.items()}, holds


def _origin(error: BaseException) -> str:
    """In one line, what an error arose from."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _compiled(options: dict[str, Any]) -> Callable[..., object]:
    options = {"recompile_limit": _LIMIT, **options, "fullgraph": True, "isolate_recompiles": True}
    backend, mode = options.get("backend", "inductor"), options.get("mode")
    if mode is None or backend == "inductor":
        settings = mode_options(options.pop("mode", None) or "default", options.get("dynamic"))
        filtered = {"guard_filter_fn": _on_what_changes}
        options["options"] = {**settings, **filtered, **options.get("options", {})}
    return torch.compile(_graph, **options)


def _on_what_changes(guards: Sequence[Any]) -> list[bool]:
    """Which guards to look at in each call: those on tensors and modes; the rest of the module and torch stay."""
    return [
        guard.name.endswith("['training']")
        or (isinstance(guard.value, Tensor) and guard.guard_type in ("TENSOR_MATCH", "DUPLICATE_INPUT"))
        or not (guard.is_global or guard.name.startswith(("graphs", "__import__")))
        for guard in guards
    ]


def _inputs(graphs: Graphs, td: TensorDictBase) -> tuple[tuple[NestedKey, ...], list[Tensor]]:
    """The entries that an explanation depends on; none if one of them is missing."""
    keys: list[NestedKey] = []
    values: list[Tensor] = []
    for key in graphs.reads(td):
        found = td.get(key, None)
        if found is None:
            return (), []
        for name, value in ((key, found),) if isinstance(found, Tensor) else leaves_of(key, found):
            keys.append(name)
            values.append(value.clone() if _is_inference(value) else value)
    return tuple(keys), values


def _nonnegative(
    graphs: Graphs, keys: Sequence[NestedKey], values: Sequence[Tensor]
) -> tuple[NestedKey, ...]:
    """Inputs that are not negative, and never were: for them there is a graph that skips what would be zero.

    On a GPU nothing is looked at, for which it would have to be waited for.
    """
    if not graphs.reads_signs():
        return ()
    signed = graphs.signed
    for key, value in zip(keys, values, strict=True):
        if key not in signed and not (value.is_cpu and value.is_floating_point() and value.amin() >= 0):
            signed.add(key)
    return tuple(key for key in keys if key not in signed)


def _is_inference(value: Tensor) -> bool:
    """Whether a value has to be copied to be saved for the backward pass."""
    return not torch.compiler.is_compiling() and value.is_inference()


def _graph(
    graphs: Graphs,
    axes: str,
    learnt: str,
    nonnegative: tuple[NestedKey, ...],
    keys: tuple[NestedKey, ...],
    values: list[Tensor],
) -> _Results:
    """What ``torch.compile`` traces: collects what the explanation depends on.

    ``axes`` is the number of batch axes in words: a number would be taken for a size that may change.
    """
    state = [registry[name] for registry, name in graphs.slots]
    state += [registry[name] for registry, name in graphs.held]
    modes = [attributes[name] for attributes, name in graphs.modes]
    return _explain(graphs.name, modes, axes, learnt, nonnegative, keys, state, values)


@nonstrict
def _explain(
    name: str,
    modes: Sequence[bool],
    axes: str,
    learnt: str,
    nonnegative: Sequence[NestedKey],
    keys: Sequence[NestedKey],
    state: Sequence[Tensor],
    values: Sequence[Tensor],
) -> _Results:
    """An explanation as a function of tensors; a change of the other arguments makes for another graph."""
    graphs = Graphs.named(name)
    td = TensorDict({}, values[0].shape[: int(axes)])
    for key, value in zip(keys, values, strict=True):
        td.set(key, value)
    off_tape = {id(x): x.detach() if x.requires_grad else x for x in state}
    # Copies are overwritten, so that nothing has happened where the call is to be made another way after all.
    off_tape.update({id(state[i]): state[i].clone() for i in graphs.overwritten})
    given = [off_tape[id(x)] for x in state]
    changed: dict[str, Tensor] = {}
    with (
        swapped((*graphs.slots, *graphs.held), given),
        deferred() as conditions,
        assuming_nonnegative(nonnegative),
        hooks_on_saved_tensors(),
    ):
        written = graphs.explain(td)
        for i, ((registry, name), value) in enumerate(zip(graphs.slots, given, strict=False)):
            if registry[name] is not value or i in graphs.overwritten:
                changed[str(i)] = registry[name].detach()
    for key, value in written.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the model writes {key!r}, which is no tensor")
    device = values[0].device
    holds = torch.ones((), dtype=torch.bool, device=device)
    for condition in conditions:
        holds = holds & condition.to(device)
    return written, changed, holds
