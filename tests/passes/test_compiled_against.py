"""One graph against a baseline: equal to eager for every rule, preset and kind of reference, in both flows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled_models import FEATURES, RULES, compiled, dense, image, observation, some
from tensordict import TensorDict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tdhook import LRP, Contrast, Target, preset
from tdhook.attribution.lrp_helpers import rules as r
from tdhook.perturbing.references import References
from tdhook.relevance.composites.composite import PRESETS

pytestmark = [
    # Dynamo makes an instance of a function to trace it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # tensordict asks for a setting that torch has done away with.
    pytest.mark.filterwarnings("ignore:torch._dynamo.config.inline_inbuilt_nn_modules is deprecated"),
]

FLOWS = ("relevance", "gradient")
QUICKLY = {"backend": "aot_eager"}
# Modified gradients are no shares of a difference.
OF_DIFFERENCES = sorted(set(PRESETS) - {"guided_backprop", "deconvnet", "beta_smooth"})


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def assert_near(ours, theirs):
    """Equal, up to what the order of sums does to secants, whose denominators are differences."""
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9)


def assert_same_calls(method, net, calls, **options):
    """A graph of its own says in each of several calls what eager does, and does not give up."""
    explained = method.wrap(net)
    method = LRP(method.composite, target=method.target, baseline=method.references, flow=method.flow)
    method.compile = {**QUICKLY, **options}
    graph = method.wrap(net)
    for td in calls:
        assert_near(graph(td.clone()), explained(td.clone()))
    assert graph._graphs.wanted and graph._graphs.function is not None
    return graph


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", some(RULES, {"epsilon", "z-plus", "softmax", "layer norm"}))
def test_every_rule(name, flow):
    composite, make = RULES[name]
    net = make()
    shape = (2, FEATURES) if name in ("recurrent", "attention") else (FEATURES,)
    method = LRP(composite, target=Target("output", "argmax"), baseline=0.3, flow=flow)
    td = observation(5, shape=shape)
    assert_near(compiled(method.wrap(net))(td.clone()), method.wrap(net)(td.clone()))


class Everything(nn.Module):
    """What presets have rules for."""

    def __init__(self):
        super().__init__()
        self.image, self.inner, self.norm = image(), nn.Linear(3, 3), nn.LayerNorm(3)
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        h = F.gelu(self.image(x))
        h = h + self.inner(self.norm(h))
        return self.out(h * torch.softmax(h, -1))


@pytest.mark.parametrize("name", some(OF_DIFFERENCES, {"deeplift"}))
def test_every_preset(name):
    arguments = {"low": -4.0, "high": 4.0} if name == "epsilon_gamma_box" else {}
    net = Everything().double().eval()
    flow = FLOWS[OF_DIFFERENCES.index(name) % 2]  # each of their rules is compiled in both
    method = LRP(preset(name, **arguments), target=Target("output", "argmax"), baseline=0.3, flow=flow)
    td = observation(3, shape=(2, 8, 8))
    assert_near(compiled(method.wrap(net))(td.clone()), method.wrap(net)(td.clone()))


DATA = TensorDict(
    input=torch.linspace(-2, 2, 9 * FEATURES).reshape(9, FEATURES).sin().double(), batch_size=[9]
)
BASELINES = {
    "number": 0.3,
    "row": DATA["input"][0],
    "rows": DATA["input"][:4],
    "mapping": {"input": DATA["input"][1]},
    "mean": "mean",
    "mean of data": References("mean", data=DATA),
    "function": lambda rows: rows.flip(0),
    "entry": ("start", "input"),
    "entries": ("start",),
    "previous": "previous",
    "sample": "sample",
    "samples": References("sample", 3, values=True, spread=True),
    "samples of data": References("sample", 3, DATA, seed=5),
}


@pytest.mark.parametrize("name", some(BASELINES, {"row", "entry", "samples of data"}))
def test_every_baseline(name):
    def batch(n):
        td = observation(n)
        td["start", "input"] = td["input"].flip(-1)
        if name == "previous":
            td["next", "input"] = torch.cat([td["input"][1:], td["input"][:1]])
            td["next", "done"] = (torch.arange(n) % 3 == 2).unsqueeze(-1)
        return td

    flow = FLOWS[list(BASELINES).index(name) % 2]
    method = LRP("deeplift", target=Target("output", "argmax"), baseline=BASELINES[name], flow=flow)
    sizes = (4, 4) if name == "rows" else (4, 4, 7)
    assert_same_calls(method, dense(nn.Tanh()), [batch(n) for n in sizes])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["row", "entry", "samples of data"])
def test_with_the_default_backend(name):
    method = LRP("deeplift", target=Target("output", "argmax"), baseline=BASELINES[name])
    calls = [observation(n, start=TensorDict(input=torch.rand(n, FEATURES).double())) for n in (4, 4, 7)]
    assert_same_calls(method, dense(nn.Tanh()), calls, backend="inductor")


def test_what_a_method_holds_counts_as_it_is_now():
    """Baselines, data, indices and bounds of rules are arguments of the graph."""
    row, index, low = (
        torch.randn(FEATURES).double(),
        torch.tensor([0, 2, 1, 1]),
        torch.full((1,), -4.0).double(),
    )
    data = DATA.clone()
    mean = References("mean", data=data)
    for baseline in (row, mean):
        composite = [(nn.Linear, r.ZBoxRule(low, 4.0))]
        method = LRP(composite, target=Target("output", index), baseline=baseline)
        net, td = dense(), observation(4)
        graph = assert_same_calls(method, net, [td])
        before = graph(td.clone())["attr", "input"]
        row += 1
        index[0] = 1
        data["input"] *= 2
        after = graph(td.clone())
        assert_near(after, method.wrap(net)(td.clone()))
        assert not torch.allclose(before, after["attr", "input"])


@pytest.mark.parametrize("budget", [0, 3000, None])
def test_several_targets_and_references_in_parts(budget):
    def method(**options):
        everything = Contrast(Target("output", "argmax"), Target("output", "all"))
        drawn = References("sample", 3, DATA)
        return LRP("deeplift", target=everything, baseline=drawn, memory_budget=budget, **options)

    net = dense(nn.Tanh())
    explained, graph = method().wrap(net), method(compile=QUICKLY).wrap(net)
    for n in (4, 9):
        td = observation(n)
        assert_near(graph(td.clone()), explained(td.clone()))
    assert graph._graphs.wanted


def test_new_batch_sizes_take_no_new_graph():
    explained = LRP("deeplift", target=Target("output", 0), baseline="sample").wrap(dense())
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(explained, counter)
    for batch in (4, 7, 30):
        td = observation(batch)
        assert_near(graph(td.clone()), explained(td.clone()))
    assert counter.frame_count == 2


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        kept = h * h
        h.tanh_()
        h += 1
        h[..., 0] = 0
        return self.last(h * kept.sigmoid_())


@pytest.mark.parametrize("flow", FLOWS)
def test_a_model_that_overwrites_tensors(flow):
    method = LRP("deeplift", target=Target("output", "argmax"), baseline=0.3, flow=flow)
    net, td = Overwrites().double(), observation(4)
    expected = method.wrap(net)(td.clone())
    assert_near(compiled(method.wrap(net))(td.clone()), expected)
    rise = net(td["input"]) - net(torch.full_like(td["input"], 0.3))
    chosen = rise.gather(-1, expected["output"].argmax(-1, keepdim=True)).squeeze(-1).detach()
    torch.testing.assert_close(expected["attr", "input"].sum(-1), chosen)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_statistics_are_updated_by_the_input_alone():
    method = LRP("deeplift", target=Target("output", 0), baseline=0.3)
    ours, theirs = Norms().double(), Norms().double()
    theirs.load_state_dict(ours.state_dict())
    graph, explained = compiled(method.wrap(ours)), method.wrap(theirs)
    for _ in range(3):
        td = observation(6)
        assert_near(graph(td.clone()), explained(td.clone()))
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


class Picks(nn.Module):
    def __init__(self, pick):
        super().__init__()
        torch.manual_seed(0)
        self.pick, self.first, self.last = pick, nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.pick(self.first(x)))


PICKS = {
    "largest": lambda h: h * h.amax(-1, keepdim=True),
    "pooled": lambda h: F.max_pool1d(h.unsqueeze(1), 2, 1, 1).squeeze(1)[:, :8],
    "sorted": lambda h: h.sort(-1).values.cumsum(-1),
    "median": lambda h: h - h.median(-1, keepdim=True).values,
    "kinks": lambda h: F.huber_loss(h, h.flip(-1), reduction="none", delta=0.1),
    "by index": lambda h: h * h.gather(-1, h.argmin(-1, keepdim=True)),
    "by row": lambda h: h * h[torch.arange(len(h)), h.argmax(-1)].unsqueeze(-1),
}


@pytest.mark.filterwarnings("ignore:the model does something else on the reference")
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", some(PICKS, {"largest", "by index"}))
def test_where_values_decide(name, flow):
    """Where a graph cannot follow what values decide, the call is made without it."""
    net = Picks(PICKS[name]).double()
    method = LRP("deeplift", target=Target("output", 1), baseline=0.1, flow=flow)
    explained = method.wrap(net)
    method = LRP("deeplift", target=Target("output", 1), baseline=0.1, flow=flow, compile=QUICKLY)
    graph = method.wrap(net)
    for batch in (4, 4, 6):
        td = observation(batch)
        assert_near(graph(td.clone()), explained(td.clone()))


def test_a_graph_that_is_of_no_use_is_given_up():
    net = Picks(PICKS["sorted"]).double()
    method = LRP("deeplift", target=Target("output", 1), baseline=0.1, compile=QUICKLY)
    graph = method.wrap(net)
    for _ in range(7):
        graph(observation(4))
    assert graph._graphs.wanted
    told = r"Picks cannot be explained as one graph .* depends on values, and not as in the graph"
    with pytest.warns(UserWarning, match=told):
        graph(observation(4))
    assert not graph._graphs.wanted


def test_what_is_drawn_on_the_way_is_drawn_once():
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    method = LRP("deeplift", target=Target("output", 1), baseline=0.1)
    graph = LRP("deeplift", target=Target("output", 1), baseline=0.1, compile=QUICKLY).wrap(net)
    td = observation(4)
    torch.manual_seed(1)
    expected = method.wrap(net)(td.clone())
    torch.manual_seed(1)
    with pytest.warns(
        UserWarning, match=r"draws random numbers \(.*\), which one graph does not draw once more"
    ):
        assert_near(graph(td.clone()), expected)
    net.eval()
    assert_same_calls(method, net, [td])


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "beta_smooth"])
def test_modified_gradients_are_none_of_a_difference(name):
    graph = LRP(name, target=Target("output", 1), baseline=0.1, compile=QUICKLY)
    with pytest.raises(ValueError, match="makes a modified gradient, which is no share of a difference"):
        graph.wrap(dense())(observation(4))


class Along(nn.Module):
    """A function along the batch, whose secant is a quadrature."""

    def forward(self, x):
        return torch.logcumsumexp(x, 0)


def test_where_elements_meet_what_a_quadrature_leaves_is_shared_among_all():
    torch.manual_seed(0)
    net = nn.Sequential(Along(), nn.Linear(3, 2)).double()
    td = TensorDict({"input": torch.randn(4, 3).double()}, [4])
    found = []
    for options in (None, QUICKLY):
        lrp = LRP("deeplift", target=Target("output", 0), baseline=torch.full((4, 3), 0.3).double())
        lrp.compile = options
        found.append(lrp.wrap(net)(td.clone())["attr", "input"])
    torch.testing.assert_close(*found)
    with torch.no_grad():
        rise = net(td["input"]) - net(torch.full((4, 3), 0.3).double())
    torch.testing.assert_close(found[1].sum(), rise[:, 0].sum())
