"""Attribution while a policy is trained: what it looks at, and how that changes from version to version."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.contexts.attribution import Attribution
from tdhook.contexts.recorded import padding_told
from tdhook.evaluation.similarity import drift
from tdhook.keys import under
from tdhook.models.entries import leaves_of
from tdhook.models.holding import modules_of
from tdhook.models.state import restored
from tdhook.rl.policies import require_names
from tdhook.tape.undoing import Undoing, undone, undone_where_raised

if TYPE_CHECKING:
    from torchrl.record.loggers.common import Logger
    from torchrl.trainers import Trainer

__all__ = ["AttributionTracker", "Region"]

Region: TypeAlias = "Tensor | Callable[[TensorDictBase], Tensor]"
_MOST_FEATURES = 64


class AttributionTracker:
    """Explains batches of a training now and then, and keeps what came of it.

    In a loop of your own, ``tracker.update(batch, step=frames)``; with torchrl's ``Trainer``,
    ``tracker.register(trainer)`` once. The numbers of each check are appended to :attr:`history` and sent to the
    logger:

    - ``relevance/NAME``, the mean absolute relevance of each feature, and ``share/NAME``, its share of that of all;
    - ``region/NAME``, the share of all absolute relevance that lies in a region of the input;
    - ``drift/previous`` and ``drift/first``, one minus the mean cosine between the explanations of the probe now and
      those at the previous and at the first check: 0 where they are the same, 1 where they have nothing in common (not
      a number at the first check);
    - ``gap``, the largest share of what is explained that the ledger misses, if the method keeps one.

    The policy is explained as in evaluation, with its parameters of the moment, and is left as it was: its mode, its
    buffers, its gradients and the random numbers are those from before. So is the batch. A policy that is explained
    acts anew: for the action that was taken in the batch, keep it under another key and name that in the target.

    Args:
        method: how to explain: ``LRP("epsilon_plus", target=...)``.
        module: what to explain: the actor (or critic) that is trained.
        probe: the elements on which drift is measured, with the entries that the policy reads; by default none is.
        key: the input, or module by its path, whose relevance is tracked; by default the only one.
        features: one name for each of the input's features, in their order; by default their numbers, if they are on
            one axis and at most 64 (else they are not listed one by one).
        regions: masks by name: a boolean tensor of the shape of the features, or that expands to it, or a function of
            the batch that gives one, or one for each of its elements (``[*batch, *features]``).
        every: explain every n-th batch, beginning with the first.
        logger: a logger of torchrl, or whatever has ``log_scalar(name, value, step=step)``.
        prefix: what the names begin with that are logged.
        mask_key: truth values ``[*batch]``, if the batch has them: steps where they are false are padding, which does
            not count.

    Attributes:
        history: the numbers of all checks by name, with the steps under ``"step"``, in lists of the same length.

    Raises:
        ValueError: ``every`` is not positive, two features have one name, or the policy has several inputs and ``key``
            does not say which.
    """

    def __init__(
        self,
        method: Attribution,
        module: nn.Module,
        *,
        probe: TensorDictBase | None = None,
        key: NestedKey | None = None,
        features: Sequence[str] | None = None,
        regions: Mapping[str, Region] | None = None,
        every: int = 1,
        logger: Logger | None = None,
        prefix: str = "attribution",
        mask_key: NestedKey | None = ("collector", "mask"),
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: every how many batches to explain, at least 1")
        require_names(features or (), "features")
        self.explained = method.wrap(module)
        inputs = self.explained.attributed
        known = [*inputs] or [*method.input_modules]
        if key is None and len(known) != 1:
            there = "the policy reads" if inputs else "there is relevance of"
            raise ValueError(f"{there} {', '.join(map(repr, known))}: say with key= which to track")
        self.key: NestedKey = known[0] if key is None else unravel_key(key)
        if self.key not in inputs and method.values is not True:  # its value says what its features are
            method = method.asked(values=[*(method.values or ()), self.key])
            self.explained = method.wrap(module)
        self._method = method
        self.features = None if features is None else tuple(features)
        self.regions = dict(regions or {})
        self.every, self.logger, self.prefix, self.mask_key = every, logger, prefix, mask_key
        self.history: dict[str, list[float]] = {"step": []}
        self._entry = self.explained.entry(self.key)
        self._root = module
        self._probe = None if probe is None else probe.detach().clone()
        self._first: Tensor | None = None
        self._previous: Tensor | None = None
        self._count = 0
        self._trainer: Trainer | None = None

    def update(self, batch: TensorDictBase, step: int | None = None) -> dict[str, float] | None:
        """Count a batch, and explain it if it is its turn.

        Args:
            batch: with the entries that the policy and the target read, of any batch size; left as it is.
            step: what the numbers are noted under, frames say; by default how many batches there were before.

        Returns:
            The numbers by name, or ``None`` if it was not its turn, or nothing but padding.

        Raises:
            ValueError: there is a number of names that is not that of the features, or a region of another shape.
            TypeError: a region is not boolean.
        """
        before = (
            self._count,
            self._first,
            self._previous,
            {name: len(of) for name, of in self.history.items()},
        )
        with Undoing(), undone_where_raised(lambda: self._go_back(*before)):
            return self._counted(batch, step)

    def __call__(self, batch: TensorDictBase) -> dict[str, float] | None:
        """What a ``Trainer`` calls with each batch that it collected; it logs what is returned."""
        values = self.update(batch, None if self._trainer is None else self._trainer.collected_frames)
        if values is None:
            return None
        return {f"{self.prefix}/{name}": value for name, value in values.items() if not math.isnan(value)}

    def register(self, trainer: Trainer, name: str = "attribution_tracker") -> None:
        """Have a trainer of torchrl track each batch before it learns from it, and keep the state in its checkpoints.

        Args:
            trainer: the trainer, whose logger gets the numbers, whatever logger the tracker has itself.
            name: what the state is called in the trainer's state.
        """
        self._trainer = trainer
        trainer.register_module(name, self)
        trainer.register_op("pre_steps_log", self)

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed goes on with: plain data."""
        return {
            "count": self._count,
            "history": {name: list(values) for name, values in self.history.items()},
            "first": self._first,
            "previous": self._previous,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` gave.

        Raises:
            ValueError: it is not as that, or cut off: its entries are not of one length. Nothing is changed then.
        """
        try:
            history = {str(name): list(values) for name, values in state_dict["history"].items()}
            count, first, previous = (state_dict[name] for name in ("count", "first", "previous"))
            lengths = {name: len(values) for name, values in history.items()}
            fits = len(set(lengths.values())) == 1 and "step" in history and type(count) is int
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no state of a tracker: {type(error).__name__}: {error}") from error
        if not fits or not all(value is None or isinstance(value, Tensor) for value in (first, previous)):
            raise ValueError(f"this is no state of a tracker: its history has the lengths {lengths}")
        self._count, self.history, self._first, self._previous = count, history, first, previous

    def _go_back(
        self, count: int, first: Tensor | None, previous: Tensor | None, lengths: Mapping[str, int]
    ) -> None:
        """Forget a check that was not finished."""
        self._count, self._first, self._previous = count, first, previous
        for name in [*self.history]:
            del self.history[name][lengths.get(name, 0) :]
            if name not in lengths:
                del self.history[name]

    def _counted(self, batch: TensorDictBase, step: int | None) -> dict[str, float] | None:
        count, self._count = self._count, self._count + 1
        if count % self.every:
            return None
        valid = self._valid(batch)
        if valid is not None and not valid.any():
            return None
        values = self._of_batch(self._explain(batch, valid), batch, valid)
        if self._probe is not None:
            values |= self._drift(self._probe)
        self._note(values, count if step is None else step)
        return values

    def _explain(self, batch: TensorDictBase, valid: Tensor | None = None) -> TensorDictBase:
        """A batch, explained: compared with what is made of steps that are no padding."""
        work, module, method = batch.copy(), self.explained, self._method
        if valid is not None:
            keys = [key for of in module.attributed for key, _ in leaves_of(of, work.get(of, None))]
            method, work, fill = method.settled(keys, work, valid)
            work = fill(work)
        with undone(lambda: module.explain_by(self._method)), restored(self._root), _evaluating(self._root):
            module.explain_by(method)
            out: TensorDictBase = module(work)
        return out

    def _valid(self, batch: TensorDictBase) -> Tensor | None:
        """Which steps are none of padding, ``[*batch]``, where there is any."""
        mask = padding_told(batch, self.mask_key)
        if not isinstance(mask, Tensor) or mask.numel() != batch.batch_size.numel() or bool(mask.all()):
            return None
        return mask.reshape(batch.batch_size)

    def _of_batch(self, out: TensorDictBase, batch: TensorDictBase, valid: Tensor | None) -> dict[str, float]:
        counting = slice(None) if valid is None else valid.flatten()
        if out.get(self._entry, None) is None:
            raise ValueError(
                f"{self.key!r} is tracked and gets no relevance: name it in attribute or input_modules"
            )
        relevance = out[self._entry].double().abs()
        named = self.key if self.key in out.keys(True) else under(self._method.value_key, self.key)
        shape = out.get(named).shape[out.batch_dims :]
        # Where several outputs are explained, theirs are between the batch's axes and those of the features.
        each = relevance.reshape(out.batch_size.numel(), -1, *shape).mean(1)
        mean = each[counting].mean(0).flatten()
        total = mean.sum().item()
        values: dict[str, float] = {}
        for name, value in zip(self._names(shape), mean.tolist(), strict=False):
            values[f"relevance/{name}"] = value
            values[f"share/{name}"] = value / total if total else 0.0
        for name, region in self.regions.items():
            mask = self._mask(name, region, batch, each.shape, len(out.batch_size))
            inside = each.masked_fill(~mask, 0.0)[counting].mean(0).sum().item()
            values[f"region/{name}"] = inside / total if total else 0.0
        if ("ledger", "gap") in out.keys(True):
            target, gap = (
                out["ledger", name].double().reshape(len(each), -1)[counting].abs()
                for name in ("target", "gap")
            )
            values["gap"] = (gap.max() / target.mean().clamp(min=torch.finfo(torch.float64).tiny)).item()
        return values

    def _names(self, shape: torch.Size) -> Sequence[str]:
        count = shape.numel()
        if self.features is None:
            return [str(i) for i in range(count)] if len(shape) <= 1 and count <= _MOST_FEATURES else []
        if len(self.features) != count:
            raise ValueError(f"there are {len(self.features)} names for {count} features of {self.key!r}")
        return self.features

    def _mask(
        self, name: str, region: Region, batch: TensorDictBase, shape: torch.Size, batch_dims: int
    ) -> Tensor:
        mask: object = region if isinstance(region, Tensor) else region(batch)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"the region {name!r} is {kind}; a mask is a boolean tensor")
        if not isinstance(region, Tensor) and mask.shape[:batch_dims] == batch.batch_size:
            mask = mask.reshape(shape[0], *mask.shape[batch_dims:])
        try:
            fitting: Tensor = mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"the region {name!r} of shape {tuple(mask.shape)} does not fit {self.key!r}, whose features have the "
                f"shape {tuple(shape[1:])}"
            ) from None
        return fitting

    def _drift(self, probe: TensorDictBase) -> dict[str, float]:
        valid = self._valid(probe)
        counting = slice(None) if valid is None else valid.flatten()
        out = self._explain(probe, valid)
        now = out[self._entry].detach().double().reshape(out.batch_size.numel(), -1)[counting].clone()
        before = {"previous": self._previous, "first": self._first}
        self._previous, self._first = now, now if self._first is None else self._first
        return {
            f"drift/{name}": math.nan if old is None else drift(now, old.to(now.device)).mean().item()
            for name, old in before.items()
        }

    def _note(self, values: Mapping[str, float], step: int) -> None:
        checks = len(self.history["step"])
        self.history["step"].append(step)
        for name in {**self.history, **values}:
            if name != "step":
                series = self.history.setdefault(name, [math.nan] * checks)
                series.append(values.get(name, math.nan))
        if self.logger is not None:
            for name, value in values.items():
                if not math.isnan(value):
                    self.logger.log_scalar(f"{self.prefix}/{name}", value, step=step)


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Have all modules in evaluation mode, and each as it was afterwards."""
    modes = [(module, module.training) for module in modules_of(root).values()]

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode

    with undone(put_back):
        for module, _ in modes:
            module.training = False
        yield
