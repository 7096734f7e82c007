"""Presets: composites of the literature, by name."""

from __future__ import annotations

from torch import Tensor, nn

from tdhook.models.families import Activation, AvgPool, BatchNorm, Convolution, Linear, MaxPool
from tdhook.models.layers import Sum
from tdhook.relevance.composites.composite import PRESETS, Composite
from tdhook.relevance.propagation.params import ZeroParams
from tdhook.relevance.propagation.rule import Rule
from tdhook.relevance.propagation.stabilisers import Stabilizer
from tdhook.relevance.rules.attention import AttentionRule
from tdhook.relevance.rules.epsilon import EpsilonRule, NormRule, SoftmaxEpsilonRule
from tdhook.relevance.rules.gradient import ReLUBetaSmoothRule, ReLUDeconvNetRule, ReLUGuidedBackpropRule
from tdhook.relevance.rules.normalisation import LayerNormRule
from tdhook.relevance.rules.products import ConstantRule, SignalTakeAllRule
from tdhook.relevance.rules.recurrent import RecurrentRule
from tdhook.relevance.rules.reveal import RevealCancelRule, ShapleyRule
from tdhook.relevance.rules.signed import AlphaBetaRule, GammaRule, ZBoxRule, ZPlusRule
from tdhook.relevance.rules.simple import IgnoreRule, PassRule
from tdhook.relevance.rules.squares import FlatRule
from tdhook.selectors import First, Last, Op, SelectorLike, Type
from tdhook.selectors.kinds import MATRIX_PRODUCTS

__all__ = [
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
    "relp",
]


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


def deeplift() -> Composite:
    """DeepLIFT's rescale rule (Shrikumar et al. 2017, eq. 9 to 11), for any model: give a baseline.

    Linear layers share differences by their weights, without a stabiliser, and every operation by its secant, so that
    all of the difference arrives. Averaged over several baselines it is DeepSHAP (Lundberg and Lee 2017).
    """
    return Composite([(Linear, EpsilonRule(0.0)), *_base(0.0)])


def deeplift_reveal_cancel() -> Composite:
    """DeepLIFT with RevealCancel (Shrikumar et al. 2017, section 3.5.3), for any model: give a baseline.

    Linear layers share the difference of the activation behind them by what adds to it and what takes from it; all else
    is as in :func:`deeplift`.
    """
    return _revealing(RevealCancelRule())


def deeplift_shapley() -> Composite:
    """DeepLIFT with about the Shapley values of what contributes to each activation, for any model: give a baseline.

    It is :func:`deeplift_reveal_cancel` with ``ShapleyRule`` in place of the rule there.
    """
    return _revealing(ShapleyRule())


def _revealing(rule: Rule) -> Composite:
    return Composite([(Type(Linear) | Op("linear", "conv*", *MATRIX_PRODUCTS), rule), *_base(0.0)])


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
    its operation, which is the paper's: epsilon for what is linear, batch norm in evaluation among it, wherever it
    stands, equal parts for products (Prop. 3.3), denominators held constant (Prop. 3.4: normalisation that is written
    out by hand).
    """
    return _transformer(values_only=False)


def _transformer(values_only: bool) -> Composite:
    return Composite(
        [
            (Op("scaled_dot_product_attention"), AttentionRule(values_only)),
            (Op("softmax"), ConstantRule() if values_only else SoftmaxEpsilonRule()),
            (Op("layer_norm", "rms_norm", "group_norm"), LayerNormRule()),
            (BatchNorm, IgnoreRule()),
            (Activation, PassRule()),
        ]
    )


def cp_lrp() -> Composite:
    """CP-LRP, for transformers (Ali et al. 2022): :func:`attn_lrp` with attention weights held constant.

    Values take all relevance of attention, queries and keys none (the "AH" rule there), and normalisation has its
    standard deviation held constant (the "LN" rule there).
    """
    return _transformer(values_only=True)


def relp(held: float = 0.4) -> Composite:
    """Relevance patching (Jafari et al. 2025), with less of it held: for coefficients, not for maps.

    As in :func:`cp_lrp`, attention weights and all normalisations but the last are held constant, and products are
    shared equally. To hold the last normalisation is right where the residual stream is replaced by another of the same
    length, and its gradient where little is added to it: a part of each serves both. Activations and cosine similarity,
    a normalisation without a weight, are left to their gradients, so that relevance is not conserved there.

    It is for :class:`~tdhook.attribution.Patching` in one gradient, whose ``"by_share"`` comes nearer in two; the
    paper's own composite is :func:`cp_lrp`.

    Args:
        held: how much of the last normalisation is held constant.
    """
    norm = Last(Type(nn.LayerNorm, nn.RMSNorm, "*RMSNorm"))
    activation = Type(Activation, "transformers.activations.*")
    inside = Op(*_ACTIVATIONS, "cosine_similarity") | (Op("*") & activation)
    pairs: list[tuple[SelectorLike, Rule]] = [
        (norm, LayerNormRule(held)),
        (activation, IgnoreRule()),
        (inside, IgnoreRule()),
    ]
    return Composite(pairs) + _transformer(values_only=True)


_ACTIVATIONS = (
    "elu",
    "gelu",
    "hardswish",
    "leaky_relu",
    "mish",
    "relu*",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
)


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


PRESETS.update(
    {
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
            deeplift,
            deeplift_reveal_cancel,
            deeplift_shapley,
            beta_smooth,
            attn_lrp,
            cp_lrp,
            lstm_lrp,
            relp,
        )
    }
)
