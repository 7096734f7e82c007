"""Models as they come: torchrl's actors and multi-agent networks, layers that repeat, in-place activations."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Key, Target
from tdhook.models.families import Linear
from tdhook.rules import EpsilonRule, FlatRule, PassRule
from tdhook.selectors import First, Reads, Type

EXACT = [(Linear, EpsilonRule(1e-12)), ((nn.ReLU, nn.Tanh), PassRule())]


def mlp(n_in=3, n_out=4):
    return nn.Sequential(nn.Linear(n_in, 8, bias=False), nn.ReLU(), nn.Linear(8, n_out, bias=False)).double()


def cnn(inplace):
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(8, 4, bias=False)
    ).double()


def explain(model, td, composite=EXACT, **kwargs):
    with LRP(composite, **kwargs).prepare(model) as explained:
        return explained(td)


# --- Odd models -----------------------------------------------------------------------------------


def test_nested_contexts_keep_to_themselves():
    model, td = mlp(), TensorDict(input=torch.randn(5, 3).double(), batch_size=[5])
    flat = [(Linear, FlatRule()), (nn.ReLU, PassRule())]
    with LRP(EXACT).prepare(model) as outer:
        alone = outer(td.clone())["attr", "input"]
        with LRP(flat).prepare(model) as inner:
            other = inner(td.clone())["attr", "input"]
            assert torch.equal(outer(td.clone())["attr", "input"], alone)
            assert torch.equal(inner(td.clone())["attr", "input"], other)
        assert torch.equal(outer(td.clone())["attr", "input"], alone)
        assert not torch.equal(alone, other)


@pytest.mark.parametrize("shared", [False, True], ids=["called twice", "shared weights"])
def test_a_layer_that_runs_more_than_once(shared):
    first = nn.Linear(3, 3, bias=False).double()
    second = first
    if shared:
        second = nn.Linear(3, 3, bias=False).double()
        second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), first, nn.Linear(3, 2, bias=False).double())
    apart = copy.deepcopy(model)
    apart[2], apart[4] = copy.deepcopy(first), copy.deepcopy(first)
    td = TensorDict(input=torch.rand(5, 3).double(), batch_size=[5])
    got = explain(model, td.clone(), [(Linear, EpsilonRule(0.01))])
    torch.testing.assert_close(
        got["attr", "input"], explain(apart, td, [(Linear, EpsilonRule(0.01))])["attr", "input"]
    )


@pytest.mark.parametrize(
    "composite", ["epsilon_plus", "epsilon_plus_flat", "guided_backprop", "excitation_backprop"]
)
def test_activations_that_work_in_place(composite):
    model = cnn(inplace=True)
    td = TensorDict(input=torch.rand(5, 1, 4, 4).double(), batch_size=[5])
    got = explain(model, td.clone(), composite, target=Target("output", "argmax"))
    assert model[1].inplace
    model[1].inplace = False
    expected = explain(model, td, composite, target=Target("output", "argmax"))
    assert torch.equal(got["attr", "input"], expected["attr", "input"])


def test_inplace_stays_what_it_was_made_since():
    model = cnn(inplace=True)
    explained = LRP("epsilon_plus").wrap(model)
    model[1].inplace = False
    explained(TensorDict(input=torch.rand(5, 1, 4, 4).double(), batch_size=[5]))
    assert model[1].inplace is False


@pytest.mark.parametrize(
    "composite", [EXACT, [(First(Type(nn.Linear)), FlatRule()), *EXACT]], ids=["plain", "traced"]
)
def test_a_model_that_would_overwrite_its_input(composite):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).double()
    x = torch.randn(5, 3).double()
    before = x.clone()
    td = explain(model, TensorDict(input=x, batch_size=[5]), composite)
    assert torch.equal(x, before) and torch.equal(td["input"], before)


class Counting(nn.Module):
    """Keeps a count in a buffer that it makes anew each time."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return self.fc(x)


def test_finding_the_execution_order_counts_as_no_run():
    model = Counting()
    explain(model, TensorDict(input=torch.randn(5, 3), batch_size=[5]), [(First(nn.Linear), FlatRule())])
    assert model.count == 1
    dropout = nn.Sequential(nn.Linear(3, 100), nn.Dropout(0.5))
    td = TensorDict(input=torch.randn(5, 3), batch_size=[5])
    torch.manual_seed(3)
    expected = dropout(td["input"])
    torch.manual_seed(3)
    assert torch.equal(explain(dropout, td, [(First(nn.Linear), FlatRule())])["output"], expected)


