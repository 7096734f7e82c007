"""What is tracked of a training: by hand on a linear policy, and in a training of torchrl."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.record import CSVLogger
from torchrl.trainers import Trainer

from tdhook import LRP, Key, Target
from tdhook.rl import AttributionTracker, build_actor, make_env

NAMES = ("cart position", "cart velocity", "pole angle", "pole angular velocity")


class Logger:
    """Whatever has ``log_scalar``."""

    def __init__(self):
        self.found = []

    def log_scalar(self, name, value, step=None):
        self.found.append((name, value, step))


def linear(weight):
    layer = nn.Linear(3, len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return TensorDictModule(layer, ["obs"], ["value"])


def batch_of(*rows, **entries):
    return TensorDict(obs=torch.tensor(rows), **entries, batch_size=[len(rows)])


def test_each_number_is_that_by_hand():
    model = linear([[1.0, -2.0, 0.0]])
    probe = batch_of([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    regions = {
        "first two": torch.tensor([True, True, False]),
        "the largest": lambda batch: batch["obs"].abs() == batch["obs"].abs().amax(-1, keepdim=True),
        "none": torch.zeros(3, dtype=torch.bool),
    }
    tracker = AttributionTracker(
        LRP("epsilon", target="value", ledger=True),
        model,
        probe=probe,
        features=["a", "b", "c"],
        regions=regions,
    )
    batch = batch_of([1.0, 1.0, 5.0], [3.0, -1.0, 1.0])  # relevance 1, -2, 0 and 3, 2, 0
    values = tracker.update(batch, step=10)
    expected = {"relevance/a": 2.0, "relevance/b": 2.0, "relevance/c": 0.0, "share/a": 0.5, "share/b": 0.5}
    expected |= {"share/c": 0.0, "region/first two": 1.0, "region/none": 0.0, "region/the largest": 3 / 8}
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-5), name
    assert math.isnan(values["drift/first"]) and math.isnan(values["drift/previous"])
    assert abs(values["gap"]) < 1e-5
    model.module.weight.data = torch.tensor([[-1.0, 2.0, 0.0]])
    values = tracker.update(batch, step=20)
    assert values["drift/first"] == values["drift/previous"] == pytest.approx(2.0, abs=1e-5)
    model.module.weight.data = torch.tensor([[1.0, 0.0, 0.0]])
    values = tracker.update(batch, step=30)
    # The first element of the probe is explained by (1, 0, 0), the second by (1, 0, 0) where it was (1, -2, 0).
    assert values["drift/first"] == pytest.approx(1 - (1 + 1 / math.sqrt(5)) / 2, abs=1e-5)
    assert values["drift/previous"] == pytest.approx(1 + (1 + 1 / math.sqrt(5)) / 2, abs=1e-5)
    assert tracker.history["step"] == [10, 20, 30]
    assert {len(series) for series in tracker.history.values()} == {3}
    assert set(batch.keys()) == {"obs"} and set(probe.keys()) == {"obs"}


def test_several_outputs_and_several_batch_axes():
    """The mean is over elements and outputs."""
    model = linear([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    tracker = AttributionTracker(LRP("epsilon", target=Target("value", "all")), model)
    td = TensorDict(obs=torch.ones(2, 5, 3), batch_size=[2, 5])
    values = tracker.update(td)
    assert [values[f"relevance/{i}"] for i in range(3)] == pytest.approx([0.5, 1.5, 0.0], abs=1e-5)
    mask = lambda batch: (torch.arange(5) < 2)[None, :, None].expand(2, 5, 3)  # noqa: E731
    by_step = AttributionTracker(LRP("epsilon", target="value"), model, regions={"early": mask})
    assert by_step.update(td)["region/early"] == pytest.approx(0.4, abs=1e-5)


def test_images_have_regions_and_no_list_of_features():
    model = TensorDictModule(nn.Sequential(nn.Flatten(), nn.Linear(32, 1, bias=False)), ["pixels"], ["value"])
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True  # for both channels
    td = TensorDict(pixels=torch.rand(6, 2, 4, 4), batch_size=[6])
    values = AttributionTracker(LRP("epsilon", target="value"), model, regions={"left": left}).update(td)
    assert set(values) == {"region/left"}
    relevance = (td["pixels"] * model.module[1].weight.detach().reshape(2, 4, 4)).abs()
    assert values["region/left"] == pytest.approx(
        (relevance[..., :2].sum() / relevance.sum()).item(), abs=1e-5
    )


@pytest.mark.parametrize("baseline", [None, "mean"])
def test_padding_does_not_count(baseline):
    """Numbers of a padded batch are those of its steps."""
    model, region = linear([[1.0, -2.0, 3.0]]), torch.tensor([True, False, False])
    method = LRP("epsilon", target="value", baseline=baseline, ledger=True)
    obs, mask = torch.arange(24.0).reshape(2, 4, 3).sin(), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    padded = TensorDict(obs=obs, collector=TensorDict(mask=mask, batch_size=[2, 4]), batch_size=[2, 4])
    found, expected = (
        AttributionTracker(method, model, regions={"first": region}).update(td)
        for td in (padded, padded[mask])
    )
    assert found == pytest.approx(expected, abs=1e-5)
    tracker = AttributionTracker(method, model)
    assert tracker.update(padded[:, 3:]) is None and tracker.history == {"step": []}
    assert tracker.update(padded[0, :3]) is not None


@pytest.mark.parametrize("baseline", [None, "mean"])
def test_padding_of_the_probe_does_not_count(baseline):
    obs, mask = torch.arange(24.0).reshape(2, 4, 3).sin(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    padded = TensorDict(obs=obs, collector=TensorDict(mask=mask, batch_size=[2, 4]), batch_size=[2, 4])
    found = []
    for probe in (padded, padded[mask]):
        model = linear([[1.0, -2.0, 3.0]])
        tracker = AttributionTracker(LRP("epsilon", target="value", baseline=baseline), model, probe=probe)
        tracker.update(padded)
        model.module.weight.data = torch.tensor([[-1.0, 1.0, 2.0]])
        found.append(tracker.update(padded)["drift/first"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_check_that_fails_is_as_if_it_had_not_been():
    asked = []

    def region(batch):
        asked.append(batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return batch["obs"] > 0

    td = batch_of([1.0, 2.0, 3.0])
    tracker = AttributionTracker(
        LRP("epsilon", target="value"), linear([[1.0, 1.0, 1.0]]), probe=td, regions={"some": region}
    )
    tracker.update(td)
    before = tracker.state_dict()
    with pytest.raises(KeyboardInterrupt):
        tracker.update(td)
    assert tracker.state_dict() == before
    tracker.update(td)
    assert tracker.history["step"] == [0, 1] and {len(series) for series in tracker.history.values()} == {2}


def test_every_so_many_batches_to_a_logger():
    logger, model = Logger(), linear([[1.0, 1.0, 0.0]])
    td = batch_of([1.0, 2.0, 3.0])
    tracker = AttributionTracker(LRP("epsilon", target="value"), model, every=3, logger=logger, probe=td)
    assert [tracker.update(td) is not None for _ in range(7)] == 2 * [True, False, False] + [True]
    assert tracker.history["step"] == [0, 3, 6]
    names = [name for name, _, step in logger.found if step == 0]
    assert "attribution/relevance/0" in names and "attribution/drift/first" not in names  # not a number yet
    assert ("attribution/drift/first", pytest.approx(0.0, abs=1e-6), 3) in logger.found


def test_an_explanation_of_nothing_has_no_shares_and_does_not_drift():
    model, td = linear([[0.0, 0.0, 0.0]]), batch_of([1.0, 2.0, 3.0])
    tracker = AttributionTracker(
        LRP("epsilon", target="value"), model, probe=td, regions={"all": torch.ones(3, dtype=torch.bool)}
    )
    tracker.update(td)
    values = tracker.update(td)
    assert values["drift/first"] == 0.0 and values["share/0"] == 0.0 and values["region/all"] == 0.0


def test_the_policy_stays_as_it_was():
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1))
    model, td = TensorDictModule(net, ["obs"], ["value"]), TensorDict(obs=torch.randn(16, 3), batch_size=[16])
    net[0].eval()
    net(td["obs"]).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    tracker = AttributionTracker(LRP("epsilon_plus", target="value"), model, probe=td)
    first, second = tracker.update(td), tracker.update(td)
    assert first["relevance/0"] == second["relevance/0"] and second["drift/previous"] == pytest.approx(
        0, abs=1e-6
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(
        torch.equal(p.grad, g) and p.requires_grad for p, g in zip(net.parameters(), grads, strict=True)
    )


def test_a_training_that_is_resumed_goes_on():
    def tracker():
        return AttributionTracker(LRP("epsilon", target="value"), model, probe=td, every=2)

    model, td = linear([[1.0, 1.0, 0.0]]), batch_of([1.0, 2.0, 3.0])
    whole, part = tracker(), tracker()
    for _ in range(3):
        whole.update(td), part.update(td)
    resumed = tracker()
    resumed.load_state_dict(part.state_dict())
    model.module.weight.data *= torch.tensor([[-1.0, 1.0, 1.0]])
    for each in (whole, resumed):
        each.update(td), each.update(td)
    assert str(resumed.history) == str(whole.history)  # not a number is equal to itself in words
    assert part.history["step"] == [0, 2] and resumed.history["step"] == [0, 2, 4]


def test_names_that_are_equal_would_hide_each_other():
    with pytest.raises(ValueError, match="features have the name 'a' twice, which does not tell them apart"):
        AttributionTracker(
            LRP("epsilon", target="value"), linear([[1.0, 2.0, 3.0]]), features=("a", "b", "a")
        )


@pytest.mark.parametrize(
    "change",
    [
        {"history": {"step": [0], "a": []}},
        {"history": {}},
        {"history": 3},
        {"history": {"a": [1]}},
        {"count": "3"},
        {"first": 3},
        None,
    ],
)
def test_a_state_that_is_cut_off_changes_nothing(change):
    tracker = AttributionTracker(LRP("epsilon", target="value"), linear([[1.0, 2.0, 3.0]]))
    tracker.update(batch_of([1.0, 2.0, 3.0]))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match="this is no state of a tracker"):
        tracker.load_state_dict({} if change is None else {**before, **change})
    assert tracker.state_dict() == before


def test_what_does_not_fit():
    model, td, lrp = linear([[1.0, 1.0, 0.0]]), batch_of([1.0, 2.0, 3.0]), LRP("epsilon", target="value")
    with pytest.raises(ValueError, match="every=0: every how many batches to explain, at least 1"):
        AttributionTracker(lrp, model, every=0)
    with pytest.raises(ValueError, match="there are 2 names for 3 features of 'obs'"):
        AttributionTracker(lrp, model, features=["a", "b"]).update(td)
    with pytest.raises(TypeError, match=r"the region 'ball' is torch.float32; a mask is a boolean tensor"):
        AttributionTracker(lrp, model, regions={"ball": torch.ones(3)}).update(td)
    with pytest.raises(ValueError, match=r"the region 'ball' of shape \(4,\) does not fit 'obs', .*\(3,\)"):
        AttributionTracker(lrp, model, regions={"ball": torch.ones(4).bool()}).update(td)
    two = TensorDictModule(lambda a, b: a + b, ["a", "b"], ["value"])
    with pytest.raises(ValueError, match="the policy reads 'a', 'b': say with key= which to track"):
        AttributionTracker(lrp, two)


def test_units_of_a_layer_are_tracked():
    torch.manual_seed(0)
    model = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), ["obs"], ["value"])
    td = batch_of([1.0, 2.0, 3.0], [0.5, -1.0, 2.0])
    for target in (Target("value", 0), Target("value", "all")):
        for asked in ({"use_inputs": False}, {"values": ["obs"]}):
            lrp = LRP("epsilon", target=target, input_modules=["module.1"], **asked)
            expected = lrp.wrap(model)(td.clone())["attr", "module.1"].abs().reshape(-1, 4)
            key = None if "use_inputs" in asked else "module.1"
            tracker = AttributionTracker(lrp, model, key=key, probe=td)
            values = tracker.update(td)
            for i, mean in enumerate(expected.mean(0).tolist()):
                assert values[f"relevance/{i}"] == pytest.approx(mean)
            assert tracker.update(td)["drift/first"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="the model has no module 'nothing'"):
        AttributionTracker(LRP("epsilon", target=Target("value", 0)), model, key="nothing")
    with pytest.raises(
        ValueError, match=r"'module.1' is tracked and gets no relevance: name it in attribute or"
    ):
        AttributionTracker(LRP("epsilon", target=Target("value", 0)), model, key="module.1").update(td)


def trained(tmp_path, logger, frames=512, tracker_of=AttributionTracker):
    """PPO on CartPole by torchrl's trainer, for a moment."""
    torch.manual_seed(0)
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [32], "activation": "Tanh"}
    actor = build_actor("ppo_mlp", architecture)
    actor[-1].return_log_prob = True
    critic = ValueOperator(MLP(in_features=4, out_features=1, num_cells=[32]), in_keys=["observation"])
    loss, gae = ClipPPOLoss(actor, critic), GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    probe = make_env("CartPole-v1", seed=1).rollout(16).exclude("action")
    collector = Collector(
        make_env("CartPole-v1", seed=0),
        actor,
        frames_per_batch=128,
        total_frames=frames,
        auto_register_policy_transforms=False,
    )
    trainer = Trainer(
        collector=collector,
        total_frames=frames,
        frame_skip=1,
        optim_steps_per_batch=4,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2),
        progress_bar=False,
        logger=logger,
        log_interval=1,
        save_trainer_file=tmp_path / "trainer.pt",
    )
    trainer.register_op("batch_process", lambda batch: gae(batch))
    method = LRP("epsilon_plus", target=Target("logits", 1), ledger=True)
    tracker = AttributionTracker(method, actor, probe=probe, features=NAMES, every=2)
    tracker.register(trainer)
    seen = []
    trainer.register_op(
        "pre_steps_log", lambda batch: seen.append((batch.clone(), expected(method, actor, batch)))
    )
    trainer.train()
    return trainer, tracker, seen


