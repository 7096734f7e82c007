"""Targets at some steps of a sequence: what did *earlier* observations have to do with the answer *now*?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.tape.conditions import holds
from tdhook.targets.base import Around, Seeder, Seeds
from tdhook.targets.contrasts import TargetLike, as_seeder
from tdhook.targets.outputs import Key, same_index

__all__ = ["AtStep", "time_axis"]

Step: TypeAlias = "int | str | list[int] | Tensor | Key"


@dataclass(frozen=True, eq=False)
class AtStep(Around):
    """A target at one time step, or at some, of a batch of sequences.

    The model sees all of a sequence, of batch size ``[*batch, time]`` as in a rollout, and the relevance of its inputs
    says what each step had to do with the output at the chosen one. Steps after it have none, and neither have those
    before a reset, where the model resets its memory.

    Args:
        target: what is explained at the step: any target.
        step: which: an ``int``, negative ones from the end; ``"last"``; an integer tensor, one step for each sequence
            (``[*batch]``); a boolean tensor ``[*batch, time]`` that marks steps, or the :class:`Key` of an entry
            that does (``Key(("next", "done"))``): all marked steps are explained together, and a sequence without has
            no relevance. Several are explained at once, each separately, which gives relevance of shape
            ``[*batch, time, steps, *features]``: a list of integers, or ``"all"`` for each step.
        time_dim: which axis of the batch is time; by default the one named ``"time"``, as collectors do, else the last.

    Raises:
        IndexError: a step or ``time_dim`` is out of range.
        TypeError: several steps are asked for, and several outputs.
    """

    target: TargetLike
    step: Step = "last"
    time_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_seeder(self.target))
        step = self.step
        if isinstance(step, list) and not (step and all(map(_is_int, step))):
            raise TypeError(f"a list of steps names at least one, by integers; got {step!r}")
        if isinstance(step, str) and step not in ("last", "all"):
            raise ValueError(
                f"step={step!r} is neither 'last' nor 'all'; to take marks from a TensorDict entry, write Key({step!r})"
            )
        if isinstance(step, Tensor) and step.is_floating_point():
            raise TypeError(f"a tensor of steps holds integers or marks, got {step.dtype}")
        if not (_is_int(step) or isinstance(step, str | list | Tensor | Key)):
            raise TypeError(
                f"a step is an int, 'last', 'all', a list, a tensor or a Key, got {type(step).__name__}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AtStep):
            return NotImplemented
        same = self.target == other.target and self.time_dim == other.time_dim
        return same and same_index(self.step, other.step)

    def __hash__(self) -> int:
        return hash((self.target, self.time_dim))

    def inner(self) -> Seeder:
        """What is explained at the step."""
        assert isinstance(self.target, Seeder)
        return self.target

    def around(self, other: Seeder) -> AtStep:
        """Another target at the same step."""
        return replace(self, target=other)

    @property
    def several(self) -> bool:
        """Whether it explains several steps separately."""
        return isinstance(self.step, list) or (isinstance(self.step, str) and self.step == "all")

    @property
    def entries(self) -> list[NestedKey] | None:
        """Those of its target, and the one that marks steps."""
        entries = self.inner().entries
        if entries is None:
            return None
        return [*entries, self.step.key] if isinstance(self.step, Key) else list(entries)

    def __call__(self, outputs: TensorDictBase, inputs: TensorDictBase, flow: Convention) -> Seeds:
        """The seeds of its target, at the chosen steps alone."""
        seeds = self.inner()(outputs, inputs, flow)
        if seeds.several is not None and self.several:
            raise TypeError(
                f"several outputs or several steps can be explained at once, not both: {self.target!r} at the steps "
                f"{self.step!r}"
            )
        marks = self._marks(outputs, inputs)
        grads = []
        for z, grad in zip(seeds.tensors, seeds.grads, strict=True):
            event = z.dim() - outputs.batch_dims
            at = marks.to(z.device).reshape((*marks.shape, *(1,) * event))
            grads.append(torch.where(at, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)))
        return Seeds(seeds.keys, seeds.tensors, grads, len(marks) if self.several else seeds.several)

    def _marks(self, outputs: TensorDictBase, inputs: TensorDictBase) -> Tensor:
        """Where it is explained, ``[*batch]``, or ``[steps, *batch]`` for several."""
        step, batch = self.step, outputs.batch_size
        axis = time_axis(inputs, self.time_dim)
        if isinstance(step, Key):
            entry = outputs.get(step.key, None)
            entry = inputs.get(step.key, None) if entry is None else entry
            if entry is None:
                known = sorted({str(k) for td in (outputs, inputs) for k in td.keys(True, True)})
                raise KeyError(
                    f"entry {step.key!r}, which marks steps, is not there; there are {', '.join(known)}"
                )
            if entry.dtype is not torch.bool:
                raise TypeError(f"entry {step.key!r} marks steps by truth values, and it is {entry.dtype}")
            return _shaped(entry, batch, f"entry {step.key!r}, which marks steps,")
        if isinstance(step, Tensor) and step.dtype is torch.bool:
            return _shaped(step, batch, "the tensor that marks steps")
        if isinstance(step, str):
            chosen: object = -1 if step == "last" else torch.arange(batch[axis])
        else:
            chosen = step
        return self._at(torch.as_tensor(chosen), batch, axis)

    def _at(self, steps: Tensor, batch: torch.Size, axis: int) -> Tensor:
        """The marks of steps that are given as numbers."""
        count = batch[axis]
        steps = steps.long()
        inside = (steps >= -count) & (steps < count)
        if not holds(inside):
            raise IndexError(
                f"step {int(steps[~inside][0])} is out of range: the sequences have {count} steps (batch size "
                f"{list(batch)}, axis {axis})"
            )
        steps = steps % count
        if self.several:
            steps = steps.reshape(-1, *(1,) * len(batch))
        elif steps.dim():
            sequences = torch.Size([*batch[:axis], *batch[axis + 1 :]])
            steps = _shaped(steps, sequences, "the tensor of steps, one for each sequence,").unsqueeze(axis)
        time = torch.arange(count, device=steps.device).reshape(-1, *(1,) * (len(batch) - axis - 1))
        return (time == steps).expand((*steps.shape[: self.several], *batch))


def time_axis(td: TensorDictBase, time_dim: int | None = None) -> int:
    """Which axis of the batch is time, counted from the front.

    Args:
        td: of batch size ``[*batch, time]``.
        time_dim: the axis, if it is known; else the one named ``"time"``, or the last.

    Raises:
        IndexError: there is no such axis.
    """
    axes: int = td.batch_dims
    if not axes:
        raise IndexError(
            "a step is chosen along an axis of the batch, and the TensorDict has batch size []; make time one: "
            "td.auto_batch_size_(), or TensorDict(..., batch_size=[*batch, time])"
        )
    if time_dim is None:
        return list(td.names).index("time") if "time" in td.names else axes - 1
    if not -axes <= time_dim < axes:
        raise IndexError(f"time_dim={time_dim} is no axis of the batch, which has size {list(td.batch_size)}")
    return time_dim % axes


def _is_int(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool)


def _shaped(value: Tensor, shape: torch.Size, what: str) -> Tensor:
    if value.shape == (*shape, 1):
        return value.squeeze(-1)
    if value.shape != shape:
        raise ValueError(f"{what} is of shape {list(value.shape)}, and should be of shape {list(shape)}")
    return value