def test_buffers_and_modes_are_the_models_own_business_in_training():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3).double()
    td = explain(model, TensorDict(input=x, batch_size=[5]), [(First(nn.Linear), FlatRule()), *EXACT])
    assert torch.equal(td["output"], twin(x))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True)), (
        "one step, not two"
    )


# --- torchrl --------------------------------------------------------------------------------------


def torchrl():
    return pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.data")


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize("space", ["one_hot", "categorical"])
def test_q_value_actor(batch, space):
    modules, data = torchrl()
    spec = data.OneHot(4) if space == "one_hot" else data.Categorical(4)
    actor = modules.QValueActor(mlp(), in_keys=["observation"], spec=spec)
    td = TensorDict(observation=torch.randn(*batch, 3).double(), batch_size=batch)
    explained = LRP(EXACT, target=Target("action_value", "action")).wrap(actor)
    assert explained.in_keys == ["observation"]
    td = explained(td)
    bare = actor(TensorDict(observation=td["observation"], batch_size=batch))
    assert all(torch.equal(td[key], bare[key]) for key in actor.out_keys)
    torch.testing.assert_close(td["attr", "observation"].sum(-1, keepdim=True), td["chosen_action_value"])


@pytest.mark.parametrize("distribution", ["Categorical", "OneHotCategorical"])
def test_probabilistic_actor(distribution):
    modules, data = torchrl()
    actor = modules.ProbabilisticActor(
        TensorDictModule(mlp(), ["observation"], ["logits"]),
        in_keys=["logits"],
        spec=data.OneHot(4) if "OneHot" in distribution else data.Categorical(4),
        distribution_class=getattr(modules, distribution, None) or torch.distributions.Categorical,
        return_log_prob=True,
    )
    td = TensorDict(observation=torch.randn(6, 3).double(), batch_size=[6])
    explained = LRP(EXACT, target=Target("logits", "action")).wrap(actor)
    td = explained(td)
    action = td["action"].argmax(-1) if "OneHot" in distribution else td["action"]
    chosen = td["logits"].gather(-1, action.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(td["attr", "observation"].sum(-1), chosen)
    assert explained.get_dist(td).sample().shape == td["action"].shape


def test_actor_and_value_share_a_trunk():
    modules, data = torchrl()
    trunk = TensorDictModule(mlp(3, 6), ["observation"], ["hidden"])
    policy = modules.ProbabilisticActor(
        TensorDictModule(mlp(6, 2), ["hidden"], ["logits"]),
        in_keys=["logits"],
        spec=data.OneHot(2),
        distribution_class=modules.OneHotCategorical,
    )
    operator = modules.ActorValueOperator(trunk, policy, modules.ValueOperator(mlp(6, 1), in_keys=["hidden"]))
    td = TensorDict(observation=torch.randn(2, 5, 3).double(), batch_size=[2, 5])
    value = explain(operator, td.clone(), target=Target("state_value"), attribute="all")
    for key in ("observation", "hidden"):
        torch.testing.assert_close(value["attr", key].sum(-1, keepdim=True), value["state_value"])
    action = explain(operator.get_policy_operator(), td, target=Target("logits", "action"))
    torch.testing.assert_close(
        action["attr", "observation"].sum(-1), (action["logits"] * action["action"]).sum(-1)
    )


def test_exploration_behind_an_actor():
    modules, data = torchrl()
    actor = modules.QValueActor(mlp(), in_keys=["observation"], spec=data.OneHot(4))
    explore = modules.EGreedyModule(data.OneHot(4), eps_init=1.0, annealing_num_steps=10)
    td = explain(
        TensorDictSequential(actor, explore),
        TensorDict(observation=torch.randn(50, 3).double(), batch_size=[50]),
        target=Target("action_value", "action"),
    )
    torch.testing.assert_close(td["attr", "observation"].sum(-1), (td["action_value"] * td["action"]).sum(-1))


@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("centralized", [False, True], ids=["decentralised", "centralised"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)], ids=str)
def test_multi_agent_networks(batch, centralized, share_params):
    """As one unit under the generic rule; its layers are batched over agents by vmap."""
    modules, _ = torchrl()
    net = modules.MultiAgentMLP(3, 4, 2, centralized=centralized, share_params=share_params, depth=1, num_cells=8,
                                activation_class=nn.Tanh)  # fmt: skip
    model = TensorDictModule(net.double(), [("agents", "observation")], [("agents", "value")])
    td = TensorDict(agents={"observation": torch.randn(*batch, 2, 3).double()}, batch_size=batch)
    td["agents", "action"] = torch.randint(4, (*batch, 2))
    composite = [(Type("MultiAgentMLP"), EpsilonRule(0.01))]
    target = Target(("agents", "value"), ("agents", "action"))
    td = explain(model, td, composite, target=target)
    x = td["agents", "observation"].clone().requires_grad_()
    z = model.module(x)
    seed = torch.nn.functional.one_hot(td["agents", "action"], 4) * z.detach()
    (g,) = torch.autograd.grad(z, x, seed / (z + 0.01 * z.sign()).detach())
    torch.testing.assert_close(td["attr", "agents", "observation"], (x * g).detach())


