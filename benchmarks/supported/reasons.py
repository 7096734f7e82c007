"""Why some models fail, where their numbers do not tell: found by hand, each by changing what is named and no more."""

from __future__ import annotations

__all__ = ["REASONS"]

ZERO = "exactly zero, so that the relevance flow has nothing to hand on"
CHOICE = f"choices that were not taken, `hard - soft.detach() + soft`, are {ZERO}"
CODES = f"codes that are rounded to zero, `x + (round(x) - x).detach()`, are {ZERO}"
GATES = (
    "the pass rule at the gates of squeezed channels multiplies by `sigmoid(x) / x`, which is large where `x` is small,"
    " block after block, to more than single precision holds; by `(Type(nn.Sigmoid), EpsilonRule())` it is below 0.01"
)
REASONS: dict[str, str] = {
    "efficientnet_b7": GATES,
    "efficientnet_v2_l": GATES,
    "groupvit": CHOICE,
    "groupvit_vision_model": CHOICE,
    "neucodec": CODES,
    "raft_small": f"gates of its recurrent cell are one even in double precision: `1 - z` is {ZERO}",
    "reformer": "its own backward pass runs in training mode alone",
    "sam3_video": "its images are of 1,008 by 1,008 pixels, 5,184 tokens: a pass takes half a minute",
    "xcodec2": CODES,
}
"""By name, for a model that is not ok; of one that is, nothing is said."""
