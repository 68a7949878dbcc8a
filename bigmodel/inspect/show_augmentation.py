"""What augmentation makes of a text: an example of the plan's first step, and a text's segmentations in two passes."""

from collections.abc import Iterable, Sequence

import numpy as np

from bigmodel.config.settings import Settings
from bigmodel.data.load.stream import Builder
from bigmodel.data.objectives.example import Example
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.data.store.shards import ShardStore

SHOWN_TOKENS = 40


def augmentation_text(settings: Settings, store: ShardStore) -> str:
    """Empty if nothing is augmented."""
    data = settings.data
    is_denoised = any(one.kind == "denoising" for one in data.wanted_objectives)
    if not (data.augmentation or is_denoised or store.passes):
        return ""
    chunks = [chunk for pack in Order.of_run(store, settings).next_step() for chunk in pack]
    lines = noise_lines(settings, store, chunks) if data.augmentation or is_denoised else []
    return "\n".join(lines + (segmentation_lines(store, chunks[0]) if store.passes else []))


def noise_lines(settings: Settings, store: ShardStore, chunks: Iterable[Chunk]) -> list[str]:
    """The first example whose read tokens are changed, and what it was."""
    data, seed = settings.data, settings.run.seed
    builder, clean = Builder(store, data, seed), Builder(store, data.without_augmentation(), seed)
    for chunk in chunks:
        before, after = _read(clean.example(chunk)), _read(builder.example(chunk))
        if builder.objective_of(chunk) == "denoising":
            before = clean.example(chunk).labels
            before = before[before >= 0]
        if not np.array_equal(before, after):
            source = store.sources[chunk.source]
            return [
                f"noise, on document {chunk.row} of shard {chunk.shard} of {source}:",
                f"  text: {in_pieces(store, before, '')}",
                f"  read: {in_pieces(store, after, '')}",
            ]
    return ["noise: none of the examples of the first step is changed; their texts are too short"]


def segmentation_lines(store: ShardStore, chunk: Chunk) -> list[str]:
    """The first tokens of a document: the tokenizer's own, and those of the first passes."""
    source = store.sources[chunk.source]
    named = {"tokenizer": None} | {f"pass {number + 1}": number for number in range(min(2, store.passes))}
    lines = [f"segmentations of document {chunk.row} of shard {chunk.shard} of {source}:"]
    for name, number in named.items():
        document = store.document(source, chunk.shard, chunk.row, number)
        ids = document.source if isinstance(document, Pair) else document
        assert not isinstance(ids, Supervised), "supervised documents are stored as tokens"
        lines.append(f"  {name + ':':<11}{len(ids) - 2:,} tokens: {in_pieces(store, ids[1:-1], '|')}")
    return lines


def in_pieces(store: ShardStore, ids: Sequence[int] | np.ndarray, between: str) -> str:
    """The texts of the first ids in one line; special tokens by name, those above the tokenizer's as [number]."""
    pieces = []
    for number in [int(one) for one in ids[:SHOWN_TOKENS]]:
        known = number < len(store.pieces)
        piece = store.pieces[number] or store.token_of(number) if known else f"[{number - len(store.pieces)}]"
        pieces.append(piece.replace("\n", "\\n").replace("\t", "\\t"))
    return between.join(pieces) + (" ..." if len(ids) > SHOWN_TOKENS else "")


def _read(example: Example) -> np.ndarray:
    return example.source if len(example.source) else example.tokens