@pytest.mark.parametrize("share_params", [True, False], ids=["shared", "own"])
def test_layers_inside_a_multi_agent_network(share_params):
    modules, _ = torchrl()
    net = modules.MultiAgentMLP(
        3, 4, 2, centralized=False, share_params=share_params, depth=1, num_cells=8
    ).double()
    model = TensorDictModule(net, [("agents", "observation")], [("agents", "value")])
    td = TensorDict(agents={"observation": torch.randn(5, 2, 3).double()}, batch_size=[5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    td = explain(model, td, target=Target(("agents", "value"), "argmax"))
    total = td["attr", "agents", "observation"].sum(-1)
    torch.testing.assert_close(total, td["agents", "value"].max(-1).values, rtol=1e-6, atol=1e-9)


@pytest.fixture
def cartpole():
    pytest.importorskip("gymnasium")
    envs = pytest.importorskip("torchrl.envs")
    env = envs.TransformedEnv(envs.GymEnv("CartPole-v1"), envs.StepCounter())
    yield env
    env.close()


@pytest.mark.parametrize(
    "composite", ["epsilon_plus", [(Reads("observation"), FlatRule()), (Linear, EpsilonRule())]]
)
def test_rollouts(cartpole, composite):
    modules, _ = torchrl()
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    actor = modules.QValueActor(net, in_keys=["observation"], spec=cartpole.action_spec)
    explained = LRP(composite, target=Target("action_value", "action")).wrap(actor)
    cartpole.set_seed(0)
    bare = cartpole.rollout(60, actor, break_when_any_done=False)
    cartpole.set_seed(0)
    td = cartpole.rollout(60, explained, break_when_any_done=False)
    assert td.batch_size == bare.batch_size == torch.Size([60])
    for key in ("observation", "action", "step_count", ("next", "done"), ("next", "step_count")):
        assert torch.equal(td[key], bare[key])
    assert td["next", "done"].any() and (td["step_count"] == 0).sum() > 1, "episodes began anew"
    assert td["attr", "observation"].shape == (60, 4) and td["attr", "observation"].isfinite().all()
    again = explained(td.select("observation", "action"))
    torch.testing.assert_close(again["attr", "observation"], td["attr", "observation"], rtol=1e-4, atol=1e-5)


def test_the_index_may_come_from_what_was_done_then():
    """Explaining a recorded rollout: the action that was taken, not the one that the policy would take now."""
    modules, data = torchrl()
    actor = modules.QValueActor(mlp(), in_keys=["observation"], spec=data.OneHot(4))
    taken = torch.nn.functional.one_hot(torch.arange(8) % 4, 4)
    td = TensorDict(observation=torch.randn(8, 3).double(), taken=taken, batch_size=[8])
    td = explain(actor, td, target=Target("action_value", Key("taken")))
    torch.testing.assert_close(td["attr", "observation"].sum(-1), (td["action_value"] * taken).sum(-1))
    gc.collect()


class Fussy(nn.Module):
    """A batch norm that takes any batch shape, and behind it a layer that does not."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(3), nn.Conv1d(1, 2, 1)

    def forward(self, x):
        return self.conv(self.norm(x.reshape(-1, 3)).reshape(*x.shape[:-1], 1, 3))


def test_an_attempt_with_another_batch_shape_counts_as_no_run():
    model = Fussy().double()
    td = explain(model, TensorDict(input=torch.randn(2, 5, 3).double(), batch_size=[2, 5]))
    assert td["output"].shape == (2, 5, 2, 3)
    assert model.norm.num_batches_tracked == 1
