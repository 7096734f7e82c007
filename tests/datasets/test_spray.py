"""SpRAy finds the strategy that looks at an artefact, and finds one strategy where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from tdhook import LRP, Target
from tdhook.datasets import Job, Reservoir, open_result
from tdhook.datasets.spray import SpRAy

SIDE, COUNT = 8, 600


def pictures(tagged: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of noise; those of class 1 have a bright bar in the middle, or, some of them, a tag in the corner."""
    draw = torch.Generator().manual_seed(0)
    x = 0.3 * torch.rand(COUNT, 1, SIDE, SIDE, generator=draw)
    label = torch.arange(COUNT) % 2
    has_tag = (torch.rand(COUNT, generator=draw) < tagged) & (label == 1)
    x[(label == 1) & ~has_tag, 0, 3:5, 2:6] += 0.7
    x[has_tag, 0, :2, :2] += 1.0
    return x, label, has_tag


def classifier(x: Tensor, label: Tensor) -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 32), nn.ReLU(), nn.Linear(32, 2))
    adam = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        adam.step()
    assert (net(x).argmax(-1) == label).float().mean() > 0.99
    return TensorDictModule(net, ["pixels"], ["logits"])


def drawn(tagged: float, out: Path) -> tuple[TensorDict, Tensor]:
    x, label, has_tag = pictures(tagged)
    rows = TensorDict({"pixels": x, "label": label}, [COUNT])
    method = LRP("epsilon", target=Target("logits", 1))
    sample = Reservoir(1000, by="label")
    Job(method, classifier(x, label), rows, out, keep=None, reduce=[sample]).work()
    return open_result(out).reduced["reservoir"], has_tag


@pytest.mark.parametrize("tagged", [0.05, 0.3])
def test_it_finds_a_planted_clever_hans(tagged: float, tmp_path: Path) -> None:
    sample, has_tag = drawn(tagged, tmp_path / "job")
    strategies = SpRAy().by_group(sample)
    found = strategies[1]
    last = len(found) - 1
    assert last > 0 and found.apart[last] > 0.5
    assert torch.equal(found.label == last, has_tag[found.row])
    corner = found.mean[:, 0, :2, :2].sum((-2, -1))
    assert corner[last] > 0.5 and corner[:last].abs().max() < 0.1
    assert has_tag[found.references[last]].all() and not has_tag[torch.cat(found.references[:last])].any()
    # The map has it apart: the nearest neighbour of each row is tagged as the row is.
    apart = torch.cdist(found.embedding, found.embedding).fill_diagonal_(torch.inf)
    same = (found.label == last)[apart.argmin(-1)] == (found.label == last)
    assert same.float().mean() > 0.98
    # Pictures of the other class have no artefact, and one strategy.
    assert len(strategies[0]) == 1
    assert strategies[0].share.tolist() == [1.0] and strategies[0].apart.tolist() == [0.0]


def planted(count: int = 80) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    x = 0.1 * torch.randn(count, 6, generator=draw)
    for i in range(3):
        x[i * count // 4 : (i + 1) * count // 4, i] += 1 + i
    x[3 * count // 4 :, 0] += 1
    return x


@pytest.mark.parametrize("embedding", ["tsne", "spectral"])
def test_the_same_seed_gives_the_same_strategies(embedding: str) -> None:
    first, again = (SpRAy(embedding=embedding, seed=4)(planted()) for _ in range(2))
    for name in ("label", "eigenvalues", "embedding", "mean", "share", "apart"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert len(first) == 3 and first.share.tolist() == [0.5, 0.25, 0.25]


def test_many_rows_have_the_eigenvalues_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = SpRAy(embedding="spectral")(planted())
    monkeypatch.setattr("tdhook.datasets.spray._DENSE", 10)
    sparse = SpRAy(embedding="spectral")(planted())
    torch.testing.assert_close(dense.eigenvalues, sparse.eigenvalues)
    assert torch.equal(dense.label, sparse.label)


def test_strength_does_not_matter_and_pictures_are_pooled() -> None:
    x = planted()
    strong = x * torch.linspace(0.1, 10, len(x))[:, None]
    assert torch.equal(SpRAy(embedding="spectral")(x).label, SpRAy(embedding="spectral")(strong).label)
    maps = torch.zeros(40, 1, 6, 6)
    maps[:20, 0, 0, 0], maps[20:, 0, 5, 5] = 1.0, -2.0
    maps += 0.01 * torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    found = SpRAy(pooled=3, embedding="spectral")(maps, torch.arange(100, 140))
    assert found.mean.shape == (2, 1, 2, 2)
    assert {frozenset((r.item() - 100) // 20 for r in rows) for rows in found.references} == {
        frozenset({0}),
        frozenset({1}),
    }


def test_a_number_of_clusters_can_be_asked_for() -> None:
    assert len(SpRAy(clusters=5, embedding="spectral")(planted())) == 5


def test_rows_without_relevance_stay() -> None:
    x = planted()
    x[0] = 0
    assert SpRAy(embedding="spectral")(x).mean.isfinite().all()


@pytest.mark.parametrize(
    "options, relevance, text",
    [
        ({}, torch.zeros(3, 2), "among 4 to 20000 rows, got 3"),
        ({}, torch.full((9, 2), torch.nan), "relevance is not finite"),
        ({"pooled": 2}, torch.ones(9, 2), "rows have 1"),
        ({"clusters": 0}, torch.ones(9, 2), "clusters is at least 1, got clusters=0"),
        ({"size": "most"}, torch.ones(9, 2), "size='most' is neither"),
        ({"embedding": "pca"}, torch.ones(9, 2), "embedding='pca' is neither"),
    ],
)
def test_mistakes_are_told(options: dict[str, object], relevance: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SpRAy(**options)(relevance)  # type: ignore[arg-type]
