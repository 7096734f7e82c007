"""Relevance through an environment's transforms, back to what the environment gave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawing import drawing
from hypothesis import given
from hypothesis import strategies as st
from raw_environments import SHAPE, Frames, rolled, with_relevance
from tensordict import TensorDictBase
from torch import Tensor, nn

pytest.importorskip("torchrl")

from torchrl.data import Composite, Unbounded
from torchrl.envs import (
    CatFrames,
    CatTensors,
    ClipTransform,
    Compose,
    DoubleToFloat,
    FlattenObservation,
    GymEnv,
    InitTracker,
    ObservationNorm,
    ObservationTransform,
    PermuteTransform,
    RenameTransform,
    RewardScaling,
    SelectTransform,
    SerialEnv,
    SignTransform,
    SqueezeTransform,
    StepCounter,
    TensorDictPrimer,
    TimeMaxPool,
    ToTensorImage,
    TransformedEnv,
    UnsqueezeTransform,
    VecNormV2,
)

from tdhook.rl import frame_times, raw_relevance


class _Mapped(ObservationTransform):
    """What a user writes: a transform that maps one observation."""

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        before = observation_spec[self.in_keys[0]]
        shape = self._apply_transform(torch.zeros(before.shape)).shape
        observation_spec[self.out_keys[0]] = Unbounded(shape, dtype=torch.float32)
        return observation_spec


class Grey(_Mapped):
    def _apply_transform(self, obs: Tensor) -> Tensor:
        return (obs * torch.tensor([0.3, 0.6, 0.1]).reshape(3, 1, 1)).sum(-3, keepdim=True)


class Pool(_Mapped):
    def _apply_transform(self, obs: Tensor) -> Tensor:
        flat = obs.reshape(-1, *obs.shape[-3:])
        return nn.functional.avg_pool2d(flat, 2).reshape(
            *obs.shape[:-2], obs.shape[-2] // 2, obs.shape[-1] // 2
        )


class Total(_Mapped):
    def _apply_transform(self, obs: Tensor) -> Tensor:
        return obs.sum(-1, keepdim=True)


class Rounded(_Mapped):
    def _apply_transform(self, obs: Tensor) -> Tensor:
        return (obs > 0).float()


def totals(td: TensorDictBase) -> Tensor:
    return sum(value.double().flatten(td.batch_dims).sum(-1) for value in td.values(True, True))


def by_matrix(step: Any, x: Tensor, relevance: Tensor) -> Tensor:
    """The z-rule from its definition: the matrix of a linear transform, and the share of each contribution."""
    matrix = torch.autograd.functional.jacobian(lambda v: step._apply_transform(v), x.double())
    matrix = matrix.reshape(relevance.numel(), x.numel())
    contributions = matrix * (x.double().flatten() + 1e-9)
    shares = contributions / contributions.sum(1, keepdim=True)
    return (shares * relevance.double().reshape(-1, 1)).sum(0).reshape(x.shape)


def test_values_that_are_mapped_one_by_one_keep_their_relevance() -> None:
    env, td = rolled(
        DoubleToFloat(),
        ObservationNorm(loc=0.5, scale=3.0, in_keys=["vector"]),
        ObservationNorm(loc=0.5, scale=3.0, in_keys=["vector"], standard_normal=True),
        VecNormV2(in_keys=["vector"]),
        ClipTransform(in_keys=["vector"], low=-0.2, high=0.2),
        SignTransform(in_keys=["vector"]),
        RewardScaling(loc=1.0, scale=0.1),
        StepCounter(),
        InitTracker(),
    )
    with_relevance(td, "vector")
    raw = raw_relevance(env, td)
    assert raw.batch_size == td.batch_size
    assert set(raw.keys()) == {"vector"}
    torch.testing.assert_close(raw["vector"], td["attr", "vector"])


def test_an_image_is_turned_back() -> None:
    env, td = rolled(ToTensorImage(in_keys=["pixels"]))
    with_relevance(td, "pixels")
    expected = td["attr", "pixels"].movedim(-3, -1)
    torch.testing.assert_close(raw_relevance(env, td)["pixels"], expected)


def test_each_of_the_stacked_frames_has_its_own() -> None:
    env, td = rolled(ToTensorImage(in_keys=["pixels"]), CatFrames(4, dim=-3, in_keys=["pixels"]))
    with_relevance(td, "pixels")
    raw = raw_relevance(env, td)["pixels"]
    assert raw.shape == (7, 4, *SHAPE)
    for frame in range(4):
        part = td["attr", "pixels"][:, 3 * frame : 3 * frame + 3]
        torch.testing.assert_close(raw[:, frame], part.movedim(-3, -1))


@pytest.mark.parametrize("mixing", [Grey, Pool])
def test_where_values_are_mixed_each_has_a_share_by_its_contribution(mixing: Any) -> None:
    keep = ToTensorImage(in_keys=["pixels"], out_keys=["image"])
    env, td = rolled(keep, mixing(["image"], ["image"]))
    with_relevance(td, "image")
    raw = raw_relevance(env, td)["pixels"]
    even = raw_relevance(env, td, by_weight=True)["pixels"]
    for t in range(7):
        image = td["pixels"][t].movedim(-1, -3).double() / 255
        expected = by_matrix(mixing([""], [""]), image, td["attr", "image"][t]).movedim(-3, -1)
        torch.testing.assert_close(raw[t].double(), expected, rtol=1e-3, atol=1e-3)
        expected = by_matrix(mixing([""], [""]), torch.ones_like(image), td["attr", "image"][t]).movedim(
            -3, -1
        )
        torch.testing.assert_close(even[t].double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(totals(raw_relevance(env, td)), totals(td["attr"]), rtol=1e-5, atol=1e-4)


def test_several_outputs_look_at_the_same_values() -> None:
    keep = ToTensorImage(in_keys=["pixels"], out_keys=["image"])
    env, td = rolled(keep, Grey(["image"], ["image"]), CatFrames(3, dim=-3, in_keys=["image"]))
    both = with_relevance(td, "image", outputs=2)["attr", "image"]
    raw = raw_relevance(env, td)["pixels"]
    assert raw.shape == (7, 2, 3, *SHAPE)
    for output in range(2):
        td["attr", "image"] = both[:, output]
        torch.testing.assert_close(raw[:, output], raw_relevance(env, td)["pixels"])


def test_stacked_frames_are_shared_out_by_the_values_of_their_own_time() -> None:
    keep = ToTensorImage(in_keys=["pixels"], out_keys=["image"])
    env, td = rolled(keep, Grey(["image"], ["image"]), CatFrames(3, dim=-3, in_keys=["image"]), steps=12)
    with_relevance(td, "image")
    raw, times = raw_relevance(env, td)["pixels"], frame_times(env, td)
    for t in range(12):
        for i in range(3):
            image = td["pixels"][times[t, i]].movedim(-1, -3).double() / 255
            expected = by_matrix(Grey([""], [""]), image, td["attr", "image"][t, i]).movedim(-3, -1)
            torch.testing.assert_close(raw[t, i].double(), expected, rtol=1e-3, atol=1e-3)


STEPS = {
    "flatten": lambda: FlattenObservation(-3, -1, in_keys=["pixels"]),
    "permute": lambda: PermuteTransform((-1, -3, -2), in_keys=["pixels"]),
    "image": lambda: ToTensorImage(in_keys=["pixels"]),
    "norm": lambda: ObservationNorm(loc=2.0, scale=-3.0, in_keys=["pixels"]),
    "unsqueeze": lambda: Compose(
        UnsqueezeTransform(-4, in_keys=["pixels"]), SqueezeTransform(-4, in_keys=["pixels"])
    ),
    "stack": lambda: CatFrames(3, dim=-3, in_keys=["pixels"]),
    "stack behind": lambda: CatFrames(2, dim=-1, in_keys=["pixels"]),
    "grey": lambda: Grey(["pixels"], ["pixels"]),
    "pool": lambda: Pool(["pixels"], ["pixels"]),
    "total": lambda: Total(["pixels"], ["pixels"]),
    "clip": lambda: ClipTransform(in_keys=["pixels"], low=0.0, high=0.5),
}


@drawing(15)
@given(
    before=st.permutations(["norm", "clip", "unsqueeze"]),
    image=st.sampled_from(
        [[], ["image"], ["image", "grey"], ["image", "pool"], ["image", "grey", "pool"], ["permute"]]
    ),
    stack=st.sampled_from([[], ["stack"], ["stack behind"]]),
    behind=st.permutations(["norm", "flatten", "clip", "total"]),
    kept=st.tuples(st.integers(0, 3), st.integers(0, 4)),
    outputs=st.sampled_from([None, 2]),
)
def test_the_sum_is_kept_in_any_composition(
    before: list[str],
    image: list[str],
    stack: list[str],
    behind: list[str],
    kept: tuple[int, int],
    outputs: int | None,
) -> None:
    torch.manual_seed(0)
    behind = behind[: kept[1]]
    if "total" in behind and "flatten" in behind:
        behind.remove("total")
    taken = [*before[: kept[0]], *image, *stack, *behind]
    env, td = rolled(*(STEPS[name]() for name in taken), steps=3)
    with_relevance(td, "pixels", outputs=outputs)
    before = td.clone()
    raw = raw_relevance(env, td, by_weight=True)
    assert bool((td == before).all())
    stacked = [3] if "stack" in taken else [2] if "stack behind" in taken else []
    several = [] if outputs is None else [outputs]
    assert list(raw["pixels"].shape) == [3, *several, *stacked, *SHAPE]
    torch.testing.assert_close(totals(raw), totals(td["attr"]), rtol=1e-4, atol=1e-2)


def test_keys_are_renamed_and_taken_apart() -> None:
    env, td = rolled(
        RenameTransform(["vector"], ["state"]),
        CatFrames(3, dim=-1, in_keys=["state"], out_keys=["history"]),
        CatTensors(["state", "history"], "both", del_keys=False),
    )
    with_relevance(td, "both", "state")
    raw = raw_relevance(env, td)
    assert set(raw.keys()) == {"vector"}
    of_state, of_history = (
        td["attr", "both"].split([5, 15], -1)
        if env.transform[2].in_keys[0] == "state"
        else (td["attr", "both"][..., 15:], td["attr", "both"][..., :15])
    )
    expected = of_history.unflatten(-1, (3, 5)).clone()
    expected[:, -1] += of_state + td["attr", "state"]  # what the policy saw by itself is the present one
    torch.testing.assert_close(raw["vector"], expected)


def test_functions_that_were_appended_are_transforms_too() -> None:
    env = TransformedEnv(Frames(), lambda td: td.set("vector", td["vector"].flip(-1) * 2))
    td = with_relevance(env.rollout(4, break_when_any_done=False), "vector")
    torch.testing.assert_close(raw_relevance(env, td)["vector"], td["attr", "vector"].flip(-1))


def test_what_a_transform_adds_by_itself_keeps_its_relevance() -> None:
    env, td = rolled(TensorDictPrimer(hidden=Unbounded((7,))), SelectTransform("vector", "hidden"))
    with_relevance(td, "vector", "hidden")
    raw = raw_relevance(env, td)
    torch.testing.assert_close(raw["hidden"], td["attr", "hidden"])
    torch.testing.assert_close(raw["vector"], td["attr", "vector"])


def test_transforms_that_cannot_be_undone_are_named() -> None:
    env, td = rolled(Rounded(["vector"], ["vector"]))
    with pytest.raises(ValueError, match=r"relevance does not go back through Rounded: .* inside the policy"):
        raw_relevance(env, with_relevance(td, "vector"))
    env, td = rolled(TimeMaxPool(in_keys=["vector"], T=2))
    with pytest.raises(ValueError, match="relevance does not go back through TimeMaxPool"):
        raw_relevance(env, with_relevance(td, "vector"))
    env, td = rolled(Total(["vector"], ["vector"]))
    with pytest.raises(KeyError, match=r"Total mixes values, .* 'vector' as the environment gave it"):
        raw_relevance(env, with_relevance(td, "vector"))
    env, td = rolled(CatFrames(2, dim=-1, in_keys=["vector"], out_keys=["x"]), Total(["x"], ["x"]))
    with pytest.raises(ValueError, match=r"Total mixes values of stacked frames, .* by_weight=True"):
        raw_relevance(env, with_relevance(td, "x"))
    twice = [CatFrames(2, dim=-1, in_keys=["vector"]) for _ in range(2)]
    env, td = rolled(*twice)
    with pytest.raises(ValueError, match="through one CatFrames, and the environment has several"):
        raw_relevance(env, with_relevance(td, "vector"))


def test_errors_say_what_to_do() -> None:
    env, td = rolled(DoubleToFloat())
    with pytest.raises(KeyError, match="there is no relevance 'attr'; there are 'action'"):
        raw_relevance(env, td)
    with pytest.raises(ValueError, match="stacks no frames: there is no CatFrames in DoubleToFloat"):
        frame_times(env, td)
    other = GymEnv("CartPole-v1")
    with pytest.raises(
        ValueError, match=r"has shape \[7, 5\] in a batch of \[7\], .* has no such observation"
    ):
        raw_relevance(other, with_relevance(td, "vector"))
    several = SerialEnv(2, lambda: TransformedEnv(Frames(), DoubleToFloat()))
    with pytest.raises(
        ValueError, match="the transforms of a SerialEnv are those of the environments that it runs"
    ):
        raw_relevance(several, td)
    stacking, td = rolled(CatFrames(2, dim=-1, in_keys=["vector"]))
    with pytest.raises(KeyError, match="neither 'is_init' nor"):
        frame_times(stacking, td.exclude("next"))
    with pytest.raises(ValueError, match="this one has no axes"):
        frame_times(stacking, td[0])
