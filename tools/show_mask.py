"""Draws the attention mask of a packed batch and the tiles that the attention kernels visit.

    python -m tools.show_mask --lengths 5,23,1,19
    python -m tools.show_mask --rule cross --lengths 12,20,9 --key-lengths 24,8,17 --png cross.png
    python -m tools.show_mask --rule causal,window,prefix,cross --left 12

A line is a query, a column is a key. In the picture a square is one pair. A full tile (every pair visible, computed
without a mask) is dark. A partial tile is light at visible pairs and hatched at masked ones. Pairs that no tile visits
are empty. In the terminal two characters stand for `--cell` x `--cell` pairs.

The tiles are those of the kernels: rows from `tile_table`, columns from the intervals of a tile's first and last row
by `tile_bounds`. Every drawing is checked against the dense form of the rule; a contradiction ends the program.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.text import Text

from bigmodel.config.settings import UserError
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, dense, intervals, prefix_lm, tile_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

FULL, PARTIAL = "full", "partial"
INK, PAPER, EMPTY, GRID = "#1f2933", "#ffffff", "#f4f5f7", "#d9dee3"
COLOURS = ("#2f6db3", "#d1793b", "#3c8d5a", "#a8465a", "#7a5ea8", "#8a7a2f", "#2f8f94", "#8c5a3c")  # of documents


@dataclass(frozen=True)
class Tile:
    """The rows and columns of one visited tile."""

    rows: range
    columns: range
    state: str


def tiles_of(mask: AttentionMask, num_queries: int, num_keys: int, rows: int, columns: int) -> list[Tile]:
    """All tiles that a kernel with tiles of `rows` x `columns` visits, cut at the last key."""
    lo_Q, hi_Q = (side.tolist() for side in intervals(mask, num_queries))
    document_ends = sorted({*mask.cu_seqlens_q.tolist(), num_queries})
    found = []
    for first in tile_table(mask, num_queries, rows)[:, 0].tolist():
        if first >= num_queries:
            continue  # a spare tile
        end = min(first + rows, next(end for end in document_ends if end > first))
        begin, last_lo, first_hi, last_hi = lo_Q[first], lo_Q[end - 1], hi_Q[first], hi_Q[end - 1]
        visited = -(-max(last_hi - begin, 0) // columns)
        full_from = min(-(-(last_lo - begin) // columns), visited)
        full_to = max(max(first_hi - begin, 0) // columns, full_from)
        for number in range(visited):
            start = begin + number * columns
            state = FULL if full_from <= number < full_to else PARTIAL
            found.append(Tile(range(first, end), range(start, min(start + columns, num_keys)), state))
    return found


def check_tiles(tiles: list[Tile], sees_QK: np.ndarray) -> None:
    """Asserts that all pairs of full tiles are visible and that every visible pair is visited once."""
    visits_QK = np.zeros(sees_QK.shape, int)
    for tile in tiles:
        place = np.ix_(tile.rows, tile.columns)
        visits_QK[place] += 1
        assert tile.state != FULL or sees_QK[place].all(), f"{tile} has a masked pair"
    assert visits_QK.max(initial=0) <= 1, "a pair is visited twice"
    assert (visits_QK[sees_QK] == 1).all(), "a visible pair is not visited"


@dataclass(frozen=True)
class Drawing:
    """One rule over one batch, ready to draw."""

    title: str
    mask: AttentionMask
    tiles: list[Tile]
    sees_QK: np.ndarray

    def count(self, state: str) -> int:
        return sum(tile.state == state for tile in self.tiles)


def draw(drawings: list[Drawing], png: Path) -> None:
    """Draw the picture with a panel per drawing: documents as coloured bands, tiles as rectangles."""
    figure, axes = plt.subplots(
        1, len(drawings), figsize=(6.4 * len(drawings), 7.2), facecolor=PAPER, squeeze=False, layout="constrained"
    )
    for axis, drawing in zip(axes[0], drawings, strict=True):
        _panel(axis, drawing)
    dark, light = "#6b7580", _mixed("#6b7580", 0.45)
    handles = [
        Patch(facecolor=dark, edgecolor=INK, label="full tile: no mask needed"),
        Patch(facecolor=light, edgecolor=INK, label="partial tile: visible"),
        Patch(facecolor=PAPER, edgecolor="#9aa4af", hatch="////", label="partial tile: masked"),
        Patch(facecolor=EMPTY, edgecolor=GRID, label="never visited"),
    ]
    columns = 4 if len(drawings) > 1 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    figure.savefig(png, dpi=110, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def _panel(axis: Axes, drawing: Drawing) -> None:
    num_queries, num_keys = drawing.sees_QK.shape
    _pairs(axis, drawing)
    _bands(axis, drawing.mask, num_queries, num_keys)
    counts = f"{drawing.count(FULL)} full tiles, {drawing.count(PARTIAL)} partial"
    axis.set_title(drawing.title, color=INK, fontsize=13, fontweight="bold", pad=14)
    axis.text(
        0.5, -0.02, f"{counts}; {100 * drawing.sees_QK.mean():.0f}% of the pairs visible", transform=axis.transAxes,
        ha="center", va="top", color=INK, fontsize=10,
    )  # fmt: skip
    axis.set(xlim=(-0.045 * num_keys, num_keys), ylim=(num_queries, -0.045 * num_queries), aspect="equal")
    axis.set_xlabel("keys", color=INK)
    axis.set_ylabel("queries", color=INK)
    axis.xaxis.set_label_position("top")
    axis.xaxis.tick_top()
    axis.tick_params(colors=INK, length=0, labelsize=8, pad=2)
    axis.spines[:].set_visible(False)


def _pairs(axis: Axes, drawing: Drawing) -> None:
    tiles, sees_QK = drawing.tiles, drawing.sees_QK
    num_queries, num_keys = sees_QK.shape
    owner_Q = np.searchsorted(drawing.mask.cu_seqlens_q.numpy(), np.arange(num_queries), side="right") - 1
    axis.add_patch(Rectangle((0, 0), num_keys, num_queries, facecolor=EMPTY, edgecolor=GRID))
    image = np.zeros((num_queries, num_keys, 4))
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        colour = COLOURS[owner_Q[rows.start] % len(COLOURS)]
        place = np.ix_(rows, columns)
        tone = matplotlib.colors.to_rgba(colour if tile.state == FULL else _mixed(colour, 0.45))
        image[place] = np.where(sees_QK[place][..., None], tone, 0.0)
        box = (columns.start, rows.start), len(columns), len(rows)
        axis.add_patch(Rectangle(*box, facecolor=PAPER, edgecolor="#9aa4af", hatch="////", linewidth=0, zorder=1))
        axis.add_patch(Rectangle(*box, fill=False, edgecolor=INK, linewidth=0.8, zorder=3))
    axis.imshow(image, extent=(0, num_keys, num_queries, 0), interpolation="nearest", zorder=2)


def _bands(axis: Axes, mask: AttentionMask, num_queries: int, num_keys: int) -> None:
    """A coloured band per document along both sides, and lines at the ends of documents."""
    thick_x, thick_y = 0.025 * num_keys, 0.025 * num_queries
    queries, keys = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
    for number in range(len(queries) - 1):
        colour = COLOURS[number % len(COLOURS)]
        first, end = queries[number], queries[number + 1]
        axis.add_patch(Rectangle((-1.4 * thick_x, first), thick_x, end - first, facecolor=colour, edgecolor=PAPER))
        first, end = keys[number], keys[number + 1]
        axis.add_patch(Rectangle((first, -1.4 * thick_y), end - first, thick_y, facecolor=colour, edgecolor=PAPER))
    axis.set_yticks(sorted({0, *queries, num_queries}))
    axis.set_xticks(sorted({0, *keys, num_keys}))


def _mixed(colour: str, share: float) -> tuple[float, float, float]:
    """The colour, mixed with `share` of white."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return tuple(1 - share * (1 - one) for one in (red, green, blue))  # type: ignore[return-value]


