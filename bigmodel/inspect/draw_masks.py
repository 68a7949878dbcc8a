"""Pictures of attention masks: which key tokens each query token attends to, as PNG and as text for the terminal.

In: a batch and the matrices of `bigmodel.model.attention_masks`, the same code that makes the masks of training.
Padding lies in documents of its own and stays white. A mask of more than `MOST_CELLS` tokens is scaled down.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigmodel.data.load.batch import Batch, SourceSide, documents_of, real_documents
from bigmodel.model.attention_masks import MaskMatrix
from bigmodel.pictures import SERIES, save_picture

MOST_CELLS = 1500  # along one side of the picture
TEXT_COLUMNS = 60
SHADES = " ░▒▓█"  # share of visible keys: none, up to a third, up to two thirds, less than all, all


def draw_masks(batch: Batch, masks: Sequence[MaskMatrix], path: Path, num_packs: int = 1) -> None:
    """Write a picture with a panel per mask; a coloured strip above each panel shows the documents of the keys."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(masks) + 0.8, 7.4), layout="constrained")
    axes = figure.subplots(2, len(masks), height_ratios=(1, 14), sharex="col", squeeze=False)
    for mask, strip, square in zip(masks, axes[0], axes[1], strict=True):
        shown_QK = shown_documents(batch, mask)
        extent = (-0.5, len(mask.place_K) - 0.5)
        look: dict[str, Any] = {"cmap": ListedColormap(SERIES), "vmin": 0, "vmax": len(SERIES) - 1, "aspect": "auto"}
        look["interpolation"] = "nearest"
        strip.imshow(_colours_of_keys(batch, mask)[None, :], **look, extent=(*extent, 0, 1))
        strip.set(yticks=[], title=mask.name)
        square.imshow(shown_QK, **look, extent=(*extent, len(mask.lo_Q) - 0.5, -0.5))
        square.set(xlabel=f"keys: {', then '.join(map(_name_of, mask.key_sides))}", ylabel="queries")
        _lines(square, batch, mask, num_packs)
    positions = batch.num_tokens + (batch.source.num_tokens if batch.source else 0)
    places = len(batch.tokens) + (len(batch.source.tokens) if batch.source else 0)
    figure.suptitle(f"{batch.num_documents} documents, {positions} of {places} tokens")
    save_picture(figure, path, dpi=120)


def shown_documents(batch: Batch, mask: MaskMatrix) -> np.ma.MaskedArray:
    """(Q, K) colour of each visible key; masked where not visible and at padding; scaled down above `MOST_CELLS`."""
    rows, columns = (_sampled(len(side)) for side in (mask.lo_Q, mask.place_K))
    colours_K = _colours_of_keys(batch, mask)[columns.numpy()]
    hidden_QK = ~mask.sees(rows, columns).numpy() | np.ma.getmaskarray(colours_K)
    return np.ma.masked_array(np.broadcast_to(colours_K.data, hidden_QK.shape), hidden_QK)


def mask_text(batch: Batch, mask: MaskMatrix) -> list[str]:
    """The mask in at most `TEXT_COLUMNS` columns and half as many lines, below its name."""
    seen_QK = ~np.ma.getmaskarray(shown_documents(batch, mask))
    num_queries, num_keys = len(mask.lo_Q), len(mask.place_K)
    tokens = max(1.0, num_keys / TEXT_COLUMNS, num_queries / TEXT_COLUMNS)
    shares = _mean_of_cells(_mean_of_cells(seen_QK, num_queries / (2 * tokens), 0), num_keys / tokens, 1)
    marks = np.ceil(shares * 3 - 1e-9).astype(int) + (shares > 1 - 1e-9)
    lines = ["|" + "".join(SHADES[mark] for mark in line) + "|" for line in marks]
    return [f"{mask.name} (down: queries, across: keys; a mark is {2 * tokens:.4g} x {tokens:.4g} tokens)", *lines]


def _mean_of_cells(values: np.ndarray, cells: float, axis: int) -> np.ndarray:
    """Means of about `cells` intervals of equal length along an axis."""
    count = min(max(1, round(cells)), values.shape[axis])
    edges = np.arange(count) * values.shape[axis] // count
    sizes = np.diff([*edges, values.shape[axis]])
    sums = np.add.reduceat(values.astype(np.float64), edges, axis=axis)
    return sums / (sizes[:, None] if axis == 0 else sizes)


def _sampled(count: int) -> torch.Tensor:
    return torch.arange(min(count, MOST_CELLS)) * count // min(count, MOST_CELLS)


def _colours_of_keys(batch: Batch, mask: MaskMatrix) -> np.ma.MaskedArray:
    """(K,) number of each key's document, modulo the number of colours; masked at padding. A document has one colour on
    both sides."""
    is_real = np.array(real_documents(batch))
    documents_K = np.concatenate([documents_of(_side(batch, name)) for name in mask.key_sides])
    return np.ma.masked_where(~is_real[documents_K], (documents_K % len(SERIES)).astype(np.int8))


def _lines(square: Any, batch: Batch, mask: MaskMatrix, num_packs: int) -> None:
    """Draw the ends of packed sequences and of sides."""
    first = 0
    for name in mask.key_sides:
        size = len(_side(batch, name).tokens)
        for number in range(num_packs + 1):
            square.axvline(first + number * (size // num_packs) - 0.5, color="grey", linewidth=0.5)
        first += size
    for number in range(num_packs + 1):
        square.axhline(number * (len(mask.lo_Q) // num_packs) - 0.5, color="grey", linewidth=0.5)


def _side(batch: Batch, name: str) -> Batch | SourceSide:
    assert name == "target" or batch.source, "the mask has a source side, the batch has none"
    return batch.source if name == "source" and batch.source else batch


def _name_of(side: str) -> str:
    return "source" if side == "source" else "own tokens"
