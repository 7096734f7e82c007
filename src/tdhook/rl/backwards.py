"""Relevance back through one transform of an environment."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.attribution.lrp import LRP
from tdhook.conventions import Convention
from tdhook.keys import parts_of
from tdhook.relevance.operations.table import ARITHMETIC, default_rule
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.relevance.rules.epsilon import EpsilonRule
from tdhook.relevance.rules.simple import PassRule
from tdhook.selectors import Op
from tdhook.selectors.kinds import AFFINE, PRODUCTS
from tdhook.tape.functions import on_tape

if TYPE_CHECKING:
    from torchrl.envs import Transform

__all__ = ["Back", "applied", "nonzero"]

_GIVEN = "_relevance"
# Of the relevance of a step, what may be missing or too much behind a transform: rounding, in single precision.
_TOLERANCE = 1e-4
# In units of the largest value: so that of zeros, which contribute nothing, each has a share by its weight.
_SHIFT = 1e-6


class Back:
    """Takes relevance back through one transform, which is explained as a model is.

    Operations have their usual rules: data movement is undone, element-wise functions pass, sums hand out in proportion
    to contributions. But a constant that is added takes no share.

    Args:
        step: the transform, which is left as it is.
        reads: keys of the observations before it.
        writes: keys behind it whose relevance is taken back.
    """

    def __init__(self, step: Transform, reads: Sequence[NestedKey], writes: Sequence[NestedKey]) -> None:
        self.writes = list(writes)
        self._name = type(step).__name__
        self._step = _Step(step, list(reads), self.writes)
        self._reads = list(reads)
        method = LRP(
            [(Op(*_SHIFTS, *_SCALES), _ConstantRule()), (Op(*AFFINE, *PRODUCTS), _SharesRule(rounding))],
            target=self._seeds,
            attribution_key="r",
            on_unmatched="ignore",
        )
        self._explained = method.wrap(self._step, in_keys=self._reads, out_keys=self.writes)

    def __call__(
        self, values: Mapping[NestedKey, Tensor], relevance: Mapping[NestedKey, Tensor]
    ) -> dict[NestedKey, Tensor]:
        """Relevance ``[rows, *shape]`` of what the transform reads, given that of what it writes.

        Raises:
            ValueError: the transform does not let it through.
        """
        rows = len(relevance[self.writes[0]])
        work = TensorDict(dict(values), [rows])
        for key in self.writes:
            work.set((_GIVEN, *parts_of(key)), relevance[key])
        before = _state(self._step)
        try:
            result = self._explained(work)
        except Exception as error:  # a transform can do anything, and so fail in any way
            raise ValueError(
                f"relevance does not go back through {self._name}: {error}. {_WAY_OUT}"
            ) from error
        if not _same_state(before, _state(self._step)):
            raise ValueError(
                f"relevance does not go back through {self._name}, which remembers steps. {_WAY_OUT}"
            )
        like = relevance[self.writes[0]]
        found = {key: result.get(("r", *parts_of(key))).to(like) for key in self._reads}
        arrived, put_in = (
            _sums([parts[key] for key in keys])
            for parts, keys in ((found, self._reads), (relevance, self.writes))
        )
        size = _sums([relevance[key].abs() for key in self.writes])
        if not bool(((arrived - put_in).abs() <= _TOLERANCE * size).all()):
            raise ValueError(f"relevance is not conserved on its way back through {self._name}. {_WAY_OUT}")
        return found

    def depends_on_values(
        self, like: Mapping[NestedKey, Tensor], relevance: Mapping[NestedKey, Tensor]
    ) -> bool:
        """Whether shares depend on what the transform is given, as they do where it mixes values."""
        generator = torch.Generator().manual_seed(0)

        def drawn(x: Tensor) -> Tensor:
            return 0.5 + torch.rand(x.shape, generator=generator).to(x)

        given = {key: drawn(relevance[key]) for key in self.writes}
        first, second = (self({key: drawn(x) for key, x in like.items()}, given) for _ in range(2))
        return not all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-4) for key in first)

    def _seeds(self, outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        given = {key: inputs.get((_GIVEN, *parts_of(key))).to(outputs.get(key)) for key in self.writes}
        return TensorDict(given, outputs.batch_size)


_SHIFTS = ("add", "sub", "rsub")
_SCALES = ("mul", "div", "neg", "deg2rad", "rad2deg")
_WAY_OUT = "Leave it out, or do what it does inside the policy, where it is explained with it"


class _Step(nn.Module):
    """A copy of a transform as a function of tensors."""

    def __init__(self, step: Transform, reads: list[NestedKey], writes: list[NestedKey]) -> None:
        super().__init__()
        self.step, self.reads, self.writes = _copied(step), reads, writes

    def forward(self, *tensors: Tensor) -> object:
        work = TensorDict(dict(zip(self.reads, tensors, strict=True)), tensors[0].shape[:1])
        for key in self.step.in_keys:  # rewards and the like, which are moved beside what is observed
            if key not in work:
                work.set(key, tensors[0].new_zeros(len(tensors[0]), 1))
        result = self.step._step(work.copy(), work)
        written = tuple(result.get(key).clone() for key in self.writes)
        return written[0] if len(written) == 1 else written


class _SharesRule(EpsilonRule):
    """Shares by contribution, of which none is kept for a stabiliser."""

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """Products of values that are observed run as usual."""
        shares = super().running(module, flow)

        def run(call: Call) -> object:
            if _observed(call) < 2:
                return shares(call)
            rule = default_rule(cast(Operation, module).name, call.args, call.kwargs) or ARITHMETIC
            return rule.bound(module, flow)(call)

        return run


class _ConstantRule(PassRule):
    """All relevance to what a constant is added to, or what is scaled by one, whatever its value is."""

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """Values that are observed share it by their contributions when they are added."""
        passed, shifts = super().running(module, flow), cast(Operation, module).name in _SHIFTS
        shares = (EpsilonRule(rounding) if shifts else _SharesRule(rounding)).bound(module, flow)
        return lambda call: passed(call) if _keeps_shape(call) else shares(call)


def _keeps_shape(call: Call) -> bool:
    """Whether one value depends on what is observed, and what becomes of it has its shape."""
    tensors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
    observed = [x for x in tensors if on_tape(x)]
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return len(observed) < 2 and all(x.shape == shape for x in observed)


def _observed(call: Call) -> int:
    """How many of the arguments depend on what is observed."""
    return sum(isinstance(x, Tensor) and on_tape(x) for x in (*call.args, *call.kwargs.values()))


def applied(step: Transform, td: TensorDictBase) -> TensorDictBase:
    """What a transform makes of observations; neither it nor ``td`` is changed."""
    with torch.no_grad():
        result: TensorDictBase = _copied(step)._step(td.copy(), td.copy())
    return result


def nonzero(x: Tensor) -> Tensor:
    """Values, a trifle larger, so that they contribute even where they are zero."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    largest = x.abs().amax()
    return x + _SHIFT * torch.where(largest > 0, largest, 1.0)


def _copied(step: Transform) -> Transform:
    """A transform that belongs to no environment, and whose statistics stay as they are."""
    if hasattr(step, "frozen_copy"):
        return step.frozen_copy()
    return copy.deepcopy(step.clone())


def _state(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if is_lazy(x) else x.clone() for name, x in module.named_buffers()}


def _same_state(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return a.keys() == b.keys() and all(
        x is y if x is None or y is None else torch.equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def _sums(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double().flatten(1).sum(1) for part in parts]).sum(0)
