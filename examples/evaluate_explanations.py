"""Do explanations of trained agents mean anything? Each preset against the gradient, gradient x input and chance.

    python examples/evaluate_explanations.py --out evaluation.json --picture evaluation.png

It takes the policy that comes with tdhook, and those of examples/agents that have a checkpoint. For each it prints a
table, whose columns are explained in docs/show-and-test/evaluation.md; what is there was printed by this script. An
agent takes about a minute on one core. Needs the extras ``rl`` and ``viz``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook import LRP, Target
from tdhook.evaluation import (
    Gradient,
    GradientTimesInput,
    Method,
    RandomMap,
    as_markdown,
    compare,
    perturbation_curve,
    return_lost,
)
from tdhook.relevance.composites.composite import PRESETS, preset
from tdhook.rl import demo_policy, make_env
from tdhook.targets import Advantage, TargetLike

AGENTS = Path(__file__).parent / "agents"
ENVS = 5
"""In how many environments an agent is watched."""
STATES = 1000
"""How many of the observations are explained."""


@dataclass(frozen=True)
class Agent:
    """An agent to explain.

    Attributes:
        name: of the agent.
        what: the agent, its environment and what is explained, in words.
        actor: the policy.
        target: what is explained.
        env_id: gymnasium id of its environment.
        steps: after how many an episode is cut off.
    """

    name: str
    what: str
    actor: TensorDictModuleBase
    target: TargetLike
    env_id: str
    steps: int = 200


def demo() -> Agent:
    """The policy that comes with tdhook."""
    policy = demo_policy()
    return Agent(
        "demo", "DQN, CartPole: why this action", policy.actor, Advantage(index="argmax"), policy.env_id
    )


def trained(
    name: str, what: str, network: str, target: TargetLike, weights: str | None = None, steps: int = 200
) -> Agent | None:
    """An agent of examples/agents, if it has a checkpoint."""
    path = AGENTS / "checkpoints" / f"{name}.pt"
    if not path.exists():
        return None
    sys.path.insert(0, str(AGENTS))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    built = getattr(importlib.import_module(name), network)()
    actor = built[0] if isinstance(built, tuple) else built
    state = checkpoint["weights"]
    actor.load_state_dict(state if weights is None else state[weights])
    return Agent(name, what, actor.eval(), target, checkpoint["facts"]["environment"], steps)


CASES: tuple[Callable[[], Agent | None], ...] = (
    demo,
    partial(trained, "dqn", "DQN, Acrobot: why this action", "network", Advantage(index="argmax")),
    partial(
        trained,
        "dueling",
        "Dueling DQN, Lander: why this action",
        "network",
        Advantage(index="argmax"),
        steps=400,
    ),
    partial(
        trained,
        "ppo",
        "PPO, Lander: why this action",
        "networks",
        Advantage("logits", "argmax"),
        "actor",
        400,
    ),
    partial(trained, "sac", "SAC, Pendulum: what torque", "networks", Target("loc")),
    partial(trained, "td3", "TD3, Pendulum: what torque", "networks", Target("push"), "actor"),
)


def methods_for(agent: Agent, states: TensorDictBase) -> dict[str, Method]:
    """All presets and the controls; presets whose relevance is the same, to one percent, share a row."""
    found: dict[str, Method] = {}
    maps: dict[str, torch.Tensor] = {}
    for name in PRESETS:
        bounds = {"low": -1.0, "high": 1.0} if name == "epsilon_gamma_box" else {}
        method = LRP(preset(name, **bounds), target=agent.target, on_unmatched="ignore")
        relevance = method.wrap(agent.actor)(states.clone())["attr", "observation"]
        scale = relevance.abs().mean()
        same = [other for other, known in maps.items() if (known - relevance).abs().max() < 0.01 * scale]
        if same:
            found[f"{same[0]}, {name}"] = found.pop(same[0])
            maps[f"{same[0]}, {name}"] = maps.pop(same[0])
        else:
            found[name], maps[name] = method, relevance
    controls = {
        "gradient": Gradient(agent.target),
        "gradient x input": GradientTimesInput(agent.target),
        "random map": RandomMap(agent.target),
    }
    return {**found, **controls}


def watched(agent: Agent, env: EnvBase, seed: int) -> TensorDictBase:
    """Observations of the agent as it acts, drawn from its episodes."""
    env.set_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = env.rollout(agent.steps, agent.actor, break_when_any_done=False)
    seen = rollout["observation"].flatten(0, 1)
    chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))[:STATES]
    return TensorDict({"observation": seen[chosen]}, batch_size=[len(chosen)])


def evaluate(agent: Agent, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the table, and the curves of the picture."""
    env = SerialEnv(ENVS, lambda: make_env(agent.env_id))
    states = watched(agent, env, seed)
    returns: dict[int, Any] = {}

    def played(which: str) -> Callable[[Method], float]:
        def figure(method: Method) -> float:
            if id(method) not in returns:
                found = return_lost(
                    env, agent.actor, method, count=1, episodes=1, max_steps=agent.steps, seed=seed
                )
                returns[id(method)] = found.to_dict()
            return float(returns[id(method)][which])

        return figure

    methods = methods_for(agent, states)
    rows = compare(
        methods,
        agent.actor,
        states,
        target=agent.target,
        baseline="sample",
        radius=0.05 * states["observation"].std(0),
        seed=seed,
        further={f"return, {which}": played(which) for which in ("seen", "most", "least", "random")},
    )
    env.close()
    curves = {
        name: perturbation_curve(agent.actor, states, method, baseline="sample", seed=seed).to_dict()
        for name, method in methods.items()
    }
    return rows, curves


