"""Scanning: the first stage of `prepare`. All rows are read and judged, malformed ones counted.

In: the units. Out: their scans, the duplicates over all of them, and documents and bytes of each source by reason.

Guarantees: malformed records end the preparation only after all records are read, so their number and share are known.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bigmodel.config.settings import PrepareSettings, UserError
from bigmodel.data.prepare import cleaning, corpus, encoding
from bigmodel.data.prepare.cleaning import Scan
from bigmodel.data.prepare.corpus import Source, Unit
from bigmodel.data.prepare.encoding import Work, save_array
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store.manifest import in_words
from bigmodel.run_directory import write_atomically
from bigmodel.sizes import counted_noun


def scan_all(team: Team, all_units: Sequence[Unit], settings: PrepareSettings, work: Work) -> list[Scan]:
    """The scans of all units, with duplicates marked. Raises `UserError` for more malformed records than allowed."""
    if settings.decontaminate:
        save_array(work.contaminated, cleaning.evaluation_hashes(settings.decontaminate))
    tasks = [(number, unit, settings, work) for number, unit in enumerate(all_units)]
    team.run("reading", encoding.scan_unit, tasks, [unit.num_bytes for unit in all_units])
    scans = [Scan.read(work.scan(number)) for number in range(len(all_units))]
    _check_malformed(all_units, scans, settings.malformed_share, work)
    save_array(work.duplicates, cleaning.mark_duplicates(scans) if settings.deduplicate else np.zeros(0, np.int64))
    return scans


def _check_malformed(all_units: Sequence[Unit], scans: Sequence[Scan], allowed: float, work: Work) -> None:
    """Raise `UserError` for the sources with more malformed records than allowed, and write a list of all."""
    names = [unit.source for unit in all_units]
    paragraphs, least = [], 0.0
    for source in dict.fromkeys(names):
        mine = [scan for name, scan in zip(names, scans, strict=True) if name == source]
        malformed = sum(int((scan.status == cleaning.MALFORMED).sum()) for scan in mine)
        read = sum(len(scan.status) for scan in mine)
        if malformed > allowed * read:
            least = max(least, malformed / read)
            records = [record for scan in mine for record in scan.malformed]
            paragraphs.append(
                f"prepare.sources {source!r}: {malformed:,} of {counted_noun(read, 'record')} malformed "
                f"({_percent(malformed / read)})\n{corpus.in_lines(records)}"
            )
    if paragraphs:
        listed = work.folder / "malformed.jsonl"
        write_malformed(listed, cleaning.list_malformed(names, scans))
        found = "\n".join(paragraphs)
        allow = f", or set prepare.malformed_share = {_rounded_up(least):g}" if least < 1 else ""  # 1 leaves no record
        raise UserError(
            f"{found}\nThis is above prepare.malformed_share = {allowed:g}. Correct or drop these records{allow}; "
            f"{listed} lists them"
        )


def _percent(share: float) -> str:
    """
    >>> [_percent(share) for share in (1.0, 0.028, 0.00001234)]
    ['100%', '2.8%', '0.0012%']
    """
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _rounded_up(share: float) -> float:
    """With two digits, at most 1.

    >>> [_rounded_up(share) for share in (3 / 107, 1 / 3, 1.0, 0.02)]
    [0.029, 0.34, 1.0, 0.02]
    """
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(1.0, float(f"{math.ceil(share / step - 1e-9) * step:.2g}"))


def write_malformed(path: Path, records: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(record) + "\n" for record in records]
    if lines:
        write_atomically(path, "".join(lines))


def count_rows(
    sources: Sequence[Source],
    all_units: Sequence[Unit],
    scans: Sequence[Scan],
    left_out: dict[str, dict[str, dict[str, int]]],
    share: float,
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Documents and bytes of each source: read, kept, dropped by reason. Raises `UserError` for a source or split
    without documents."""
    rows, row_bytes = {}, {}
    for source in sources:
        mine = [scan for unit, scan in zip(all_units, scans, strict=True) if unit.source == source.name]
        counted = cleaning.count_reasons(mine)
        if not counted[0]["kept"]:
            some = {reason: count for reason, count in counted[0].items() if count or reason == "read"}
            raise UserError(
                f"prepare.sources {source.name!r}: has no documents ({in_words(some)}); "
                "name files that hold text, or leave the source out"
            )
        for counts, what in zip(counted, ("documents", "bytes"), strict=True):
            early = {reason: numbers[what] for reason, numbers in left_out.get(source.name, {}).items()}
            counts |= early | {"read": counts["read"] + sum(early.values())}
            accounted = sum(count for reason, count in counts.items() if reason != "read")
            assert accounted == counts["read"], f"{source.name}: {counts} does not add up"
        rows[source.name], row_bytes[source.name] = counted
    kept = np.concatenate([scan.validation[scan.status == cleaning.KEPT] for scan in scans])
    for split, number in (("train", np.count_nonzero(~kept)), ("validation", np.count_nonzero(kept))):
        if not number:
            of_texts = [texts_in_words(source) for source in sources if num_texts(source)]
            enough = _enough(share, len(kept))
            remedy = f"set prepare.validation_share = {enough:g}" if split == "validation" else "lower it"
            raise UserError(
                f"prepare.validation_share = {share:g}: none of the {counted_noun(len(kept), 'document')} fell into "
                f"the {split} split; {remedy}, or add documents" + (f" ({', '.join(of_texts)})" if of_texts else "")
            )
    return rows, row_bytes


def _enough(share: float, num_documents: int) -> float:
    """A validation share for 4 expected documents or more, at most 0.4, and at least twice `share`."""
    return min(0.4, max(math.ceil(400 / num_documents) / 100, round(2 * share, 2)))


def num_texts(source: Source) -> int:
    return sum(form.kind == "text" for form in source.formats)


def texts_in_words(source: Source) -> str:
    number = num_texts(source)
    return "1 .txt file, which is one document" if number == 1 else f"{number:,} .txt files, one document each"
