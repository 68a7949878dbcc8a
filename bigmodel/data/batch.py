"""Batch: what the model gets, one micro-batch as one flat run of tokens.

Takes packs (lists of fragments) and a reader of documents, gives a `Batch` of tensors. Guarantees static shapes,
boundaries that come from the plan and never from token values, and targets that are ignored exactly at padding.
Costs about 10 ns a token on one core. Also draws a batch, as text and as a picture.

Shapes: k packs of T0 = pack_tokens positions and at most D0 = pack_documents documents make T = k * T0 positions
and D = k * (D0 + 1) documents: one more per pack, because a pack's padding is laid out as a document of its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigmodel.config import DataSettings
from bigmodel.data.objectives import causal
from bigmodel.data.randomness import make_key, words
from bigmodel.data.shuffle import Fragment, Pack

IGNORED = -100  # the target of padding: torch's default ignore_index
Reader = Callable[[Fragment], np.ndarray]  # the stored tokens of the whole document that a fragment is of


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch. Padding has token 0, target -100 and position 0, and lies in documents of its own.

    Two packs of 8 positions and at most 2 documents, from three documents of 5, 4 and 6 stored tokens (1 opens a
    document, 2 ends it):

    >>> documents = [[1, 11, 12, 13, 2], [1, 21, 22, 2], [1, 31, 32, 33, 34, 2]]
    >>> first, second, third = (Fragment(0, 0, row, 0, len(documents[row]) - 1, 0) for row in range(3))
    >>> settings = DataSettings(context_tokens=8, pack_tokens=8, pack_documents=2)
    >>> packs = [(first, second), (third,)]
    >>> def read(fragment):
    ...     return np.array(documents[fragment.row])
    >>> batch = build_batch(packs, read, settings, make_keys(1, 0, [0, 1], 8))
    >>> batch.tokens.tolist()
    [1, 11, 12, 13, 1, 21, 22, 0, 1, 31, 32, 33, 34, 0, 0, 0]
    >>> batch.targets.tolist()
    [11, 12, 13, 2, 21, 22, 2, -100, 31, 32, 33, 34, 2, -100, -100, -100]
    >>> batch.positions.tolist()
    [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    >>> batch.offsets.tolist()  # 4, 3, 1 of padding; 5, 3 of padding; one more that is empty
    [0, 4, 7, 8, 13, 16, 16]
    >>> batch.num_positions, batch.num_targets, batch.num_documents
    (12, 12, 3)
    """

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64: the token after this one in the same document; IGNORED exactly at padding
    positions: Tensor  # (T,) int64: from 0 in every document
    offsets: Tensor  # (D+1,) int32: document i is [offsets[i], offsets[i+1]); the first is 0, the last T
    keys: Tensor  # (T,) int64: a random word for each position, the same at every world size
    num_positions: int  # without padding
    num_targets: int
    num_documents: int  # without padding; a piece of a long document counts as one

    def to(self, device: torch.device | str) -> "Batch":
        """This batch with its tensors on a device."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()})

    def pinned(self) -> "Batch":
        """This batch in page-locked memory: `to` a GPU then returns at once and copies while others compute."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def fingerprint(self) -> str:
        """sha256 over the tensors' names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


def make_keys(seed: int, step: int, numbers: Sequence[int], pack_tokens: int) -> np.ndarray:
    """Random words for the positions of the packs of these numbers in a data step: (T,) int64.

    The number is the pack's own, whatever rank and micro-batch it is computed in.
    """
    keys = [words(make_key("positions", seed, step, number), pack_tokens) for number in numbers]
    return np.concatenate(keys).view(np.int64)


def build_batch(packs: Sequence[Pack], read: Reader, settings: DataSettings, keys: np.ndarray) -> Batch:
    """Lay packs end to end, each at its multiple of pack_tokens. An empty pack is all padding.

    `keys`: (T,) int64, from `make_keys`. Raises what `read` raises.
    """
    pack_tokens, pack_documents = settings.pack_tokens, settings.pack_documents
    num_tokens = len(packs) * pack_tokens
    tokens_T, targets_T = np.zeros(num_tokens, dtype=np.int64), np.full(num_tokens, IGNORED, dtype=np.int64)
    positions_T, count = np.zeros(num_tokens, dtype=np.int64), np.arange(settings.context_tokens)
    ends: list[int] = []
    for number, pack in enumerate(packs):
        assert len(pack) <= pack_documents, f"a pack of {len(pack)} documents; pack_documents = {pack_documents}"
        place, pack_end = number * pack_tokens, (number + 1) * pack_tokens
        for fragment in pack:
            end = place + fragment.length
            assert end <= pack_end, f"a pack of more than pack_tokens = {pack_tokens} positions: {pack}"
            tokens_T[place:end], targets_T[place:end] = causal(read(fragment), fragment.start, fragment.length)
            positions_T[place:end] = count[: fragment.length]
            ends.append(end)
            place = end
        if place < pack_end:
            ends.append(pack_end)
    num_positions = sum(fragment.length for pack in packs for fragment in pack)
    offsets = np.full(len(packs) * (pack_documents + 1) + 1, num_tokens, dtype=np.int32)
    offsets[0], offsets[1 : len(ends) + 1] = 0, ends
    assert keys.shape == (num_tokens,), f"{keys.shape[0]} keys for {num_tokens} positions"
    assert int(np.count_nonzero(targets_T != IGNORED)) == num_positions, "a target is ignored outside the padding"
    return Batch(
        tokens=torch.from_numpy(tokens_T),
        targets=torch.from_numpy(targets_T),
        positions=torch.from_numpy(positions_T),
        offsets=torch.from_numpy(offsets),
        keys=torch.from_numpy(keys),
        num_positions=num_positions,
        num_targets=num_positions,
        num_documents=sum(len(pack) for pack in packs),
    )


def draw(batch: Batch, num_packs: int = 1, width: int = 96) -> list[str]:
    """A text picture, a line per pack: a letter per document, dots for padding; a table too where a pack is short.

    A pack of more than `width` positions is drawn to scale. Letters begin anew in each pack and repeat after 52.
    """
    letters_T = _letters(batch, num_packs)
    pack_tokens = len(letters_T) // num_packs
    lines = []
    for number in range(num_packs):
        first = number * pack_tokens
        cells = min(width, pack_tokens)
        picture = "".join(letters_T[first + cell * pack_tokens // cells] for cell in range(cells))
        lines.append(f"pack {number:>4}|{picture}|")
        if pack_tokens * 5 <= width:
            for name in ("tokens", "targets", "positions"):
                row = getattr(batch, name)[first : first + pack_tokens].tolist()
                lines.append(f"{name:>9}" + "".join(f"{value:5}" for value in row))
    padding = len(letters_T) - batch.num_positions
    lines.append(f"{batch.num_documents} documents, {batch.num_positions} positions, {padding} of padding (.)")
    return lines


def draw_png(batch: Batch, visible_TT: np.ndarray, path: Path, num_packs: int = 1) -> None:
    """Write a picture: the documents as coloured stretches above who sees whom.

    `visible_TT`: (T, T) bool, row = query, column = key; from `kernels.visibility`, where the attention rule lives.
    """
    from matplotlib.figure import Figure

    documents_T, num_tokens = _documents(batch), len(batch.tokens)
    assert visible_TT.shape == (num_tokens, num_tokens), f"visible is {visible_TT.shape} for {num_tokens} positions"
    shown_T = np.ma.masked_where((batch.targets == IGNORED).cpu().numpy(), documents_T % 10)
    shown_TT = np.ma.masked_where(~np.asarray(visible_TT, dtype=bool), np.tile(shown_T[:, None], num_tokens))
    figure = Figure(figsize=(7, 8), layout="constrained")
    strip, square = figure.subplots(2, 1, height_ratios=(1, 12), sharex=True)
    look = {"cmap": "tab10", "vmin": 0, "vmax": 9, "interpolation": "nearest", "aspect": "auto"}
    strip.imshow(shown_T[None, :], **look)
    strip.set(yticks=[], title=f"{batch.num_documents} documents, {batch.num_positions} of {num_tokens} positions")
    square.imshow(shown_TT, **look)
    square.set(xlabel="key position", ylabel="query position")
    for edge in range(0, num_tokens + 1, num_tokens // num_packs):
        square.axvline(edge - 0.5, color="grey", linewidth=0.5)
        square.axhline(edge - 0.5, color="grey", linewidth=0.5)
    figure.savefig(path, dpi=150)


def _documents(batch: Batch) -> np.ndarray:
    """The number of the document, padding's included, at every position: (T,)."""
    lengths = np.diff(batch.offsets.cpu().numpy())
    return np.repeat(np.arange(len(lengths)), lengths)


def _letters(batch: Batch, num_packs: int) -> list[str]:
    """A letter for the document at every position, from A in every pack; a dot at padding."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    documents_T = _documents(batch)
    real_T = (batch.targets != IGNORED).cpu().numpy()
    pack_tokens = len(documents_T) // num_packs
    first_T = np.repeat(documents_T[::pack_tokens], pack_tokens)  # a pack starts with a document of its own
    return [
        alphabet[number % len(alphabet)] if real else "."
        for number, real in zip((documents_T - first_T).tolist(), real_T.tolist(), strict=True)
    ]
