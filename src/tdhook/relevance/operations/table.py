"""What each operation does with relevance where no composite says otherwise.

Every function is one of: data movement and winner-take-all, which plain backward passes treat rightly in both
conventions; element-wise, which pass; arithmetic with the generic epsilon rule; or one with a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdhook.relevance.operations.placing import leaves_some, may_meet
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.relevance.rules.attention import AttentionRule
from tdhook.relevance.rules.epsilon import EpsilonRule, SoftmaxEpsilonRule, UniformEpsilonRule
from tdhook.relevance.rules.normalisation import LayerNormRule
from tdhook.relevance.rules.products import FactorsRule, SignalTakeAllRule
from tdhook.relevance.rules.recurrent import RecurrentRule
from tdhook.relevance.rules.simple import IgnoreRule, PassRule
from tdhook.selectors.kinds import (
    AFFINE,
    ELEMENTWISE,
    FUSED,
    HOMOGENEOUS,
    MOVES,
    NORMS,
    PRODUCTS,
    RECURRENT,
    TAYLOR,
    WINNER,
)
from tdhook.tape.functions import on_tape
from tdhook.tape.origins import made_by

__all__ = ["ARITHMETIC", "OPERATIONS", "default_rule"]


ARITHMETIC = EpsilonRule(rounding)
"""The generic epsilon rule: for arithmetic that nothing else is known of."""

OPERATIONS: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES | WINNER, IgnoreRule()),
    **dict.fromkeys(ELEMENTWISE, PassRule()),
    **dict.fromkeys(AFFINE | HOMOGENEOUS | TAYLOR, ARITHMETIC),
    **dict.fromkeys(PRODUCTS, UniformEpsilonRule(rounding)),
    **dict.fromkeys(("div", "grid_sampler", "grid_sample"), SignalTakeAllRule()),
    **dict.fromkeys(NORMS, LayerNormRule()),
    **dict.fromkeys(("cumprod", "prod"), FactorsRule()),
    "linalg_solve": SignalTakeAllRule(1),
    "softmax": SoftmaxEpsilonRule(),
    "scaled_dot_product_attention": AttentionRule(),
    **dict.fromkeys(RECURRENT, RecurrentRule()),
}
"""The rule of each operation, by name."""

_Dependence: TypeAlias = Callable[[Rule | None, Sequence[object], Mapping[str, object]], "Rule | None"]
_MOVES, _PASSES, _NORMALISES, _FACTORS = IgnoreRule(), PassRule(), LayerNormRule(), FactorsRule()
_TAKES_ALL = SignalTakeAllRule(0), SignalTakeAllRule(1)


def default_rule(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """The rule of one call of an operation.

    Args:
        name: the operation.
        args: its arguments, or nothing to ask whether all of its calls merely move data.
        kwargs: its arguments by name.

    Returns:
        The rule, or ``None`` for an operation that is made of others or unknown.
    """
    rule = OPERATIONS.get(name)
    if not args and not kwargs:
        return None if name in _DEPENDS else rule
    if name in _DEPENDS:
        return _DEPENDS[name](rule, args, kwargs)
    if name in ELEMENTWISE and not _of_one(args, kwargs):
        return ARITHMETIC
    return rule


def _live(values: Iterable[object]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and on_tape(x)]


def _of_one(args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether an element-wise function has one argument on the tape, of the shape of its result."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    live = _live(tensors)
    if len(live) != 1 or live[0].is_complex():
        return False
    return len(tensors) == 1 or torch.broadcast_shapes(*(x.shape for x in tensors)) == live[0].shape


def _given(
    args: Sequence[object], kwargs: Mapping[str, object], index: int, key: str, default: object
) -> Any:
    return args[index] if len(args) > index else kwargs.get(key, default)


def _fused(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """A sum and a product: of activations, it is written out."""
    factors = [*args[1:3], *(x for key, x in kwargs.items() if key not in ("input", "out"))]
    return None if len(_live(factors)) > 1 else ARITHMETIC


def _linear(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    weight = _given(args, kwargs, 1, "weight", None)
    return None if isinstance(weight, Tensor) and on_tape(weight) else ARITHMETIC


def _convolution(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    weight = _given(args, kwargs, 1, "weight", None)
    return OPERATIONS["matmul"] if isinstance(weight, Tensor) and on_tape(weight) else ARITHMETIC


def _lerp(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    weight = _given(args, kwargs, 2, "weight", None)
    return None if isinstance(weight, Tensor) and on_tape(weight) else ARITHMETIC


def _div(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    numerator, denominator = _given(args, kwargs, 0, "input", None), _given(args, kwargs, 1, "other", None)
    if kwargs.get("rounding_mode") is not None or not _live((numerator,)):
        return _PASSES if _of_one(args, kwargs) else ARITHMETIC
    return rule if _live((denominator,)) else ARITHMETIC


def _solve(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """``A^-1 b`` is a quotient, whose denominator is held constant where ``b`` can take all."""
    both = _live((_given(args, kwargs, 0, "A", None),)) and _live((_given(args, kwargs, 1, "B", None),))
    return rule if both else ARITHMETIC


def _batch_norm(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """``torch.batch_norm`` and ``torch.instance_norm``; those of ``torch.nn.functional`` are entered."""
    if len(args) < 6:
        return None
    return _NORMALISES if args[5] else ARITHMETIC


def _places(name: str) -> _Dependence:
    """Sums, where values are added to what is there; else what is written last to a place takes all."""
    index = {"index_put": 3, "put": 3}.get(name)

    def rule_of(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
        if index is not None and _given(args, kwargs, index, "accumulate", False):
            return ARITHMETIC
        reduces = kwargs.get("reduce") is not None
        return None if reduces or leaves_some(name, args, kwargs) or may_meet(name, args, kwargs) else _MOVES

    return rule_of


def _scatters(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    if leaves_some("scatter_reduce", args, kwargs):
        return None
    return _reduces(4)(rule, args, kwargs)


def _adds(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    return None if leaves_some("scatter_add", args, kwargs) else rule


def _reduces(index: int) -> _Dependence:
    """What is reduced by groups is a product, or linear, or picks values; ``index`` is where ``reduce`` is given."""

    def rule_of(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
        return _FACTORS if _given(args, kwargs, index, "reduce", None) == "prod" else rule

    return rule_of


def _embedding(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """Rows that are picked; what its derivative leaves out, or divides by how often they are, is written out."""
    padding = _given(args, kwargs, 2, "padding_idx", None)
    rarely = _given(args, kwargs, 5, "scale_grad_by_freq", False)
    plain = (padding is None or padding == -1) and not rarely
    return _bag(rule, args, kwargs) if plain else None


def _bag(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """What makes the rows of its table shorter is refused where it is written out."""
    return rule if _given(args, kwargs, 3, "max_norm", None) in (None, False) else None


def _dropout(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """In training it passes: to run it again, as arithmetic is, would drop others."""
    training = _given(args, kwargs, 2, "training", True)
    return _PASSES if training else _MOVES


def _mul(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """Of ``x * rsqrt(y)``, a quotient, the denominator is held constant; of ``x * exp(y)`` the scale, or decay.

    Relevance of an exponential would go to an exponent that is often zero or nearly so where recurrent and state-space
    models compute (``exp(a - max(a, b))``, ``exp(a - a)``), and that has no share in ``exp(0) = 1``.
    """
    factors = [_given(args, kwargs, 0, "input", None), _given(args, kwargs, 1, "other", None)]
    if len(_live(factors)) == 2:
        signals = [i for i, x in enumerate(factors) if not made_by(x, _SCALES)]
        if len(signals) == 1:
            return _TAKES_ALL[signals[0]]
    return rule


def _of_two(rule: Rule | None, args: Sequence[object], kwargs: Mapping[str, object]) -> Rule | None:
    """Functions of two activations that are no sum of their shares are written out."""
    if len(_live((*args, *kwargs.values()))) > 1:
        return None
    return rule if _of_one(args, kwargs) else ARITHMETIC


_SCALES = frozenset(("rsqrt", "reciprocal", "rdiv", "exp", "exp2"))

_DEPENDS: Mapping[str, _Dependence] = {
    **dict.fromkeys(FUSED, _fused),
    **dict.fromkeys((name for name in AFFINE if name.startswith("conv")), _convolution),
    **dict.fromkeys(
        (name for name in AFFINE if name.endswith("dropout") or name.startswith("dropout")), _dropout
    ),
    **{name: _places(name) for name in ("index_copy", "index_put", "put", "scatter", "setitem")},
    "index_reduce": _reduces(4),
    "scatter_add": _adds,
    "scatter_reduce": _scatters,
    "segment_reduce": _reduces(1),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("float_power", "floor_divide", "pow", "xlogy"), _of_two),
    "div": _div,
    "embedding": _embedding,
    "embedding_bag": _bag,
    "lerp": _lerp,
    "linalg_solve": _solve,
    "linear": _linear,
    "mul": _mul,
}
