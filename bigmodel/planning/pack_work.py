"""Attention work of a packed sequence, before a run: from the lengths of prepared documents, else from assumed ones.

In: settings, the manifest of the prepared data or None. Out: the `Work` of one full packed sequence, and the mean
length of its documents. The manifest counts documents by powers of two of their tokens (all sources and splits): the
lengths are spread evenly inside each power, on a logarithmic scale, and scaled to the tokens counted: pairs within 2%,
where all documents are of nearly one length within 8%. Imports no torch.

Example: documents of 1,000 tokens in packed sequences of 8,000: 8 * 1,000 * 1,001 / 2 pairs a layer.
"""

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigmodel.config.settings import Settings
from bigmodel.data.plan.attention_work import Work
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.store.manifest import Manifest

SAMPLES = 4096  # documents that stand for all
# Web text: FineWeb-Edu has 1.3e12 tokens in 1.28e9 documents (Penedo et al. 2024). The spread is an assumption.
ASSUMED_MEAN, ASSUMED_SPREAD = 1000, 1.0


class PackWork(NamedTuple):
    """`mean_document`: tokens; `is_measured`: of the prepared data."""

    work: Work
    mean_document: float
    is_measured: bool


def pack_work(settings: Settings, manifest: Manifest | None) -> PackWork:
    """Of a packed sequence without padding, with the documents of the manifest, else the assumed ones."""
    histogram = (manifest.statistics.get("histogram") if manifest else None) or {}
    mean = float(manifest.statistics["mean_tokens"]) if manifest and histogram else ASSUMED_MEAN
    lengths = _spread(tuple(sorted((int(top), int(count)) for top, count in histogram.items())), mean)
    return work_of_documents(settings, lengths)._replace(is_measured=bool(histogram))


def work_of_documents(settings: Settings, lengths: NDArray[np.float64]) -> PackWork:
    """With documents of these lengths (documents,). With a source side each has its share of both sides."""
    data = settings.data
    pack, sources = data.sequence_length, data.source_sequence_length
    chunks_D = _chunks(lengths, min(data.max_document_length, pack + sources))
    tokens_D = np.maximum(1, np.rint(chunks_D * (pack / (pack + sources)))).astype(np.int64)
    sources_D = chunks_D - tokens_D if sources else np.zeros_like(tokens_D)
    pairs = visible_pairs(tokens_D, sources_D, np.zeros_like(tokens_D), settings.model)
    scale = pack / int(tokens_D.sum())
    work = Work(pack, sources, *(round(count * scale) for count in pairs))
    return PackWork(work, float(chunks_D.mean()), is_measured=True)


@lru_cache(maxsize=8)
def _spread(histogram: tuple[tuple[int, int], ...], mean: float) -> NDArray[np.float64]:
    """Lengths (SAMPLES,) that stand for all documents. Without a histogram: lognormal."""
    shares = (np.arange(SAMPLES) + 0.5) / SAMPLES
    if histogram:
        tops, counts = (np.array(column, np.float64) for column in zip(*histogram, strict=True))
        ends = np.cumsum(counts) / counts.sum()
        bins = np.minimum(np.searchsorted(ends, shares), len(tops) - 1)
        inside = 1 - (ends[bins] - shares) / (counts[bins] / counts.sum())
        lengths = tops[bins] * 2.0 ** (inside - 1)
    else:
        normal = NormalDist(-(ASSUMED_SPREAD**2) / 2, ASSUMED_SPREAD)
        lengths = np.array([math.exp(normal.inv_cdf(float(share))) for share in shares])
    return np.asarray(lengths * (mean / lengths.mean()))


def _chunks(lengths: NDArray[np.float64], longest: int) -> NDArray[np.int64]:
    """Chunks of at most `longest` tokens."""
    whole = np.maximum(2, np.rint(lengths)).astype(np.int64)
    full, rest = np.divmod(whole, longest)
    return np.concatenate([np.full(int(full.sum()), longest, np.int64), rest[rest > 1]])
