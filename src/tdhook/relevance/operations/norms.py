"""Batch norms in evaluation where a model computes with ``torch.batch_norm``: as the layers that they amount to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.passes.within import Learnt
from tdhook.relevance.propagation.binding import Around, Binding
from tdhook.relevance.propagation.call import Setting
from tdhook.relevance.propagation.rule import Rule
from tdhook.tape.internals import buffers_of, parameters_of, transformed

__all__ = ["Norms"]


class Norms:
    """Finds the layer that a call of ``torch.batch_norm`` amounts to.

    Args:
        rule: that of batch norms which a model calls as functions, if they may be merged into the layer before them.
        flow: the convention of the backward pass.
        setting: what the calls of the plan share.
    """

    def __init__(self, rule: Rule | None, flow: Convention, setting: Setting) -> None:
        self._rule, self._flow, self._setting = rule, flow, setting
        self._layers: Sequence[Binding] = ()
        self._modules: Sequence[nn.Module] = ()
        self._inside: dict[int, Binding] = {}
        self._places: dict[Any, Any] = {}
        self._called: dict[tuple[Any, ...], Binding] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inside": {}, "_places": {}, "_called": {}}

    def begin(self, layers: Sequence[Binding], modules: Sequence[nn.Module]) -> None:
        """Begin a run.

        Args:
            layers: the batch norms inside layers that derive from one, under their rules.
            modules: the modules of the model.
        """
        self._layers, self._modules = layers, modules
        self._look()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Find the same ones in a part of a run that is made once more, for which modules hold other tensors."""
        self._look()
        try:
            yield
        finally:
            self._look()

    def _look(self) -> None:
        means = ((buffers_of(norm.module).get("running_mean"), norm) for norm in self._layers)
        self._inside = {id(mean): norm for mean, norm in means if mean is not None}
        if self._rule is not None and self._setting.merges is not None:
            self._places = {
                _memory(x): (index, name)
                for index, module in enumerate(self._modules)
                for own in (buffers_of, parameters_of)
                for name, x in own(module).items()
            }

    def inside(self, args: tuple[Any, ...]) -> Binding | None:
        """The batch norm inside a layer, by the statistics that a call is given."""
        return self._inside.get(id(args[3]))

    def called(self, args: tuple[Any, ...], around: Around) -> Binding | None:
        """The batch norm that a call amounts to, if its tensors are the model's.

        Args:
            args: what is called with.
            around: runs what is found as one unit.

        Raises:
            Learnt: that the model makes such calls was not known.
        """
        state, merges = args[1:5], self._setting.offered
        if self._rule is None or merges is None or args[5] or state[2] is None or transformed():
            return None
        if not merges.used:
            merges.used = True
            raise Learnt
        # What a run has learnt of a batch norm holds in the next one, which finds its tensors in the same places.
        places = tuple(None if x is None else self._places.get(_memory(x)) for x in state)
        if any(place is None and x is not None for place, x in zip(places, state, strict=True)):
            return None
        norm = self._called.get(places)
        if norm is None:
            layer = nn.BatchNorm1d(1, affine=False, track_running_stats=False)
            norm = self._called[places] = Binding(layer, self._rule, self._flow, around, self._setting)
        _give(norm.module, dict(zip(("weight", "bias", "running_mean", "running_var"), state, strict=True)))
        return norm


def _memory(x: Tensor | None) -> Any:
    """What tells the values of a tensor from others, also of one that was taken off the tape."""
    if x is None or torch.compiler.is_compiling():
        return x if x is None else id(x)
    return x.data_ptr(), x.dtype, x.stride()


def _give(layer: nn.Module, state: Mapping[str, Tensor | None]) -> None:
    for name, x in state.items():
        registry: dict[str, Any] = (parameters_of if name in ("weight", "bias") else buffers_of)(layer)
        registry[name] = x
