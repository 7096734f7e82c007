"""Strategies: which different reasons a policy has for what it does, by clusters of its explanations.

Spectral relevance analysis (SpRAy; Lapuschkin et al. 2019): relevance of many rows is made small and of one size, rows
whose relevance is alike are neighbours, and the spectrum of the graph of neighbours says how many clusters there are.
A policy that looks at something else on part of the data, an artefact, has a cluster of its own there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook.datasets.keeping import block_sums
from tdhook.extras import require

__all__ = ["SpRAy", "Strategies"]

_DENSE = 1500
"""Rows up to which all eigenvalues are worked out."""
_MOST_ROWS = 20_000
_FLOOR = 0.05
"""What is added to eigenvalues before they are compared: those of clusters that hardly touch are all near zero."""


@dataclass(frozen=True)
class Strategies:
    """Clusters of explanations, the largest first.

    Attributes:
        row: ``[samples]``, the numbers of the rows.
        label: ``[samples]``, the cluster of each.
        eigenvalues: ``[most + 1]``, the smallest of the normalised Laplacian, which say how many clusters there are.
        embedding: ``[samples, 2]``, a map on which rows with like relevance are near each other.
        mean: ``[clusters, *features]``, the mean relevance of each cluster, of rows as they were compared.
        share: ``[clusters]``, the part of the rows that is in each.
        apart: ``[clusters]``, the mean silhouette of each: near 1 a cluster of its own, near 0 part of another.
        references: for each cluster the rows nearest to its mean, the nearest first.
    """

    row: Tensor
    label: Tensor
    eigenvalues: Tensor
    embedding: Tensor
    mean: Tensor
    share: Tensor
    apart: Tensor
    references: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.share)


class SpRAy:
    """Finds strategies in the relevance of many rows.

    Args:
        clusters: how many; by default as many as the largest gap between eigenvalues says, in proportion: that after
            which they are so many times as large, each counted 0.05 larger, so that those near zero are alike.
        most: of how many at most.
        pooled: the side of square blocks of the last two axes, which are summed first: a picture is compared by its
            parts, and not pixel by pixel.
        size: what each row is divided by, so that how strong it is does not matter: the sum of absolute values
            (``"absolute"``), the Euclidean norm (``"norm"``), or nothing (``None``).
        neighbours: how many nearest rows each is joined with; by default by the number of rows.
        references: how many rows are named for each cluster.
        embedding: how the map is made: ``"tsne"``, ``"umap"`` (of the package umap-learn), or ``"spectral"``.
        seed: of what is drawn: the same rows and seed give the same strategies.

    Raises:
        ImportError: scikit-learn is not installed (extra ``clusters``).
        ValueError: a setting is none of these.
    """

    def __init__(
        self,
        *,
        clusters: int | None = None,
        most: int = 10,
        pooled: int | None = None,
        size: Literal["absolute", "norm"] | None = "absolute",
        neighbours: int | None = None,
        references: int = 6,
        embedding: Literal["tsne", "umap", "spectral"] = "tsne",
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("clusters", clusters),
            ("most", most),
            ("pooled", pooled),
            ("neighbours", neighbours),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, got {name}={value}")
        if size not in ("absolute", "norm", None):
            raise ValueError(f"size={size!r} is neither 'absolute', 'norm' nor None")
        if embedding not in ("tsne", "umap", "spectral"):
            raise ValueError(f"embedding={embedding!r} is neither 'tsne', 'umap' nor 'spectral'")
        self._cluster = require("sklearn.cluster", "SpRAy")
        self._near = require("sklearn.neighbors", "SpRAy")
        self._metrics = require("sklearn.metrics", "SpRAy")
        self._maps = require("umap" if embedding == "umap" else "sklearn.manifold", "SpRAy(embedding=...)")
        self.clusters, self.most, self.pooled, self.size = clusters, most, pooled, size
        self.neighbours, self.references, self.embedding, self.seed = neighbours, references, embedding, seed

    def __call__(self, relevance: Tensor | TensorDictBase, row: Tensor | None = None) -> Strategies:
        """Find the strategies of some rows.

        Args:
            relevance: ``[samples, *features]``, or what a :class:`~tdhook.datasets.reducers.Reservoir` has drawn, with
                its rows.
            row: ``[samples]``, their numbers; by default they are counted.

        Raises:
            ValueError: there are too few rows to compare, or too many, or relevance is not finite.
        """
        if isinstance(relevance, TensorDictBase):
            relevance, row = relevance["relevance"], relevance["row"]
        count = len(relevance)
        row = torch.arange(count) if row is None else row
        if count < 4 or count > _MOST_ROWS:
            raise ValueError(
                f"strategies are found among 4 to {_MOST_ROWS} rows, got {count}: draw a sample, Reservoir(1000)"
            )
        if not bool(relevance.isfinite().all()):
            raise ValueError("relevance is not finite")
        compared = self._compared(relevance)
        flat = compared.flatten(1).numpy()
        values, vectors = self._spectrum(flat)
        number = self.clusters or _gap(values)
        number = min(number, count)
        label = self._labels(vectors[:, :number], number)
        return self._described(compared, row.cpu(), label, torch.from_numpy(values), vectors, number)

    def by_group(self, drawn: TensorDictBase) -> dict[int, Strategies]:
        """The strategies of each group that a :class:`~tdhook.datasets.reducers.Reservoir` has drawn of (``by=``).

        A group with too few rows has none.
        """
        found = {}
        for group in drawn["group"].unique().tolist():
            of = drawn["group"] == group
            if int(of.sum()) >= 4:
                found[group] = self(drawn["relevance"][of], drawn["row"][of])
        return found

    def _compared(self, relevance: Tensor) -> Tensor:
        """Relevance as it is compared, ``[samples, *features]``: made small, and of one size."""
        value = relevance.detach().cpu().double()
        if self.pooled is not None:
            if value.dim() < 3:
                raise ValueError(f"pooled= sums blocks of the last two axes, and rows have {value.dim() - 1}")
            value = block_sums(value, self.pooled)
        flat = value.flatten(1)
        if self.size is not None:
            size = flat.abs().sum(-1) if self.size == "absolute" else flat.norm(dim=-1)
            # A row without relevance stays one.
            flat = flat / torch.where(size == 0, 1.0, size)[:, None]
        return flat.reshape(value.shape)

    def _spectrum(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest eigenvalues of the normalised Laplacian, ``[most + 1]``, with ``[samples, most + 1]``."""
        count = len(flat)
        near = self.neighbours or max(5, round(2 * np.log2(count)))
        graph = self._near.kneighbors_graph(flat, min(near, count - 1), include_self=False)
        joined = graph.maximum(graph.T)
        csgraph = require("scipy.sparse.csgraph", "SpRAy")
        laplacian = csgraph.laplacian(joined, normed=True)
        wanted = min(max(self.most, self.clusters or 1) + 1, count)
        if count <= _DENSE:
            values, vectors = np.linalg.eigh(laplacian.toarray())
            values, vectors = values[:wanted], vectors[:, :wanted]
        else:
            linalg = require("scipy.sparse.linalg", "SpRAy")
            begin = np.random.default_rng(self.seed).normal(size=count)
            # Those nearest to a number below zero are the smallest.
            values, vectors = linalg.eigsh(laplacian.tocsc(), wanted, sigma=-1e-2, v0=begin)
            order = np.argsort(values, kind="stable")
            values, vectors = values[order], vectors[:, order]
        # A vector and its negative are the same: the largest entry is made positive.
        largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
        return values, vectors * np.where(largest < 0, -1.0, 1.0)

    def _labels(self, vectors: np.ndarray, number: int) -> Tensor:
        """Clusters by k-means of the rows of the first vectors, each of length one (Ng, Jordan, Weiss 2001)."""
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = vectors / np.where(length == 0, 1.0, length)
        found = self._cluster.KMeans(number, n_init=10, random_state=self.seed).fit_predict(rows)
        label = torch.from_numpy(found.astype(np.int64))
        order = torch.bincount(label, minlength=number).argsort(descending=True, stable=True)
        return order.argsort()[label]

    def _described(
        self, compared: Tensor, row: Tensor, label: Tensor, values: Tensor, vectors: np.ndarray, number: int
    ) -> Strategies:
        flat = compared.flatten(1)
        count = torch.bincount(label, minlength=number)
        mean = torch.stack([compared[label == one].mean(0) for one in range(number)])
        apart = torch.zeros(number, dtype=torch.float64)
        if 1 < number < len(flat):
            each = torch.from_numpy(self._metrics.silhouette_samples(flat.numpy(), label.numpy()))
            apart = torch.stack([each[label == one].mean() for one in range(number)])
        distance = (flat - mean.flatten(1)[label]).norm(dim=-1)
        references = []
        for one in range(number):
            of = (label == one).nonzero()[:, 0]
            nearest = distance[of].argsort(stable=True)[: self.references]
            references.append(row[of[nearest]])
        return Strategies(
            row,
            label,
            values,
            self._embedded(flat.numpy(), vectors),
            mean,
            count / len(flat),
            apart,
            tuple(references),
        )

    def _embedded(self, flat: np.ndarray, vectors: np.ndarray) -> Tensor:
        if self.embedding == "spectral":
            found = vectors[:, 1:3] if vectors.shape[1] > 2 else np.zeros((len(flat), 2))
        elif self.embedding == "umap":
            found = self._maps.UMAP(random_state=self.seed, n_jobs=1).fit_transform(flat)
        else:
            near = min(30.0, (len(flat) - 1) / 3)
            found = self._maps.TSNE(perplexity=near, init="random", random_state=self.seed).fit_transform(
                flat
            )
        return torch.from_numpy(np.asarray(found, dtype=np.float32))


def _gap(values: np.ndarray) -> int:
    """How many eigenvalues are before the largest gap, in proportion."""
    raised = values.clip(min=0) + _FLOOR
    return 1 + int(np.argmax(raised[1:] / raised[:-1]))
