"""Relevance through the memory of a recurrent policy: from one batch of a collector back into the one before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.attribution.lrp import LRP
from tdhook.contexts.recorded import recurrent
from tdhook.conventions import Convention, per_value
from tdhook.extras import require
from tdhook.keys import next_key
from tdhook.tape.undoing import Undoing
from tdhook.targets import Seeder, Seeds
from tdhook.targets.time import time_axis

__all__ = ["explain_windows", "memory_keys"]


def explain_windows(
    method: LRP,
    policy: TensorDictModuleBase,
    windows: Sequence[TensorDictBase],
    *,
    memory: Sequence[NestedKey] | None = None,
    resets: NestedKey = "is_init",
    time_dim: int | None = None,
) -> list[TensorDictBase]:
    """Explain the last of several successive windows, as far back as the first.

    A collector cuts episodes where a batch ends; what the policy remembers goes on into the next batch, as its hidden
    state. The state at the start of a window is an input like any other, and has relevance. Here that becomes the
    target of the window before, whose last state it was, and so on. Where a window starts with a reset, nothing is
    carried. Each window is run in torchrl's recurrent mode, from its first state on, with the weights of now.

    Args:
        method: how, and what: its target is one of the last window (:class:`~tdhook.targets.AtStep`).
        policy: reads observations and its memory, of batch size ``[*batch, time]``, and writes the next memory.
        windows: what a collector gave, oldest first, each of batch size ``[*batch, time]`` with the same ``*batch``.
            They are left as they are.
        memory: keys of the hidden states; by default each ``key`` that the policy reads where it writes
            ``("next", key)``, as torchrl's recurrent modules do.
        resets: key of the flags ``[*batch, time, 1]`` that say where an episode starts (torchrl's ``InitTracker``).
        time_dim: which axis of the batch is time; by default the one named ``"time"``, else the last.

    Returns:
        For each window a shallow copy with its relevance, under ``(attribution_key, key)`` for each floating-point key
        that the policy reads (or that ``attribute`` names), and the ledger, if one is kept: that of an earlier window
        has as its target what was carried into it. All else stays as it is in the window, the action that was taken
        too: a target of a policy that draws its actions should read a copy of it, ``Target("logits", Key("taken"))``.

    Raises:
        ImportError: torchrl is not installed.
        KeyError: a window lacks the flags of resets, or a hidden state.
        ValueError: there is no window, the policy has no memory, or a window does not start where the one before ended.
    """
    if not windows:
        raise ValueError("there is no window to explain: the list is empty")
    states = memory_keys(policy) if memory is None else [unravel_key(key) for key in memory]
    if not states:
        raise ValueError(
            f"the policy has no memory: it reads {list(policy.in_keys)}, and writes none of these under 'next'; name "
            "its hidden states by memory=[...]"
        )
    starts = [_Start(window, states, resets, time_dim) for window in windows]
    for number, (window, start) in enumerate(zip(windows, starts[1:], strict=False)):
        start.check_follows(window, number)

    explained: list[TensorDictBase] = []
    for window, start in zip(reversed(windows), reversed(starts), strict=True):
        found = _explain(method, policy, window, states)
        kept = found.select(method.attribution_key, "ledger", strict=False)
        explained.insert(0, window.copy().update(kept))
        method = method.explaining(start.carried(found.get(method.attribution_key)))
    return explained


def memory_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """The keys of a policy's hidden states: those that it reads, and writes for the next step."""
    written = {unravel_key(key) for key in policy.out_keys}
    read = [unravel_key(key) for key in policy.in_keys]
    return [key for key in read if next_key(key) in written]


def _explain(
    method: LRP, policy: TensorDictModuleBase, window: TensorDictBase, states: list[NestedKey]
) -> TensorDictBase:
    """A window with the relevance of what the policy reads, its first hidden states among it."""
    floating = [key for key in policy.in_keys if window.get(key).is_floating_point()]
    if isinstance(wanted := method.attribute, tuple):
        method = copy.copy(method)
        method.attribute = tuple(dict.fromkeys([*wanted, *states]))
    require("torchrl.modules", "tdhook.rl")
    with Undoing(), recurrent(), method.prepare(policy, in_keys=floating) as explained:
        result: TensorDictBase = explained(window.copy())
    return result


class _Start:
    """How a window starts: its hidden states, and where they are those of a new episode."""

    def __init__(
        self, window: TensorDictBase, states: list[NestedKey], resets: NestedKey, time_dim: int | None
    ) -> None:
        for key in (*states, resets):
            if window.get(key, None) is None:
                known = ", ".join(sorted(map(str, window.keys(True, True))))
                raise KeyError(f"a window has no {key!r}; it has {known}")
        self.axis, self.batch_dims = time_axis(window, time_dim), window.batch_dims
        self.states = {key: window.get(key).select(self.axis, 0) for key in states}
        first = window.get(resets).select(self.axis, 0)
        self.new = first.squeeze(-1) if first.dim() == window.batch_dims else first

    def check_follows(self, before: TensorDictBase, number: int) -> None:
        """Raise unless the window starts as the one ``before`` ended."""
        for key, state in self.states.items():
            last = before.get(next_key(key), None)
            if last is None:
                continue
            last = last.select(self.axis, -1)
            new = self._beside(state)
            if last.shape != state.shape or not torch.allclose(last.where(~new, 0), state.where(~new, 0)):
                raise ValueError(
                    f"window {number + 1} does not start with the {key!r} that window {number} ended with: windows are "
                    "successive batches of the same environments, oldest first"
                )

    def carried(self, relevance: TensorDictBase) -> _Carried:
        """The relevance of the states, as a target of the window before."""
        found, several = {}, False
        for key, state in self.states.items():
            arrived = relevance.get(key).select(self.axis, 0)
            several = arrived.dim() > state.dim()
            if several:
                arrived = arrived.movedim(self.batch_dims - 1, 0)
            found[key] = arrived.where(~self._beside(state), 0)
        return _Carried(found, several, self.axis)

    def _beside(self, state: Tensor) -> Tensor:
        """Where an episode starts, against a state."""
        ones = [1] * (state.dim() - self.new.dim())
        beside: Tensor = self.new.reshape([*self.new.shape, *ones])
        return beside


@dataclass(frozen=True, eq=False)
class _Carried(Seeder):
    """The final states of a window, whose relevance is known.

    Attributes:
        relevance: by key, ``[*batch, *state]``, after a leading axis where several are explained.
        several: whether they are.
        axis: that of time.
    """

    relevance: dict[NestedKey, Tensor]
    several: bool
    axis: int

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds: at the last step alone."""
        tensors = [outputs.get(next_key(key)) for key in self.relevance]
        grads = []
        for z, relevance in zip(tensors, self.relevance.values(), strict=True):
            if flow == "gradient":
                relevance = per_value(z.select(self.axis, -1), relevance)
            grad = z.new_zeros((*relevance.shape[: self.several], *z.shape))
            grad.select(self.axis + self.several, -1).copy_(relevance)
            grads.append(grad)
        count = len(grads[0]) if self.several else None
        return Seeds([next_key(key) for key in self.relevance], tensors, grads, count)
