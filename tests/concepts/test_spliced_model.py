"""A model with dictionaries in it, as a module."""

from __future__ import annotations

import copy
import pickle
from threading import Thread

import pytest
import torch
from autoencoders import Autoencoder, mlp, observations, why
from tolerances import assert_close
from torch import Tensor

from tdhook.concepts import Spliced


def test_as_one_graph() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24, "topk").double()}).on(actor)
    eager = why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    compiled = why("epsilon", input_modules=["1.features"], compile={"backend": "aot_eager"})
    compiled = compiled.wrap(spliced)(td.clone())
    for key in ("logits", ("attr", "1.features"), ("attr", "observation")):
        assert_close(compiled[key], eager[key])


def test_the_model_is_left_as_it_is() -> None:
    actor, td = mlp(), observations(5)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    modules = list(actor.modules())
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    spliced(td.clone())
    with pytest.raises(ValueError, match="does not encode"):
        Spliced({"1": Autoencoder(5, 24).double()}).on(actor)(td.clone())
    assert list(actor.modules()) == modules
    assert not any(module._forward_hooks for module in (*modules, *spliced.modules()))
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())
    assert set(before) < set(spliced.state_dict())
    assert "beside.module.1.features.dictionary.encoder.weight" in spliced.state_dict()
    assert spliced.get_parameter("module.0.weight") is actor.module[0].weight
    spliced.load_state_dict(spliced.state_dict())
    explained = why("epsilon").wrap(spliced)
    explained.load_state_dict(spliced.state_dict())
    spliced.eval()
    assert not actor.training and not actor.module.training and not dictionary.training
    spliced.float()
    assert actor.module[0].weight.dtype is dictionary.encoder.weight.dtype is torch.float32


def test_a_hook_on_features_puts_others_in_their_place() -> None:
    actor, td = mlp(), observations(5)
    dictionary = Autoencoder(8, 24).double()
    spliced = Spliced({"1": dictionary}).on(actor)
    hook = spliced.feature_modules["1"].register_forward_hook(lambda module, args, found: 2 * found)
    found = spliced(td.clone())["logits"]
    hook.remove()
    h = actor.module[:2](td["observation"])
    features = dictionary.encode(h)
    other = actor.module[2:](h + dictionary.decode(2 * features) - dictionary.decode(features))
    assert_close(found, other)
    assert torch.equal(spliced(td.clone())["logits"], actor(td.clone())["logits"])


def test_copies_and_pickles() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    method = why("epsilon", input_modules=["1.features"])
    found = method.wrap(spliced)(td.clone())
    for other in (copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
        with torch.no_grad():
            actor.module[0].weight.add_(1.0)
        again = method.wrap(other)(td.clone())
        assert torch.equal(again["attr", "1.features"], found["attr", "1.features"])
        with torch.no_grad():
            actor.module[0].weight.sub_(1.0)


def test_nothing_is_left_behind_by_an_error() -> None:
    actor, td = mlp(), observations(5)

    def failing(features: Tensor) -> Tensor:
        raise RuntimeError("in the middle")

    spliced = Spliced({"1": (lambda h: h, failing)}).on(actor)
    with pytest.raises(RuntimeError, match="in the middle"):
        why("epsilon", input_modules=["1.features"]).wrap(spliced)(td.clone())
    assert spliced.feature_modules["1"].last is None
    assert not any(module._forward_hooks for module in (*actor.modules(), *spliced.modules()))


def test_threads() -> None:
    actor, td = mlp(), observations(5)
    spliced = Spliced({"1": Autoencoder(8, 24).double()}).on(actor)
    method, out = why("epsilon", input_modules=["1.features"]), actor(td.clone())["logits"]
    expected = method.wrap(spliced)(td.clone())["attr", "1.features"]
    found: list[Tensor] = []
    plain: list[Tensor] = []

    def explain() -> None:
        found.append(method.wrap(spliced)(td.clone())["attr", "1.features"])

    def act() -> None:
        plain.extend(actor(td.clone())["logits"] for _ in range(50))

    threads = [Thread(target=explain) for _ in range(4)] + [Thread(target=act)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, expected) for one in found)
    assert len(plain) == 50 and all(torch.equal(one, out) for one in plain)
