"""What torch.jit compiled: the rules of the operations inside reach functions; modules are units, or refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.rules import EpsilonRule
from tdhook.selectors import Type

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def gated(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(x, -1) * y + x


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(*self.first(x).chunk(2, -1)))


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_explained_as_if_it_were_not_compiled(flow: str) -> None:
    plain = Model(gated).double()
    scripted = Model(torch.jit.script(gated)).double()
    scripted.load_state_dict(plain.state_dict())
    td = TensorDict({"input": torch.randn(4, 3).double()}, batch_size=[4])
    method = LRP("attn_lrp", target=Target("output", 0), flow=flow, ledger=True)
    expected, got = (method.wrap(model)(td.copy()) for model in (plain, scripted))
    assert torch.equal(got["attr", "input"], expected["attr", "input"])
    assert (got["ledger", "gap"].abs() <= 1e-9 * got["ledger", "target"].abs()).all()


def test_compiled_functions_run_compiled_elsewhere() -> None:
    model = Model(torch.jit.script(gated)).double()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    td = TensorDict({"input": torch.randn(4, 3).double()}, batch_size=[4])
    with pytest.raises(RuntimeError, match="broken"):
        LRP("attn_lrp", target=Target("output", 0)).wrap(nn.Sequential(model, Broken()))(td)
    x, y = torch.randn(2, 4).double().unbind()
    assert torch.equal(model.function(x, y), gated(x, y))


def part() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()


COMPILED = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, (torch.randn(4, 3).double(),)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_compiled_modules_are_refused_by_name_or_run_as_one_unit(whole: bool, how: str) -> None:
    def model(inner: nn.Module) -> nn.Module:
        torch.manual_seed(2)
        return inner if whole else nn.Sequential(inner, nn.Linear(4, 2).double())

    torch.manual_seed(0)
    td = TensorDict({"input": torch.randn(4, 3).double()}, batch_size=[4])
    compiled = model(COMPILED[how](part()))
    place = r"\(model\)" if whole else "0"
    message = rf"the module `{place}` \(Sequential\) was compiled by torch.jit.*explain the module that it was compiled"
    with pytest.raises(NotImplementedError, match=message):
        LRP("epsilon_plus", target=Target("output", 0)).wrap(compiled)(td.copy())
    unit = Unit(part())
    rules = [(Type(torch.jit.ScriptModule), EpsilonRule()), (Unit, EpsilonRule()), (nn.Linear, EpsilonRule())]
    method = LRP(rules, target=Target("output", 0))
    got, expected = (method.wrap(m)(td.copy())["attr", "input"] for m in (compiled, model(unit)))
    assert torch.allclose(got, expected, rtol=1e-9)


class Unit(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_compiled_modules_may_compute_constants() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.last = (
                torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())),
                nn.Linear(3, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x * self.mask(torch.ones_like(x)))

    td = TensorDict({"input": torch.randn(4, 3).double()}, batch_size=[4])
    td = LRP("epsilon_plus", target=Target("output", 0), ledger=True).wrap(Masked().double())(td)
    assert td["ledger", "gap"].abs().max() < 1e-9
