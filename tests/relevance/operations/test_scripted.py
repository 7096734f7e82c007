"""Functions compiled by torch.jit.script: the rules of the operations inside reach them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook import LRP, Target

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
    before = torch._C.ScriptFunction.__dict__["__call__"]
    model = Model(torch.jit.script(gated)).double()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert torch._C.ScriptFunction.__dict__["__call__"] is not before
            raise RuntimeError("broken")

    td = TensorDict({"input": torch.randn(4, 3).double()}, batch_size=[4])
    with pytest.raises(RuntimeError, match="broken"):
        LRP("attn_lrp", target=Target("output", 0)).wrap(nn.Sequential(model, Broken()))(td)
    assert torch._C.ScriptFunction.__dict__["__call__"] is before
    x, y = torch.randn(2, 4).double().unbind()
    assert torch.equal(model.function(x, y), gated(x, y))
