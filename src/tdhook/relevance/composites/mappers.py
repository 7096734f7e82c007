"""Mappers: composites that ask a user's mapper first."""

from __future__ import annotations

from torch import nn

from tdhook.relevance.composites.composite import Composite, Pairs, RuleMapper
from tdhook.relevance.composites.presets import _base, epsilon_plus
from tdhook.relevance.propagation.rule import Rule
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
        super().__init__(self._pairs(stabilizer))
        self._rule_mapper = rule_mapper
        if rule_mapper is not None:
            self.entries = ((Where(rule_mapper), rule_mapper), *self.entries)

    @property
    def decides_itself(self) -> bool:
        """Whether a subclass overrides ``_call``, as those of tdhook 0.3 do, or the call itself."""
        cls = type(self)
        return cls.__call__ is not BaseRuleMapper.__call__ or cls._call is not BaseRuleMapper._call

    def __call__(self, name: str, module: nn.Module) -> Rule | None:
        """The rule for one module: what the user's mapper says, or else what ``_call`` does."""
        rule = None if self._rule_mapper is None else self._rule_mapper(name, module)
        return self._call(name, module) if rule is None else rule

    def _call(self, name: str, module: nn.Module) -> Rule | None:
        return self._rule_for(self.pairs, name, module)

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
