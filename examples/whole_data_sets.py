"""Make two replay buffers by acting, and name what `tdhook dataset explain` needs of them.

    python -m examples.whole_data_sets cartpole buffers/cartpole          # 1,000,000 steps
    python -m examples.whole_data_sets freeway buffers/freeway            # 50,000 frames
    tdhook dataset explain --policy examples.whole_data_sets:cartpole --source buffers/cartpole --out cartpole-job
    tdhook dataset report cartpole-job

Needs the extras rl and atari. Each buffer is the same for the same seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook.rl import Policy, demo_policy

EXPLORING = 0.1
"""Part of the steps at which an action is drawn by chance, so that the buffer has states that the policy avoids."""


def cartpole() -> Policy:
    return demo_policy("cartpole")


def freeway() -> Policy:
    return demo_policy("freeway")


def numbers(rows: TensorDictBase) -> TensorDictBase:
    """Bytes of frames as the numbers that the policy of Freeway reads: `--prepare examples.whole_data_sets:numbers`."""
    return rows.copy().set("pixels", (rows["pixels"].float() / 255 - 0.5568627450980392) / 0.25)


def make_cartpole(out: Path, steps: int, seed: int, at_once: int = 1000) -> None:
    """`at_once` poles, balanced at the same time; the rows are one environment after the other, in order of time."""
    policy, generator = cartpole().actor, np.random.default_rng(seed)
    envs = gymnasium.make_vec("CartPole-v1", num_envs=at_once, vectorization_mode="vector_entry_point")
    observation, _ = envs.reset(seed=seed)
    length = steps // at_once
    rows = TensorDict(
        {
            "observation": torch.zeros(at_once, length, 4),
            "action": torch.zeros(at_once, length, 2, dtype=torch.bool),
            "is_init": torch.zeros(at_once, length, 1, dtype=torch.bool),
            ("next", "reward"): torch.zeros(at_once, length, 1),
            ("next", "done"): torch.zeros(at_once, length, 1, dtype=torch.bool),
        },
        [at_once, length],
    )
    begins, place = torch.ones(at_once, dtype=torch.bool), torch.zeros(at_once, dtype=torch.int64)
    anew = torch.zeros(
        at_once, dtype=torch.bool
    )  # an environment that ended begins anew in a step, which is no row
    while int(place.min()) < length:
        seen = torch.from_numpy(np.array(observation, dtype=np.float32))
        action = acted(policy, TensorDict({"observation": seen}, [at_once]), 2, generator)
        observation, reward, ended, cut, _ = envs.step(action.long().argmax(-1).numpy())
        done = torch.from_numpy(ended | cut)
        of = (~anew & (place < length)).nonzero()[:, 0]
        at = place[of]
        rows["observation"][of, at], rows["action"][of, at] = seen[of], action[of]
        rows["is_init"][of, at, 0], rows["next", "done"][of, at, 0] = begins[of], done[of]
        rows["next", "reward"][of, at, 0] = torch.from_numpy(reward.astype(np.float32))[of]
        place[of] += 1
        begins, anew = anew, done
    rows.reshape(-1).memmap(out)


def make_freeway(out: Path, frames: int, seed: int, at_once: int = 8) -> None:
    """Stacks of four grey frames in bytes, as small as the policy sees them."""
    import ale_py

    gymnasium.register_envs(ale_py)
    policy, generator = freeway().actor, np.random.default_rng(seed)
    envs = [gymnasium.make("ALE/Freeway-v5", obs_type="grayscale") for _ in range(at_once)]
    length = frames // at_once
    out.mkdir(parents=True, exist_ok=True)
    rows = TensorDict(
        {
            "pixels": torch.zeros((), dtype=torch.uint8).expand(at_once, length, 4, 44, 38),
            "action": torch.zeros((), dtype=torch.bool).expand(at_once, length, 3),
            "is_init": torch.zeros((), dtype=torch.bool).expand(at_once, length, 1),
            ("next", "reward"): torch.zeros(()).expand(at_once, length, 1),
            ("next", "done"): torch.zeros((), dtype=torch.bool).expand(at_once, length, 1),
        },
        [at_once, length],
    ).reshape(-1)
    rows = rows.memmap_like(out).unflatten(0, (at_once, length))
    seen = torch.stack([small(env.reset(seed=seed + i)[0]) for i, env in enumerate(envs)])
    stack = seen[:, None].repeat(1, 4, 1, 1)
    begins = torch.ones(at_once, dtype=torch.bool)
    for step in range(length):
        action = acted(policy, numbers(TensorDict({"pixels": stack}, [at_once])), 3, generator)
        rows["pixels"][:, step], rows["action"][:, step] = stack, action
        rows["is_init"][:, step, 0] = begins
        begins = torch.zeros(at_once, dtype=torch.bool)
        for i, env in enumerate(envs):
            observation, reward, ended, cut, _ = env.step(int(action[i].long().argmax()))
            rows["next", "reward"][i, step, 0], rows["next", "done"][i, step, 0] = float(reward), ended or cut
            stack[i] = torch.cat([stack[i, 1:], small(observation)[None]])
            if ended or cut:
                begins[i] = True
                stack[i] = small(env.reset()[0]).expand(4, -1, -1)


def acted(
    policy: torch.nn.Module, seen: TensorDictBase, count: int, generator: np.random.Generator
) -> Tensor:
    """What the policy does, or something else now and then, one-hot, `[envs, count]`."""
    with torch.no_grad():
        best = policy(seen)["action"].long().argmax(-1)  # of two actions of the same value, the first
    other = generator.random(len(best)) < EXPLORING
    drawn = torch.from_numpy(generator.integers(count, size=len(best)))
    return torch.nn.functional.one_hot(torch.where(torch.from_numpy(other), drawn, best), count).bool()


def small(frame: np.ndarray) -> Tensor:
    """The road, averaged over blocks of 4 x 4, `[44, 38]`."""
    road = torch.from_numpy(frame[20:196, 8:160]).float()
    return road.reshape(44, 4, 38, 4).mean((1, 3)).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cartpole", "freeway"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begun = time.perf_counter()
    if given.what == "cartpole":
        make_cartpole(given.out, given.steps or 1_000_000, given.seed)
    else:
        make_freeway(given.out, given.steps or 50_000, given.seed)
    print(f"{given.out}: made in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
