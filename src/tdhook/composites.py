"""Composites: ordered lists of ``(selector, rule)``, first match wins; and the presets, which are such lists.

``[(Reads("pixels"), FlatRule())] + epsilon_plus()`` is a preset with another rule for the layer that reads the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from tdhook.attribution.lrp_helpers.layers import Sum
from tdhook.attribution.lrp_helpers.params import Stabilizer, ZeroParams
from tdhook.attribution.lrp_helpers.rule import Rule, rule_from_dict
from tdhook.attribution.lrp_helpers.rules.attention import AttentionRule
from tdhook.attribution.lrp_helpers.rules.epsilon import EpsilonRule, NormRule, SoftmaxEpsilonRule
from tdhook.attribution.lrp_helpers.rules.gradient import (
    ReLUBetaSmoothRule,
    ReLUDeconvNetRule,
    ReLUGuidedBackpropRule,
)
from tdhook.attribution.lrp_helpers.rules.normalisation import LayerNormRule
from tdhook.attribution.lrp_helpers.rules.products import ConstantRule, SignalTakeAllRule
from tdhook.attribution.lrp_helpers.rules.recurrent import RecurrentRule
from tdhook.attribution.lrp_helpers.rules.signed import AlphaBetaRule, GammaRule, ZBoxRule, ZPlusRule
from tdhook.attribution.lrp_helpers.rules.simple import IgnoreRule, PassRule
from tdhook.attribution.lrp_helpers.rules.squares import FlatRule
from tdhook.attribution.lrp_helpers.types import Activation, AvgPool, BatchNorm, Convolution, Linear, MaxPool
from tdhook.selectors import First, Op, Selector, SelectorLike, Type, Where, as_selector
from tdhook.sites import Site

__all__ = [
    "PRESETS",
    "BaseRuleMapper",
    "Composite",
    "EpsilonPlus",
    "attn_lrp",
    "beta_smooth",
    "cp_lrp",
    "deconvnet",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "guided_backprop",
    "lstm_lrp",
    "preset",
]

RuleMapper: TypeAlias = "Callable[[str, nn.Module], Rule | None]"
Pairs: TypeAlias = "Iterable[tuple[SelectorLike, Rule]]"


class Composite:
    """An ordered list of ``(selector, rule)`` pairs, of which the first match wins.

    It is a value: printed, compared, concatenated with ``+``, written to plain data. It is also a rule mapper,
    ``composite(name, module) -> Rule or None``.

    Args:
        pairs: the list; what is not a selector stands for the obvious one (see
            :func:`tdhook.selectors.as_selector`).

    Raises:
        TypeError: a pair is not one of a selector and a rule.
    """

    def __init__(self, pairs: Pairs = ()) -> None:
        self.pairs: tuple[tuple[Selector, Rule], ...] = tuple(_as_pair(pair) for pair in pairs)

    def find(self, site: Site) -> tuple[Selector, Rule] | None:
        """The first pair whose selector matches ``site``."""
        for selector, rule in self.pairs:
            if site.operation is not None and not selector.reaches_operations:
                continue
            if isinstance(rule, _Mapped):
                found = rule.mapper(site.name, site.module)
                if found is not None:
                    return selector, found
            elif selector.matches(site):
                return selector, rule
        return None

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule for one module, seen without the model around it.

        Raises:
            ValueError: a selector depends on the execution order of a whole model.
        """
        pair = self.find(Site(name, module))
        return None if pair is None else pair[1]

    @property
    def needs_execution(self) -> bool:
        """Whether matching depends on the order in which the model runs its modules."""
        return any(selector.needs_execution for selector, _ in self.pairs)

    @property
    def on_operations(self) -> tuple[tuple[Selector, Rule], ...]:
        """The pairs that can mean operations."""
        return tuple(pair for pair in self.pairs if pair[0].reaches_operations)

    def __add__(self, other: Composite | Pairs) -> Composite:
        return Composite((*self.pairs, *Composite(other).pairs))

    def __radd__(self, other: Pairs) -> Composite:
        return Composite(other) + self

    def __iter__(self) -> Iterator[tuple[Selector, Rule]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __eq__(self, other: object) -> bool:
        return self.pairs == other.pairs if isinstance(other, Composite) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __repr__(self) -> str:
        lines = "".join(f"\n    ({selector!r}, {rule!r})," for selector, rule in self.pairs)
        return f"{type(self).__name__}([{lines}\n])" if lines else f"{type(self).__name__}([])"

    def to_dict(self) -> dict[str, Any]:
        """This composite as plain data, fit for TOML and JSON.

        Raises:
            TypeError: it holds a callable, which is not data.
        """
        return {"pairs": [{"select": selector.to_dict(), **rule.to_dict()} for selector, rule in self.pairs]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Composite:
        """Make a composite from plain data: ``{"pairs": [{"select": ..., "rule": ..., **arguments}]}``.

        ``{"preset": name, **parameters}`` stands for a preset; with ``pairs`` beside it, these come first.

        Raises:
            ValueError: the data is not that of a composite.
        """
        content = dict(data)
        pairs = content.pop("pairs", [])
        name = content.pop("preset", None)
        if name is None and (content or "pairs" not in data):
            raise ValueError(
                f"a composite is given by 'pairs', 'preset' or both; got {sorted(map(str, data))}"
            )
        if not isinstance(pairs, list | tuple):
            raise ValueError(f"'pairs' is a list, and each of 'pairs' has 'select' and 'rule'; got {pairs!r}")
        own = []
        for entry in pairs:
            if not isinstance(entry, Mapping) or "select" not in entry or "rule" not in entry:
                raise ValueError(f"each of 'pairs' has 'select' and 'rule', got {entry!r}")
            rule = {key: value for key, value in entry.items() if key != "select"}
            own.append((Selector.from_dict(entry["select"]), rule_from_dict(rule)))
        return Composite(own) if name is None else own + preset(name, **content)


class _Mapped(IgnoreRule):
    """Stands in a composite for the rule that a user's mapper gives, where it gives one."""

    def __init__(self, mapper: RuleMapper) -> None:
        super().__init__()
        self.mapper = mapper


def _as_pair(pair: Any) -> tuple[Selector, Rule]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"a composite is a list of (selector, rule) pairs, got {pair!r}")
    selector, rule = pair
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise TypeError(f"a composite pairs selectors with rules: write {rule.__name__}(...), not the class")
    if not isinstance(rule, Rule):
        raise TypeError(f"a composite pairs selectors with rules, got {rule!r} of type {type(rule).__name__}")
    return as_selector(selector), rule


def _base(stabilizer: Stabilizer) -> list[tuple[SelectorLike, Rule]]:
    """What needs no thought: activations, normalisation, pooling, data movement."""
    return [
        ((Activation, BatchNorm), PassRule()),
        ((MaxPool, nn.Identity, nn.Dropout, nn.Flatten), IgnoreRule()),
        ((Sum, AvgPool), NormRule(stabilizer)),
    ]


def _first_flat(stabilizer: Stabilizer) -> list[tuple[SelectorLike, Rule]]:
    return [(First(Type(Linear)), FlatRule(stabilizer))]


def epsilon(
    epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """Epsilon for all linear layers (Bach et al. 2015, eq. 58)."""
    return Composite([(Linear, EpsilonRule(epsilon, zero_params)), *_base(stabilizer)])


def epsilon_plus(
    epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """z-plus for convolutions, epsilon for fully connected layers (Lapuschkin et al. 2017)."""
    return Composite(
        [
            (Convolution, ZPlusRule(stabilizer, zero_params)),
            (Linear, EpsilonRule(epsilon, zero_params)),
            *_base(stabilizer),
        ]
    )


def epsilon_plus_flat(
    epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """:func:`epsilon_plus` with the flat rule for the first linear layer."""
    return _first_flat(stabilizer) + epsilon_plus(epsilon, stabilizer, zero_params)


def epsilon_alpha2_beta1(
    epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """alpha-beta with ``(2, 1)`` for convolutions, epsilon for fully connected layers."""
    return Composite(
        [
            (Convolution, AlphaBetaRule(2.0, 1.0, stabilizer, zero_params)),
            (Linear, EpsilonRule(epsilon, zero_params)),
            *_base(stabilizer),
        ]
    )


def epsilon_alpha2_beta1_flat(
    epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
) -> Composite:
    """:func:`epsilon_alpha2_beta1` with the flat rule for the first linear layer."""
    return _first_flat(stabilizer) + epsilon_alpha2_beta1(epsilon, stabilizer, zero_params)


def epsilon_gamma_box(
    low: float | Tensor,
    high: float | Tensor,
    epsilon: Stabilizer = 1e-6,
    gamma: float = 0.25,
    stabilizer: Stabilizer = 1e-6,
    zero_params: ZeroParams = None,
) -> Composite:
    """z-box for the first convolution, gamma for the others, epsilon for fully connected layers.

    ``low`` and ``high`` are the least and largest value of the input, as floats or tensors that broadcast against it.
    """
    return Composite(
        [
            (First(Type(Convolution)), ZBoxRule(low, high, stabilizer, zero_params)),
            (Convolution, GammaRule(gamma, stabilizer, zero_params)),
            (Linear, EpsilonRule(epsilon, zero_params)),
            *_base(stabilizer),
        ]
    )


def excitation_backprop(stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> Composite:
    """z-plus for all linear layers (Zhang et al. 2016)."""
    return Composite([(Linear, ZPlusRule(stabilizer, zero_params)), *_base(stabilizer)])


def guided_backprop() -> Composite:
    """The gradient, let through ReLUs only where both it and the activation are positive (Springenberg et al. 2015)."""
    return Composite([(Type(nn.ReLU) | Op("relu"), ReLUGuidedBackpropRule())])


def deconvnet() -> Composite:
    """The gradient, let through ReLUs only where it is positive (Zeiler and Fergus 2014)."""
    return Composite([(Type(nn.ReLU) | Op("relu"), ReLUDeconvNetRule())])


def beta_smooth(beta: float = 10.0) -> Composite:
    """The gradient, with that of softplus in place of ReLU's (Dombrowski et al. 2019)."""
    return Composite([(Type(nn.ReLU) | Op("relu"), ReLUBetaSmoothRule(beta))])


def attn_lrp() -> Composite:
    """AttnLRP, for transformers (Achtibat et al. 2024), in the gradient flow: one forward and one backward pass.

    Attention (Prop. 3.1 and 3.3) and softmax (Prop. 3.1) are linearised at their inputs, normalisation has its
    statistics held constant (Prop. 3.4), and activations pass (the identity rule). Everything else has the default of
    its operation, which is the paper's: epsilon for what is linear, equal parts for products (Prop. 3.3), denominators
    held constant (Prop. 3.4: normalisation that is written out by hand).
    """
    return _transformer(values_only=False)


def _transformer(values_only: bool) -> Composite:
    return Composite(
        [
            (Op("scaled_dot_product_attention"), AttentionRule(values_only)),
            (Op("softmax"), ConstantRule() if values_only else SoftmaxEpsilonRule()),
            (Op("layer_norm", "rms_norm", "group_norm"), LayerNormRule()),
            (Activation, PassRule()),
        ]
    )


def cp_lrp() -> Composite:
    """CP-LRP, for transformers (Ali et al. 2022): :func:`attn_lrp` with attention weights held constant.

    Values take all relevance of attention, queries and keys none (the "AH" rule there), and normalisation has its
    standard deviation held constant (the "LN" rule there).
    """
    return _transformer(values_only=True)


def lstm_lrp(epsilon: Stabilizer = 1e-3) -> Composite:
    """Signal-take-all, for LSTM and GRU, fused or written out by hand (Arras et al. 2017 and 2019).

    Products of a gate and a signal give all relevance to the signal ("LRP-all" there), weighted sums and sums share it
    by epsilon with the bias included (eq. 2 of Arras et al. 2017), and activations pass.
    """
    return Composite(
        [
            (Type(Linear) | Op("linear", "add", "sub"), EpsilonRule(epsilon)),
            (Op("mul"), SignalTakeAllRule()),
            (Op("lstm", "lstm_cell", "gru", "gru_cell", "rnn_*"), RecurrentRule()),
            (Activation, PassRule()),
        ]
    )


PRESETS: dict[str, Callable[..., Composite]] = {
    function.__name__: function
    for function in (
        epsilon,
        epsilon_plus,
        epsilon_plus_flat,
        epsilon_alpha2_beta1,
        epsilon_alpha2_beta1_flat,
        epsilon_gamma_box,
        excitation_backprop,
        guided_backprop,
        deconvnet,
        beta_smooth,
        attn_lrp,
        cp_lrp,
        lstm_lrp,
    )
}


def preset(name: str, **parameters: Any) -> Composite:
    """The preset of that name: ``preset("epsilon_gamma_box", low=0.0, high=1.0)``.

    Raises:
        ValueError: no preset has that name, or it does not take these parameters.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset is named {name!r}; presets are {', '.join(PRESETS)}")
    try:
        return PRESETS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"preset {name!r}: {error}") from error


class BaseRuleMapper(Composite):
    """What needs no thought: pass for activations and batch norm, epsilon for sums and average pooling.

    Args:
        stabilizer: the stabiliser of all rules but epsilon.
        rule_mapper: asked first, ``(name, module) -> Rule or None``.
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, rule_mapper: RuleMapper | None = None) -> None:
        asked = [] if rule_mapper is None else [(Where(rule_mapper), _Mapped(rule_mapper))]
        super().__init__([*asked, *self._pairs(stabilizer)])

    def _pairs(self, stabilizer: Stabilizer) -> Pairs:
        return _base(stabilizer)


class EpsilonPlus(BaseRuleMapper):
    """:func:`epsilon_plus` as a mapper that asks the user's mapper first.

    Args:
        epsilon: the stabiliser of the epsilon rule.
        stabilizer: that of all others.
        rule_mapper: asked first, ``(name, module) -> Rule or None``.
    """

    def __init__(
        self, epsilon: Stabilizer = 1e-6, stabilizer: Stabilizer = 1e-6, rule_mapper: RuleMapper | None = None
    ) -> None:
        self._epsilon = epsilon
        super().__init__(stabilizer, rule_mapper)

    def _pairs(self, stabilizer: Stabilizer) -> Pairs:
        return epsilon_plus(self._epsilon, stabilizer)
