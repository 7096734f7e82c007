"""Mappers: composites that ask a user's mapper first."""

from __future__ import annotations

from tdhook.relevance.composites.composite import Composite, Pairs, RuleMapper, _Mapped
from tdhook.relevance.composites.presets import _base, epsilon_plus
from tdhook.relevance.propagation.stabilisers import Stabilizer
from tdhook.selectors import Where

__all__ = ["BaseRuleMapper", "EpsilonPlus"]


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
