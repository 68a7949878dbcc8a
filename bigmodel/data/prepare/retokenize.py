"""Retokenize: compares stored ids with those that the `tokenizers` library gives for the same text.

In: stored documents and a share of them. Out: a sentence for every difference. The text of a document is

    the stored text                 in shards of text; compared is the path that training uses
    what its ids decode to          where ids give back the text: byte-level BPE without a normalizer
    read again from the sources     otherwise, if they have not changed

Guarantees: the documents are chosen by their place, or by their text if it is read from sources: each time the same,
and at least one.

Costs: the share of 2 to 3 MB/s; from sources also their reading, and 8 bytes for each document.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np

from bigmodel.config.settings import PrepareSettings, UserError
from bigmodel.data.prepare import cleaning, corpus
from bigmodel.data.prepare.rows import Malformed
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.tokenizer import Tokenizer

NAMED_IDS = 4  # of a difference, on each side


def choose(num_documents: int, share: float, shard: str) -> list[int]:
    """Rows of a shard, at least one."""
    number = min(num_documents, math.ceil(share * num_documents))
    return sorted(Random(shard).sample(range(num_documents), number))


def find_differences(
    exact: Tokenizer, rows: Sequence[int], documents: Sequence[np.ndarray], texts: Sequence[str]
) -> Iterator[str]:
    """`documents`: the ids of the chosen rows, begin and end included."""
    for row, document, expected in zip(rows, documents, exact.encode_documents(texts), strict=True):
        if not np.array_equal(document, expected):
            length = min(len(document), len(expected))
            unequal = np.flatnonzero(document[:length] != expected[:length])
            place = int(unequal[0]) if len(unequal) else length
            ours, theirs = (ids[place : place + NAMED_IDS].tolist() for ids in (document, expected))
            yield f"document {row}: has other ids than the library gives, from token {place}: {ours} for {theirs}"


def digest(column: str, document: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(column.encode() + document.tobytes(), digest_size=8).digest(), "little")


def compare_with_sources(
    manifest: Manifest, exact: Tokenizer, share: float, columns: Sequence[str], stored: np.ndarray
) -> tuple[int, list[str]]:
    """Read a share of the texts again; returns the number of texts compared and the problems. `stored`: digests of all
    documents. Raises `UserError` with the reason why the sources cannot be read again."""
    settings = _settings(manifest.recipe)
    sources = [corpus.find_source(source) for source in settings.sources]
    if corpus.corpus_hash(sources) != manifest.corpus_sha256:
        raise UserError("prepare.sources: the files have other content now")
    contaminated = cleaning.evaluation_hashes(settings.decontaminate) if settings.decontaminate else None
    known, compared = np.sort(stored), 0
    problems: list[str] = []
    for source, texts in _choose_again(sources, settings, contaminated, share):
        compared += len(texts)
        for column, text, document in zip(columns, texts, exact.encode_documents(texts), strict=False):
            wanted = np.uint64(digest(column, document))
            place = np.searchsorted(known, wanted)
            if place == len(known) or known[place] != wanted:
                problems.append(f"{source}: no document has the ids that the library gives for {text[:40]!r}")
    return compared, problems


def _choose_again(
    sources: Sequence[corpus.Source], settings: PrepareSettings, contaminated: np.ndarray | None, share: float
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Source and kept texts of the chosen rows; of the first kept row if none is chosen."""
    first: tuple[str, tuple[str, ...]] | None = None
    chosen = 0
    for source in (source for source in sources if source.record is None):
        for unit in corpus.plan_units(source):
            for row, _ in corpus.read_unit(unit):
                if isinstance(row, Malformed) or not (first is None or _is_chosen(row, share)):
                    continue
                verdict, texts = cleaning.judge(row, settings, contaminated)
                if verdict != cleaning.KEPT:
                    continue
                first = first or (source.name, texts)
                if _is_chosen(row, share):
                    chosen += 1
                    yield source.name, texts
    if first and not chosen:
        yield first


def _settings(recipe: dict[str, Any]) -> PrepareSettings:
    """The settings that made a folder, as far as they decide which texts are kept."""
    if not isinstance(recipe.get("sources"), list):
        raise UserError("manifest.json: names no source files")
    table = {name: value for name, value in recipe.items() if name in PrepareSettings.model_fields}
    return PrepareSettings.model_validate({**table, "tokenizer": None, "vocabulary": 32_000}, context={"saved": True})


def _is_chosen(row: tuple[str | None, ...], share: float) -> bool:
    content = cleaning.joined(tuple(text or "" for text in row))
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") < share * 2**64
