"""Batch: the input of the model, one micro-batch as one flat run of tokens. Also draws a batch as text.

In: packs (tuples of chunks), a reader of documents. Out: a `Batch` of tensors; its docstring has worked examples.
Guarantees static shapes, and boundaries from the plan, never from token values. Labels of plain text are IGNORED at
padding only. Costs about 10 ns a token on one core.

Shapes: k packs of T0 = sequence_length positions and at most D0 = max_documents documents make T = k * T0 positions
and D = k * (D0 + 1) documents: one more per pack, because the padding of a pack is a document of its own.
Packs with a source side have S = k * source_sequence_length source positions, in the same D documents.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.causal import causal
from bigmodel.data.objectives.example import IGNORED, Example
from bigmodel.data.objectives.examples import Document, Examples
from bigmodel.data.objectives.supervised import SUPERVISED
from bigmodel.data.plan.shuffle import PLAIN, Chunk, Pack
from bigmodel.data.randomness import extend_key, make_key, words, words_of_keys

Reader = Callable[[Chunk], Document]  # a chunk -> the stored tokens of its whole document, or pair


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # of documents in pictures


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch. Padding has token 0, label -100 and position 0, and is a document of its own in each pack.

    Two packs of 8 positions and at most 2 documents, from three documents of 5, 4 and 6 stored tokens (1 = BOS,
    2 = EOS):

    >>> documents = [[1, 11, 12, 13, 2], [1, 21, 22, 2], [1, 31, 32, 33, 34, 2]]
    >>> first, second, third = (Chunk(0, 0, row, 0, len(documents[row]) - 1, 0) for row in range(3))
    >>> settings = DataSettings(max_document_length=8, sequence_length=8, max_documents=2)
    >>> packs = [(first, second), (third,)]
    >>> def read(chunk):
    ...     return np.array(documents[chunk.row])
    >>> batch = build_batch(packs, read, settings, make_dropout_seeds(1, 0, [0, 1], 8))
    >>> batch.tokens.tolist()
    [1, 11, 12, 13, 1, 21, 22, 0, 1, 31, 32, 33, 34, 0, 0, 0]
    >>> batch.labels.tolist()
    [11, 12, 13, 2, 21, 22, 2, -100, 31, 32, 33, 34, 2, -100, -100, -100]
    >>> batch.positions.tolist()
    [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    >>> batch.cu_seqlens.tolist()  # 4, 3, padding 1; 5, padding 3; one empty
    [0, 4, 7, 8, 13, 16, 16]
    >>> batch.num_tokens, batch.num_labels, batch.num_documents
    (12, 12, 3)

    A pack with a source side, of 8 target and 6 source positions. Two pairs: source texts 11 12 13 and 21, target
    texts 31 32 and 41 42 43. Each source ends with EOS, each decoder input begins with BOS:

    >>> from bigmodel.data.objectives.examples import Examples, Pair
    >>> pairs = [([1, 11, 12, 13, 2], [1, 31, 32, 2]), ([1, 21, 2], [1, 41, 42, 43, 2])]
    >>> def read(chunk):
    ...     return Pair(*map(np.array, pairs[chunk.row]))
    >>> settings = DataSettings(max_document_length=8, sequence_length=8, max_documents=2, source_sequence_length=6)
    >>> first, second = Chunk(0, 0, 0, 0, 4, 0, 1, 3, 3, 4), Chunk(0, 0, 1, 0, 2, 0, 1, 4, 4, 2)
    >>> keys, source_seeds = make_dropout_seeds(1, 0, [0], 8), make_dropout_seeds(1, 0, [0], 6, "source positions")
    >>> batch = build_batch([(first, second)], read, settings, keys, Examples(settings, seed=1), source_seeds)
    >>> batch.tokens.tolist(), batch.labels.tolist()
    ([1, 31, 32, 1, 41, 42, 43, 0], [31, 32, 2, 41, 42, 43, 2, -100])
    >>> batch.cu_seqlens.tolist()  # 3, 4, padding 1
    [0, 3, 7, 8]
    >>> batch.source.tokens.tolist(), batch.source.cu_seqlens.tolist()  # 4, 2, no padding
    ([11, 12, 13, 2, 21, 2], [0, 4, 6, 6])
    """

    tokens: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64: the token to predict; IGNORED at padding and at unlabelled positions
    positions: Tensor  # (T,) int64: from 0 in every document
    cu_seqlens: Tensor  # (D+1,) int32: document i is [cu_seqlens[i], cu_seqlens[i+1]); first 0, last T
    dropout_seeds: Tensor  # (T,) int64: one random word per position, the same at every world size; see document_seeds
    num_tokens: int  # without padding
    num_labels: int
    num_documents: int  # without padding; a chunk of a long document counts as one
    prefixes: Tensor | None = None  # (D,) int32: length of each document's bidirectional prefix
    source: "SourceSide | None" = None  # the encoder's input
    loss_groups: Tensor | None = None  # (T,) int64: loss group of each position, 0 to num_loss_groups - 1
    num_loss_groups: int = 1
    weights: Tensor | None = None  # (T,) float32: weight of each label in the loss, 0 without a label; None: all 1
    replaced: Tensor | None = None  # (R,) int64: in training, rows whose input is the model's own prediction
    predicted_at: Tensor | None = None  # (R,) int64: the rows of these predictions
    choice_seeds: Tensor | None = None  # (R,) int64: random words that draw them; None: the likeliest tokens
    padding: Tensor | None = None  # (T,) bool: positions of padding; None: there is none

    def to(self, device: torch.device | str) -> "Batch":
        """This batch with its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors_of(self).items()}
        return replace(self, **moved, source=self.source.to(device) if self.source else None)

    def pinned(self) -> "Batch":
        """This batch in page-locked memory: `to` a GPU then returns at once and copies during computation."""
        pinned = {name: tensor.pin_memory() for name, tensor in tensors_of(self).items()}
        return replace(self, **pinned, source=self.source.pinned() if self.source else None)

    def fingerprint(self) -> str:
        """sha256 over the tensors' names, types, shapes and bytes. Padding follows from the others."""
        digest = hashlib.sha256()
        for side in (self, self.source) if self.source else (self,):
            for name, tensor in [(name, one) for name, one in tensors_of(side).items() if name != "padding"]:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SourceSide:
    """The source side of a micro-batch: the same documents in the same order. Padding has token 0, position 0."""

    tokens: Tensor  # (S,) int64
    positions: Tensor  # (S,) int64: from 0 in every document
    cu_seqlens: Tensor  # (D+1,) int32
    dropout_seeds: Tensor  # (S,) int64
    num_tokens: int  # without padding

    def to(self, device: torch.device | str) -> "SourceSide":
        """This side with its tensors on a device."""
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors_of(self).items()}
        )

    def pinned(self) -> "SourceSide":
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors_of(self).items()})


