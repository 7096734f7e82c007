"""A task of several agents whose truth is known: what one of them sees tells all of them what to do."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("torchrl")

from torchrl.modules import MultiAgentMLP

from tdhook import LRP, Target

AGENTS, SEEN, ACTIONS, KNOWS = 4, 5, 3, 2
PRICE = 1e-3  # of the size of weights, so that noise is not looked at
OBSERVATION, LOGITS = ("agents", "observation"), ("agents", "logits")


def situations(count, seed):
    """Observations ``[count, AGENTS, SEEN]``, alike for all agents, and what is to be done, ``[count]``.

    The largest of the first few numbers that the agent ``KNOWS`` sees tells the action; the rest is noise.
    """
    observation = torch.randn(count, AGENTS, SEEN, generator=torch.Generator().manual_seed(seed))
    return observation, observation[:, KNOWS, :ACTIONS].argmax(-1)


class Attending(nn.Module):
    """Each agent asks all of them, by attention over learned names, and does what it is told."""

    def __init__(self):
        super().__init__()
        self.names = nn.Parameter(torch.randn(AGENTS, 8))
        self.ask, self.answer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.say = nn.Linear(SEEN, 16)
        self.act = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, ACTIONS))

    def forward(self, observation):
        weights = (self.ask(self.names) @ self.answer(self.names).T).softmax(-1)
        return self.act(weights @ self.say(observation))


def centralised(shared):
    return MultiAgentMLP(
        n_agent_inputs=SEEN,
        n_agent_outputs=ACTIONS,
        n_agents=AGENTS,
        centralized=True,
        share_params=shared,
        depth=1,
        num_cells=32,
        activation_class=nn.ReLU,
    )


POLICIES = {
    "shared": lambda: centralised(True),
    "individual": lambda: centralised(False),
    "attending": Attending,
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    """Trained to do the right thing; what it need not look at is given up for a small price on weights."""
    torch.manual_seed(0)
    network = POLICIES[request.param]()
    observation, told = situations(20_000, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=600)
    weights = [p for p in network.parameters() if p.dim() > 1]
    for step in range(600):
        chosen = slice(200 * step % 20_000, 200 * step % 20_000 + 200)
        logits = network(observation[chosen])
        loss = F.cross_entropy(logits.flatten(0, 1), told[chosen].repeat_interleave(AGENTS))
        loss = loss + PRICE * sum(w.abs().sum() for w in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    observation, told = situations(1000, seed=1)
    with torch.no_grad():
        assert (network(observation).argmax(-1) == told[:, None]).float().mean() > 0.93
    return TensorDictModule(network, [OBSERVATION], [LOGITS])


def share(policy, composite, baseline=None):
    """``[AGENTS, AGENTS]``: of the relevance for what each agent does, how much lies on what each agent saw."""
    observation, told = situations(1000, seed=1)
    td = TensorDict({"agents": {"observation": observation}}, [1000])
    rows = []
    for agent in range(AGENTS):
        # The logit of the right action, of this agent alone.
        weight = torch.zeros(1000, AGENTS, ACTIONS, dtype=torch.bool)
        weight[torch.arange(1000), agent, told] = True

        def target(outputs, inputs, weight=weight):
            return TensorDict({"agents": {"logits": outputs[LOGITS] * weight}}, [1000])

        explained = LRP(composite, target=target, baseline=baseline, ledger=True).wrap(policy)(td.clone())
        assert explained["ledger", "gap"].abs().max() < 1e-4 * explained["ledger", "target"].abs().mean()
        amount = explained["attr", "agents", "observation"].abs().sum(-1).mean(0)
        rows.append(amount / amount.sum())
    return torch.stack(rows)


def shapley_share(policy, baseline, orders=30):
    """The same by Shapley values, of numbers put in one after the other, in some orders and the same backwards."""
    observation, told = situations(1000, seed=1)
    start = torch.zeros_like(observation) if baseline == 0.0 else observation.mean(0).expand_as(observation)
    drawn, right = torch.Generator().manual_seed(0), told[:, None, None].expand(-1, AGENTS, 1)
    found = torch.zeros(1000, AGENTS, AGENTS * SEEN)
    for _ in range(orders):
        order = torch.randperm(AGENTS * SEEN, generator=drawn)
        for places in (order, order.flip(0)):
            x, before = start.clone(), None
            for place in (None, *places.tolist()):
                if place is not None:
                    x.flatten(1)[:, place] = observation.flatten(1)[:, place]
                with torch.no_grad():
                    now = policy.module(x).gather(-1, right).squeeze(-1)
                if place is not None:
                    found[..., place] += now - before
                before = now
    amount = found.unflatten(-1, (AGENTS, SEEN)).abs().sum(-1).mean(0)
    return amount / amount.sum(-1, keepdim=True)


@pytest.mark.parametrize("composite", ["epsilon", "attn_lrp"])
def test_relevance_lies_on_the_agent_that_knows(policy, composite):
    assert (share(policy, composite)[:, KNOWS] > 0.95).all()


@pytest.mark.parametrize("baseline", [0.0, "mean"], ids=["zero", "mean"])
def test_against_a_baseline_more_of_it_does(policy, baseline):
    """Of the networks that have a weight for each agent more than 99 %; attention leaves a little to the others.

    That is there: Shapley values, over orders of the agents and numbers that they see, say the same.
    """
    against = share(policy, "deeplift", baseline)[:, KNOWS]
    assert (against > share(policy, "epsilon")[:, KNOWS]).all()
    assert (against > (0.985 if isinstance(policy.module, Attending) else 0.99)).all()
    assert (against > shapley_share(policy, baseline)[:, KNOWS] - 2e-3).all()


def test_an_agent_that_sees_for_itself_rests_on_itself():
    torch.manual_seed(0)
    network = MultiAgentMLP(
        n_agent_inputs=SEEN,
        n_agent_outputs=ACTIONS,
        n_agents=AGENTS,
        centralized=False,
        share_params=False,
        depth=1,
        num_cells=8,
        activation_class=nn.ReLU,
    )
    alone = TensorDictModule(network, [OBSERVATION], [LOGITS])
    assert torch.equal(share(alone, "epsilon"), torch.eye(AGENTS))


@pytest.mark.parametrize("composite", ["deeplift", "attn_lrp"])
def test_networks_of_their_own_are_explained_against_a_baseline_again_and_again(composite):
    """They run inside ``torch.vmap``: of what was met there nothing is kept for the next call."""
    torch.manual_seed(0)
    policy = TensorDictModule(centralised(False), [OBSERVATION], [LOGITS])
    observation, _ = situations(6, seed=1)
    td = TensorDict({"agents": {"observation": observation}}, [6])
    explained = LRP(composite, target=Target(LOGITS, (0, 1)), baseline=0.0).wrap(policy)
    first, second = (explained(td.clone())["attr", "agents", "observation"] for _ in range(2))
    with torch.no_grad():
        risen = network_at(policy, observation) - network_at(policy, torch.zeros_like(observation))
    torch.testing.assert_close(first.sum((1, 2)), risen)
    assert torch.equal(first, second)


def network_at(policy, observation):
    return policy.module(observation)[:, 0, 1]
