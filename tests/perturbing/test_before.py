"""The step before: where it is told, looked up, missing, or not to be known."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdhook.perturbing.before import step_before

SEEN = torch.arange(12.0).reshape(2, 6, 1)


def recorded(names=(None, "time"), **entries):
    return TensorDict({"observation": SEEN, **entries}, [2, 6], names=names)


def test_along_the_axis_that_is_named_time():
    before = step_before("observation", SEEN, recorded(names=("time", None)))
    assert torch.equal(before[1], SEEN[0])
    assert torch.equal(before[0], SEEN[0])


def test_along_the_last_axis_of_what_was_recorded():
    td = recorded(names=None, next={"done": torch.zeros(2, 6, 1, dtype=torch.bool)})
    before = step_before("observation", SEEN, td)
    assert torch.equal(before[:, 1:], SEEN[:, :-1])
    assert torch.equal(before[:, 0], SEEN[:, 0])


@pytest.mark.parametrize("flag", ["is_init", "done", "terminated", "truncated", "traj_ids"])
def test_each_flag_that_tells_where_a_trajectory_begins(flag):
    begins = torch.zeros(2, 6, 1, dtype=torch.bool)
    begins[1, 3] = True
    if flag == "is_init":
        td = recorded(is_init=begins)
    elif flag == "traj_ids":
        td = recorded(collector={"traj_ids": begins[..., 0].long().cumsum(-1)})
    else:
        td = recorded(next={flag: begins.roll(-1, 1)})
    before = step_before("observation", SEEN, td)
    assert torch.equal(before[1, 3], SEEN[1, 3])
    assert torch.equal(before[1, 4], SEEN[1, 3])
    assert torch.equal(before[0, 3], SEEN[0, 2])


def test_what_the_batch_tells_comes_first():
    td = recorded(names=None, previous={"observation": -SEEN})
    assert torch.equal(step_before("observation", SEEN, td), -SEEN)


def test_where_something_else_came_next_there_is_no_step_before():
    after = torch.cat([SEEN[:, 1:], SEEN[:, -1:]], 1)
    after[0, 1] = 100.0
    before = step_before("observation", SEEN, recorded(next={"observation": after}))
    assert torch.equal(before[0, 2], SEEN[0, 2])
    assert torch.equal(before[1, 2], SEEN[1, 1])


@pytest.mark.parametrize("size", [[], [3]])
def test_without_time_it_is_not_known(size):
    td = TensorDict({"observation": torch.zeros(*size, 1)}, size)
    with pytest.raises(ValueError, match=r"nothing says which axis of the batch .* is time"):
        step_before("observation", td["observation"], td)
