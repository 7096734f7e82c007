"""A world model of Pendulum-v1, torchrl's RSSM: what does the reward that it predicts rest on?

A recurrent state-space model (Hafner et al. 2019) sees observations and actions of the past, and keeps what it needs of
them in a belief and a state, from which the next observation and the reward are read. The reward of the pendulum is
known: minus the angle squared, less a little of the velocity squared, and next to nothing of the action. All of these
are of the moment before the observation that comes with it.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Shown, gap, main
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Normal, kl_divergence
from torchrl.data import Unbounded
from torchrl.envs import SerialEnv
from torchrl.modules import MLP, RSSMPosterior, RSSMPrior, RSSMRollout

from tdhook import LRP, Target, preset
from tdhook.plots import relevance_matrix
from tdhook.rl import make_env
from tdhook.targets import AtStep

WIDTH, STATE, STEPS = 32, 8, 16
FEATURES = ("cosine", "sine", "angular velocity")
SEEN = ("next", "observation")


def network() -> TensorDictSequential:
    """Untrained: from observations and actions ``[*batch, time]`` to what it expects at each step."""
    prior = RSSMPrior(Unbounded((1,)), WIDTH, WIDTH, STATE, action_dim=1)
    posterior = RSSMPosterior(WIDTH, STATE, WIDTH, obs_embed_dim=WIDTH)
    latents, belief, state = ("next", "latents"), ("next", "belief"), ("next", "state")
    believed = [("next", "prior_mean"), ("next", "prior_std")]
    found = [("next", "posterior_mean"), ("next", "posterior_std")]
    return TensorDictSequential(
        TensorDictModule(MLP(3, WIDTH, num_cells=[WIDTH]), [SEEN], [latents]),
        RSSMRollout(
            TensorDictModule(prior, ["state", "belief", "action"], [*believed, "_", belief]),
            TensorDictModule(posterior, [belief, latents], [*found, state]),
        ),
        TensorDictModule(Reader(3), [state, belief], ["expected"]),
        TensorDictModule(Reader(1), [state, belief], ["reward"]),
    )


class Reader(nn.Module):
    """Reads something from belief and state."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.net = MLP(STATE + WIDTH, out, num_cells=[WIDTH])

    def forward(self, state: torch.Tensor, belief: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([state, belief], -1))


def watch(rounds: int, seed: int) -> TensorDictBase:
    """Random torques, kept for some steps, in windows ``[windows, STEPS]`` that start with an empty belief.

    Observations are scaled to about one, and rewards to about minus one.
    """
    env = SerialEnv(16, lambda: make_env("Pendulum-v1"))
    env.set_seed(seed)
    found = []
    for _ in range(rounds):
        torques = (4 * torch.rand(16, 20, 1) - 2).repeat_interleave(8, 1)
        steps = iter(torques.unbind(1))
        played = env.rollout(160, lambda td: td.set("action", next(steps)), break_when_any_done=False)  # noqa: B023
        found.append(played.select("action", SEEN, ("next", "reward")))
    env.close()
    windows = torch.cat(found).unflatten(1, (10, STEPS)).flatten(0, 1)
    windows[SEEN] = windows[SEEN] / torch.tensor([1.0, 1.0, 4.0])
    windows["next", "reward"] = windows["next", "reward"] / 8
    windows["state"] = torch.zeros(*windows.shape, STATE)
    windows["belief"] = torch.zeros(*windows.shape, WIDTH)
    return windows


def normal(found: TensorDictBase, name: str) -> Normal:
    """The distribution of the state, before or after the observation."""
    return Normal(found["next", f"{name}_mean"], found["next", f"{name}_std"])


def train(seed: int, updates: int = 1500) -> dict[str, Any]:
    """Observations and rewards as they came, and a prior that foresees the posterior."""
    windows, model = watch(6, seed), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch = windows[torch.randint(len(windows), (32,))]
        found = model(batch.copy())
        expected = nn.functional.mse_loss(found["expected"], batch[SEEN])
        reward = nn.functional.mse_loss(found["reward"], batch["next", "reward"])
        divergence = kl_divergence(normal(found, "posterior"), normal(found, "prior")).sum(-1).mean()
        loss = 10 * (expected + reward) + 0.1 * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    facts = {
        "seed": seed,
        "steps watched": windows.numel(),
        "error of the reward": round(reward.item() ** 0.5, 4),
    }
    return {"weights": model.state_dict(), "facts": facts}


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """What the reward rests on that is predicted for the last of some steps, and through which inner entry."""
    model = network().eval()
    model.load_state_dict(checkpoint["weights"])
    windows = watch(1, 100 + seed)
    # Contributions cancel each other in a belief, the more so the longer it is kept: a large epsilon dampens them.
    composite = preset("lstm_lrp", epsilon=0.2)
    lrp = LRP(composite, target=AtStep(Target("reward")), ledger=True)
    with lrp.prepare(model, in_keys=[SEEN, "action", "state", "belief"]) as explained:
        found = explained(windows)
    relevance = torch.cat(
        [found["attr", "next", "observation"], found["attr", "action"]], -1
    )  # [windows, STEPS, features]
    names = (*FEATURES, "action")
    error = (found["reward"] - found["next", "reward"])[:, -1].square().mean().sqrt()

    sizes = relevance.abs().mean(0)
    share = sizes / sizes.sum()
    lines = [
        f"error of the predicted reward: {error:.3f}, where rewards are {windows['next', 'reward'].mean():.2f}"
    ]
    lines += [f"{name}: {part:.0%} of all relevance" for name, part in zip(names, share.sum(0), strict=True)]
    lines.append(f"the present observation: {share[-1, :3].sum():.0%}")

    last = found[:, -1:].exclude("attr", "ledger")
    reader = TensorDictSequential(model[-1])
    with LRP(composite, target=Target("reward"), ledger=True).prepare(reader) as explained:
        inner = explained(last.select(("next", "state"), ("next", "belief")))
    state, belief = (inner["attr", "next", name].abs().sum(-1).mean() for name in ("state", "belief"))
    lines.append(
        f"read from the state: {state / (state + belief):.0%}, from the belief: {belief / (state + belief):.0%}"
    )
    figure = relevance_matrix(
        relevance.mean(0).T,
        names,
        [str(step) for step in range(1 - STEPS, 1)],
        title="What the reward that is predicted for the last step rests on",
        column_label="steps before the last one",
    )
    return Shown(figure, max(gap(found[:, -1]), gap(inner)), lines)


if __name__ == "__main__":
    main("world_model", train, explain)
