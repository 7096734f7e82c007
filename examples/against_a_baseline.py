"""What an action value is made of, and what is different from the mean: the picture of `Against a baseline`.

    python examples/against_a_baseline.py [FILE]

Writes `baseline.png`, or FILE. Needs the extras ``rl`` and ``viz``.
"""

import sys

import torch
from matplotlib.figure import Figure

from tdhook import LRP, Target
from tdhook.plots.style import AGAINST, FOR, plain
from tdhook.rl import Explain, demo_policy, make_env

STEP = 40  # of the rollout

policy = demo_policy()
torch.manual_seed(0)
rollout = make_env(policy.env_id, seed=0).rollout(300, policy.actor)
value = Target("action_value", "action")


def explained(baseline):
    """What each feature gets at that step, and what is kept on the way."""
    method = LRP("epsilon_plus", target=value, baseline=baseline, ledger=True)
    found = Explain(method, policy.actor, mask_key=None)(rollout)[STEP]
    amounts = [*found["attr", "observation"].tolist(), found["ledger", "absorbed"].item()]
    return found["ledger", "target"].item(), amounts


figure = Figure(figsize=(9.0, 2.6), layout="constrained")
left, right = figure.subplots(1, 2, sharey=True)
labels = [*policy.features, "kept by biases"]
for axes, baseline, title in (
    (left, None, "The value of the action, {:+.1f}"),
    (right, "mean", "Its difference from the mean observation, {:+.2f}"),
):
    total, amounts = explained(baseline)
    bars = axes.barh(
        range(len(labels)), amounts, color=[FOR if a > 0 else AGAINST for a in amounts], height=0.7
    )
    axes.bar_label(bars, [f"{a:+.2f}" for a in amounts], padding=3, fontsize="small")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.margins(x=0.2)
    axes.set_title(title.format(total), fontsize="medium")
    plain(axes)
left.invert_yaxis()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "baseline.png", dpi=100)