def expected(method, actor, batch):
    with method.prepare(actor) as explained:
        found = explained(batch.clone())["attr", "observation"]
    return found.abs().mean(tuple(range(found.dim() - 1))).tolist()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchrl's own, of its trainer
        yield


@pytest.mark.usefixtures("quiet")
def test_with_a_trainer(tmp_path):
    logger = CSVLogger("run", log_dir=str(tmp_path))
    trainer, tracker, seen = trained(tmp_path, logger)
    history = tracker.history
    assert history["step"] == [128, 384] and trainer.collected_frames == 512
    for check, (_, means) in zip((0, 1), (seen[0], seen[2]), strict=True):
        assert [history[f"relevance/{name}"][check] for name in NAMES] == pytest.approx(means, rel=1e-4)
    assert 0 < history["drift/first"][1] <= 2 and history["drift/first"][1] == history["drift/previous"][1]
    assert max(history["gap"]) < 1e-4
    assert "attr" not in seen[0][0]  # the batch that is learnt from has nothing new
    for file in logger.experiment.files.values():
        file.flush()
    (written,) = tmp_path.rglob("relevance/pole angle.csv")
    rows = [line.split(",") for line in written.read_text().split()]
    assert [int(step) for step, _ in rows] == [128, 384]
    assert [float(value) for _, value in rows] == pytest.approx(history["relevance/pole angle"])
    (drift,) = tmp_path.rglob("drift/first.csv")
    assert len(drift.read_text().split()) == 1
    state = torch.load(tmp_path / "trainer.pt", weights_only=False)
    again = AttributionTracker(LRP("epsilon_plus", target=Target("logits", 1)), tracker._root, features=NAMES)
    again.load_state_dict(state["attribution_tracker"])
    assert str(again.history) == str(history)


@pytest.mark.usefixtures("quiet")
def test_tensorboard_has_the_same(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torchrl.record.loggers.tensorboard import TensorboardLogger

    logger = TensorboardLogger("run", log_dir=str(tmp_path))
    td = batch_of([1.0, 2.0, 3.0])
    tracker = AttributionTracker(LRP("epsilon", target="value"), linear([[1.0, 1.0, 0.0]]), logger=logger)
    for step in (5, 10):
        tracker.update(td, step=step)
    logger.experiment.flush()
    logger.experiment.close()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    found = events.Scalars("attribution/relevance/1")
    assert [event.step for event in found] == [5, 10]
    assert [event.value for event in found] == pytest.approx(tracker.history["relevance/1"])


def test_the_action_that_was_taken():
    """An explained policy acts anew; what was done in the batch is explained under another key."""
    model = linear([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    td = batch_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], taken=torch.tensor([0, 1]))
    tracker = AttributionTracker(LRP("epsilon", target=Target("value", Key("taken"))), model)
    values = tracker.update(td)
    assert [values[f"relevance/{i}"] for i in range(3)] == pytest.approx([0.5, 1.0, 0.0], abs=1e-5)