def tensors_of(side: Batch | SourceSide) -> dict[str, Tensor]:
    return {field.name: value for field in fields(side) if isinstance(value := getattr(side, field.name), Tensor)}


def make_dropout_seeds(
    seed: int, step: int, numbers: Sequence[int], tokens: int, side: str = "positions"
) -> np.ndarray:
    """Dropout seeds of packs, `tokens` positions each, in a data step: (T,) int64.

    `numbers`: of the packs in the step; they do not depend on rank and micro-batch. Each side has its own words.
    """
    of_step = make_key(side, seed, step)
    return words_of_keys([extend_key(of_step, number) for number in numbers], tokens).reshape(-1).view(np.int64)


def document_seeds(
    seed: int, packs: Sequence[Pack], sources: Sequence[str], tokens: int, side: str = "positions"
) -> np.ndarray:
    """Dropout seeds of packs, `tokens` positions each, that belong to documents: (T,) int64.

    A function of the seed, the chunk (source, shard, row, first token), its epoch and the position in it: not of step,
    packing or rank. The upper 32 bits are equal at all positions of a chunk, the lower ones are the position's.
    `sources`: their names. `side`: "positions" or "source positions".
    """
    seeds = np.zeros((len(packs), tokens), dtype=np.uint64)
    for row, pack in zip(seeds, packs, strict=True):
        end = 0
        for chunk in pack:
            place = chunk.shard, chunk.row, chunk.start, chunk.epoch
            key = make_key(f"{side} of documents", seed, sources[chunk.source], *place)
            own = words(key, chunk.source_positions if side == "source positions" else chunk.num_tokens)
            row[end : end + len(own)] = own >> np.uint64(32) | np.uint64(key >> 32 << 32)
            end += len(own)
    return seeds.reshape(-1).view(np.int64)


