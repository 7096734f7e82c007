"""Relevance of recurrent networks by Arras et al. (2017, 2019), in plain NumPy, one sequence at a time.

Gates are constants: of gate times signal the signal takes all. Sums, and products with weights, are shared by
contribution; a bias takes its share. Activations pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def through(weight: Array, x: Array, z: Array, r: Array) -> Array:
    """The relevance of ``x``, of which ``z = weight @ x + ...`` has relevance ``r``."""
    found = np.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(z)):
            found[i] += weight[j, i] * x[i] / z[j] * r[j]
    return found


@dataclass
class Weights:
    """Those of one direction of one layer."""

    ih: Array
    hh: Array
    b_ih: Array
    b_hh: Array
    projection: Array | None = None

    def gate(self, k: int, n: int) -> tuple[Array, Array, Array, Array]:
        rows = slice(k * n, (k + 1) * n)
        return self.ih[rows], self.hh[rows], self.b_ih[rows], self.b_hh[rows]

    @property
    def size(self) -> int:
        return self.ih.shape[0]


def weights_of(module: Any, layer: int = 0, reverse: bool = False) -> Weights:
    """Those of a network, or of a cell."""
    suffix = f"_l{layer}{'_reverse' if reverse else ''}" if hasattr(module, "num_layers") else ""
    ih, hh = (getattr(module, f"weight_{k}{suffix}").detach().numpy() for k in ("ih", "hh"))
    b_ih, b_hh = np.zeros(len(ih)), np.zeros(len(ih))
    if getattr(module, f"bias_ih{suffix}", None) is not None:
        b_ih, b_hh = (getattr(module, f"bias_{k}{suffix}").detach().numpy() for k in ("ih", "hh"))
    projection = getattr(module, f"weight_hr{suffix}", None)
    return Weights(ih, hh, b_ih, b_hh, None if projection is None else projection.detach().numpy())


@dataclass
class Direction:
    """Runs over one sequence, and back."""

    kind: str
    w: Weights
    steps: list[dict[str, Array]] = field(default_factory=list)

    def forward(self, xs: Array, h: Array, c: Array) -> tuple[list[Array], Array, Array]:
        outputs = []
        for x in xs:
            step = {"x": x, "h0": h, "c0": c}
            getattr(self, self.kind)(step)
            h, c = step["h"], step.get("c", c)
            self.steps.append(step)
            outputs.append(h)
        return outputs, h, c

    def backward(self, r_outputs: list[Array], r_h: Array, r_c: Array) -> tuple[list[Array], Array, Array]:
        """The relevance of inputs and of the first state."""
        r_xs = []
        for step, r in zip(self.steps[::-1], r_outputs[::-1], strict=True):
            r_x, r_h, r_c = getattr(self, f"{self.kind}_back")(step, r_h + r, r_c)
            r_xs.append(r_x)
        return r_xs[::-1], r_h, r_c

    def lstm(self, s: dict[str, Array]) -> None:
        n = self.w.size // 4
        z = [ih @ s["x"] + b1 + hh @ s["h0"] + b2 for ih, hh, b1, b2 in (self.w.gate(k, n) for k in range(4))]
        s["i"], s["f"], s["z"], s["o"] = sigmoid(z[0]), sigmoid(z[1]), z[2], sigmoid(z[3])
        s["g"] = np.tanh(s["z"])
        s["c"] = s["f"] * s["c0"] + s["i"] * s["g"]
        s["m"] = s["o"] * np.tanh(s["c"])
        s["h"] = s["m"] if self.w.projection is None else self.w.projection @ s["m"]

    def lstm_back(self, s: dict[str, Array], r_h: Array, r_c: Array) -> tuple[Array, Array, Array]:
        ih, hh, _, _ = self.w.gate(2, self.w.size // 4)
        r_m = r_h if self.w.projection is None else through(self.w.projection, s["m"], s["h"], r_h)
        r_c = r_c + r_m
        r_g = s["i"] * s["g"] / s["c"] * r_c
        r_c0 = s["f"] * s["c0"] / s["c"] * r_c
        return through(ih, s["x"], s["z"], r_g), through(hh, s["h0"], s["z"], r_g), r_c0

    def gru(self, s: dict[str, Array]) -> None:
        n = self.w.size // 3
        (ir, hr, b1, b2), (iz, hz, b3, b4), (i_n, hn, b5, b6) = (self.w.gate(k, n) for k in range(3))
        s["r"] = sigmoid(ir @ s["x"] + b1 + hr @ s["h0"] + b2)
        s["gate"] = sigmoid(iz @ s["x"] + b3 + hz @ s["h0"] + b4)
        s["a"], s["b"] = i_n @ s["x"] + b5, hn @ s["h0"] + b6
        s["z"] = s["a"] + s["r"] * s["b"]
        s["n"] = np.tanh(s["z"])
        s["h"] = (1 - s["gate"]) * s["n"] + s["gate"] * s["h0"]

    def gru_back(self, s: dict[str, Array], r_h: Array, r_c: Array) -> tuple[Array, Array, Array]:
        i_n, hn, _, _ = self.w.gate(2, self.w.size // 3)
        r_n = (1 - s["gate"]) * s["n"] / s["h"] * r_h
        r_h0 = s["gate"] * s["h0"] / s["h"] * r_h
        r_a, r_b = s["a"] / s["z"] * r_n, s["r"] * s["b"] / s["z"] * r_n
        # Without bias, nothing comes of a state of zero.
        from_state = through(hn, s["h0"], np.where(s["b"] == 0, 1.0, s["b"]), r_b)
        return through(i_n, s["x"], s["a"], r_a), r_h0 + from_state, r_c

    def tanh(self, s: dict[str, Array]) -> None:
        s["z"] = self.w.ih @ s["x"] + self.w.b_ih + self.w.hh @ s["h0"] + self.w.b_hh
        s["h"] = np.tanh(s["z"])

    def tanh_back(self, s: dict[str, Array], r_h: Array, r_c: Array) -> tuple[Array, Array, Array]:
        return through(self.w.ih, s["x"], s["z"], r_h), through(self.w.hh, s["h0"], s["z"], r_h), r_c

    def relu(self, s: dict[str, Array]) -> None:
        self.tanh(s)
        s["h"] = np.maximum(s["z"], 0)

    relu_back = tanh_back


@dataclass
class Network:
    """All layers and directions of a network, for one sequence."""

    module: Any
    kind: str

    def forward(self, xs: Array, h0: Array, c0: Array) -> tuple[list[Array], Array, Array]:
        """Outputs and last states; ``h0`` and ``c0`` have one row per layer and direction."""
        ways = 2 if self.module.bidirectional else 1
        self.directions: list[list[Direction]] = []
        h_n, c_n, values = [], [], list(xs)
        for layer in range(self.module.num_layers):
            outputs, row = [], []
            for way in range(ways):
                direction = Direction(self.kind, weights_of(self.module, layer, way == 1))
                at = layer * ways + way
                made, h, c = direction.forward(values[::-1] if way else values, h0[at], c0[at])
                outputs.append(made[::-1] if way else made)
                row.append(direction)
                h_n.append(h)
                c_n.append(c)
            self.directions.append(row)
            values = [np.concatenate(parts) for parts in zip(*outputs, strict=True)]
        return values, np.stack(h_n), np.stack(c_n)

    def backward(self, r_outputs: list[Array], r_h: Array, r_c: Array) -> tuple[list[Array], Array, Array]:
        """Relevance of the inputs and of the first states."""
        ways, r_values = len(self.directions[0]), list(r_outputs)
        r_h0, r_c0 = np.zeros_like(r_h), np.zeros_like(r_c)
        for layer in reversed(range(len(self.directions))):
            found = []
            for way, direction in enumerate(self.directions[layer]):
                at = layer * ways + way
                own = [np.split(r, ways)[way] for r in r_values]
                r_xs, r_h0[at], r_c0[at] = direction.backward(own[::-1] if way else own, r_h[at], r_c[at])
                found.append(r_xs[::-1] if way else r_xs)
            r_values = [sum(parts) for parts in zip(*found, strict=True)]
        return r_values, r_h0, r_c0
