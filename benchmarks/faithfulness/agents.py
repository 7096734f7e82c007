"""The agents of examples/agents and of the demo, in their environments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.envs import SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks.faithfulness.subjects import PLAIN, Subject
from benchmarks.supported.shim import import_torchvision
from tdhook import Contrast, Key, Target
from tdhook.evaluation import along, blurred, patches
from tdhook.rl import Policy, demo_policy, load_policy, make_env
from tdhook.targets import Advantage, ExpectedValue, TargetLike

__all__ = ["AGENTS", "STATES", "checkpoint", "script"]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "agents"
STATES = 100
"""How many of the observations of a seed are explained."""


def script(name: str) -> Any:
    """The module that trained an agent."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def checkpoint(name: str) -> dict[str, Any]:
    """What it wrote."""
    found: dict[str, Any] = torch.load(FOLDER / "checkpoints" / f"{name}.pt", weights_only=True)
    return found


def some(values: TensorDictBase, count: int, seed: int) -> TensorDictBase:
    """So many rows, drawn without replacement."""
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:count]]


def met(actor: TensorDictModuleBase, env_id: str, steps: int = 200) -> Callable[[int], TensorDictBase]:
    """Observations of an actor that does what it holds best, from four episodes."""

    def draw(seed: int) -> TensorDictBase:
        env = SerialEnv(4, lambda: make_env(env_id))
        env.set_seed(seed)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            rollout = env.rollout(steps, actor, break_when_any_done=False)
        env.close()
        return some(rollout.select("observation").flatten(), STATES, seed)

    return draw


def demo() -> Subject:
    """The policy that comes with tdhook."""
    policy = demo_policy()
    what = "DQN, CartPole: why this action"
    return Subject(
        "demo", what, "vector", policy.actor, Advantage(index="argmax"), met(policy.actor, policy.env_id)
    )


def trained(
    name: str,
    what: str,
    target: Callable[[Any], TargetLike],
    network: str = "network",
    weights: str | None = None,
    steps: int = 200,
) -> Callable[[], Subject]:
    """An agent that sees a vector."""

    def made() -> Subject:
        of, found = script(name), checkpoint(name)
        built = getattr(of, network)()
        actor = built[0] if isinstance(built, tuple) else built
        actor.load_state_dict(found["weights"] if weights is None else found["weights"][weights])
        actor = actor.eval()
        env_id = found["facts"]["environment"]
        return Subject(name, what, "vector", actor, target(actor), met(actor, env_id, steps))

    return made


def distributional() -> Subject:
    """C51: the expectation of the return."""
    made = trained(
        "distributional", "C51, CartPole: the expected return", lambda _: None, "categorical_network", "atoms"
    )()
    support = made.model.support
    return Subject(
        made.name, made.what, made.kind, made.model, ExpectedValue(support, index="argmax"), made.draw
    )


def multiagent() -> Subject:
    """Two agents with networks of their own, which see the observations of both."""
    of, found = script("multiagent"), checkpoint("multiagent")
    name = "own networks, see all"
    actor = of.make_actor(of.SETUPS[name])
    actor.load_state_dict(found["weights"][name]["actor"])

    def draw(seed: int) -> TensorDictBase:
        torch.manual_seed(seed)
        episodes = of.play(actor, seed, resets=4)
        return some(episodes.select(of.OBSERVATION).flatten(), STATES, seed)

    target = Target(("agents", "loc"), (0, 0))
    what = "PPO, two agents of VMAS: the force of the first in x"
    return Subject("multiagent", what, "vector", actor, target, draw, (of.OBSERVATION,))