def build_batch(
    packs: Sequence[Pack],
    read: Reader,
    settings: DataSettings,
    keys: np.ndarray,
    examples: Examples | None = None,
    source_seeds: np.ndarray | None = None,
    loss_group_of: Callable[[Chunk], int] | None = None,
    num_loss_groups: int = 1,
    has_weights: bool = False,
) -> Batch:
    """Lay packs end to end, each at its multiple of sequence_length. An empty pack is all padding.

    `keys`: dropout seeds, (T,) int64, from `make_dropout_seeds`; `source_seeds`: (S,), for a source side. `examples`:
    needed for all but plain text in causal order. `loss_group_of`: the loss group of a chunk. `has_weights`: labels
    may have other weights than 1. Raises what `read` raises.
    """
    target_side = _Side(len(packs), settings.sequence_length)
    source_side = _Side(len(packs), settings.source_sequence_length)
    ignored = np.full(settings.sequence_length, IGNORED, dtype=np.int64)
    num_places = len(packs) * settings.sequence_length
    groups_T = np.zeros(num_places if loss_group_of else 0, dtype=np.int64)
    weights_T = np.zeros(num_places if has_weights else 0, dtype=np.float32)
    padding_T = np.zeros(num_places, dtype=bool)
    labels: list[np.ndarray] = []  # of each document and padding
    prefixes: list[int] = []
    is_one_sided = not source_side.size
    num_tokens = num_labels = 0
    for number, pack in enumerate(packs):
        assert len(pack) <= settings.max_documents, (
            f"a pack of {len(pack)} documents; max_documents = {settings.max_documents}"
        )
        for chunk in pack:
            if chunk.objective == PLAIN:
                document = read(chunk)
                assert isinstance(document, np.ndarray), f"{chunk} is planned as plain text but is a pair"
                tokens, targets = causal(document, chunk.start, chunk.length)
                place = target_side.add(tokens, number)
                num_tokens += chunk.length
                num_labels += chunk.length
                prefix = 0
            else:
                example = _example(chunk, read, examples)
                place, targets = target_side.add(example.tokens, number, example.places), example.labels
                num_tokens += chunk.planned_tokens
                num_labels += chunk.planned_labels
                is_read = chunk.objective == SUPERVISED or bool(settings.classes)  # as any text
                has_prefix = is_one_sided and settings.bidirectional_prefix and not is_read
                prefix = _prefix(example) if has_prefix else 0
                if not is_one_sided:
                    source_side.add(example.source, number)
            labels.append(targets)
            prefixes.append(prefix)
            if has_weights:
                weights = None if chunk.objective == PLAIN else example.weights
                weights_T[place] = targets != IGNORED if weights is None else weights
            if loss_group_of:
                groups_T[place] = loss_group_of(chunk)
        padding = [side.pad(number) for side in (target_side, source_side)]
        labels.append(ignored[: padding[0]])
        padding_T[target_side.place - padding[0] : target_side.place] = True
        if any(padding):
            target_side.ends.append(target_side.place)
            source_side.ends.append(source_side.place)
            prefixes.append(0)
    if is_one_sided:
        source_side.ends = target_side.ends
    num_documents = len(packs) * (settings.max_documents + 1)
    labels_T = _joined(labels, num_places)
    found = int(np.count_nonzero(labels_T != IGNORED))
    assert keys.shape == (num_places,), f"{keys.shape[0]} dropout seeds for {num_places} positions"
    assert found == num_labels, f"{found} labels where {num_labels} were planned"
    assert len(source_side.ends) == len(target_side.ends), "the two sides hold different documents"
    source = None
    if not is_one_sided:
        assert source_seeds is not None, "no dropout seeds for the source side"
        assert source_seeds.shape == (len(packs) * source_side.size,), (
            f"{len(source_seeds)} dropout seeds do not fit the source side"
        )
        source = SourceSide(
            tokens=torch.from_numpy(source_side.tokens()),
            positions=torch.from_numpy(source_side.positions()),
            cu_seqlens=torch.from_numpy(source_side.cu_seqlens(num_documents)),
            dropout_seeds=torch.from_numpy(source_seeds),
            num_tokens=sum(chunk.source_positions for pack in packs for chunk in pack),
        )
    return Batch(
        tokens=torch.from_numpy(target_side.tokens()),
        labels=torch.from_numpy(labels_T),
        positions=torch.from_numpy(target_side.positions()),
        cu_seqlens=torch.from_numpy(target_side.cu_seqlens(num_documents)),
        dropout_seeds=torch.from_numpy(keys),
        num_tokens=num_tokens,
        num_labels=num_labels,
        num_documents=sum(len(pack) for pack in packs),
        prefixes=_padded(prefixes, num_documents) if any(prefixes) else None,
        source=source,
        loss_groups=torch.from_numpy(groups_T) if loss_group_of else None,
        num_loss_groups=num_loss_groups,
        weights=torch.from_numpy(weights_T) if has_weights else None,
        padding=torch.from_numpy(padding_T),
    )


