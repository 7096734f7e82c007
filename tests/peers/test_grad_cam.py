"""Activation maps are grad-cam's, which scales each of its maps to ``[0, 1]``."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import cam
from tdhook.attribution.activation_maps import ActivationMap

peer = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed; `nox -s peers` installs it")
pytestmark = pytest.mark.peers

NAMES = ("GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM", "XGradCAM")


def scaled(seen: Tensor) -> Tensor:
    """As they scale: from the least to the largest."""
    flat = seen.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    return (seen - low[:, None, None]) / (1e-7 + high - low)[:, None, None]


@pytest.mark.parametrize("name", NAMES)
def test_the_map(name: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 3)
    )
    x = torch.rand(4, 3, 24, 24)
    method = getattr(cam, name)
    assert issubclass(method, ActivationMap)
    found = method("3", Target("output", 1)).wrap(net)(TensorDict({"input": x}, [4]))
    targets = import_module("pytorch_grad_cam.utils.model_targets")
    theirs = getattr(peer, name)(model=net, target_layers=[net[3]])(
        input_tensor=x, targets=[targets.ClassifierOutputTarget(1)] * 4
    )
    # ours at the layer, resized as theirs is: scaled first, interpolated then
    seen = found["attr", "3"].sum(1).clamp(min=0)
    large = F.interpolate(scaled(seen).unsqueeze(1), (24, 24), mode="bilinear").squeeze(1)
    torch.testing.assert_close(scaled(large), torch.as_tensor(theirs), rtol=1e-3, atol=2e-3)
