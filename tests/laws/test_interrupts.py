"""Interrupts: one that comes at any line of the library leaves everything as it was, and later explanations right."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch.utils import checkpoint
from unchanged import Unchanged

import tdhook
from tdhook import LRP, Target
from tdhook.attribution import Ablation, IntegratedGradients
from tdhook.models.turns import Turn
from tdhook.tape import conditions, functions
from tdhook.tape.internals import function_modes, saved_tensors_hooks_on_top, torch_functions_seen

SOURCES = str(Path(tdhook.__file__).parent)
HOME = (checkpoint.CheckpointFunction, torch._C.ScriptFunction.__call__)


class Interrupted:
    """Raises ``KeyboardInterrupt`` at the n-th line of the library, or of a file of it, that runs within."""

    def __init__(self, n: int, within: str = SOURCES) -> None:
        self.n, self.where, self.within = n, "", within

    def __enter__(self) -> Interrupted:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(self.within) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            self.n -= 1
            if self.n == 0:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


class Overwriting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        return y


class Counting(nn.Linear):
    """Counts how often it runs."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.dropout = nn.LSTM(4, 4, batch_first=True), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.lstm(x.unsqueeze(1))[0][:, 0])


def mlp() -> nn.Module:
    layers = [nn.Linear(4, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6), nn.Linear(6, 4), Overwriting()]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 2)).eval()


def actor() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    head = TensorDictModule(lambda z: z.argmax(-1), ["output"], ["action"])
    return TensorDictSequential(TensorDictModule(net, ["input"], ["output"]), head)


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Recurrent(), nn.Linear(4, 2)).train()


def lrp(composite: str, **options: Any) -> Callable[[], Any]:
    return lambda: LRP(composite, target=Target("output", 0), on_unmatched="ignore", **options)


METHODS = {
    "preset": lrp("epsilon_plus"),
    "traced": lrp("epsilon_plus_flat"),
    "ledger": lrp("epsilon_plus", ledger=True),
    "traced, ledger": lrp("epsilon_plus_flat", ledger=True),
    "from inside": lrp("epsilon_plus", attribute="all"),
    "integrated": lambda: IntegratedGradients(target=Target("output", 0), steps=2),
    "perturbed": lambda: Ablation(target=Target("output", 0)),
}
MODELS = {"mlp": mlp, "actor": actor, "recurrent": recurrent}


def surroundings() -> tuple[object, ...]:
    """All that is not the model's."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        function_modes(),
        torch_functions_seen(),
        saved_tensors_hooks_on_top(),
        torch._C._are_functorch_transforms_active(),
        functions._COPIES.get(),
        conditions._DEFERRED.get(),
        conditions._NONNEGATIVE.get(),
        (checkpoint.CheckpointFunction, torch._C.ScriptFunction.__call__) == HOME,
    )


def explained_by(explained: nn.Module, x: Tensor) -> dict[object, Tensor]:
    torch.manual_seed(5)
    return dict(explained(TensorDict({"input": x}, [len(x)])).items(True, True))


@pytest.mark.parametrize("lasting", [True, False], ids=["called before", "first call"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_interrupt_at_any_line(
    make: Callable[[], nn.Module],
    method: Callable[[], Any],
    lasting: bool,
    request: pytest.FixtureRequest,
) -> None:
    gc.collect()  # what tests before left behind is not finished meanwhile
    torch.manual_seed(0)
    x, model = torch.randn(3, 4), make()
    expected, before = explained_by(method().wrap(model), x), surroundings()
    explained, line, step = method().wrap(model), 1, 61 if request.config.getoption("--slow") else 1499
    explained_by(explained, x)
    while True:
        tried = explained if lasting else method().wrap(model)
        unchanged, interrupt = Unchanged(model), Interrupted(line)
        torch.manual_seed(5)
        state = torch.get_rng_state()
        try:
            with interrupt:
                tried(TensorDict({"input": x}, [len(x)]))
        except KeyboardInterrupt:
            pass
        if not interrupt.where:
            break
        unchanged.check()
        assert surroundings() == before, interrupt.where
        assert make is recurrent or torch.equal(torch.get_rng_state(), state), interrupt.where
        found = explained_by(tried, x)
        assert found.keys() == expected.keys(), interrupt.where
        for key, value in expected.items():
            assert torch.equal(found[key], value), (interrupt.where, key)
        gc.collect(0)  # what an interrupt left half done is not finished later
        assert surroundings() == before, interrupt.where
        line += step
    with Turn(model.modules()):  # nobody else has it
        pass


@pytest.mark.parametrize("name", ["contexts/recorded.py", "tape/undoing.py"])
def test_an_interrupt_where_batches_are_explained_against_their_mean(
    name: str, request: pytest.FixtureRequest
) -> None:
    """What is put back around an explanation is put back, too: the mean of a batch is not that of the next."""
    pytest.importorskip("torchrl")
    from tdhook.rl import AttributionTracker, Explain

    torch.manual_seed(0)
    model = TensorDictModule(Counting(), ["input"], ["output"])
    method = LRP("deeplift", target=Target("output", 0), baseline="mean")
    mask = {"mask": torch.tensor([True, True, True, False])}
    batch, other = (TensorDict({"input": torch.randn(4, 4), "collector": mask}, [4]) for _ in range(2))
    explain, tracker = Explain(method, model), AttributionTracker(method, model)
    expected, numbers = explain(other)["attr", "input"], tracker.update(other)
    called = explain if name == "contexts/recorded.py" else tracker.update
    # There are many lines, of which some are enough.
    line, step = 1, 1 if request.config.getoption("--slow") else 5
    while True:
        unchanged, interrupt = Unchanged(model), Interrupted(line, str(Path(SOURCES, name)))
        runs = model.module.runs
        try:
            with interrupt:
                called(batch)
        except KeyboardInterrupt:
            pass
        if not interrupt.where:
            break
        unchanged.check()
        assert model.module.runs == runs, interrupt.where
        assert torch.equal(explain(other)["attr", "input"], expected), interrupt.where
        assert tracker.update(other) == pytest.approx(numbers, abs=1e-6), interrupt.where
        line += step
    assert line > 30


def test_an_interrupt_where_a_plan_is_made() -> None:
    torch.manual_seed(0)
    model, x, line = nn.Sequential(Counting(), nn.BatchNorm1d(2)), torch.randn(3, 4), 1
    while True:
        unchanged, interrupt = Unchanged(model), Interrupted(line, str(Path(SOURCES, "tape/undoing.py")))
        try:
            with interrupt:
                LRP("epsilon_plus").plan(model, TensorDict({"input": x}, [3]))
        except KeyboardInterrupt:
            pass
        if not interrupt.where:
            break
        unchanged.check()
        assert model[0].runs == 0, interrupt.where
        line += 1
    assert line > 30