class _Side:
    """One side of a micro-batch under construction."""

    def __init__(self, num_packs: int, size: int) -> None:
        self.size, self.place, self.ends = size, 0, [0]
        self._num_places = num_packs * size
        self._tokens: list[np.ndarray] = []  # of each document and padding
        self._positions: list[np.ndarray] = []
        self._count, self._zeros = np.arange(size), np.zeros(size, dtype=np.int64)

    def add(self, tokens: np.ndarray, pack: int, places: np.ndarray | None = None) -> slice:
        """Append a document to its pack."""
        length = len(tokens)
        end = self.place + length
        assert end <= (pack + 1) * self.size, f"a pack of more than sequence_length = {self.size} positions on a side"
        taken = slice(self.place, end)
        self._tokens.append(tokens)
        self._positions.append(self._count[:length] if places is None else places)
        self.place = end
        self.ends.append(end)
        return taken

    def pad(self, pack: int) -> int:
        """Move to the end of this pack. Returns the room that was left."""
        room = (pack + 1) * self.size - self.place
        self._tokens.append(self._zeros[:room])
        self._positions.append(self._zeros[:room])
        self.place += room
        return room

    def tokens(self) -> np.ndarray:
        """(T,) int64."""
        return _joined(self._tokens, self._num_places)

    def positions(self) -> np.ndarray:
        """(T,) int64."""
        return _joined(self._positions, self._num_places)

    def cu_seqlens(self, num_documents: int) -> np.ndarray:
        """(D+1,) int32; unused documents are empty and last."""
        cu_seqlens = np.full(num_documents + 1, self._num_places, dtype=np.int32)
        cu_seqlens[: len(self.ends)] = self.ends
        return cu_seqlens


def _joined(parts: list[np.ndarray], count: int) -> np.ndarray:
    """The parts end to end: (count,) int64. A third of the time of an assignment for each."""
    return np.concatenate(parts, out=np.empty(count, dtype=np.int64)) if parts else np.empty(0, dtype=np.int64)


def _example(chunk: Chunk, read: Reader, examples: Examples | None) -> Example:
    assert examples, f"{chunk} has an objective; give build_batch the run's examples"
    example = examples.make(chunk, read(chunk))
    assert (len(example.tokens), len(example.source)) == (chunk.num_tokens, chunk.source_positions), (
        f"the example of {chunk} has {len(example.tokens)} tokens and {len(example.source)} source tokens"
    )
    return example


def _prefix(example: Example) -> int:
    """Length of the bidirectional prefix: a source and the first input with a label; 0 without a source."""
    if len(example.labels) and example.labels[0] != IGNORED:
        return 0
    return int((example.labels != IGNORED).argmax()) + 1


def _padded(values: list[int], count: int) -> Tensor:
    return torch.tensor([*values, *[0] * (count - len(values))], dtype=torch.int32)


