"""Threads: an explanation neither notices what others do meanwhile, nor is noticed by them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Thread, get_ident

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from unchanged import Boom, Unchanged

from tdhook import LRP, Target
from tdhook.attribution import Ablation, GradientTimesInput
from tdhook.models.turns import Turn
from tdhook.rules import EpsilonRule, StopRule
from tdhook.selectors import Name, Op, Type

PATIENCE = 60  # seconds until a thread that waits counts as one that waits for ever
PATHS = [(Op("add") & Name("b"), EpsilonRule(0.5)), (nn.Linear, EpsilonRule())]
METHODS = {
    "preset": lambda: LRP("epsilon_plus", target=Target("output", 0)),
    "traced": lambda: LRP("epsilon_plus_flat", target=Target("output", 0)),
    "by path": lambda: LRP(PATHS, target=Target("output", 0)),
    "with a ledger": lambda: LRP("epsilon", target=Target("output", 0), ledger=True),
    "from inside": lambda: LRP("epsilon", target=Target("output", 0), input_modules=["a"]),
    "perturbed": lambda: Ablation(target=Target("output", 0)),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Have threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Gate:
    """Halts whoever comes first until somebody opens."""

    def __init__(self) -> None:
        self.reached, self.opened = Event(), Event()
        self.thread: int | None = None

    def __call__(self) -> None:
        if self.thread in (None, get_ident()) and not self.opened.is_set():
            self.thread = get_ident()
            self.reached.set()
            assert self.opened.wait(PATIENCE)


class Block(nn.Module):
    def __init__(self, gate: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 4), gate

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        self.gate()
        return x + 2 * h


class Net(nn.Module):
    def __init__(self, gate: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.a, self.b, self.head = Block(), Block(gate), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


def net(gate: Callable[[], None] = lambda: None) -> Net:
    torch.manual_seed(0)
    return Net(gate).double()


def entries(explained: nn.Module, x: Tensor) -> dict[object, Tensor]:
    td = explained(TensorDict({"input": x}, [len(x)]))
    return dict(td.items(True, True))


def assert_same(found: dict[object, Tensor], expected: dict[object, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def together(*work: Callable[[], None]) -> None:
    """Run each in a thread of its own, and raise what one of them raised."""
    errors: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for ever"
    for error in errors:
        raise error


@every_method
def test_another_model_that_runs_meanwhile_changes_nothing(method: Callable[[], LRP]) -> None:
    x, mine, its = torch.randn(3, 4).double(), Gate(), Gate()
    expected = entries(method().wrap(net()), x)
    explained, other, found = method().wrap(net(mine)), net(its), []

    def run_other() -> None:
        assert mine.reached.wait(PATIENCE)
        other(x)

    def free() -> None:
        assert its.reached.wait(PATIENCE)  # the other one is in the midst of its modules
        mine.opened.set()

    def explain() -> None:
        found.append(entries(explained, x))
        its.opened.set()

    together(explain, run_other, free)
    assert_same(found[0], expected)


@every_method
def test_the_same_model_runs_plainly_elsewhere(method: Callable[[], LRP]) -> None:
    x, others, gate = torch.randn(3, 4).double(), torch.randn(7, 4).double(), Gate()
    model = net(gate)
    unchanged = Unchanged(model)
    expected, plain = entries(method().wrap(net()), x), net()(others)
    explained, found, ran = method().wrap(model), [], []

    def run_plainly() -> None:
        assert gate.reached.wait(PATIENCE)
        with torch.no_grad():
            ran.append(model(others))
        ran.append(model(others))
        gate.opened.set()

    together(lambda: found.append(entries(explained, x)), run_plainly)
    assert_same(found[0], expected)
    assert torch.equal(ran[0], plain) and torch.equal(ran[1], plain)
    unchanged.check()


@every_method
@pytest.mark.usefixtures("hurried")
def test_two_threads_explain_the_same_model(method: Callable[[], LRP]) -> None:
    x, model = torch.randn(3, 4).double(), net()
    unchanged = Unchanged(model)
    expected = entries(method().wrap(net()), x)
    shared = method().wrap(model)

    def explain_often() -> None:
        for _ in range(20):
            assert_same(entries(shared, x), expected)
            assert_same(entries(method().wrap(model), x), expected)

    together(explain_often, explain_often)
    unchanged.check()


@pytest.mark.usefixtures("hurried")
def test_two_threads_explain_models_of_their_own() -> None:
    x = torch.randn(3, 4).double()
    expected = entries(METHODS["by path"]().wrap(net()), x)

    def explain_often(model: nn.Module) -> None:
        for _ in range(100):
            assert_same(entries(METHODS["by path"]().wrap(model), x), expected)

    # Made here: random numbers are drawn by one thread at a time, or weights are others.
    together(*(partial(explain_often, model) for model in (net(), net())))


@pytest.mark.usefixtures("hurried")
def test_models_that_share_a_part_wait_for_each_other() -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 4).double(), [nn.Linear(4, 2).double() for _ in range(2)]
    models = [nn.Sequential(trunk, nn.ReLU(), head) for head in heads]
    whole = nn.Sequential(models[0], nn.Linear(2, 2).double())
    x, method = torch.randn(3, 4).double(), METHODS["preset"]
    expected = [entries(method().wrap(model), x) for model in (*models, whole)]

    def explain_often(i: int, model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(40):
                assert_same(entries(method().wrap(model), x), expected[i])

        return run

    together(*(explain_often(i, model) for i, model in enumerate((*models, whole))))


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
@every_method
def test_who_failed_has_had_its_turn(method: Callable[[], LRP], kind: type[BaseException]) -> None:
    fails = True

    def gate() -> None:
        if fails:
            raise kind

    model, x = net(gate), torch.randn(3, 4).double()
    unchanged, explained = Unchanged(model), method().wrap(model)
    with pytest.raises(kind):
        entries(explained, x)
    unchanged.check()
    fails, found = False, []
    together(lambda: found.append(entries(explained, x)))
    assert_same(found[0], entries(method().wrap(net()), x))


def test_a_thread_may_have_several_turns() -> None:
    model, x = net(), torch.randn(3, 4).double()
    with Turn(model.modules()), Turn([model.a]):
        entries(METHODS["traced"]().wrap(model), x)
    inner = TensorDictModule(nn.Linear(4, 4).double(), ["input"], ["output"])
    nested = METHODS["preset"]().wrap(inner)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = inner, nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            weights = nested(TensorDict({"input": x.detach()}, [len(x)]))["attr", "input"]
            return self.last(x * weights)

    together(lambda: entries(METHODS["preset"]().wrap(Outer()), x))


def test_nothing_of_an_explanation_is_process_wide() -> None:
    seen: list[object] = []

    def gate() -> None:
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
            seen.extend(getattr(torch_modules, name))

    model = net(gate)
    alive = weakref.ref(model)
    for method in METHODS.values():
        entries(method().wrap(model), torch.randn(3, 4).double())
    assert not seen
    del model, gate
    gc.collect()
    assert alive() is None


class MakesLayers(nn.Module):
    """Its forward makes modules, one inside the other."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(Twice(), nn.Tanh())(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def test_modules_that_are_made_on_the_way_are_named_by_their_makers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), MakesLayers(), Twice()).double()
    td = TensorDict({"input": torch.randn(3, 4).double()}, [3])
    plan = LRP("epsilon", target=Target("output", 0)).plan(model, td)
    paths = [row.path for row in plan if row.operation == "add"]
    assert paths == ["1.(Sequential).(Twice)", "2"]
    stopped = {
        "made": (Op("add") & Name("1*"), True),
        "by type": (Op("add") & Type(Twice), True),
        "elsewhere": (Op("add") & Name("0*"), False),
    }
    for selector, stops in stopped.values():
        found = LRP([(selector, StopRule())], target=Target("output", 0)).wrap(model)(td.copy())
        assert (found["attr", "input"] == 0).all().item() is stops


class InThreads(nn.Module):
    """Has a branch run in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as threads:
            there = threads.submit(lambda: self.there(x).sigmoid()).result()
        return self.last(self.here(x).tanh() * there)


@pytest.mark.parametrize("baseline", [None, 0.0])
def test_a_model_that_computes_in_a_thread_of_its_own_is_told(baseline: float | None) -> None:
    """What no rule sees is no constant."""
    model, td = InThreads(), TensorDict({"input": torch.randn(2, 4)}, [2])
    with (
        LRP("epsilon", target="output", baseline=baseline).prepare(model) as explained,
        pytest.raises(NotImplementedError, match="computes with its inputs in another thread"),
    ):
        explained(td)
    expected = model(td["input"])
    torch.testing.assert_close(
        GradientTimesInput(target="output").wrap(model)(td)["output"], expected.detach()
    )
