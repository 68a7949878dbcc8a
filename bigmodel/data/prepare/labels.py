"""Labels: the classes of labelled documents (`label_column`), counted.

In: the encoded parts of labelled sources. Out: documents by source, split and class, for the manifest. Example:

    {"news": {"train": {"sport": 812, "politics": 790}, "validation": {"sport": 44, "politics": 39}}}
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.corpus import Source
from bigmodel.data.prepare.encoding import read_array
from bigmodel.data.prepare.rows import LabelColumn
from bigmodel.data.store.manifest import SPLITS, Labels

MOST_CLASSES = 10_000  # a column of more values holds no classes, but texts or numbers
SHOWN = 20


def count_labels(sources: Sequence[Source], encoded: Mapping[str, Sequence[Path]]) -> Labels:
    """Documents by source, split and class; nothing of sources without labels. Raises `UserError` for a source with
    more values than classes can be."""
    found: Labels = {}
    for source in sources:
        if not isinstance(source.columns[-1], LabelColumn):
            continue
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for part in encoded[source.name]:
            for split, of_part in json.loads(read_array(part, "labels").tobytes()).items():
                counts[split].update(of_part)
        values = {name for of_split in counts.values() for name in of_split}
        if len(values) > MOST_CLASSES:
            raise UserError(
                f"prepare.sources {source.name!r}: label_column = {str(source.columns[-1])!r} has {len(values):,} "
                f"different values, more than {MOST_CLASSES:,} classes; name a column of classes"
            )
        found[source.name] = {split: dict(sorted(counts[split].items())) for split in SPLITS}
    return found


def labels_in_words(of_source: Mapping[str, Mapping[str, int]]) -> str:
    """
    >>> labels_in_words({"train": {"b": 2, "a": 1}, "validation": {"a": 1}})
    '2 classes: "a" 2, "b" 2'
    """
    total: Counter[str] = Counter()
    for counts in of_source.values():
        total.update(counts)
    shown = [f"{json.dumps(name, ensure_ascii=False)} {total[name]:,}" for name in sorted(total)[:SHOWN]]
    more = f" and {len(total) - SHOWN:,} more" if len(total) > SHOWN else ""
    return f"{len(total):,} classes: {', '.join(shown)}{more}"
