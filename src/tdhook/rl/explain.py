"""Explain batches afterwards: a transform for replay buffers, and for what collectors bring."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.contexts.attribution import Attribution
from tdhook.contexts.explained import ExplainedModule
from tdhook.contexts.recorded import Recorded
from tdhook.extras import require
from tdhook.keys import put
from tdhook.models.entries import require_fields
from tdhook.models.holding import held_by, modules_of
from tdhook.models.loading import Weights, load_weights
from tdhook.models.model import InKeys
from tdhook.models.parallel import unwrapped
from tdhook.models.state import Slot, slots_of

__all__ = ["Explain"]

Transform: Any = require("torchrl.envs", "tdhook.rl").Transform


class Explain(Transform):
    """Adds relevance to a batch: ``buffer.append_transform(Explain(...))``, or ``Collector(..., postproc=...)``.

    For policies other than the one that acted (an older one, one in training), for critics, and for every n-th batch.
    Nothing in the batch is overwritten: what the module writes is dropped, and only relevance, and the ledger if one is
    kept, are added. What a target takes its index from, as in ``Target("action_value", "action")``, is the entry of the
    batch, so that the action which was taken is explained, whichever the module would take.

    The module itself is left alone: a copy of it is explained, so that a buffer that prefetches in a thread of its own
    does not meddle with training. Parameters and buffers are copied anew for each batch that is explained.

    Baselines that depend on more than one step are those of the whole batch, however it is cut: its mean, what is drawn
    of it, and with ``baseline="previous"`` the step before, along the axis named ``"time"``, else the last one. Where a
    trajectory begins, and at the first step of a batch, that is the step itself; with the transform
    :class:`~tdhook.rl.before.StepBefore` in the environment a batch tells the step before of its first one, too. With
    ``at="next"`` it is what the batch has of the step itself.

    Args:
        method: what is explained and how, say ``LRP("epsilon_plus", target=Target("action_value", "action"))``.
        module: the policy or critic.
        in_keys: as in ``LRP(...).wrap``: of a TensorDictModule, the keys that are attributed; of a plain module,
            those that it reads.
        out_keys: as there: the keys that a plain module writes.
        at: the entry of the batch that the module reads instead of the batch itself: with ``at="next"`` a critic
            looks at what came next, and writes ``("attr", "next", "observation")``.
        under: a key under which all of it is put, to tell the entries of several of these transforms apart:
            ``(under, "attr", "observation")``.
        every: explain the first batch and each ``every``-th after it. The others get the same entries, filled with NaN
            (numbers of units with -1), so that they can be stacked and stored together.
        snapshot: whether to explain the module as it is now, until :meth:`update` is called, whatever is trained since.
            A copy in another process (a pickled one: behind a remote buffer, or in a collector's worker) does not
            follow the module, and says so: send it weights by :meth:`update`.
        at_once: how many steps are explained in one pass, so that memory does not grow with the batch; by default by
            their size.
        trajectories: whether the module looks along the last axis of the batch, which is time (recurrent policies,
            transformers). It is then given whole trajectories; otherwise, each step for itself.
        mask_key: truth values ``[*batch]``, if the batch has them: steps where they are false are padding, which is not
            explained and has relevance zero.

    Shapes:
        Relevance of ``key [*batch, *features]`` is ``("attr", key) [*batch, *features]``, or ``[*batch, outputs,
        *features]`` for a target of several outputs; entries of the ledger are ``[*batch]``.

    Raises:
        KeyError: the batch lacks what the module reads, or already has entries of the names that are to be added.
    """

    def __init__(
        self,
        method: Attribution,
        module: nn.Module,
        in_keys: InKeys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        *,
        at: NestedKey | None = None,
        under: NestedKey | None = None,
        every: int = 1,
        snapshot: bool = False,
        at_once: int | None = None,
        trajectories: bool = False,
        mask_key: NestedKey | None = ("collector", "mask"),
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every is at least 1, got every={every}")
        self.every, self.snapshot, self._calls = every, snapshot, 0
        self._wrapped_with = in_keys, out_keys
        self._lock = threading.RLock()
        self._given = self._away = self._warned = False
        self._taken = time.time()
        self._shapes: dict[NestedKey, tuple[torch.Size, torch.dtype]] = {}
        # Not registered: what moves or saves a buffer must not move or save the policy.
        root = module.model.root if isinstance(module, ExplainedModule) else unwrapped(module)
        self.__dict__["_module"] = root
        self._makeup = _makeup(root)
        self._recorded = Recorded(
            method,
            self._wrapped,
            at=at,
            under=under,
            at_once=at_once,
            trajectories=trajectories,
            mask_key=mask_key,
        )
        self.in_keys, self.out_keys = self._recorded.in_keys, self._recorded.out_keys

    def update(self, weights: Weights | None = None) -> None:
        """From now on, explain with other weights.

        Args:
            weights: a module like the one that is explained, its ``state_dict``, or a TensorDict of its parameters, as
                ``TensorDict.from_module`` and torchrl's weight updates have them. They are copied. Without: those that
                the module has now; with ``snapshot=True`` a new snapshot is taken.

        Raises:
            RuntimeError: there is nothing to update, as the weights are those of the moment anyway.
            ValueError: the weights do not fit the module; nothing is changed then.
        """
        with self._lock:
            if weights is not None:
                load_weights(self._recorded.explained.model.root, weights)
                self._given = True
            elif self.snapshot or self._given or self._away:
                self._take()
                self._given = False
            else:
                raise RuntimeError(
                    "without snapshot=True the weights are those of the moment anyway: there is nothing to update"
                )
            self._away, self._taken = False, time.time()

    @property
    def age(self) -> float:
        """How old the weights are with which the next batch will be explained, in seconds.

        Zero where they are those of the moment; otherwise, the time since they were taken, given, or pickled.
        """
        return time.time() - self._taken if self.snapshot or self._given or self._away else 0.0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Explain a batch.

        Args:
            tensordict: of any batch size; left as it is.

        Returns:
            A TensorDict with the same entries, and relevance.
        """
        require_fields(tensordict, self.out_keys)
        with self._lock:  # buffers that prefetch call from several threads
            found = self._found(tensordict)
            self._calls += 1
        result = tensordict.copy()
        for key, value in found.items():
            if result.get(key, None) is not None:
                raise KeyError(
                    f"the batch already has {key!r}, which is not overwritten: give LRP another attribution_key, or "
                    "Explain a key to put its entries under, under=..."
                )
            put(result, key, value, self._recorded.told_by(key))
        return result

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        """What runs on writing, in a buffer that the transform is appended to with ``invert=True``."""
        return self.forward(next_tensordict)

    def transform_output_spec(self, output_spec: object) -> Any:
        raise RuntimeError(
            "Explain is a transform of replay buffers and of what a collector brings (postproc=...); in an "
            "environment, let the explained policy act: LRP(...).wrap(policy), which a StepBefore() in the environment "
            'tells the step before, for baseline="previous"'
        )

    def __getstate__(self) -> dict[str, object]:
        # What is not updated from here on has the weights of this moment.
        taken = self._taken if self.snapshot or self._given or self._away else time.time()
        return {**super().__getstate__(), "_lock": None, "_makeup": None, "_away": True, "_taken": taken}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})

    def _found(self, tensordict: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What is added to a batch."""
        batch = tensordict.batch_size
        if self._calls % self.every == 0:
            if not self.snapshot and not self._given:
                self._take()
                self._say_if_old()
            found = self._recorded.entries(tensordict)
            self._shapes = {key: (value.shape[len(batch) :], value.dtype) for key, value in found.items()}
            return found
        device = tensordict.device
        return {
            key: torch.full((*batch, *shape), _missing(dtype), dtype=dtype, device=device)
            for key, (shape, dtype) in self._shapes.items()
        }

    def _say_if_old(self) -> None:
        if self._away and not self._warned:
            self._warned = True
            warnings.warn(
                f"this Explain was pickled {self.age:.0f} s ago and explains with the weights of then: send it those "
                "of now by update(weights), or call update() if the module is trained in this process",
                stacklevel=5,
            )

    def _wrapped(self, method: Attribution) -> ExplainedModule:
        return method.wrap(copy.deepcopy(self._module), *self._wrapped_with)

    def _take(self) -> None:
        """Take the parameters, buffers and modes of the module over into the copy of it."""
        theirs, ours = (
            modules_of(root).values() for root in (self._module, self._recorded.explained.model.root)
        )
        pairs = list(zip(map(_value, slots_of(theirs)), map(_value, slots_of(ours)), strict=False))
        makeup = _makeup(self._module)
        same = makeup == self._makeup and len(slots_of(theirs)) == len(slots_of(ours))
        if not same or any(_kind(new) != _kind(old) for new, old in pairs):
            self._recorded.anew()
            self._makeup = makeup
            return
        with torch.no_grad():
            for new, old in pairs:
                old.copy_(new)
        for their, our in zip(theirs, ours, strict=True):
            our.training = their.training


def _makeup(root: nn.Module) -> object:
    """Of which modules a model consists, and what they hold besides tensors: a slope, a function."""
    modules = modules_of(root)
    return [(path, type(module)) for path, module in modules.items()], held_by(modules.values())


def _missing(dtype: torch.dtype) -> float:
    """What stands where nothing was explained: no number, or no unit."""
    return torch.nan if dtype.is_floating_point else -1


def _value(slot: Slot) -> Tensor:
    registry, name = slot
    value: Tensor = registry[name]
    return value


def _kind(x: Tensor) -> object:
    return object() if is_lazy(x) else (x.shape, x.dtype, x.device)
