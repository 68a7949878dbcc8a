"""Other loaders of token shards for `tools.bench_stream`: litdata, OLMo-core, torchtitan. None is a dependency.

    python -m tools.bench_stream speed --others litdata olmo-packed olmo-concatenate torchtitan

In: the folder of shards of the benchmark. Out: tokens of batches of 8 rows of 2,048. Each has its own copy of the
documents, in its own format, made beside the shards before the clock starts:

- litdata: `StreamingDataset` with `TokensLoader`, shuffled: a stream cut into rows before it is shuffled, labels by a
  shift within the row; no boundaries of documents.
- olmo-packed: `NumpyPackedFSLDataset`, best-fit, long documents cut into several (its default drops what is longer than
  a row); olmo-concatenate: `NumpyFSLDataset`; both with the lengths of documents, rows in a random order.
- torchtitan: `HuggingFaceTextDataset` over an Arrow table of stored ids, so that nothing is tokenized.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.data.store.shards import ShardStore

CONTEXT, ROWS = 2048, 8
BEGIN, END = 0, 1


def documents(folder: Path) -> Iterator[np.ndarray]:
    """(n,) uint16 tokens of each document; the last is END, and none before it is."""
    store = ShardStore(folder, "train")
    for shard in range(len(store.shard_sizes("web"))):
        for row in range(len(store.lengths("web", shard))):
            tokens = np.maximum(store.document("web", shard, row), 2)
            tokens[-1] = END
            yield tokens


def copies(folder: Path, others: list[str]) -> None:
    """Write the copies that the named loaders read."""
    if "litdata" in others:
        _write_litdata(folder)
    if any(name.startswith("olmo") for name in others):
        np.concatenate(list(documents(folder))).tofile(folder / "tokens.npy")  # without a header, as Dolma's
    if "torchtitan" in others:
        import datasets

        datasets.Dataset.from_dict({"tokens": list(documents(folder))}).save_to_disk(str(folder / "arrow"))


def _write_litdata(folder: Path) -> None:
    import torch
    from litdata.streaming import Cache
    from litdata.streaming.item_loader import TokensLoader

    cache = Cache(str(folder / "litdata"), chunk_bytes="16MB", item_loader=TokensLoader(block_size=CONTEXT))
    for number, tokens in enumerate(documents(folder)):
        cache[number] = torch.from_numpy(tokens)
    cache.done()
    cache.merge()


def litdata(folder: Path) -> Iterator[int]:
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader
    from torch.utils.data import default_collate

    dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=CONTEXT), shuffle=True)

    def collate(rows: list[Any]) -> Any:
        tokens = default_collate(rows).long()
        return tokens, tokens.roll(-1, 1)

    yield from _in_batches(dataset, collate, lambda batch: batch[0].numel())


def _olmo(folder: Path, kind: str) -> Iterator[int]:
    import olmo_core.data
    from olmo_core.data.collator import DataCollator
    from olmo_core.data.types import LongDocStrategy

    cut = {"long_doc_strategy": LongDocStrategy.fragment} if "Packed" in kind else {}
    dataset = getattr(olmo_core.data, kind)(
        str(folder / "tokens.npy"), sequence_length=CONTEXT, pad_token_id=BEGIN, eos_token_id=END, vocab_size=50_000,
        dtype=np.uint16, generate_doc_lengths=True, **cut,
    )  # fmt: skip
    dataset.work_dir = folder / f"work-{kind}"
    shutil.rmtree(dataset.work_dir, ignore_errors=True)
    dataset.prepare()
    rows = (dataset[int(number)] for number in np.random.default_rng(1).permutation(len(dataset)))
    yield from _in_batches(rows, DataCollator(pad_token_id=BEGIN), _real_tokens)


def _real_tokens(batch: dict[str, Any]) -> int:
    return int(batch["label_mask"].sum()) if "label_mask" in batch else batch["input_ids"].numel()


class _Stored:
    """The tokenizer that torchtitan asks: documents are ids already."""

    def encode(self, tokens: list[int], **_: bool) -> list[int]:
        return tokens


def torchtitan(folder: Path) -> Iterator[int]:
    import datasets
    from torch.utils.data import default_collate
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    text_datasets.DATASETS["stored"] = DatasetConfig(
        path=str(folder / "arrow"), loader=datasets.load_from_disk, sample_processor=lambda sample: sample["tokens"]
    )
    dataset = text_datasets.HuggingFaceTextDataset("stored", None, _Stored(), seq_len=CONTEXT)
    yield from _in_batches(dataset, default_collate, lambda batch: batch[1].numel())


def _in_batches(rows: Any, collate: Callable[[list[Any]], Any], count: Callable[[Any], int]) -> Iterator[int]:
    waiting = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == ROWS:
            yield count(collate(waiting))
            waiting = []


OTHERS: dict[str, Callable[[Path], Iterator[int]]] = {
    "litdata": litdata,
    "olmo-packed": lambda folder: _olmo(folder, "NumpyPackedFSLDataset"),
    "olmo-concatenate": lambda folder: _olmo(folder, "NumpyFSLDataset"),
    "torchtitan": torchtitan,
}