def draw(curves: Mapping[str, Any], rows: list[dict[str, Any]], title: str) -> Figure:
    """Curves of each method, and the return that is left without one feature."""
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1.0])
    known = (
        "#b2182b",
        "#e69f00",
        "#7a4f9a",
        "#009e73",
        "#56b4e9",
        "#8c8c00",
        "#cc79a7",
        "#8b5a2b",
        "#0b3d91",
    )
    others = {"gradient": "#333333", "gradient x input": "#888888", "random map": "#cccccc"}
    colours = iter(known * 2)
    for name, curve in curves.items():
        label, colour = _short(name), others[name] if name in others else next(colours)
        left.plot(curve["most"]["fraction"], curve["most"]["value"], color=colour, label=label)
        left.plot(curve["least"]["fraction"], curve["least"]["value"], color=colour, linestyle="--")
    left.set_xlabel("share of the features replaced")
    left.set_ylabel("what was explained, mean")
    left.set_title("most relevant first (solid), least relevant first (dashed)", fontsize="medium")
    left.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    places, labels = (
        range(len(rows)),
        {"most": "the most relevant", "random": "any", "least": "the least relevant"},
    )
    for shift, (which, colour) in enumerate(
        (("most", "#b2182b"), ("random", "#999999"), ("least", "#2166ac"))
    ):
        at = [place + 0.27 * (shift - 1) for place in places]
        right.barh(
            at,
            [row[f"return, {which}"] for row in rows],
            0.25,
            color=colour,
            label=labels[which],
        )
    right.axvline(rows[0]["return, seen"], color="#333333", linewidth=0.8)
    right.set_yticks(list(places), [_short(row["method"]) for row in rows], fontsize="small")
    right.invert_yaxis()
    right.set_xlabel("return")
    right.set_title("one feature hidden at each step (line: none)", fontsize="medium")
    right.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.15), frameon=False)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="large")
    return figure


def _short(name: str) -> str:
    first, *others = name.split(", ")
    return f"{first} (+{len(others)})" if others else first


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate explanations of trained agents.")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: %(default)s)")
    parser.add_argument("--agents", nargs="*", help="names of agents (default: all that there are)")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON; those of other agents stay")
    parser.add_argument("--picture", type=Path, help="where the picture of the first one goes")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the networks are too small to gain from more
    torch.manual_seed(arguments.seed)
    found = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for case in CASES:
        agent = case()
        if agent is None or (arguments.agents and agent.name not in arguments.agents):
            continue
        start = time.perf_counter()
        rows, curves = evaluate(agent, arguments.seed)
        print(
            f"{agent.what} ({time.perf_counter() - start:.0f} s)\n\n{as_markdown(rows, digits=3)}\n",
            flush=True,
        )
        if arguments.picture and agent.name == "demo":
            draw(curves, rows, agent.what).savefig(arguments.picture, dpi=80)
        found[agent.name] = {"what": agent.what, "rows": rows}
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
