"""Policies and environments to explain (extra ``rl``: torchrl and gymnasium, imported at the first use)."""

from tdhook.rl.policies import Policy, build_actor, demo_policy, load_policy, make_env, save_policy

__all__ = ["Policy", "build_actor", "demo_policy", "load_policy", "make_env", "save_policy"]
