"""`LRP(..., compile=...)`: the explained module compiles itself, and says so where it cannot."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tdhook import LRP, Key, Target

AOT = {"backend": "aot_eager"}

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def dense():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()


def observation(*batch, **entries):
    return TensorDict(input=torch.randn(*batch, 6).double(), **entries, batch_size=batch)


def explained(net, compile=False, target=None, **arguments):
    return LRP(
        "epsilon_plus", target=target or Target("output", "argmax"), compile=compile, **arguments
    ).wrap(net)


def assert_equal(ours, theirs):
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_equals_eager_and_takes_a_graph(mode):
    net = dense()
    counter = CompileCounterWithBackend("aot_eager")
    graph = explained(net, {"backend": counter})
    with mode():
        for batch in ((4,), (4,), (7,), (9,), (2, 3), ()):
            td = observation(*batch)
            assert_equal(graph(td.clone()), explained(net)(td.clone()))
    assert counter.frame_count == 4  # of one size, of any size, and one for each other number of axes
    graph(observation(11))
    assert counter.frame_count == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", [True, "reduce-overhead", "max-autotune", {"dynamic": True}], ids=str)
def test_with_the_default_backend(how):
    net, td = dense(), observation(4)
    graph = explained(net, how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of in its modes is its own
        assert_equal(graph(td.clone()), explained(net)(td.clone()))
    assert graph._graphs.function is not None


def test_dynamic_graphs_are_made_for_any_size_at_once():
    counter = CompileCounterWithBackend("aot_eager")
    graph = explained(dense(), {"backend": counter, "dynamic": True})
    for batch in (4, 7, 9):
        graph(observation(batch))
    assert counter.frame_count == 1


def test_many_explained_modules_do_not_share_a_limit():
    counter = CompileCounterWithBackend("aot_eager")
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        explained(nn.Linear(6, 3).double(), {"backend": counter})(observation(4))
    assert counter.frame_count == torch._dynamo.config.recompile_limit + 2


def test_what_takes_another_graph():
    net = nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 3)).double()
    counter = CompileCounterWithBackend("aot_eager")
    graph, td = explained(net, {"backend": counter}), observation(4)
    graph(td.clone())
    graph(td.clone().set("unrelated", torch.zeros(4)))
    assert counter.frame_count == 1
    for change in (lambda: net.eval(), lambda: net[1].train(), lambda: net.float()):
        change()
        graph(td.clone().to(net[0].weight.dtype))
        counter.frame_count -= 1
        assert counter.frame_count == 1
    net.double().eval()
    assert_equal(graph(td.clone()), explained(net)(td.clone()))


def test_no_setting_is_left_changed():
    before = torch._dynamo.config.get_config_copy(), torch._functorch.config.get_config_copy()
    explained(dense(), AOT)(observation(4))
    after = torch._dynamo.config.get_config_copy(), torch._functorch.config.get_config_copy()
    assert before == after


def test_what_is_wrong_with_a_call_is_said_as_ever():
    graph = explained(dense(), AOT, Target("output", Key("index")))
    good = observation(4, index=torch.arange(4) % 3)
    for _ in range(2):  # before and after there is a graph
        with pytest.raises(KeyError, match="key 'input' is missing from the TensorDict, which has index"):
            graph(good.select("index"))
        with pytest.raises(KeyError, match="the target takes its index from 'index', which is not there"):
            graph(good.select("input"))
        with pytest.raises(ValueError, match="there is nothing to explain"):
            graph(good[:0])
        with pytest.raises(ValueError, match="input 'input' has 24 NaN or infinite values among its 24"):
            graph(good.clone().set("input", torch.full((4, 6), torch.nan).double()))
        with pytest.raises(IndexError, match="target index 7 from entry 'index' is out of range"):
            graph(good.clone().set("index", torch.full((4,), 7)))
        graph(good.clone())
        assert graph._graphs.wanted and graph._graphs.function is not None
    hot = torch.nn.functional.one_hot(good["index"], 3)
    graph(good.clone().set("index", hot))
    with pytest.raises(ValueError, match="is not one-hot along the last axis"):
        graph(good.clone().set("index", torch.ones_like(hot)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        z = self.fc(x)
        return z if float(z.sum().detach()) < 1e9 else -z


def test_a_model_that_makes_no_graph_runs_without():
    net, td = Branching().double(), observation(4)
    graph = explained(net, AOT)
    with pytest.warns(
        UserWarning, match="Branching cannot be explained as one graph and runs without"
    ) as told:
        result = graph(td.clone())
    assert len(told) == 1
    assert_equal(result, explained(net)(td.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(graph(td.clone()), result)


def test_a_compiler_that_does_not_work():
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    net, td = dense(), observation(4)
    graph = explained(net, {"backend": broken})
    with pytest.warns(
        UserWarning, match="runs without, operation by operation .*no C\\+\\+ compiler was found"
    ):
        assert_equal(graph(td.clone()), explained(net)(td.clone()))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_have_graphs_of_their_own(clone):
    graph, td = explained(dense(), AOT), observation(4)
    before = graph(td.clone())
    other = clone(graph)
    assert_equal(other(td.clone()), before)
    with torch.no_grad():
        next(other.parameters()).mul_(-2)
    assert not torch.allclose(other(td.clone())["attr", "input"], before["attr", "input"])
    assert_equal(graph(td.clone()), before)


def test_a_closed_module_keeps_no_graph():
    with LRP("epsilon_plus", compile=AOT).prepare(dense()) as graph:
        graph(observation(4))
        assert graph._graphs.function is not None
    assert graph._graphs.function is None
    with pytest.raises(RuntimeError, match="ended with its `with` block"):
        graph(observation(4))


def test_first_calls_count_once():
    """The rehearsal before compilation leaves buffers and random numbers alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).double()
    same = copy.deepcopy(net)
    td = observation(4)
    torch.manual_seed(1)
    ours = explained(net, AOT)(td.clone())
    torch.manual_seed(1)
    assert_equal(ours, explained(same)(td.clone()))
    assert all(map(torch.equal, net.buffers(), same.buffers()))


def test_arguments_are_checked_at_once():
    with pytest.raises(TypeError, match="compile is True, a mode such as 'reduce-overhead' or a dictionary"):
        LRP("epsilon_plus", compile=3)
    with pytest.raises(ValueError, match="a ledger cannot be compiled: leave out ledger=True or compile"):
        LRP("epsilon_plus", ledger=True, compile=True)


def test_the_compiler_is_loaded_by_who_compiles():
    code = """
import sys, torch
from tensordict import TensorDict
from tdhook import LRP, Target
for index in ("argmax", "all"):
    explained = LRP("epsilon_plus", target=Target("output", index)).wrap(torch.nn.Linear(3, 2))
    explained(TensorDict(input=torch.ones(2, 3), batch_size=[2]))
assert "torch._inductor.compile_fx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
