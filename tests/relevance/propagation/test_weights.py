"""Modified weights are made once, and made anew whenever a parameter changes, however it does."""

import copy
import gc
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook import LRP, Target
from tdhook.relevance.propagation.weights import WeightCache


def network():
    """A convolution and a batch norm, large enough for the weights to be kept."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(64, 128, 3, padding=1),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 64, 3, padding=1),
    )
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    nn.init.uniform_(net[1].running_var, 0.5, 2.0)
    return net


def relevance(module):
    torch.manual_seed(1)
    dtype = next(module.parameters()).dtype
    td = TensorDict({"input": torch.randn(2, 64, 4, 4, dtype=dtype)}, batch_size=[2])
    return module(td)["attr", "input"]


def by_optimiser(net):
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    net(torch.randn(2, 64, 4, 4)).square().sum().backward()
    optimiser.step()


def by_data(net):
    for parameter in net.parameters():  # as soft updates of target networks do; the version stays
        parameter.data.lerp_(torch.ones_like(parameter), 0.01)


def in_place(net):
    with torch.no_grad():
        net[0].weight[3, 4, 1, 1] = 50.0


def by_state_dict(net):
    net.load_state_dict({key: value * 1.1 for key, value in net.state_dict().items()})


def by_assignment(net):
    state = {key: value * 1.1 for key, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def by_new_parameter(net):
    net[3].weight = nn.Parameter(torch.randn_like(net[3].weight))


def by_set_data(net):
    net[3].weight.data = torch.randn_like(net[3].weight)


def by_statistics(net):
    net[1].running_var.mul_(3.0)


def by_tensordict(net):
    params = TensorDict.from_module(net)
    (params * 1.2).to_module(net)


def by_shared_memory(net):
    """Another process writes: the version that this one knows stays."""
    net.share_memory()
    for parameter in net.parameters():
        alias = torch.empty(0).set_(parameter.untyped_storage()).view_as(parameter)
        alias.mul_(1.3)


def by_one_value(net):
    net[3].weight.data[5, 7, 2, 1] = 40.0  # no sample of the values tells


def by_pruning(net):
    net[3].weight.data[:, 3] = 0


def by_numpy(net):
    net[0].weight.detach().numpy()[3, 5, 1, 1] = 40.0


def by_exchange(net):
    net[0].weight.data[[3, 4]] = net[0].weight.data[[4, 3]]


CHANGES = [
    by_one_value, by_pruning, by_numpy, by_exchange,
    by_optimiser, by_data, in_place, by_state_dict, by_assignment, by_new_parameter, by_set_data, by_statistics,
    by_tensordict, by_shared_memory, nn.Module.double, nn.Module.bfloat16,
]  # fmt: skip


@pytest.mark.parametrize("preset", ["epsilon_plus", "epsilon_alpha2_beta1_flat"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_parameter_is_noticed(change, preset):
    net = network()
    explained = LRP(preset, target=Target("output", 0)).wrap(net)
    before = relevance(explained)
    torch.testing.assert_close(relevance(explained), before, rtol=0, atol=0)
    change(net)
    after = relevance(explained)
    anew = relevance(LRP(preset, target=Target("output", 0), cache_weights=False).wrap(net))
    torch.testing.assert_close(after, anew, rtol=0, atol=0)
    assert not torch.equal(after.float(), before)


def made(net, **options):
    """How often a weight is clamped in the second of two calls."""
    explained = LRP("epsilon_plus", target=Target("output", 0), **options).wrap(net)
    relevance(explained)
    with torch.profiler.profile(record_shapes=True) as profile:
        relevance(explained)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name.startswith("aten::clamp")]
    return sum(shape in ([128, 64, 3, 3], [64, 128, 3, 3]) for shape in map(list, shapes))


def test_weights_are_modified_once():
    assert made(network()) == 0


def test_unless_told_otherwise():
    assert made(network(), cache_weights=False) >= 2


def test_one_tensor_for_each_layer_and_modification():
    net = network()
    cache, weight = WeightCache(net), net[0].weight
    cache.begin()
    first = cache.get(net[0], "change", [weight], lambda: weight.detach() + 1)
    assert cache.get(net[0], "change", [weight], lambda: weight.detach() + 2) is first
    assert cache.get(net[0], "another", [weight], lambda: weight.detach() + 2) is not first
    in_place(net)
    second = cache.get(net[0], "change", [weight], lambda: weight.detach() + 1)
    assert second is not first
    assert [len(kept) for kept in cache._kept.values()] == [2]


def test_a_layer_that_is_gone_leaves_nothing():
    net = network()
    cache, value = WeightCache(net), net[0].weight.detach() + 1
    cache.begin()
    cache.get(net[0], "change", [net[0].weight], lambda: value)
    assert len(cache._kept) == 1
    cache.end()
    del net
    gc.collect()
    assert len(cache._kept) == 0


def test_what_is_kept_is_not_copied_or_written():
    net = network()
    explained = LRP("epsilon_plus", target=Target("output", 0)).wrap(net)
    bare = len(pickle.dumps(explained))
    expected = relevance(explained)
    assert len(pickle.dumps(explained)) < bare + 1000
    again = copy.deepcopy(explained)
    torch.testing.assert_close(relevance(again), expected, rtol=0, atol=0)


def test_in_inference_mode_and_under_vmap_weights_are_made_anew():
    cache = WeightCache()
    layer = network()[0]
    with torch.inference_mode():
        weight = torch.ones(128, 64, 3, 3)
        values = [cache.get(layer, "change", [weight], lambda: weight + 1) for _ in range(2)]
    assert values[0] is not values[1]
    assert len(cache._kept) == 0


def test_nothing_is_kept_of_weights_that_a_layer_is_only_lent():
    """Parameters that are sharded or offloaded come for a call, and are gone afterwards."""
    net = network()
    explained = LRP("epsilon_plus", target=Target("output", 0)).wrap(net)
    expected = relevance(explained)
    (cache,) = (obj for obj in gc.get_objects() if type(obj) is WeightCache and net[0] in obj._layers)
    assert {id(layer) for layer in cache._kept} == {id(net[0]), id(net[3])}
    away = {}

    def lend(layer, args):
        layer.weight = away[layer]

    def take_back(layer, args, output):
        layer.weight = nn.Parameter(away[layer].to("meta"), requires_grad=False)

    for layer in (net[0], net[3]):
        away[layer] = layer.weight
        layer.register_forward_pre_hook(lend)
        layer.register_forward_hook(take_back)
        take_back(layer, None, None)
    torch.testing.assert_close(relevance(explained), expected, rtol=0, atol=0)
    assert not cache._kept
    for _ in range(2):
        torch.testing.assert_close(relevance(explained), expected, rtol=0, atol=0)
    assert not cache._kept
