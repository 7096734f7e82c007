"""Names of features and of groups of rows, as pages and commands show them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tdhook.configuration import write_key

__all__ = ["feature_names", "group_name"]


def group_name(by: object, group: int, actions: Sequence[str]) -> str:
    """What a group of rows is called.

    Args:
        by: what rows are told apart by, as a reducer has it.
        group: the number of the group.
        actions: names of actions, as far as they are known.
    """
    if by is None:
        return "all rows"
    if by == "action" and 0 <= group < len(actions):
        return actions[group]
    return f"{write_key(by) if isinstance(by, str | tuple) else repr(by)} {group}"


def feature_names(shape: Sequence[int], features: Sequence[str]) -> list[str]:
    """A name for each feature of a shape, flattened: those that are given, if they are as many."""
    count = torch.Size(shape).numel()
    return list(features) if len(features) == count else [f"x{i}" for i in range(count)]
