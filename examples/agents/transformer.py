"""A Decision Transformer that balances CartPole without seeing velocities: which past steps does it look at?

It learns from what others did: the packaged DQN, which sees velocities, more or less disturbed by random actions. Of
each step it sees how much reward is still to come (the return-to-go), position and angle, and the actions before it.
How fast the pole falls is in none of these alone, but in the difference between steps. Needs the transformers library.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import torch
from common import Shown, gap, main
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import DTActor

from tdhook import LRP, Contrast, Target
from tdhook.plots import relevance_matrix
from tdhook.rl import demo_policy, make_env
from tdhook.targets import AtStep

CONTEXT = 16
LONGEST = 300
SEEN = [0, 2]  # position and angle, without their velocities
KEYS = ["observation", "action", "return_to_go"]
FEATURES = ("position", "angle", "went left", "went right", "return to go")


def network() -> TensorDictModule:
    """Untrained: it writes ``logits [*batch, time, 2]`` of the action of each step, given what was before it."""
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 64, "activation": "gelu_new"}
    config |= {"n_positions": 3 * CONTEXT, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    return TensorDictModule(DTActor(len(SEEN), 2, config), KEYS, ["logits"])


def watch(rounds: int, seed: int) -> list[TensorDictBase]:
    """Episodes of the DQN, in each of which it is disturbed as often as is drawn for it, 64 at a time."""
    values = demo_policy().actor[0].module
    games = gymnasium.make_vec("CartPole-v1", num_envs=64, vectorization_mode="vector_entry_point")
    found = []
    for number in range(rounds):
        observation = torch.from_numpy(games.reset(seed=seed + number)[0])
        disturbed, steps = torch.rand(64) ** 2, []
        over = torch.zeros(64, dtype=torch.bool)
        while len(steps) < LONGEST and not over.all():
            with torch.no_grad():
                greedy = values(observation).argmax(-1)
            action = torch.where(torch.rand(64) < disturbed, torch.randint(2, (64,)), greedy)
            steps.append((observation, nn.functional.one_hot(action, 2), ~over))
            after, _, fallen, *_ = games.step(action.numpy())
            observation, over = torch.from_numpy(after), over | torch.from_numpy(fallen)
        played, actions, lasts = (torch.stack(entries, 1) for entries in zip(*steps, strict=True))
        for game, length in enumerate(lasts.sum(1).tolist()):
            found.append(seen(played[game, :length], actions[game, :length]))
    return found


def seen(observation: torch.Tensor, action: torch.Tensor) -> TensorDictBase:
    """What the transformer sees of an episode. Each step is worth 1; returns are given in hundreds."""
    count = len(action)
    to_go = torch.arange(count, 0, -1).unsqueeze(-1) / 100
    return TensorDict(
        observation=observation[:, SEEN], action=action.float(), return_to_go=to_go, batch_size=[count]
    )


def draw(episodes: TensorDictBase, starts: torch.Tensor, count: int) -> TensorDictBase:
    """Random windows, ``[count, CONTEXT]``, of episodes one after the other."""
    first = starts[torch.randint(len(starts), (count, 1))]
    return episodes[first + torch.arange(CONTEXT)]


def train(seed: int, updates: int = 1000) -> dict[str, Any]:
    """Imitation: what was done, given what was seen and what came of it."""
    episodes = [episode for episode in watch(8, seed) if len(episode) >= CONTEXT]
    ends = torch.tensor([len(episode) for episode in episodes]).cumsum(0)
    starts = torch.cat(
        [
            torch.arange(end - len(e), end - CONTEXT + 1)
            for e, end in zip(episodes, ends.tolist(), strict=True)
        ]
    )
    data = torch.cat(episodes)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch = draw(data, starts, 64)
        logits = model(batch.copy())["logits"]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["action"].argmax(-1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("attn.bias")}
    facts = {"seed": seed, "steps watched": len(data), "loss": round(loss.item(), 3)}
    return {"weights": weights, "facts": facts}


def act(model: TensorDictModule, wanted: float, seed: int) -> TensorDictBase:
    """Let it act, asked for a return: the windows that it saw, ``[steps, CONTEXT]``, once there are so many steps."""
    env = make_env("CartPole-v1", seed)
    step, past, windows, to_go = env.reset(), [], [], wanted / 100
    while len(past) < LONGEST:
        now = TensorDict(
            observation=step["observation"][SEEN], action=torch.zeros(2), return_to_go=torch.tensor([to_go])
        )
        window = torch.stack([*past[1 - CONTEXT :], now])
        with torch.no_grad():
            choice = model(window.clone())["logits"][-1].argmax()
        windows.append(window)
        action = nn.functional.one_hot(choice, 2)
        past.append(now.clone().set("action", action.float()))
        step, to_go = env.step(step.set("action", action))["next"], to_go - 0.01
        if step["done"]:
            break
    return torch.stack(windows[CONTEXT - 1 :])


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Why left and not right, given the last steps?"""
    model = network().eval()
    model.load_state_dict(checkpoint["weights"], strict=False)  # GPT-2's mask is no weight
    windows = act(model, LONGEST, seed)
    why = AtStep(Contrast(Target("logits", 0), Target("logits", 1)))
    with LRP("attn_lrp", target=why, ledger=True).prepare(model) as explained:
        explained = explained(windows)
    relevance = torch.cat([explained["attr", key] for key in KEYS], -1)  # [steps, CONTEXT, features]
    logits = explained["logits"][:, -1]
    for_what_it_did = relevance * (logits[:, 0] - logits[:, 1]).sign().reshape(-1, 1, 1)

    share = relevance.abs().mean(0) / relevance.abs().mean(0).sum()
    lines = [f"return, asked for {LONGEST}: {len(windows) + CONTEXT - 1}"]
    lines += [
        f"{name}: {part:.0%} of all relevance" for name, part in zip(FEATURES, share.sum(0), strict=True)
    ]
    lines.append(
        f"the present step: {share[-1].sum():.0%}, the one before: {share[-2].sum():.0%}, "
        f"all earlier ones: {share[:-2].sum():.0%}"
    )
    figure = relevance_matrix(
        for_what_it_did.mean(0).T,
        FEATURES,
        [str(step) for step in range(1 - CONTEXT, 1)],
        title="What spoke for the action that was taken, mean of an episode",
        column_label="steps before the present one",
    )
    return Shown(figure, gap(explained[:, -1]), lines)


if __name__ == "__main__":
    main("transformer", train, explain)
