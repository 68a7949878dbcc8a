"""Shards of others: written by mosaicml-streaming's own MDSWriter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.torchvision_operators import define_missing_torchvision_operators


def write_shards(folder: Path, columns: dict[str, str], samples: Sequence[dict[str, Any]], **options: Any) -> str:
    """Write samples as shards of at most 4,000 bytes with their index.json; returns the folder."""
    define_missing_torchvision_operators()
    from streaming import MDSWriter

    with MDSWriter(columns=columns, out=str(folder), **{"size_limit": 4000} | options) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder)
