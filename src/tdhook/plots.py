"""Pictures of relevance (extra ``viz``: matplotlib, imported at the first use).

Figures are made without pyplot: nothing global changes, no window opens, and ``figure.savefig(path)`` works anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

__all__ = ["relevance_over_time"]

RELEVANCE_COLOURS = "RdBu_r"
"""Red for relevance that speaks for the target, blue for relevance that speaks against it, white for none."""

# Told apart in any kind of colour vision, and none of them the red or blue of relevance.
_ACTION_COLOURS = ("#009e73", "#e69f00", "#7a4f9a", "#56b4e9", "#8c8c00", "#cc79a7", "#5b5b5b", "#8b5a2b")
_INK, _FAINT = "#333333", "#cccccc"


def relevance_over_time(
    relevance: Tensor,
    features: Sequence[str],
    actions: Tensor | None = None,
    action_names: Sequence[str] | None = None,
    observation: Tensor | None = None,
    title: str | None = None,
    *,
    episode_starts: Sequence[int] = (),
    max_features: int = 16,
) -> Figure:
    """Relevance of each feature at each step, beside what the agent did and saw.

    Relevance has one diverging colour scale with zero in the middle, cut at the 99.5th percentile of its size. Bars
    give the mean over the steps of each action.

    Args:
        relevance: ``[time, features]``.
        features: one name per feature.
        actions: ``[time]``, index of the action taken at each step.
        action_names: one name per action; by default ``action 0`` and so on.
        observation: ``[time, features]``, drawn as one line per feature, each in a scale of its own.
        title: of the figure.
        episode_starts: steps at which an episode begins; marked by lines.
        max_features: how many rows are shown: those of largest mean absolute relevance; the rest is summed in one more.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no step, or shapes and names do not fit together.
    """
    relevance = _checked(relevance, len(features))
    time = len(relevance)
    taken = None if actions is None else actions.detach().cpu().reshape(-1).to(torch.int64)
    seen = None if observation is None else observation.detach().cpu().reshape(len(observation), -1).to(torch.float64)
    if taken is not None and len(taken) != time:
        raise ValueError(f"there are {len(taken)} actions for {time} steps")
    if seen is not None and seen.shape != relevance.shape:
        raise ValueError(f"the observation has shape {tuple(seen.shape)} and relevance {tuple(relevance.shape)}")
    names = _action_names(taken, action_names)
    figure_class = _figure_class()

    shown, labels, relevance = _largest(relevance, features, max_features)
    rows, lanes = len(labels), 0 if seen is None else len(shown)
    heights = [0.4 * (taken is not None), 0.2 + 0.42 * rows, (0.2 + 0.42 * lanes) * (seen is not None)]
    used = [height for height in heights if height]
    figure: Figure = figure_class(figsize=(11.0, max(3.0, 1.5 + sum(used))), layout="constrained")
    grid = figure.add_gridspec(len(used), 2, width_ratios=[4.2, 1.0], height_ratios=used)

    row = 0
    heat = figure.add_subplot(grid[int(taken is not None), 0])
    timed = [heat]
    if taken is not None:
        strip = figure.add_subplot(grid[0, 0], sharex=heat)
        _draw_actions(strip, figure.add_subplot(grid[0, 1]), taken, names)
        timed.append(strip)
        row = 1
    image = _draw_relevance(heat, relevance, labels)
    bars = figure.add_subplot(grid[row, 1], sharey=heat)
    _draw_means(bars, relevance, taken, names)
    if seen is not None:
        lines = figure.add_subplot(grid[row + 1, 0], sharex=heat)
        _draw_observation(lines, seen[:, shown], [features[i] for i in shown])
        timed.append(lines)
        _draw_scale(figure, image, inside=figure.add_subplot(grid[row + 1, 1]))
    else:
        _draw_scale(figure, image, below=bars)
    for axes in timed:
        axes.set_xlim(-0.5, time - 0.5)
        for start in episode_starts:
            axes.axvline(start - 0.5, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.tick_params(labelbottom=axes is timed[-1])
    timed[-1].set_xlabel("step")
    timed[-1].xaxis.get_major_locator().set_params(integer=True)
    if title:
        figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="large", color=_INK)
    return figure


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":  # installed, but broken
            raise
        raise ImportError('tdhook.plots needs matplotlib, which is not installed: pip install "tdhook[viz]"') from error
    return Figure


def _checked(relevance: Tensor, count: int) -> Tensor:
    relevance = relevance.detach().cpu()
    if relevance.dim() != 2:
        raise ValueError(f"relevance over time has shape [time, features], got {tuple(relevance.shape)}")
    if relevance.numel() == 0:
        raise ValueError(f"there is nothing to draw: relevance has shape {tuple(relevance.shape)}")
    if relevance.shape[1] != count:
        raise ValueError(f"relevance has {relevance.shape[1]} features, and {count} names were given")
    if not bool(relevance.isfinite().all()):
        raise ValueError("relevance has NaN or infinite values, which have no colour")
    return relevance.to(torch.float64)


def _action_names(taken: Tensor | None, names: Sequence[str] | None) -> list[str]:
    if taken is None:
        return []
    if int(taken.min()) < 0:
        raise ValueError("an action is an index, and one of them is negative")
    highest = int(taken.max())
    if names is None:
        return [f"action {i}" for i in range(highest + 1)]
    if highest >= len(names):
        raise ValueError(f"action {highest} was taken, and {len(names)} action names were given")
    return list(names)


def _largest(relevance: Tensor, features: Sequence[str], most: int) -> tuple[list[int], list[str], Tensor]:
    """Which features are shown, the names of the rows, and their relevance ``[time, rows]``."""
    count = relevance.shape[1]
    if count <= most:
        return list(range(count)), list(features), relevance
    shown = sorted(relevance.abs().mean(0).topk(most).indices.tolist())
    rest = torch.ones(count, dtype=torch.bool)
    rest[shown] = False
    rows = torch.cat([relevance[:, shown], relevance[:, rest].sum(1, keepdim=True)], dim=1)
    return shown, [*(features[i] for i in shown), f"{count - most} others (sum)"], rows


def _draw_relevance(axes: Axes, relevance: Tensor, labels: Sequence[str]) -> AxesImage:
    top = torch.quantile(relevance.abs().flatten()[:: 1 + relevance.numel() // 10_000_000], 0.995).item()
    top = top or relevance.abs().max().item() or 1.0
    image = axes.imshow(
        relevance.T.numpy(),
        aspect="auto",
        cmap=RELEVANCE_COLOURS,
        vmin=-top,
        vmax=top,
        extent=(-0.5, len(relevance) - 0.5, len(labels) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(labels)), labels)
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
    _plain(axes)
    axes.set_title("relevance", loc="left", fontsize="medium", color=_INK)
    return image


def _draw_actions(axes: Axes, legend: Axes, taken: Tensor, names: Sequence[str]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = [_colour(i) for i in range(len(names))]
    axes.imshow(
        taken[None].numpy(),
        aspect="auto",
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(names) - 0.5,
        interpolation="nearest",
        extent=(-0.5, len(taken) - 0.5, 0.5, -0.5),
    )
    axes.set_yticks([0], ["action"])
    _plain(axes)
    legend.axis("off")
    # Only what was done needs a colour explained; there may be many other actions.
    handles = [Patch(color=colours[i], label=names[i]) for i in sorted(set(taken.tolist()))][:12]
    legend.legend(handles=handles, loc="center left", frameon=False, ncols=1 + len(handles) // 3, fontsize="small")


def _draw_means(axes: Axes, relevance: Tensor, taken: Tensor | None, names: Sequence[str]) -> None:
    groups = [(None, _INK)] if taken is None else [(i, _colour(i)) for i in sorted(set(taken.tolist()))]
    thickness = 0.72 / len(groups)
    for place, (action, colour) in enumerate(groups):
        mean = relevance.mean(0) if taken is None else relevance[taken == action].mean(0)
        offset = (place - (len(groups) - 1) / 2) * thickness
        axes.barh([i + offset for i in range(len(mean))], mean.tolist(), height=thickness * 0.9, color=colour)
    axes.axvline(0.0, color=_INK, linewidth=0.8)
    axes.tick_params(labelleft=False)
    axes.xaxis.get_major_locator().set_params(nbins=4)
    axes.margins(x=0.1)
    _plain(axes)
    title = "mean" if taken is None else "mean by action"
    axes.set_title(title, loc="left", fontsize="medium", color=_INK)


def _draw_observation(axes: Axes, observation: Tensor, labels: Sequence[str]) -> None:
    few = len(observation) < 40
    for lane, values in enumerate(observation.T):
        size = values.abs().max().item()
        axes.axhline(lane, color=_FAINT, linewidth=0.6, zorder=0)
        # Rows count downwards, as in the picture of relevance above, and values upwards.
        heights = lane - 0.42 * values / (size or 1.0)
        axes.plot(heights.numpy(), color=_INK, linewidth=0.9, marker="." if few else None, markersize=4)
        axes.text(1.008, lane, f"±{size:.2g}", transform=axes.get_yaxis_transform(), va="center", fontsize="x-small")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    _plain(axes)
    axes.set_title("observation", loc="left", fontsize="medium", color=_INK)


def _draw_scale(figure: Figure, image: AxesImage, inside: Axes | None = None, below: Axes | None = None) -> None:
    options: dict[str, Any] = {"orientation": "horizontal", "extend": "both", "label": "relevance at one step"}
    if inside is None:
        bar = figure.colorbar(image, ax=below, **options)
    else:
        inside.axis("off")
        bar = figure.colorbar(image, cax=inside.inset_axes((0.0, 0.62, 1.0, 0.09)), **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize="small", length=2)
    bar.locator.set_params(nbins=4)
    bar.update_ticks()


def _colour(action: int) -> str:
    return _ACTION_COLOURS[action % len(_ACTION_COLOURS)]


def _plain(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=2, labelsize="small", colors=_INK)
