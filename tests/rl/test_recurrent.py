"""Policies with memory: relevance of earlier observations, up to a reset, and through batches of a collector."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.data import Categorical
from torchrl.envs import InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import GRUModule, LSTMModule, QValueActor, set_recurrent_mode

from tdhook import LRP, Contrast, Key, Target
from tdhook.rl import make_env
from tdhook.rl.history import explain_windows, memory_keys
from tdhook.targets import AtStep

KINDS = pytest.mark.parametrize("module", [LSTMModule, GRUModule], ids=["lstm", "gru"])
WHY = Contrast(Target("action_value", 0), Target("action_value", 1))
LENGTHS = (3, 5, 4)


def make_policy(module, layers=1):
    memory = module(input_size=4, hidden_size=6, num_layers=layers, in_key="observation", out_key="memory")
    values = QValueActor(nn.Linear(6, 2), in_keys=["memory"], spec=Categorical(2))
    return TensorDictSequential(memory, values).double().eval()


def windows_of(policy, resets=(), batch=(2,), names=None):
    """Successive windows, as a collector gives them. ``resets`` are (sequence, step), counted from the first window."""
    steps = sum(LENGTHS)
    is_init = torch.zeros(*batch, steps, 1, dtype=torch.bool)
    is_init[..., 0, :] = True
    for sequence, step in resets:
        is_init.flatten(0, -3)[sequence, step] = True
    observation = torch.randn(*batch, steps, 4).double()
    size = policy[0].lstm if isinstance(policy[0], LSTMModule) else policy[0].gru
    state = {key: torch.zeros(*batch, size.num_layers, 6).double() for key in memory_keys(policy)}
    played = []
    for step in range(steps):  # as it acts: one step at a time
        now = TensorDict(
            observation=observation[..., step, :], is_init=is_init[..., step, :], batch_size=batch
        )
        fresh = is_init[..., step, :].unsqueeze(-1)
        state = {key: value.where(~fresh, 0) for key, value in state.items()}
        after = policy(now.update(state)).detach()
        state = {key: after["next", key] for key in state}
        played.append(after)
    found = torch.stack(played, len(batch)).exclude("memory")
    found.names = [None] * len(batch) + ["time"] if names is None else names
    return found.split(LENGTHS, len(batch))


def explain_whole(policy, windows, target, composite="lstm_lrp", **arguments):
    """The truth: all windows as one."""
    whole = torch.cat(windows, windows[0].batch_dims - 1)
    lrp = LRP(composite, target=target, **arguments)
    reads = ["observation", *memory_keys(policy)]
    with set_recurrent_mode("recurrent"), lrp.prepare(policy, in_keys=reads) as explained:
        return explained(whole.clone())


def observations(explained):
    return torch.cat([window["attr", "observation"] for window in explained], explained[0].batch_dims - 1)


# --- One window -----------------------------------------------------------------------------------


@KINDS
def test_relevance_never_crosses_a_reset(module):
    policy = make_policy(module)
    whole = torch.cat(windows_of(policy, resets=[(0, 4), (1, 7), (1, 10)]), 1)
    lrp = LRP("lstm_lrp", target=AtStep(WHY, "all"))
    with set_recurrent_mode("recurrent"), lrp.prepare(policy, in_keys=["observation"]) as explained:
        found = explained(whole.clone())["attr", "observation"].abs().sum(-1)  # [games, step, explained step]
    episode = whole["is_init"].squeeze(-1).cumsum(-1)
    earlier = torch.ones(12, 12).triu().bool()
    reached = earlier & (episode.unsqueeze(2) == episode.unsqueeze(1))
    assert torch.equal(found > 0, reached)


@KINDS
def test_the_first_state_counts_as_an_input(module):
    """Of a window that starts within an episode, nothing is unaccounted for."""
    policy = make_policy(module, layers=2)
    later = windows_of(policy)[1]
    lrp = LRP("lstm_lrp", target=AtStep(WHY), ledger=True)
    with (
        set_recurrent_mode("recurrent"),
        lrp.prepare(policy, in_keys=["observation", *memory_keys(policy)]) as explained,
    ):
        found = explained(later.clone())
    arrived = found["attr", "observation"].sum((1, 2))
    for key in memory_keys(policy):
        assert found["attr", key].shape == (2, LENGTHS[1], 2, 6)
        assert found["attr", key][:, 0].any()
        assert not found["attr", key][:, 1:].any()
        arrived = arrived + found["attr", key].sum((1, 2, 3))
    torch.testing.assert_close(found["ledger", "inputs"].sum(1), arrived)
    assert found["ledger", "gap"].abs().max() < 1e-9


# --- Through windows ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    "composite", ["lstm_lrp", "attn_lrp"]
)  # one in the flow of relevance, one in that of gradients
@pytest.mark.parametrize(
    "resets", [(), [(0, 4), (1, 8), (1, 10)], [(0, 3)]], ids=["none", "some", "at a start"]
)
def test_windows_are_explained_as_if_they_were_one(module, composite, resets):
    policy = make_policy(module, layers=2)
    windows = windows_of(policy, resets)
    found = explain_windows(LRP(composite, target=AtStep(WHY)), policy, windows)
    whole = explain_whole(policy, windows, AtStep(WHY), composite)
    torch.testing.assert_close(observations(found), whole["attr", "observation"], rtol=1e-7, atol=1e-12)
    for key in memory_keys(policy):
        torch.testing.assert_close(
            found[0]["attr", key][:, 0], whole["attr", key][:, 0], rtol=1e-7, atol=1e-12
        )


@pytest.mark.parametrize(
    "target, within",
    [
        (AtStep(WHY, "all"), AtStep(WHY, list(range(-4, 0)))),
        (AtStep(Target("action_value", "all"), -2), AtStep(Target("action_value", "all"), -2)),
        (AtStep(WHY, [0, 3]), AtStep(WHY, [-4, -1])),
        (AtStep(WHY, torch.tensor([1, 2])), AtStep(WHY, torch.tensor([-3, -2]))),
    ],
    ids=["each step", "each action", "two steps", "a step for each game"],
)
def test_any_target_of_the_last_window(target, within):
    policy = make_policy(LSTMModule)
    windows = windows_of(policy, [(1, 9)])
    found = observations(explain_windows(LRP("lstm_lrp", target=target), policy, windows))
    wanted = explain_whole(policy, windows, within)["attr", "observation"]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_what_an_environment_left_in_the_state_at_a_reset_is_not_carried():
    """The state that is stored there is not always zero."""
    policy = make_policy(GRUModule)
    windows = windows_of(policy)
    windows[-1]["is_init"][0, 0] = True
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY)), policy, windows)
    assert found[-1]["attr", "recurrent_state"][:, 0].abs().sum((1, 2)).all()
    assert found[0]["attr", "observation"].abs().sum((1, 2)).bool().tolist() == [False, True]


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
def test_any_batch(batch):
    policy = make_policy(GRUModule)
    windows = windows_of(policy, batch=batch) if batch else [w[0] for w in windows_of(policy, batch=(1,))]
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY)), policy, windows)
    wanted = explain_whole(policy, windows, AtStep(WHY))["attr", "observation"]
    torch.testing.assert_close(observations(found), wanted, rtol=1e-7, atol=1e-12)


def test_the_ledgers_of_windows_hang_together():
    """What is put into a window is what arrived at the first state of the next one, and nothing is lost."""
    policy = make_policy(LSTMModule)
    windows = windows_of(policy)
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY), ledger=True), policy, windows)
    kept = 0.0
    for before, after in pairwise(found):
        arrived = sum(after["attr", key][:, 0].sum((1, 2)) for key in memory_keys(policy))
        torch.testing.assert_close(before["ledger", "target"].sum(1), arrived)
    for window in found:
        assert window["ledger", "gap"].abs().max() < 1e-9
        kept = kept + window["attr", "observation"].sum((1, 2)) + window["ledger", "absorbed"].sum(1)
    first = sum(found[0]["attr", key][:, 0].sum((1, 2)) for key in memory_keys(policy))
    torch.testing.assert_close(kept + first, found[-1]["ledger", "target"].sum(1))


def test_windows_are_left_as_they_are():
    policy = make_policy(GRUModule)
    windows = windows_of(policy)
    copies = [window.clone() for window in windows]
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY), attribute=["observation"]), policy, windows)
    for window, copy, explained in zip(windows, copies, found, strict=True):
        assert set(window.keys(True, True)) == set(copy.keys(True, True))
        assert (window == copy).all()
        for key in window.keys(True, True):
            assert explained[key] is window[key]
        extra = set(explained.keys(True, True)) - set(window.keys(True, True))
        assert extra == {("attr", "observation"), ("attr", "recurrent_state")}


@KINDS
def test_a_collector_and_a_real_environment(module):
    policy = make_policy(module).float()
    primer = policy[0].make_tensordict_primer()
    env = TransformedEnv(SerialEnv(2, lambda: make_env("CartPole-v1"))).append_transform(InitTracker())
    env = env.append_transform(primer)
    act = TensorDictSequential(
        policy[0],
        QValueActor(policy[1].module[0], in_keys=["memory"], spec=env.full_action_spec_unbatched["action"]),
    )
    collector = Collector(env, act, frames_per_batch=2 * 12, total_frames=2 * 36)
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY)), act, batches)
    wanted = explain_whole(act, batches, AtStep(WHY, -1))["attr", "observation"]
    torch.testing.assert_close(observations(found), wanted, rtol=1e-3, atol=1e-5)
    assert found[0].names == [None, "time"]


# --- What is wrong with windows -------------------------------------------------------------------


def test_what_cannot_be_carried():
    policy = make_policy(LSTMModule)
    lrp = LRP("lstm_lrp", target=AtStep(WHY))
    first, second, third = windows_of(policy)
    with pytest.raises(ValueError, match="there is no window to explain: the list is empty"):
        explain_windows(lrp, policy, [])
    for order in ([first, third], [third, second], [first, second[:1]]):
        with pytest.raises(
            ValueError,
            match="window 1 does not start with the 'recurrent_state_h' that window 0 ended with: windows are "
            "successive batches of the same environments, oldest first",
        ):
            explain_windows(lrp, policy, order)
    with pytest.raises(ValueError, match="window 2 does not start with"):
        explain_windows(lrp, policy, [first, second, first.clone().fill_("is_init", False)])
    for key in ("is_init", "recurrent_state_c"):
        with pytest.raises(KeyError, match=f"a window has no '{key}'; it has .*action.*observation"):
            explain_windows(lrp, policy, [first.exclude(key)])
    linear = TensorDictModule(nn.Linear(4, 2).double(), ["observation"], ["action_value"])
    with pytest.raises(ValueError, match=r"the policy has no memory: it reads .*observation.* memory="):
        explain_windows(lrp, linear, [first])


def test_where_the_next_state_was_not_kept_its_order_is_not_checked():
    """Collectors may leave out the next step's entries."""
    policy = make_policy(GRUModule)
    windows = [window.exclude("next") for window in windows_of(policy)]
    found = explain_windows(LRP("lstm_lrp", target=AtStep(WHY)), policy, windows, memory=["recurrent_state"])
    wanted = explain_whole(policy, windows, AtStep(WHY))["attr", "observation"]
    torch.testing.assert_close(observations(found), wanted, rtol=1e-7, atol=1e-12)


def test_flags_of_another_name():
    policy = make_policy(GRUModule)
    windows = [window.set("begins", window["is_init"]) for window in windows_of(policy, [(0, 3)])]
    lrp = LRP("lstm_lrp", target=AtStep(WHY, Key("asked")))
    windows[-1]["asked"] = torch.arange(LENGTHS[-1]).expand(2, -1) == 1
    one, other = (
        observations(explain_windows(lrp, policy, windows, resets=key)) for key in ("begins", "is_init")
    )
    assert torch.equal(one, other)
