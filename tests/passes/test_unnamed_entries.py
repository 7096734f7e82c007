"""Entries that a model reads and does not name: a mask that may be there, a scale that a function takes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential, WrapModule
from torch import Tensor, nn

from tdhook import LRP, References, Target
from tdhook.attribution import IntegratedGradients, Shapley
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.gradient import Gradient
from tdhook.contexts.attribution import Attribution
from tdhook.datasets import Job
from tdhook.evaluation import perturbation_curve
from tdhook.models.reads import tells_what_it_reads
from tdhook.perturbing.draws import Noise
from tdhook.rl import Explain, TDError

TARGET = Target("q", 0)
METHODS = {
    "lrp": lambda **options: LRP("deeplift", target=TARGET, baseline=0.0, **options),
    "paths": lambda **options: IntegratedGradients(target=TARGET, steps=64, **options),
    "features": lambda **options: Shapley(target=TARGET, **options),
}


class Gated(TensorDictModuleBase):
    """Values, times a gate where there is one."""

    in_keys, out_keys = ["observation"], ["q"]

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        gate = tensordict.get("gate", None)
        q = self.net(tensordict["observation"])
        return tensordict.set("q", q if gate is None else q * gate)


class Summed(Gated):
    """Of all that there is."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        found = [x for x in tensordict.values(True, True) if isinstance(x, Tensor) and x.shape[-1:] == (3,)]
        return tensordict.set("q", self.net(torch.stack(found).sum(0).tanh()))


def batch(count: int = 5) -> TensorDict:
    torch.manual_seed(1)
    after = TensorDict({"observation": torch.randn(count, 3).double()}, [count])
    gate = torch.rand(count, 2).double()
    td = TensorDict({"observation": torch.randn(count, 3).double(), "gate": gate, "next": after}, [count])
    return td.set("task", "balance")


def difference(td: TensorDict) -> Tensor:
    zero = td.copy().set("observation", torch.zeros_like(td["observation"]))
    model = Gated()
    return model(td.copy())["q"][:, 0] - model(zero)["q"][:, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["alone", "recorded", "compiled"])
def test_a_gate_that_may_be_there_is_heard(method: str, how: str) -> None:
    options = {"compile": {"backend": "eager"}} if how == "compiled" else {}
    made = METHODS[method](**options)
    explain = Explain(made, Gated()) if how == "recorded" else made.wrap(Gated())
    td = explain(batch())
    assert (td["attr", "observation"].sum(-1) - difference(batch())).abs().max() < 1e-9
    assert "attr" not in td["next"]


def test_it_is_heard_where_features_are_replaced_and_in_jobs(tmp_path) -> None:
    td = METHODS["features"]().wrap(Gated())(batch())
    drop = perturbation_curve(Gated(), td, target=TARGET, batch_dims=1)
    assert torch.allclose(drop.most.value[:, 0] - drop.most.value[:, -1], difference(batch()), atol=1e-9)
    source = batch().memmap(tmp_path / "source")
    job = Job(METHODS["paths"](), Gated(), source, tmp_path / "out")
    job.work()
    assert torch.allclose(job.result().rows["attr", "observation"].sum(-1), difference(batch()), atol=1e-9)


@pytest.mark.parametrize("of", [LRP("deeplift", target=TARGET), Gradient(target=TARGET, signed=True)])
def test_what_is_put_aside_is_not_read(of: Attribution) -> None:
    data = TensorDict({"observation": torch.randn(20, 3).double()}, [20])
    td = batch().select("observation")
    if isinstance(of, LRP):
        over = References("sample", 12, data)
        found = Averaged(of, over).wrap(Summed())(td.copy())["attr", "observation"]
        alone = [
            LRP("deeplift", target=TARGET, baseline=over.only(k)).wrap(Summed())(td.copy()) for k in range(12)
        ]
        wanted = torch.stack([one["attr", "observation"] for one in alone]).mean(0)
    else:
        found = Averaged(of, Noise(0.0, 4)).wrap(Summed())(td.copy())["attr", "observation"]
        wanted = of.wrap(Summed())(td.copy())["attr", "observation"]
    assert torch.allclose(found, wanted, atol=1e-12)


def test_what_lies_beside_a_batch_is_what_no_module_names() -> None:
    explained = METHODS["paths"]().wrap(Gated())
    assert explained.reads(batch()) == ["observation", "gate", "task"]
    named = METHODS["paths"]().wrap(TensorDictModule(Gated().net, ["observation"], ["q"]))
    assert named.reads(batch()) == ["observation"]


def scaled(td: TensorDictBase) -> TensorDictBase:
    return td.set("scaled", td["observation"] * td["gate"][..., :1])


def test_functions_tell_nothing_unless_they_are_told_to() -> None:
    net = TensorDictModule(nn.Linear(3, 2), ["scaled"], ["q"])
    assert not tells_what_it_reads(TensorDictSequential(WrapModule(scaled), net))
    told = WrapModule(scaled, in_keys=["observation", "gate"], out_keys=["scaled"])
    assert tells_what_it_reads(TensorDictSequential(told, net))
    with pytest.raises(KeyError, match="does not say what it reads"):
        Explain(METHODS["paths"](), TensorDictSequential(WrapModule(scaled), net))(batch())


def test_a_critic_that_may_be_gated_has_its_error_explained() -> None:
    td = batch()
    td["next"].update(
        {"reward": torch.zeros(5, 1).double(), "terminated": torch.ones(5, 1, dtype=torch.bool)}
    )
    critic = TensorDictSequential(Gated(), TensorDictModule(lambda q: q[..., :1], ["q"], ["state_value"]))
    error = LRP("deeplift", target="td_error", baseline=0.0)
    explained = error.wrap(TDError(critic, gamma=0.9))
    found = explained(td.copy())
    assert torch.allclose(-found["attr", "observation"].sum(-1), difference(td), atol=1e-9)
    drop = perturbation_curve(TDError(critic, gamma=0.9), found, target="td_error", keys=["observation"])
    assert torch.allclose((drop.most.value[:, -1] - drop.most.value[:, 0]), difference(td), atol=1e-9)
    # The next step is gated by its own gate, and counts with the discount.
    td["next"].update({"gate": torch.rand(5, 2).double(), "terminated": torch.zeros(5, 1, dtype=torch.bool)})
    goes_on = explained(td.copy())["attr", "next", "observation"].sum(-1)
    assert torch.allclose(goes_on, 0.9 * difference(td["next"]), atol=1e-9)