class LastValue(torch.nn.Module):
    """A policy with memory as a function of an episode: the values of the actions at its end."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.memory, self.values = policy[0].lstm, policy[1].module[0].module

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        """``[episodes, steps, features] -> [episodes, actions]``."""
        value: torch.Tensor = self.values(self.memory(observation)[0][:, -1])
        return value


def recurrent() -> Subject:
    """The LSTM that has to remember a light, in episodes of nine steps; a step is a feature."""
    of, steps = script("recurrent"), 9
    policy = of.load(checkpoint("recurrent"), "lstm")

    def draw(seed: int) -> TensorDictBase:
        with torch.no_grad():
            played = of.make_game(policy, 128, seed).rollout(60, policy, break_when_any_done=False)
        found = [played["observation"][game, part] for game, part, _ in of.episodes(played)]
        seen = torch.stack([each for each in found if len(each) == steps])
        truth = {"observation": seen[..., 1:] > 0}  # the step at which the light was on
        return some(TensorDict({"observation": seen, "truth": truth}, [len(seen)]), STATES // 2, seed)

    return Subject(
        "recurrent",
        "LSTM, a light to remember: why this side, by step",
        "sequence",
        TensorDictModule(LastValue(policy), ["observation"], ["action_value"]),
        Advantage(index="argmax"),
        draw,
        presets=("epsilon", "lstm_lrp"),
        groups=along((steps, 2), 0),
    )


def transformer() -> Subject:
    """The Decision Transformer; a feature is what it sees of one kind at one step."""
    import_torchvision()
    of = script("transformer")
    model = of.network().eval()
    model.load_state_dict(checkpoint("transformer")["weights"], strict=False)

    class Last(torch.nn.Module):
        """The logits of the last step."""

        def __init__(self) -> None:
            super().__init__()
            self.actor = model.module

        def forward(self, *seen: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.actor(*seen)[:, -1]
            return logits

    def draw(seed: int) -> TensorDictBase:
        windows = of.act(model, of.LONGEST, seed)
        chosen = some(windows, STATES // 5, seed)
        return TensorDict({key: chosen[key] for key in of.KEYS}, [len(chosen)])

    return Subject(
        "transformer",
        "Decision Transformer, CartPole: why this action, by step and kind",
        "sequence",
        TensorDictModule(Last(), of.KEYS, ["logits"]),
        Advantage("logits", "argmax"),
        draw,
        tuple(of.KEYS),
        ("attn_lrp", "cp_lrp", "epsilon"),
        {key: along((of.CONTEXT, width), 0) for key, width in zip(of.KEYS, (2, 2, 1), strict=True)},
        steps=12,
        permutations=8,
    )


class Foreseen(torch.nn.Module):
    """A world model as a function of what was seen and done: the reward that it foresees, without noise."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.reader = model[0].module, model[3].module
        self.prior, self.posterior = model[1].rssm_prior.module, model[1].rssm_posterior.module
        self.sizes = (script("world_model").STATE, script("world_model").WIDTH)

    def forward(self, seen: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """``[windows, steps, features] -> [windows, 1]``."""
        latents = self.encoder(seen)
        state, belief = (seen.new_zeros(len(seen), size) for size in self.sizes)
        none = torch.zeros_like(state)
        for step in range(seen.shape[1]):
            *_, belief = self.prior(state, belief, action[:, step], noise=none)
            *_, state = self.posterior(belief, latents[:, step], noise=none)
        reward: torch.Tensor = self.reader(state, belief)
        return reward


def world_model() -> Subject:
    """The state-space model; a feature is what it sees of one kind at one step."""
    of = script("world_model")
    model = of.network().eval()
    model.load_state_dict(checkpoint("world_model")["weights"])
    keys = (("next", "observation"), "action")

    def draw(seed: int) -> TensorDictBase:
        torch.manual_seed(seed)
        windows = some(of.watch(1, 100 + seed), STATES // 5, seed)
        seen = {"observation": windows["next", "observation"]}
        return TensorDict({"next": seen, "action": windows["action"]}, [len(windows)])

    return Subject(
        "world_model",
        "RSSM, Pendulum: the reward foreseen, by step and kind",
        "sequence",
        TensorDictModule(Foreseen(model), list(keys), ["reward"]),
        Target("reward"),
        draw,
        keys,
        ("epsilon", "lstm_lrp"),
        {key: along((of.STEPS, width), 0) for key, width in zip(keys, (3, 1), strict=True)},
        steps=12,
        permutations=8,
    )


def language() -> Subject:
    """The tiny Llama, given embedded prompts of ten words; a word is a feature."""
    import_torchvision()
    of, length = script("language"), 10
    model = of.network().eval()
    model.load_state_dict(checkpoint("language")["weights"])
    words = of.tokenizer()

    class Answers(torch.nn.Module):
        """The logits of the next word."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, embedding: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(inputs_embeds=embedding).logits[:, -1]
            return logits

    def draw(seed: int) -> TensorDictBase:
        texts, right, wrong = of.prompts(800, 10_000 + 1000 * seed)
        chosen = [i for i, text in enumerate(texts) if len(text.split()) == length][: STATES // 4]
        ids = words([texts[i] for i in chosen], return_tensors="pt")["input_ids"]
        told, never = (
            torch.tensor(words.convert_tokens_to_ids([names[i] for i in chosen])) for names in (right, wrong)
        )
        with torch.no_grad():
            embedding = model.get_input_embeddings()(ids)
        clauses = words.convert_tokens_to_ids(["go", "never", *of.DIRECTIONS])
        truth = {"embedding": torch.isin(ids, torch.tensor(clauses)).unsqueeze(-1)}
        inputs = {"embedding": embedding, "told": told, "never": never, "truth": truth}
        return TensorDict(inputs, [len(chosen)])

    return Subject(
        "language",
        "Llama, where to go: the right word, and not the one never to take, by word",
        "sequence",
        TensorDictModule(Answers(), ["embedding"], ["logits"]),
        Contrast(Target("logits", Key("told")), Target("logits", Key("never"))),
        draw,
        ("embedding",),
        ("attn_lrp", "cp_lrp"),
        along((length, 32), 0),
    )


def pixels(
    name: str,
    what: str,
    policy: Callable[[], Policy],
    target: TargetLike,
    size: int,
    count: int,
    width: float,
) -> Callable[[], Subject]:
    """An agent that sees pictures; a square of pixels is a feature."""

    def made() -> Subject:
        of = policy()

        def draw(seed: int) -> TensorDictBase:
            torch.manual_seed(seed)
            env = make_env(of, seed)
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                rollout = env.rollout(300, of.actor, break_when_any_done=False)
            return some(rollout.select("pixels"), count, seed)

        shape = of.metadata["architecture"]["in_shape"]
        return Subject(
            name,
            what,
            "pixels",
            of.actor,
            target,
            draw,
            ("pixels",),
            ("epsilon", "gamma", "epsilon_plus", "epsilon_alpha2_beta1"),
            patches(shape, size),
            {**PLAIN, "blur": blurred(width)},
            steps=10,
            permutations=8,
        )

    return made


AGENTS: Mapping[str, Callable[[], Subject]] = {
    "demo": demo,
    "dqn": trained("dqn", "DQN, Acrobot: why this action", lambda _: Advantage(index="argmax")),
    "dueling": trained(
        "dueling", "Dueling DQN, CartPole: why this action", lambda _: Advantage(index="argmax")
    ),
    "distributional": distributional,
    "ppo": trained(
        "ppo",
        "PPO, Lander: why this action",
        lambda _: Advantage("logits", "argmax"),
        "networks",
        "actor",
        400,
    ),
    "sac": trained("sac", "SAC, Pendulum: what torque", lambda _: Target("loc"), "networks"),
    "td3": trained("td3", "TD3, Pendulum: what torque", lambda _: Target("push"), "networks", "actor"),
    "multiagent": multiagent,
    "recurrent": recurrent,
    "transformer": transformer,
    "world_model": world_model,
    "language": language,
    "atari": pixels(
        "atari",
        "PPO, Freeway (the demo's other policy): why walk, and not wait, by 4 x 4 pixels",
        lambda: demo_policy("freeway"),
        Contrast(Target("logits", 1), Target("logits", 0)),
        4,
        6,
        3.0,
    ),
    "minatar_breakout": pixels(
        "minatar_breakout",
        "PPO, MinAtar Breakout: why this action, by place",
        lambda: load_policy(FOLDER / "checkpoints" / "minatar_breakout.pt"),
        Advantage("logits", "argmax"),
        1,
        12,
        1.0,
    ),
}
