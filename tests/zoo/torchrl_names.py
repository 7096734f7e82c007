"""Names in torchrl.modules without a case, and why."""

from __future__ import annotations


def _because(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


NO_MODEL: dict[str, str] = {
    **_because("the base class of models", "ValueNorm MPCPlannerBase MCTSScore"),
    **_because("names others", "MCTSScores distributions_maps functional"),
    **_because("removed from torchrl", "AdditiveGaussianWrapper EGreedyWrapper NormalParamWrapper"),
    **_because("removed from torchrl", "OrnsteinUhlenbeckProcessWrapper"),
    **_because("no function of what is observed", "RandomPolicy"),
    **_because("searches in a model, with a model that has a case of its own", "CEMPlanner MPPIPlanner"),
    **_because(
        "scores nodes of a search tree by how often they were visited", "EXP3Score PUCTScore UCBScore"
    ),
    **_because("scores nodes of a search tree by how often they were visited", "UCB1TunedScore"),
    **_because("normalises targets in a loss, and has no forward", "PercentileValueNorm PopArtValueNorm"),
    **_because("normalises targets in a loss, and has no forward", "RunningValueNorm"),
    **_because(
        "a setting", "RecurrentMatmulPrecision RecurrentMatmulPrecisionUserMode ReparamGradientStrategy"
    ),
    **_because("a setting", "get_recurrent_matmul_precision recurrent_mode set_recurrent_matmul_precision"),
    **_because("about environments and data", "canonicalize_rnn_subset get_env_transforms_from_module"),
    **_because(
        "about environments and data", "get_primers_from_module set_exploration_modules_spec_from_env"
    ),
}
"""What maps no observation to values or to parameters of actions."""

NOT_HERE: dict[str, str] = {
    "GPWorldModel": "needs botorch and gpytorch",
}
"""What such a model is, and could not be made."""