def exchange_sources(batch: Batch) -> Batch:
    """Give each document the source of the next one, the last the first's: tests a model with wrong sources."""
    assert batch.source, "the batch has no source side"
    edges = list(pairwise(batch.source.cu_seqlens.tolist()))
    real = [number for number, is_real in enumerate(real_documents(batch)) if is_real]
    sources = dict(zip(real, [*real[1:], *real[:1]], strict=True))
    order = [sources.get(number, number) for number in range(len(edges))]
    rows = torch.cat([torch.arange(*edges[number]) for number in order])
    lengths = torch.tensor([edges[number][1] - edges[number][0] for number in order])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    moved = {name: tensor[rows] for name, tensor in tensors_of(batch.source).items() if name != "cu_seqlens"}
    return replace(batch, source=replace(batch.source, **moved, cu_seqlens=cu_seqlens))


def real_documents(batch: Batch) -> list[bool]:
    """For each document whether it has a label; padding has none."""
    asked = torch.nn.functional.pad((batch.labels != IGNORED).cumsum(0), (1, 0))
    return (asked[batch.cu_seqlens.long()].diff() > 0).tolist()


def draw(batch: Batch, num_packs: int = 1, width: int = 96) -> list[str]:
    """A text picture, one line per pack and side: a letter per document, dots for padding; short packs get a table too.

    A pack of more than `width` positions is drawn to scale. Letters start at A in each pack and repeat after 52; a
    document has the same letter on both sides.
    """
    sides: list[tuple[str, Batch | SourceSide, tuple[str, ...]]] = [("pack", batch, ("tokens", "labels", "positions"))]
    if batch.source:
        sides.insert(0, ("source", batch.source, ("tokens", "positions")))
    lines, padding = [], 0
    for number in range(num_packs):
        for name, side, columns in sides:
            letters = _letters(batch, side, num_packs)
            size = len(letters) // num_packs
            first, cells = number * size, min(width, size)
            picture = "".join(letters[first + cell * size // cells] for cell in range(cells))
            lines.append(f"{name} {number:>{8 - len(name)}}|{picture}|")
            padding += letters[first : first + size].count(".")
            if isinstance(side, Batch) and (marks := _trained(side, letters)):
                picture = "".join(marks[first + cell * size // cells] for cell in range(cells))
                lines.append(f" trained |{picture}|")
            for column in columns if size * 5 <= width else ():
                row = getattr(side, column)[first : first + size].tolist()
                lines.append(f"{column:>9}" + "".join(f"{value:5}" for value in row))
    positions = batch.num_tokens + (batch.source.num_tokens if batch.source else 0)
    lines.append(f"{batch.num_documents} documents, {positions} positions, {padding} of padding (.)")
    return lines


def _trained(batch: Batch, letters: list[str]) -> str:
    """A mark for each position: ^ predicts its label with weight 1, - with a smaller one, a blank none. Empty if all
    positions of documents predict."""
    has_label = (batch.labels != IGNORED).tolist()
    if all(has_label[place] or letter == "." for place, letter in enumerate(letters)):
        return ""
    weights = [1.0] * len(letters) if batch.weights is None else batch.weights.tolist()
    return "".join(
        " " if not labelled else "^" if weight == 1 else "-"
        for labelled, weight in zip(has_label, weights, strict=True)
    )


def documents_of(side: Batch | SourceSide) -> np.ndarray:
    """The number of the document at every position, padding documents included: (T,)."""
    lengths = np.diff(side.cu_seqlens.cpu().numpy())
    return np.repeat(np.arange(len(lengths)), lengths)


def letter_of(number: int) -> str:
    """The letter of a pack's document in pictures: A to Z, a to z, then from A again."""
    return ALPHABET[number % len(ALPHABET)]


def _letters(batch: Batch, side: Batch | SourceSide, num_packs: int) -> list[str]:
    """The letter of the document at every position of a side, from A in every pack; a dot at padding."""
    documents = documents_of(side)
    is_real = np.array(real_documents(batch))[documents]
    size = len(documents) // num_packs
    firsts = np.searchsorted(batch.cu_seqlens.numpy(), np.arange(num_packs) * (len(batch.tokens) // num_packs))
    return [
        letter_of(number - firsts[place // size]) if real else "."
        for place, (number, real) in enumerate(zip(documents.tolist(), is_real.tolist(), strict=True))
    ]
