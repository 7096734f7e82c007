"""LSTM and GRU policies that must remember: which step of the past was the action taken from?

Arrows pass by, one a step, to the left or to the right. Beside one of them a light is on, and from then on the policy
has to go where that arrow showed. The light comes at a random step, and episodes are of random length: nothing but the
lit step tells the action.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Shown, gap, main
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import (
    Bounded,
    Composite,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.modules import EGreedyModule, GRUModule, LSTMModule, QValueActor, set_recurrent_mode
from torchrl.objectives import DQNLoss, SoftUpdate

from tdhook import LRP, Contrast, Key, Target
from tdhook.plots import relevance_matrix
from tdhook.rl.history import explain_windows, memory_keys
from tdhook.targets import AtStep

SIDES = ("left", "right")
FEATURES = ("arrow", "light")
SHORTEST, LONGEST = 6, 12
HIDDEN = 24
KINDS = ("lstm", "gru")
LEFT_NOT_RIGHT = Contrast(Target("action_value", 0), Target("action_value", 1))


class Recall(EnvBase):
    """Several games at once.

    Args:
        games: how many.
        seed: of all that is random in them.

    ``observation [games, 2]`` is the arrow, 1 to the left and -1 to the right, and whether the light is on. The action
    is a side, one-hot; from the light on it is worth 1 each time it is that of the lit arrow. ``since [games, 1]`` is
    how many steps ago the light was on, -1 before: the truth, which the policy does not see.
    """

    def __init__(self, games: int, seed: int = 0) -> None:
        super().__init__(batch_size=[games])
        self.observation_spec = Composite(
            observation=Bounded(-1, 1, (games, len(FEATURES))),
            since=Unbounded((games, 1), dtype=torch.int64),
            shape=[games],
        )
        self.action_spec = OneHot(len(SIDES), shape=(games, len(SIDES)))
        self.reward_spec = Unbounded((games, 1))
        self.step_count, self.length, self.lit, self.side, self.answer = torch.zeros(
            5, games, dtype=torch.int64
        )
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _draw(self, low: int | Tensor, high: int | Tensor) -> Tensor:
        draw = torch.rand(self.batch_size, generator=self.random)
        return (low + draw * (high - low)).long()

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        new = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            new = tensordict["_reset"].reshape(self.batch_size)
        self.length = torch.where(new, self._draw(SHORTEST, LONGEST + 1), self.length)
        self.lit = torch.where(new, self._draw(0, self.length - 1), self.lit)
        self.step_count = torch.where(new, 0, self.step_count)
        self.side = torch.where(new, self._draw(0, 2), self.side)
        return self._seen()

    def _seen(self) -> TensorDictBase:
        lit = self.step_count == self.lit
        self.answer = torch.where(lit, self.side, self.answer)
        observation = torch.stack([1 - 2 * self.side, lit], -1).float()
        since = (self.step_count - self.lit).clamp(min=-1).unsqueeze(-1)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict(
            observation=observation,
            since=since,
            done=done,
            terminated=done.clone(),
            batch_size=self.batch_size,
        )

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        told = self.step_count >= self.lit
        right = told & (tensordict["action"].long().argmax(-1) == self.answer)
        ended = (self.step_count == self.length - 1).unsqueeze(-1)
        self.step_count = self.step_count + 1
        self.side = self._draw(0, len(SIDES))
        after = self._seen()
        return after.update(
            {"reward": right.float().unsqueeze(-1), "done": ended, "terminated": ended.clone()}
        )


def make_policy(kind: str) -> TensorDictSequential:
    """What is remembered of the observations so far, and from it the value of each side."""
    module = {"lstm": LSTMModule, "gru": GRUModule}[kind]
    memory = module(input_size=len(FEATURES), hidden_size=HIDDEN, in_key="observation", out_key="memory")
    values = QValueActor(nn.Linear(HIDDEN, len(SIDES)), in_keys=["memory"], spec=OneHot(len(SIDES)))
    return TensorDictSequential(memory, values)


def make_game(policy: TensorDictSequential, games: int, seed: int) -> TransformedEnv:
    """Games that also say where an episode begins, and begin it with an empty memory."""
    return (
        TransformedEnv(Recall(games, seed))
        .append_transform(InitTracker())
        .append_transform(policy[0].make_tensordict_primer())
    )


def train_one(kind: str, seed: int) -> TensorDictSequential:
    """Recurrent double DQN."""
    torch.manual_seed(seed)
    batches, games, steps, updates = 200, 128, 16, 4
    frames = games * steps
    policy = make_policy(kind)
    explore = EGreedyModule(OneHot(len(SIDES)), annealing_num_steps=batches // 3, eps_end=0.05)
    collector = Collector(
        make_game(policy, games, seed),
        TensorDictSequential(policy, explore),
        frames_per_batch=frames,
        total_frames=frames * batches,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(32 * games), batch_size=games)
    loss = DQNLoss(policy, action_space="one-hot", delay_value=True, double_dqn=True)
    loss.make_value_estimator(gamma=0.0)  # what it does changes nothing that comes later
    target = SoftUpdate(loss, eps=0.95)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for batch in collector:
        buffer.extend(batch)
        for _ in range(updates):
            with set_recurrent_mode("recurrent"):
                loss(buffer.sample())["loss"].backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            target.step()
        schedule.step()
        explore.step()
    collector.shutdown()
    return policy.eval()


def train(seed: int) -> dict[str, Any]:
    """One policy of each kind."""
    trained = {kind: train_one(kind, seed) for kind in KINDS}
    facts = {"seed": seed, "frames": 200 * 128 * 16}
    return {"weights": {kind: policy.state_dict() for kind, policy in trained.items()}, "facts": facts}


def load(checkpoint: dict[str, Any], kind: str) -> TensorDictSequential:
    """The trained policy of a kind."""
    policy = make_policy(kind)
    policy.load_state_dict(checkpoint["weights"][kind])
    return policy.eval()


def episodes(played: TensorDictBase) -> list[tuple[int, slice, int]]:
    """The whole episodes of a batch ``[games, time]``: which game, from when to when, and when the light was on."""
    found = []
    for game, step in played["next", "done"].squeeze(-1).nonzero().tolist():
        starts = played["is_init"][game, : step + 1, 0].nonzero()
        if len(starts):
            found.append((game, slice(int(starts[-1]), step + 1), step - int(played["since"][game, step])))
    return found


def explain_episodes(
    policy: TensorDictSequential, played: TensorDictBase, ledger: bool = True
) -> TensorDictBase:
    """Why left and not right, at the end of each episode, for all at once: resets keep them apart."""
    lrp = LRP("lstm_lrp", target=AtStep(LEFT_NOT_RIGHT, Key(("next", "done"))), ledger=ledger)
    reads = ["observation", *memory_keys(policy)]
    with set_recurrent_mode("recurrent"), lrp.prepare(policy, in_keys=reads) as explained:
        return explained(played.copy())


def collect(
    policy: TensorDictSequential, games: int, steps: int, count: int, seed: int
) -> list[TensorDictBase]:
    """Successive batches ``[games, steps]`` of a collector, after a first one."""
    game = make_game(policy, games, seed)
    frames = games * steps
    collector = Collector(game, policy, frames_per_batch=frames, total_frames=(count + 1) * frames)
    batches = list(collector)[1:]
    collector.shutdown()
    return batches


def explain_batches(
    policy: TensorDictSequential, batches: list[TensorDictBase], ledger: bool = True
) -> TensorDictBase:
    """The same for the ends in the last of successive batches of a collector, back through those before."""
    lrp = LRP("lstm_lrp", target=AtStep(LEFT_NOT_RIGHT, Key(("next", "done"))), ledger=ledger)
    return torch.cat(explain_windows(lrp, policy, batches), 1)


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Is the step of most relevance the one where the light was on?"""
    lines, gaps, rows, names, lit = [], [], [], [], []
    for kind in KINDS:
        policy = load(checkpoint, kind)
        played = make_game(policy, 32, 100 + seed).rollout(36, policy, break_when_any_done=False)
        ends = played["next", "done"].squeeze(-1)
        explained = explain_episodes(policy, played)
        relevance = explained["attr", "observation"].sum(-1)
        gaps.append(gap(explained[ends]))
        right = played["next", "reward"][ends].mean()
        whole = episodes(played)
        found = sum(
            part.start + int(relevance[game, part].abs().argmax()) == light for game, part, light in whole
        )
        lines.append(f"{kind.upper()}: {right:.1%} right at the end")
        lines.append(f"  most relevance is on the lit step in {found} of {len(whole)} episodes")
        lines.append("  " + across(policy, seed))
        for game, part, light in whole[:5]:
            row = torch.zeros(LONGEST)
            row[LONGEST - (part.stop - part.start) :] = relevance[game, part]
            rows.append(row)
            lit.append(light - part.stop + LONGEST)
            names.append(f"{kind.upper()}: {SIDES[int(played['action'][game, part.stop - 1].argmax())]}")
    figure = relevance_matrix(
        torch.stack(rows),
        names,
        [str(step) for step in range(1 - LONGEST, 1)],
        title="What spoke for left (red) or right (blue), in 10 episodes; a ring where the light was on",
        row_label="the action",
        column_label="steps before the end",
    )
    figure.axes[0].scatter(lit, range(len(lit)), s=500, facecolors="none", edgecolors="black")
    return Shown(figure, max(gaps), lines)


def across(policy: TensorDictSequential, seed: int) -> str:
    """How often that holds where the light was on in an earlier batch of the collector than the end."""
    steps = 8
    batches = collect(policy, games=32, steps=steps, count=3, seed=200 + seed)
    played, explained = torch.cat(batches, 1), explain_batches(policy, batches, ledger=False)
    relevance = explained["attr", "observation"].sum(-1)
    earlier = [(game, part, light) for game, part, light in episodes(played) if light < 2 * steps < part.stop]
    found = sum(
        part.start + int(relevance[game, part].abs().argmax()) == light for game, part, light in earlier
    )
    return f"and in {found} of {len(earlier)} whose light was on in an earlier batch of the collector"


if __name__ == "__main__":
    main("recurrent", train, explain)
