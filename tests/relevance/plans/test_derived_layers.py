"""Layers that derive from torch's and compute in their own way: what is said of torch's is not said of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.models.families import BatchNorm

pytestmark = pytest.mark.usefixtures("doubles")

WIDE = 6
LAYERS = {
    "batch norm": (nn.BatchNorm1d, (WIDE,)),
    "identity": (nn.Identity, ()),
    "dropout": (nn.Dropout, ()),
    "pool": (nn.MaxPool1d, (2,)),
    "flatten": (nn.Flatten, ()),
    "average": (nn.AvgPool1d, (2,)),
    "linear": (nn.Linear, (WIDE, WIDE)),
}
BEHIND = {"silu": F.silu, "scaled": lambda z: 1.7 * z, "softmax": lambda z: z.softmax(-1)}
PRESETS = {"attn_lrp": {}, "epsilon_plus": {}, "epsilon_alpha2_beta1": {}, "deeplift": {"baseline": 0.1}}


def derived(kind: type[nn.Module], behind: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """A layer with something behind it, as one class, such as timm's batch norms with their activation."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return behind(kind.forward(self, x))

    return type("Derived", (kind,), {"forward": forward})


def network(layer: nn.Module, *behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, WIDE), layer, *behind, nn.LazyLinear(3)).eval()
    net(torch.randn(3, 4))
    with torch.no_grad():
        for param in net.parameters():
            param += 0.3 * torch.randn_like(param)
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 2.0)
    return net


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("layer", LAYERS)
def test_all_relevance_is_accounted_for(layer: str, behind: str, preset: str) -> None:
    kind, arguments = LAYERS[layer]
    net = network(derived(kind, BEHIND[behind])(*arguments))
    td, found = TensorDict(input=torch.randn(5, 4), batch_size=[5]), {}
    for flow in ("relevance", "gradient"):
        method = LRP(preset, target=Target("output", 1), flow=flow, ledger=True, **PRESETS[preset])
        done = method.wrap(net)(td.clone())
        size = torch.stack([done["ledger", name].abs() for name in ("target", "inputs", "absorbed")]).amax(0)
        assert float((done["ledger", "gap"].abs() / size).max()) < 1e-9
        found[flow] = done["attr", "input"]
    torch.testing.assert_close(found["relevance"], found["gradient"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("preset", ["attn_lrp", "epsilon", "deeplift"])
def test_a_batch_norm_with_its_activation_is_one_after_the_other(preset: str) -> None:
    class Behind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x)

    as_one, apart = network(derived(nn.BatchNorm1d, F.silu)(WIDE)), network(nn.BatchNorm1d(WIDE), Behind())
    apart[1].load_state_dict(as_one[1].state_dict())
    td = TensorDict(input=torch.randn(5, 4), batch_size=[5])
    method = LRP(preset, target=Target("output", 1), **PRESETS.get(preset, {}))
    one, other = (method.wrap(net)(td.clone())["attr", "input"] for net in (as_one, apart))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_computes_as_torchs_does_is_a_batch_norm() -> None:
    class Named(nn.BatchNorm2d):
        pass

    assert isinstance(Named(3), BatchNorm) and isinstance(nn.BatchNorm1d(3), BatchNorm)
    assert not isinstance(derived(nn.BatchNorm2d, F.relu)(3), BatchNorm)
    with pytest.raises(ValueError, match="'1' is a Derived, not a batch norm"):
        LRP("epsilon", target=Target("output", 0), merge_batch_norm=[("0", "1")]).wrap(
            nn.Sequential(nn.Linear(4, 3), derived(nn.BatchNorm1d, F.relu)(3)).eval()
        )(TensorDict(input=torch.randn(2, 4), batch_size=[2]))
