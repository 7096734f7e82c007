"""What watches a pass is kept out of sight, or keeps out of it, for a while."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode

from tdhook.tape.internals import function_modes, sees, top_mode
from tdhook.tape.modes import Watching, beneath, unwatched


class Mode(TorchFunctionMode):
    pass


def test_beneath_a_mode_those_above_and_below_it_see():
    low, middle, high = Mode(), Mode(), Mode()
    with low, middle, high:
        with beneath(middle):
            assert not sees(middle) and sees(low) and top_mode() is high
        assert top_mode() is high and sees(middle)


def test_a_pass_within_another_is_in_sight_of_the_users_modes_alone():
    users, watching = Mode(), Watching()
    with users, watching:
        with unwatched():
            assert function_modes() == [users]
        assert function_modes() == [users, watching]
