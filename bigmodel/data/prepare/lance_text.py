"""Lance: the texts of Lance datasets, read by pylance.

In: a dataset, a folder named *.lance, local or in a store. Out: its columns, its fragments as pieces, and their rows;
deleted rows are left out. Credentials of a store come from the environment, as Lance expects them.

Guarantees: the newest version at the start is read. Another version at the end is an error of `prepare`, as with any
file that changes.

Costs: some hundred rows in memory; a fragment is one piece.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.columns import BATCH_ROWS, outer_columns, rows_of, text_columns
from bigmodel.data.prepare.rows import Format, Piece, Row
from bigmodel.data.store import files


@contextmanager
def _opened(folder: str) -> Iterator[Any]:
    """The dataset; errors inside become a `UserError` that names it."""
    try:
        import lance
    except ImportError:
        raise UserError(f"{folder}: a Lance dataset needs the package pylance; pip install 'bigmodel[lance]'") from None
    try:
        yield lance.dataset(files.without_settings(folder))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        reason = str(error).partition(", /")[0].partition("\n")[0]  # places in Lance's own source follow
        raise UserError(f"{folder}: cannot be read by Lance: {reason}; restore the dataset or leave it out") from None


def dataset_columns(folder: str, wanted: tuple[str, ...]) -> list[str]:
    """Names of all columns. Raises `UserError` if a wanted one does not hold text."""
    with _opened(folder) as dataset:
        return text_columns(folder, dataset.schema, wanted)


def identity(folder: str) -> str:
    """SHA-256 over the names of the files that the newest version is made of. Lance never writes a file anew."""
    with _opened(folder) as dataset:
        fragments = [fragment.metadata.to_json() for fragment in dataset.get_fragments()]
        return hashlib.sha256(json.dumps(fragments, sort_keys=True).encode()).hexdigest()


def cut_dataset(folder: str, form: Format) -> list[Piece]:
    """A piece per fragment, in order."""
    with _opened(folder) as dataset:
        sizes = {
            fragment.fragment_id: sum(file.file_size_bytes or 0 for file in fragment.data_files())
            for fragment in dataset.get_fragments()
        }
        return [Piece(folder, form, number, number + 1, size) for number, size in sizes.items()]


def read_fragment(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    with _opened(piece.file) as dataset:
        fragment = dataset.get_fragment(piece.start)
        if fragment is None:
            raise UserError(
                f"{piece.file}: has no fragment {piece.start} any more; run again when nothing writes to it"
            )
        stored = outer_columns(dataset.schema, columns)
        batches = fragment.to_batches(columns=stored, batch_size=BATCH_ROWS)
        yield from rows_of(piece, batches, columns, None, f"of fragment {piece.start}")
