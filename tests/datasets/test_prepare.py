"""Frames in bytes are explained through the transforms that the policy's environment has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("torchrl")

from torchrl.envs.transforms import Compose, GrayScale, ObservationNorm, ToTensorImage

from tdhook import LRP, Target
from tdhook.datasets import Job, Moments

COUNT, SIDE = 24, 12
METHOD = LRP("epsilon_plus", target=Target("action_value", "action"))


def frames() -> TensorDict:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (COUNT, SIDE, SIDE, 3), dtype=torch.uint8, generator=draw)
    return TensorDict({"pixels": pixels, "action": torch.arange(COUNT) % 2}, [COUNT])


def policy() -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))
    return TensorDictModule(net, ["pixels"], ["action_value"])


def transforms(loc: float = 0.5) -> Compose:
    norm = ObservationNorm(loc=loc, scale=0.25, in_keys=["pixels"], standard_normal=True)
    return Compose(ToTensorImage(in_keys=["pixels"]), GrayScale(in_keys=["pixels"]), norm)


@pytest.mark.parametrize("mapped", [False, True])
def test_transforms_make_numbers_of_frames(mapped: bool, tmp_path: Path) -> None:
    source: Any = frames()
    if mapped:
        source = tmp_path / "frames"
        frames().memmap(source)
    job = Job(
        METHOD,
        policy(),
        source,
        tmp_path / "job",
        prepare=transforms(),
        chunk=7,
        reduce=[Moments(by="action")],
    )
    job.work()
    result = job.result()
    wanted = METHOD.wrap(policy())(transforms()(frames()))["attr", "pixels"]
    torch.testing.assert_close(result.rows["attr", "pixels"], wanted)
    assert result.rows["attr", "pixels"].shape == (COUNT, 1, SIDE, SIDE)
    torch.testing.assert_close(result.reduced["moments"]["mean"][1], wanted[1::2].double().mean(0))
    if mapped:  # the source is as it was
        assert (TensorDict.load_memmap(source) == frames()).all()


def test_a_source_in_memory_is_left_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = TensorDictModule(nn.Linear(4, 3), ["observation"], ["action_value"])
    source = TensorDict({"observation": torch.randn(20, 4)}, [20])
    kept, method = source.clone(), LRP("epsilon", target=Target("action_value", 0))

    def halved(rows: TensorDictBase) -> TensorDictBase:
        rows["observation"].mul_(0.5)
        return rows

    found = Job(method, policy, source, tmp_path / "job", prepare=halved, chunk=6, at_once=4)
    found.work()
    assert torch.equal(source["observation"], kept["observation"]) and found.verify(2).ok
    expected = method.wrap(policy)(TensorDict({"observation": kept["observation"] * 0.5}, [20]))
    torch.testing.assert_close(found.result().rows["attr", "observation"], expected["attr", "observation"])


def test_other_transforms_are_another_job(tmp_path: Path) -> None:
    Job(METHOD, policy(), frames(), tmp_path / "job", prepare=transforms())
    Job(METHOD, policy(), frames(), tmp_path / "job", prepare=transforms())
    with pytest.raises(ValueError, match=r"which differs in prepare"):
        Job(METHOD, policy(), frames(), tmp_path / "job", prepare=transforms(0.4))


@pytest.mark.filterwarnings("ignore:input .pixels. is torch.uint8:UserWarning")
def test_bytes_that_nobody_prepared_are_told(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="rows 0 to 1: "):
        Job(METHOD, policy(), frames().select("pixels"), tmp_path / "job")
