"""Lengths: a picture of the distribution of document lengths.

In: the stored lengths of all documents. Out: a PNG, drawn by `bigmodel show data --png`.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bigmodel.pictures import BLUE, INK, ORANGE, figure, quiet, title
from bigmodel.run_directory import write_atomically

BINS_PER_DOUBLING = 4


def draw_lengths(lengths: Sequence[np.ndarray], path: Path, max_document_length: int = 0) -> None:
    """Shares of documents and of tokens by length; below it their cumulative shares. `max_document_length`: a vertical
    line, if above 0."""
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    all_lengths = np.concatenate(lengths)
    edges, shares = share_by_length(all_lengths)
    drawn = figure()
    axes, sums = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for (what, share), color in zip(shares.items(), (BLUE, ORANGE), strict=True):
        axes.stairs(share, edges, fill=True, color=color, alpha=0.35, label=f"share of {what}")
        axes.stairs(share, edges, color=color, linewidth=1.4)
        sums.plot(edges, np.concatenate([[0], np.cumsum(share)]), color=color, linewidth=1.8)
    if edges[0] < max_document_length < edges[-1]:
        for panel in (axes, sums):
            panel.axvline(max_document_length, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        late = max_document_length**2 > edges[0] * edges[-1]  # right of the middle: the label goes to the left
        axes.annotate(
            f" max_document_length = {max_document_length:,} ",
            (max_document_length, 0.97),
            xycoords=("data", "axes fraction"),
            color=INK,
            fontsize=9,
            verticalalignment="top",
            horizontalalignment="right" if late else "left",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.25 * max(share.max() for share in shares.values()))  # room for the legend
    title(axes, f"Lengths of {len(all_lengths):,} documents")
    axes.legend(frameon=False, loc="upper left", labelcolor=INK)
    axes.set_ylabel("share in each bar", color=INK)
    sums.set_ylabel("cumulative share", color=INK)
    sums.set_ylim(0, 1)
    sums.set_xlabel("tokens of a document, begin and end included", color=INK)
    for panel in (axes, sums):
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        quiet(panel)
    sums.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    sums.xaxis.set_minor_locator(NullLocator())
    content = io.BytesIO()
    drawn.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue())


def share_by_length(lengths: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of the bars, a quarter of a doubling each, and the shares of documents and tokens in each bar."""
    first, last = (int(np.log2(length)) for length in (lengths.min(), lengths.max()))
    edges = 2.0 ** np.linspace(first, last + 1, (last + 1 - first) * BINS_PER_DOUBLING + 1)
    documents, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths.astype(np.float64))
    return edges, {"documents": documents / documents.sum(), "tokens": tokens / tokens.sum()}
