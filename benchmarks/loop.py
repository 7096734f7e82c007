"""What attribution costs in the loop of reinforcement learning: frames per second while collecting, and per update.

Both on CartPole with 32 environments and a policy of two hidden layers of 64, as PPO is run on it.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from benchmarks.contenders import OURS, OURS_COMPILED
from benchmarks.library_models import Unavailable
from benchmarks.measuring import Settings
from benchmarks.timing import Times, cpu_ratio, ratios
from tdhook import LRP, Target

__all__ = ["LOOP_CASES", "LoopCase", "measure_loop"]

BARE = "without"
Row = dict[str, Any]
Turn = Callable[[], object]


@dataclass(frozen=True)
class LoopCase:
    """A part of a training loop, with attribution and without.

    Attributes:
        name: what it is.
        turns: given how many environments, frames of each and the explained policies by name (``None`` for none), makes
            what is timed for each.
        rate: whether what counts is frames per second, and not milliseconds.
        aim: of the ratio to the loop without attribution.
        preset: how it is explained.
    """

    name: str
    turns: Callable[[int, int, Mapping[str, Any], ExitStack], Mapping[str, Turn]]
    rate: bool
    aim: float
    preset: str = "epsilon_plus"

    @property
    def model_name(self) -> str:
        return self.name


def measure_loop(case: LoopCase, settings: Settings, envs: int = 32, steps: int = 32, rounds: int = 7) -> Row:
    """Let the contenders take turns, each of ``envs * steps`` frames, for that long and so many rounds at least."""
    row: Row = {"case": case.name, "preset": case.preset, "rate": case.rate, "aim": case.aim}
    row |= {"envs": envs, "steps": steps}
    kinds = {OURS: False} | ({OURS_COMPILED: True} if settings.compiled else {})
    target = Target("logits", "action")
    methods = {BARE: None} | {
        name: LRP(case.preset, target=target, compile=how) for name, how in kinds.items()
    }
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchrl's own
        try:
            turns = case.turns(envs, steps, methods, stack)
        except (ImportError, Unavailable) as reason:
            return row | {"missing": str(reason)}
        times = _interleaved(turns, settings.seconds, rounds)
    row["contenders"] = {
        name: {
            "wall_ms": 1e3 * statistics.median(mine.wall),
            "frames_per_s": envs * steps / statistics.median(mine.wall),
            "rounds": len(mine.wall),
            "ratio": ratios(times[BARE], mine) if case.rate else ratios(mine, times[BARE]),
            "cpu_ratio": cpu_ratio(times[BARE], mine) if case.rate else cpu_ratio(mine, times[BARE]),
        }
        for name, mine in times.items()
    }
    return row


def _interleaved(turns: Mapping[str, Turn], seconds: float, rounds: int) -> dict[str, Times]:
    times = {name: Times() for name in turns}
    for turn in turns.values():
        for _ in range(2):
            turn()
    order, shuffle = list(turns), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t.wall) < rounds for t in times.values()):
        shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            turns[name]()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
    return times


def _actor() -> TensorDictModuleBase:
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [64, 64], "activation": "Tanh"}
    torch.manual_seed(0)
    return importlib.import_module("tdhook.rl").build_actor("ppo_mlp", architecture)


def _serial(envs: int) -> Any:
    """As torchrl has it: one after the other in this process."""
    make_env = importlib.import_module("tdhook.rl").make_env
    return importlib.import_module("torchrl.envs").SerialEnv(envs, lambda: make_env("CartPole-v1"))


def _vector(envs: int) -> Any:
    """As gymnasium has it: stepped together, with arrays in and out."""
    gymnasium = importlib.import_module("gymnasium")
    mode = importlib.import_module("gymnasium.vector").AutoresetMode.DISABLED
    made = gymnasium.make_vec(
        "CartPole-v1", num_envs=envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
    )
    return importlib.import_module("torchrl.envs").GymWrapper(made)


def _collecting(make: Callable[[int], Any]) -> Callable[..., dict[str, Turn]]:
    """Batches of a collector, whose policy explains each of its steps."""

    def turns(envs: int, steps: int, methods: Mapping[str, Any], stack: ExitStack) -> dict[str, Turn]:
        collector = importlib.import_module("torchrl.collectors").Collector
        made: dict[str, Turn] = {}
        for name, method in methods.items():
            actor = _actor()
            policy = actor if method is None else method.wrap(actor)
            frames = {"frames_per_batch": envs * steps, "total_frames": -1}
            collecting = collector(make(envs), policy, auto_register_policy_transforms=False, **frames)
            stack.callback(collecting.shutdown)
            batches = stack.enter_context(closing(iter(collecting)))
            made[name] = _next_of(batches, explained=method is not None)
        return made

    return turns


def _next_of(batches: Iterator[TensorDictBase], explained: bool) -> Turn:
    def turn() -> None:
        batch = next(batches)
        assert (("attr", "observation") in batch.keys(True)) == explained

    return turn


EPOCHS, MINIBATCH = 4, 128


def _updating(each: bool) -> Callable[..., dict[str, Turn]]:
    """Updates by PPO, of which the batch is explained once, or each minibatch of each epoch."""

    def turns(envs: int, steps: int, methods: Mapping[str, Any], stack: ExitStack) -> dict[str, Turn]:
        return _updates(envs, steps, methods, stack, each)

    return turns


def _updates(
    envs: int, steps: int, methods: Mapping[str, Any], stack: ExitStack, each: bool
) -> dict[str, Turn]:
    modules, objectives = (importlib.import_module(f"torchrl.{name}") for name in ("modules", "objectives"))
    estimators = importlib.import_module("torchrl.objectives.value")
    env = _serial(envs)
    stack.callback(env.close)
    made: dict[str, Turn] = {}
    for name, method in methods.items():
        actor = _actor()
        critic = modules.ValueOperator(
            modules.MLP(in_features=4, out_features=1, num_cells=[64, 64]), in_keys=["observation"]
        )
        loss = objectives.ClipPPOLoss(actor, critic, entropy_coeff=0.01)
        gae = estimators.GAE(gamma=0.99, lmbda=0.95, value_network=critic)
        optimiser = torch.optim.Adam(loss.parameters(), lr=3e-4)
        with torch.no_grad():
            data = env.rollout(steps, actor, break_when_any_done=False)
            data["action_log_prob"] = actor.get_dist(data).log_prob(data["action"])
        explained = None if method is None else method.wrap(actor)
        made[name] = _update(data, loss, gae, optimiser, explained, each)
    return made


def _update(data: TensorDictBase, loss: Any, gae: Any, optimiser: Any, explained: Any, each: bool) -> Turn:
    """Advantages once, then minibatches."""

    def attribute(part: TensorDictBase) -> None:
        found = explained(part.select("observation"))
        assert found["attr", "observation"].shape == part["observation"].shape

    def turn() -> None:
        batch = data.clone(False)
        with torch.no_grad():
            gae(batch)
        flat = batch.reshape(-1)
        if explained is not None and not each:
            attribute(flat)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(flat)).split(MINIBATCH):
                part = flat[rows]
                if explained is not None and each:
                    attribute(part)
                terms = loss(part)
                total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
                optimiser.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimiser.step()

    return turn


LOOP_CASES = (
    LoopCase("Collector, SerialEnv", _collecting(_serial), True, 0.6),
    LoopCase("Collector, vector environment of gymnasium", _collecting(_vector), True, 0.65),
    LoopCase("PPO update, the batch explained", _updating(each=False), False, 1.3),
    LoopCase("PPO update, every minibatch explained", _updating(each=True), False, 1.3),
)
