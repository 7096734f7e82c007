"""What is compared with a reference: models, batches, and the call that explains them."""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

FLOWS = ("relevance", "gradient")


PRESETS = (
    "attn_lrp",
    "cp_lrp",
    "deeplift",
    "deeplift_reveal_cancel",
    "deeplift_shapley",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "lstm_lrp",
)


def td_of(x: Tensor, dims: int = 1) -> TensorDict:
    return TensorDict({"input": x}, batch_size=x.shape[:dims])


def explained(
    model: nn.Module, x: Tensor, baseline: object, composite: object = "deeplift", **options: object
) -> TensorDict:
    options.setdefault("target", Target("output", 0))
    with LRP(composite, baseline=baseline, on_unmatched="raise", **options).prepare(model) as run:
        return run(td_of(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
