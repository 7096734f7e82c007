"""Models that several processes run: explained as one process would, and trained as if nothing were explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from two_processes import data_parallel, in_two_processes, tensor_parallel

from tdhook import LRP, Target
from tdhook.models.parallel import home_of, unwrapped


@pytest.mark.slow
@pytest.mark.parametrize("test", [tensor_parallel, data_parallel], ids=lambda test: test.__name__)
def test_in_two_processes(test: Callable[[], None], tmp_path: Path) -> None:
    in_two_processes(test, tmp_path)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_what_is_wrapped_around_a_model_is_left_out(wrap: Callable[[nn.Module], nn.Module]) -> None:
    method, net = LRP("epsilon_plus", target=Target("output", 0)), network()
    td = TensorDict({"input": torch.randn(4, 3)}, [4])
    expected = method.wrap(net)(td.clone())["attr", "input"]
    actor = TensorDictModule(net, ["input"], ["output"])
    for model in (wrap(net), wrap(actor), TensorDictModule(wrap(net), ["input"], ["output"])):
        before = dict(vars(model))
        torch.testing.assert_close(method.wrap(model)(td.clone())["attr", "input"], expected)
        assert vars(model) == before
    assert unwrapped(wrap(nn.DataParallel(net))) is net


def test_a_wrapper_inside_is_put_back_where_the_model_fails() -> None:
    inner = nn.DataParallel(network())
    model = TensorDictModule(inner, ["input"], ["output"])
    with pytest.raises(RuntimeError):
        LRP("epsilon_plus", target="output").wrap(model)(TensorDict({"input": torch.randn(4, 5)}, [4]))
    assert "forward" not in vars(inner)


class FullyShardedDataParallel(nn.Module):
    """By its name."""


def test_what_cannot_be_explained_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match="shard the model with torch.distributed.fsdp.fully_shard"):
        LRP("epsilon_plus", target="output").wrap(nn.Sequential(FullyShardedDataParallel()))


def test_where_a_forward_pass_is_written() -> None:
    class Mixin:
        pass

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert home_of(type("Mixed", (Mixin, nn.Linear), {})(2, 2)) == "torch.nn.modules.linear"
    assert home_of(Own(2, 2)) == __name__