def text_of(drawing: Drawing, cell: int) -> list[str]:
    """A character per `cell` x `cell` pairs: # full tile, + visible in a partial tile, - masked, . not visited."""
    state_QK = np.zeros(drawing.sees_QK.shape, int)
    for tile in drawing.tiles:
        state_QK[np.ix_(tile.rows, tile.columns)] = 3 if tile.state == FULL else 1
    state_QK[(state_QK == 1) & drawing.sees_QK] = 2
    blocks = [state_QK[row : row + cell] for row in range(0, len(state_QK), cell)]
    return [
        "".join(".-+#"[block[:, key : key + cell].max()] for key in range(0, state_QK.shape[1], cell))
        for block in blocks
    ]


def offsets_of(text: str) -> torch.Tensor:
    try:
        lengths = [int(one) for one in text.split(",")]
    except ValueError:
        lengths = [-1]
    if min(lengths) < 0:
        raise UserError(f"lengths {text!r}: give whole numbers from 0 on with commas between them, for example 5,23,1")
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


RULES = ("causal", "window", "prefix", "bidirectional", "cross")


def mask_of(rule: str, lengths: str, key_lengths: str, left: int) -> AttentionMask:
    queries = offsets_of(lengths)
    if rule == "cross":
        return cross(queries, offsets_of(key_lengths))
    if rule == "bidirectional":
        return bidirectional(queries)
    if rule not in RULES:
        raise UserError(f"--rule {rule}: choose one or more of {', '.join(RULES)}, with commas between them")
    if rule == "prefix":
        return prefix_lm(queries, (queries.diff() // 2).to(torch.int32))
    return causal(queries, left=left if rule == "window" else None)


def drawing_of(title: str, mask: AttentionMask, padding: int, rows: int, columns: int) -> Drawing:
    """Compute the tiles and check them."""
    num_queries, num_keys = (int(side[-1]) + padding for side in (mask.cu_seqlens_q, mask.cu_seqlens_k))
    sees_QK = dense(mask, num_queries, num_keys).numpy()
    tiles = tiles_of(mask, num_queries, num_keys, rows, columns)
    check_tiles(tiles, sees_QK)
    return Drawing(title, mask, tiles, sees_QK)


def print_drawing(drawing: Drawing, cell: int) -> None:
    """Print to the terminal; cell 0: the smallest cell that fits its width."""
    console = Console(highlight=False, markup=False, emoji=False)
    cell = cell or -(-2 * drawing.sees_QK.shape[1] // console.width)
    styles = {"#": "bold blue", "+": "cyan", "-": "dim cyan", ".": "dim"}
    console.print(drawing.title, style="bold")
    for line in text_of(drawing, cell):
        console.print(Text.assemble(*((character * 2, styles[character]) for character in line)), soft_wrap=True)


def main(
    lengths: Annotated[str, typer.Option(help="lengths of the documents (of the queries, for cross)")] = "21,34,3,14",
    rule: Annotated[str, typer.Option(help=f"one or more of {', '.join(RULES)}")] = "causal",
    key_lengths: Annotated[str, typer.Option(help="cross: lengths on the side of the keys")] = "28,16,6,22",
    left: Annotated[int, typer.Option(min=0, help="window: keys before a query that it attends to")] = 16,
    padding: Annotated[int, typer.Option(min=0, help="rows and columns after the last document")] = 4,
    tile_rows: Annotated[int, typer.Option(min=1, help="queries in a tile")] = 8,
    tile_columns: Annotated[int, typer.Option(min=1, help="keys in a tile")] = 4,
    cell: Annotated[
        int, typer.Option(min=0, help="terminal: pairs per character along each side; 0: fit the width")
    ] = 0,
    png: Annotated[Path, typer.Option(help="path of the picture")] = Path("mask.png"),
) -> None:
    """Draw the tiles of a packed batch, in the terminal and as PNG."""
    try:
        drawings = [
            drawing_of(
                {"window": f"window, {left} back", "prefix": "prefix of half a document"}.get(one, one),
                mask_of(one, lengths, key_lengths, left), padding, tile_rows, tile_columns,
            )
            for one in rule.split(",")
        ]  # fmt: skip
    except ValueError as error:
        raise SystemExit(f"show_mask: {error}") from None
    for drawing in drawings:
        print_drawing(drawing, cell)
    print("# full tile   + partial tile, visible   - partial tile, masked   . never visited")
    draw(drawings, png)
    print(png)


if __name__ == "__main__":
    typer.run(main)
