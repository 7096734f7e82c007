"""Explain what a trained policy does, step by step: `tdhook demo` in a few lines of Python.

    python examples/explain_rollout.py

Writes a picture and a memory-mapped TensorDict to the working directory. Needs the extras ``rl`` and ``viz``.
"""

from tdhook import LRP, Target
from tdhook.plots import relevance_over_time
from tdhook.rl import demo_policy, make_env
from tdhook.rl.rollouts import save, summarise

policy = demo_policy()
env = make_env(policy.env_id, seed=0)

# The explained policy is a policy: it acts as before, and each step also gets ("attr", "observation").
explained = LRP("epsilon_plus", target=Target("action_value", index="action")).wrap(policy.actor)
rollout = env.rollout(500, explained)

summary = summarise(rollout, policy.features, policy.actions)
print(f"episode return {summary.episodes[0].total:g}")
for action, relevance in zip(policy.actions, summary.by_action, strict=True):
    print(
        action,
        {name: round(value, 3) for name, value in zip(policy.features, relevance.tolist(), strict=True)},
    )

taken = rollout["action"].argmax(-1)
figure = relevance_over_time(
    rollout["attr", "observation"], policy.features, taken, policy.actions, rollout["observation"]
)
figure.savefig("relevance.png")
save(rollout, "rollout")
