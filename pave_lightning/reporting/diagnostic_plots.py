"""Tables and pictures of the diagnostics of one purification."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pave_lightning.reporting.plots import kept_ranks, new_figure, short_layer_names, write_figure
from pave_lightning.system.files import replacing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pave_lightning.diagnostics import Diagnostics

# Okabe and Ito's palette, told apart with any colour vision
TASK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
TREATMENTS = {
    "plain": ("#999999", "plain"),
    "pave": ("#0072B2", "PAVE"),
    "dare": ("#D55E00", "DARE"),
    "dare_dropped": ("#E69F00", "DARE before rescaling"),
}
METRICS = {
    "covariance": ("#0072B2", "W C (the paper)"),
    "root": ("#009E73", "W C^(1/2)"),
    "identity": ("#D55E00", "W (plain SVD)"),
}
MATRICES = {"identity": "W", "root": "W C^(1/2)", "covariance": "W C", "task_vector": "W - W0"}
# Layers of more kinds than this are drawn as one
MOST_KINDS = 9
OTHER_KIND = "all other layers"
POINTS = 200
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def write_diagnostics(diagnostics: Diagnostics, folder: Path | str) -> list[Path]:
    """Write every table as parquet and every picture as PNG.

    Args:
        diagnostics: what `pave_lightning.diagnostics.diagnose` gives.
        folder: where to; made where it does not exist.

    Returns:
        The files, tables first.
    """
    folder = Path(folder)
    files = []
    for name, table in diagnostics.tables().items():
        files.append(folder / f"{name}.parquet")
        with replacing(files[-1]) as temporary:
            table.to_parquet(temporary, index=False)
    ranks = sorted(diagnostics.kept_ranks.itertuples(), key=lambda kept: natural(kept.layer))
    pictures: dict[str, Callable[[Path], None]] = {
        "spectra": lambda path: spectra(diagnostics.spectra, path),
        "kept_ranks": lambda path: kept_ranks(ranks, path),
        "pruning_error": lambda path: pruning_error(diagnostics.pruning_error, path),
        "subspace_overlap": lambda path: subspace_overlap(diagnostics.subspace_overlap, path),
        "conflicts": lambda path: conflicts(diagnostics.conflicts, diagnostics.removed_energy, path),
    }
    for name, draw in pictures.items():
        files.append(folder / f"{name}.png")
        draw(files[-1])
    return files


def spectra(table: pd.DataFrame, path: Path | str) -> None:
    """Draw normalised spectra: a column a kind of layer, a row a matrix, a line a task.

    Lines are geometric means over the layers of a kind; the shade spans all layers and tasks.

    Args:
        table: `Diagnostics.spectra`.
        path: The PNG file.
    """
    import numpy as np

    kinds = kinds_of_layers(table["layer"])
    table = table.assign(kind=table["layer"].map(kinds))
    names, tasks = list(dict.fromkeys(kinds.values())), list(dict.fromkeys(table["task"]))
    rows = [name for name in MATRICES if (table["matrix"] == name).any()]
    figure, panels = _grid(len(rows), len(names), 1.75, 1.6, legend=0.6)
    grid, lowest = np.linspace(0, 1, POINTS), dict[str, float]()
    for (kind, matrix), part in table.groupby(["kind", "matrix"], sort=False):
        axes = panels[rows.index(matrix)][names.index(kind)]
        curves: dict[str, list[npt.NDArray[np.float64]]] = {}
        for (task, _), own in part.groupby(["task", "layer"], sort=False):
            values = own["normalised"].to_numpy()
            if np.isfinite(values).all():
                place = np.arange(len(values)) / max(len(values) - 1, 1)
                curves.setdefault(task, []).append(np.interp(grid, place, np.log10(values.clip(1e-8))))
        if not curves:
            continue
        every = np.concatenate([np.stack(own) for own in curves.values()])
        axes.fill_between(grid, 10 ** every.min(axis=0), 10 ** every.max(axis=0), color="#E6E6E6", linewidth=0)
        # The last few values fall off steeply and would squeeze all others
        lowest[matrix] = min(lowest.get(matrix, 1), 10 ** every[:, : int(0.97 * POINTS)].min())
        for task, own in curves.items():
            mean = 10 ** np.stack(own).mean(axis=0)
            axes.plot(grid, mean, color=_colour(tasks, task), linewidth=1)
    for index, matrix in enumerate(rows):
        for axes in panels[index]:
            _log_y(axes)
            axes.set_xlim(0, 1)
        panels[index][0].set_ylabel(MATRICES[matrix])
        _share_y(panels[index], lowest.get(matrix, 0))
    _titles(panels, names)
    for axes in panels[-1]:
        axes.set_xlabel("index / all", fontsize=8)
    _head(figure, "Singular values divided by the largest: mean over layers of a kind (line), all layers (shade)")
    _legend(figure, [(_colour(tasks, task), task) for task in tasks])
    write_figure(figure, path)


def pruning_error(table: pd.DataFrame, path: Path | str) -> None:
    """Draw the error of a layer's output by pruned share of directions: a panel a kind of layer, a line a metric.

    Lines are means over layers and tasks, shades span from the smallest to the largest. Dots stand at the ranks that
    purification keeps, in the metric it was asked for.

    Args:
        table: `Diagnostics.pruning_error`.
        path: The PNG file.
    """
    kinds = kinds_of_layers(table["layer"])
    table = table.assign(kind=table["layer"].map(kinds))
    names = list(dict.fromkeys(kinds.values()))
    figure, panels = _grid(-(-len(names) // 4), min(4, len(names)), 2.7, 2.3, legend=0.6)
    flat = [axes for row in panels for axes in row]
    for axes, kind in zip(flat, names, strict=False):
        part = table[table["kind"] == kind]
        for metric, (colour, _) in METRICS.items():
            own = part[part["metric"] == metric]
            # Widths differ within a kind, so shares are rounded to what was asked for
            curve = own[~own["kept"]].assign(share=own["pruned_share"].round(2)).groupby("share")["error"]
            if len(own):
                low, mean, high = curve.min(), curve.mean(), curve.max()
                axes.fill_between(mean.index, low, high, color=colour, alpha=0.12, linewidth=0)
                axes.plot(mean.index, mean, color=colour, linewidth=1.4)
                kept = own[own["kept"] & (own["error"] > 0) & (own["pruned_share"] > 0)]
                axes.plot(kept["pruned_share"], kept["error"], ".", color=colour, markersize=3, alpha=0.6)
        _log_y(axes)
        if (part["pruned_share"] > 0).any():
            axes.set_xscale("log")
        axes.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
        axes.minorticks_off()
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("pruned share of the directions", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in flat[len(names) :]:
        axes.set_visible(False)
    _share_y(flat[: len(names)])
    figure.supylabel("relative error of the layer's output", fontsize=9)
    _head(figure, "Pruning error by metric: mean (line), all layers and tasks (shade), at the kept ranks (dots)")
    _legend(figure, list(METRICS.values()))
    write_figure(figure, path)


def subspace_overlap(table: pd.DataFrame, path: Path | str) -> None:
    """Draw the overlap of the tasks' directions: a heat map a part, a row a layer, a column a pair of tasks.

    The last column of each heat map is what random directions would have.

    Args:
        table: `Diagnostics.subspace_overlap`.
        path: The PNG file.
    """
    import numpy as np

    layers = _by_kind(table["layer"])
    parts = list(dict.fromkeys(zip(table["part"], table["share"].fillna(0), strict=True)))
    pairs = list(dict.fromkeys(zip(table["task_a"], table["task_b"], strict=True)))
    labels = [f"{a} - {b}" for a, b in pairs] + ["random"]
    margin = 0.075 * max((len(label) for label in labels), default=0)
    width = 2.9 + max(1, len(parts)) * (0.5 + 0.22 * len(labels))
    figure = new_figure(max(6.4, width), 1.6 + margin + 0.17 * max(len(layers), 4))
    panels = figure.subplots(1, max(1, len(parts)), sharey=True, squeeze=False)[0]
    for axes, (part, share) in zip(panels, parts, strict=False):
        own = table[(table["part"] == part) & (table["share"].fillna(0) == share)]
        picture = np.full((len(layers), len(labels)), np.nan)
        rows = [layers.index(layer) for layer in own["layer"]]
        picture[rows, [pairs.index(pair) for pair in zip(own["task_a"], own["task_b"], strict=True)]] = own["overlap"]
        for layer, expected in own.groupby("layer")["expected"].mean().items():
            picture[layers.index(layer), -1] = expected
        drawn = axes.imshow(picture, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.axvline(len(pairs) - 0.5, color="white", linewidth=2)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes.set_title("removed directions" if part == "removed" else f"strongest {share:.0%}", fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for line in _borders(layers):
            axes.axhline(line - 0.5, color="white", linewidth=2)
    if parts:
        panels[0].set_yticks(range(len(layers)), short_layer_names(layers), fontsize=7)
        figure.colorbar(drawn, ax=list(panels), label="mean squared cosine", pad=0.01, aspect=30)
    _head(figure, "Overlap of the tasks' output directions in each layer")
    write_figure(figure, path)


def conflicts(pairs: pd.DataFrame, energies: pd.DataFrame, path: Path | str) -> None:
    """Draw what is removed and what conflicts remain, layer by layer: a panel a quantity, a line a treatment.

    Lines are means over tasks or pairs of tasks; shades span from the smallest to the largest.

    Args:
        pairs: `Diagnostics.conflicts`.
        energies: `Diagnostics.removed_energy`.
        path: The PNG file.
    """
    layers = _by_kind(energies["layer"])
    panels_of = [
        (energies, "of_vector", "removed energy\n/ task vector's", True),
        (energies, "of_weight", "removed energy\n/ weight's", True),
        (energies, "norm_ratio", "norm after\n/ before", True),
        (pairs, "sign_conflict", "sign conflict", False),
        (pairs, "weighted_conflict", "sign conflict,\nweighted by |a b|", False),
        (pairs, "cosine", "cosine of\ntwo tasks", False),
        (pairs, "top_overlap", "Jaccard of the\nlargest elements", False),
        (pairs, "support_overlap", "Jaccard of the\nnon-zero elements", False),
    ]
    labels = short_layer_names(layers)
    margin = 0.075 * max((len(label) for label in labels), default=0)
    figure = new_figure(max(7.5, 2.6 + 0.17 * len(layers)), 1.2 + margin + 1.25 * len(panels_of))
    panels = figure.subplots(len(panels_of), 1, sharex=True)
    for axes, (table, column, label, logarithmic) in zip(panels, panels_of, strict=True):
        for treatment, (colour, _) in TREATMENTS.items():
            found = table[table["treatment"] == treatment].groupby("layer")[column]
            if len(found):
                low, mean, high = (values.reindex(layers) for values in (found.min(), found.mean(), found.max()))
                axes.fill_between(range(len(layers)), low, high, color=colour, alpha=0.15, linewidth=0)
                # Plain is often hidden behind DARE unless it is wider
                wide = 3.5 if treatment == "plain" else 1.3
                axes.plot(range(len(layers)), mean, color=colour, linewidth=wide, marker=".", markersize=4)
        if logarithmic:
            _log_y(axes)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for line in _borders(layers):
            axes.axvline(line - 0.5, color="#BBBBBB", linewidth=0.8)
    panels[-1].set_xticks(range(len(layers)), labels, rotation=90, fontsize=7)
    _head(figure, "What PAVE and DARE remove: mean (line), all tasks or pairs (shade)")
    _legend(figure, list(TREATMENTS.values()))
    write_figure(figure, path)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers inside names by their value, so that block 10 comes after block 2."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def kind_of_layer(layer: str) -> str:
    """A layer's name without its numbers: what layers of different depth have in common.

    Example:
        >>> kind_of_layer("encoder.layer.3.attention.self.query")
        'attention.self.query'
    """
    pieces = layer.split(".")
    numbers = [index for index, piece in enumerate(pieces) if piece.isdigit()]
    after = pieces[numbers[0] + 1 :] if numbers else pieces
    return ".".join(piece for piece in after if not piece.isdigit()) or layer


def kinds_of_layers(layers: Sequence[str]) -> dict[str, str]:
    """The kind of each layer; rare kinds are put together where there are many."""
    names = sorted(dict.fromkeys(layers), key=natural)
    kinds = {name: kind_of_layer(name) for name in names}
    counts: dict[str, int] = {}
    for kind in kinds.values():
        counts[kind] = counts.get(kind, 0) + 1
    if len(counts) > MOST_KINDS:
        common = sorted(counts, key=lambda kind: -counts[kind])[: MOST_KINDS - 1]
        kinds = {name: kind if kind in common else OTHER_KIND for name, kind in kinds.items()}
    return dict(sorted(kinds.items(), key=lambda item: item[1] == OTHER_KIND))


def _by_kind(layers: Sequence[str]) -> list[str]:
    """Distinct layers, those of one kind together and in the order of depth."""
    names = sorted(dict.fromkeys(layers), key=natural)
    first = {kind: index for index, kind in reversed(list(enumerate(map(kind_of_layer, names))))}
    return sorted(names, key=lambda name: first[kind_of_layer(name)])


def _borders(layers: Sequence[str]) -> list[int]:
    kinds = [kind_of_layer(layer) for layer in layers]
    return [index for index in range(1, len(kinds)) if kinds[index] != kinds[index - 1]]


def _colour(tasks: Sequence[str], task: str) -> str:
    return TASK_COLOURS[list(tasks).index(task) % len(TASK_COLOURS)]


def _grid(rows: int, columns: int, width: float, height: float, *, legend: float) -> tuple[Figure, list[list[Axes]]]:
    rows, columns = max(1, rows), max(1, columns)
    figure = new_figure(max(6.4, 0.8 + width * columns), 0.8 + legend + height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _titles(panels: Sequence[Sequence[Axes]], names: Sequence[str]) -> None:
    for index, row in enumerate(panels):
        for axes, name in zip(row, names, strict=False):
            if index == 0:
                axes.set_title(name.replace(".", ".\n", 1) if len(name) > 18 else name, fontsize=8)
            axes.tick_params(labelsize=7, labelbottom=index == len(panels) - 1)
            axes.spines[["top", "right"]].set_visible(False)


def _log_y(axes: Axes) -> None:
    """A logarithmic axis where there is a positive value to show."""
    if axes.dataLim.minposy < axes.dataLim.y1 and axes.dataLim.y1 > 0:
        axes.set_yscale("log")


def _share_y(row: Sequence[Axes], floor: float = 0.0) -> None:
    limits = [axes.get_ylim() for axes in row if axes.get_yscale() == "log"]
    lowest, highest = min((low for low, _ in limits), default=0), max((high for _, high in limits), default=0)
    for axes in row:
        if 0 < max(lowest, floor) < highest:
            axes.set_ylim(max(lowest, floor), highest)


def _head(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=label) for colour, label in entries]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(8, len(handles)), frameon=False, fontsize=9
        )
