"""Composites: ordered lists of ``(selector, rule)``, first match wins; and the presets, which are such lists.

``[(Reads("pixels"), FlatRule())] + epsilon_plus()`` is a preset with another rule for the layer that reads the pixels.
"""

from tdhook.relevance.composites.composite import PRESETS, Composite, preset
from tdhook.relevance.composites.mappers import BaseRuleMapper, EpsilonPlus
from tdhook.relevance.composites.presets import (
    attn_lrp,
    beta_smooth,
    cp_lrp,
    deconvnet,
    deeplift,
    deeplift_reveal_cancel,
    deeplift_shapley,
    epsilon,
    epsilon_alpha2_beta1,
    epsilon_alpha2_beta1_flat,
    epsilon_gamma_box,
    epsilon_plus,
    epsilon_plus_flat,
    excitation_backprop,
    guided_backprop,
    lstm_lrp,
    relp,
)
from tdhook.relevance.plans.making import DEFAULTS, select

__all__ = [
    "DEFAULTS",
    "PRESETS",
    "BaseRuleMapper",
    "Composite",
    "EpsilonPlus",
    "attn_lrp",
    "beta_smooth",
    "cp_lrp",
    "deconvnet",
    "deeplift",
    "deeplift_reveal_cancel",
    "deeplift_shapley",
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
    "relp",
    "select",
]
