"""Targets of critics: advantages, and expectations and atoms of distributional values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.tape.as_one import as_one, of_single_values
from tdhook.targets.computed import Derived, entry_of, plain_keys
from tdhook.targets.outputs import Index, Key, Target

__all__ = ["Advantage", "Atom", "ExpectedValue"]

_BASELINES = ("mean", "max", "expected")


@dataclass(frozen=True, eq=False)
class Advantage(Derived):
    """What an action is worth beyond what the state is worth: ``Q(a) - V``.

    Args:
        action_value: the key of ``Q``, ``[*batch, actions]``. An action that is masked, by minus infinity or the least
            number there is, has no part in the baseline.
        index: which action, as in :class:`~tdhook.targets.Target`; ``"all"`` for each.
        baseline: what stands for ``V``: the ``"mean"`` of ``Q`` over the actions, its ``"max"``, or the value
            ``"expected"`` under a softmax policy; or the :class:`~tdhook.targets.Key` of an entry of shape
            ``[*batch, 1]``, explained with ``Q`` where the module writes it, and else a constant.
        temperature: of that softmax policy, whose probabilities are held constant.
        key: where the advantage of each action is written, ``[*batch, actions]``; not ``"advantage"``, which torchrl's
            estimators write.

    Raises:
        ValueError: the baseline is unknown.
    """

    action_value: NestedKey = "action_value"
    index: Index = "action"
    baseline: str | Key = "mean"
    temperature: float = 1.0
    key: NestedKey = "action_advantage"

    def __post_init__(self) -> None:
        if not isinstance(self.baseline, Key) and self.baseline not in _BASELINES:
            raise ValueError(
                f"baseline={self.baseline!r} is none of {', '.join(map(repr, _BASELINES))}; for an entry, write "
                f"Key({self.baseline!r})"
            )
        if self.temperature <= 0:
            raise ValueError(f"a temperature is positive, got {self.temperature}")
        plain_keys(self, "action_value", "key")

    @property
    def reads(self) -> list[NestedKey]:
        """The baseline, if it is an entry."""
        return [self.baseline.key] if isinstance(self.baseline, Key) else []

    @property
    def explains(self) -> list[NestedKey]:
        """The values, and the baseline."""
        return [self.action_value, *self.reads]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The advantage of each action."""
        q = entry_of(self.action_value, outputs, inputs, self)
        if isinstance(self.baseline, Key):
            v = entry_of(self.baseline.key, outputs, inputs, self)
            return q - (v.unsqueeze(-1) if v.dim() < q.dim() else v)
        values = q.detach()
        allowed = values > torch.finfo(values.dtype).min / 2
        if self.baseline == "max":
            weights = torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)
        elif self.baseline == "mean":
            shares = allowed.to(torch.promote_types(values.dtype, torch.float32))
            weights = shares / shares.sum(-1, keepdim=True)
        else:
            weights = (values / self.temperature).masked_fill(~allowed, -torch.inf).softmax(-1)
        return q - (q.masked_fill(~allowed, 0.0) * weights).sum(-1, keepdim=True)


@of_single_values
@as_one
def expected_value(log_probs: Tensor, support: Tensor) -> Tensor:
    """``sum_i p_i s_i`` over the atoms: ``[*batch, atoms, actions] -> [*batch, actions]``."""
    return (log_probs.exp() * support.unsqueeze(-1)).sum(-2)


@dataclass(frozen=True, eq=False)
class ExpectedValue(Derived):
    """The expectation of a distribution over returns, as C51 (Bellemare 2017) and QR-DQN (Dabney 2018) have one.

    torchrl's ``DistributionalQValueActor`` writes ``action_value`` of shape ``[*batch, atoms, actions]``, the
    logarithms of probabilities. The expectation is linearised as one function of these, which together with the
    log-softmax that made them is what the rule of a softmax gives (AttnLRP, Prop. 3.1).

    Args:
        support: the return of each atom, ``[atoms]``; ``None`` if the entry holds returns that are equally probable
            (quantiles), whose mean is the expectation.
        action_value: its key, ``[*batch, atoms, actions]``.
        index: which action, as in :class:`~tdhook.targets.Target`.
        key: where the expectation of each action is written, ``[*batch, actions]``.

    Raises:
        ValueError: the entry has no atoms, or another number of them than the support.
    """

    support: Tensor | None
    action_value: NestedKey = "action_value"
    index: Index = "action"
    key: NestedKey = "expected_value"

    def __post_init__(self) -> None:
        plain_keys(self, "action_value", "key")

    @property
    def explains(self) -> list[NestedKey]:
        """The distributions."""
        return [self.action_value]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The expectation of each action's return."""
        z = _atoms(self, self.action_value, outputs, inputs)
        if self.support is None:
            return z.mean(-2)
        support = torch.as_tensor(self.support, device=z.device, dtype=z.dtype)
        if support.shape != z.shape[-2:-1]:
            raise ValueError(
                f"the support of shape {tuple(support.shape)} does not fit {self.action_value!r} of shape "
                f"{tuple(z.shape)}, which has {z.shape[-2]} atoms"
            )
        return expected_value(z, support)


@of_single_values
@as_one
def atom_probability(log_probs: Tensor) -> Tensor:
    """``exp``, elementwise."""
    return log_probs.exp()


@dataclass(frozen=True, eq=False)
class Atom(Derived):
    """Single atoms of the distribution over the returns of an action: their probability, or the quantile.

    Args:
        index: which atom, as in :class:`~tdhook.targets.Target`; ``"all"`` for each.
        action: of which action: an ``int``, the entry ``"action"``, one-hot or categorical, ``Key("taken")``, ...
        quantiles: whether the entry holds quantiles, and not the logarithms of probabilities.
        action_value: its key, ``[*batch, atoms, actions]``.
        key: where the atoms of the action are written, ``[*batch, atoms]``.

    Raises:
        ValueError: the entry has no atoms.
    """

    index: Index
    action: Index = "action"
    quantiles: bool = False
    action_value: NestedKey = "action_value"
    key: NestedKey = "atoms"

    def __post_init__(self) -> None:
        plain_keys(self, "action_value", "key")
        if self._of_action.several:
            raise ValueError(f"Atom is about one action at a time, got action={self.action!r}")

    @property
    def _of_action(self) -> Target:
        return Target(self.action_value, self.action)

    @property
    def reads(self) -> list[NestedKey]:
        """Where the action is."""
        return list(self._of_action.entries)

    @property
    def explains(self) -> list[NestedKey]:
        """The distributions."""
        return [self.action_value]

    def value(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """The atoms of the action."""
        z = _atoms(self, self.action_value, outputs, inputs)
        taken = self._of_action.weight(z.detach().sum(-2), outputs, inputs).long().argmax(-1, keepdim=True)
        atoms = z.take_along_dim(taken.unsqueeze(-2), -1).squeeze(-1)
        return atoms if self.quantiles else atom_probability(atoms)


def _atoms(target: Any, key: NestedKey, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
    z = entry_of(unravel_key(key), outputs, inputs, target)
    if z.dim() < outputs.batch_dims + 2:
        raise ValueError(
            f"{key!r} of shape {tuple(z.shape)} has no atoms: {type(target).__name__} needs [*batch, atoms, actions], "
            f"with the batch {list(outputs.batch_size)}"
        )
    return z
