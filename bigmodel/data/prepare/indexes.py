"""Indexes: compares MDS shards with the index.json that lists them, before any of their documents is read.

In: listed shards. Out: nothing, or one error with all differences.

Costs: every shard is read, decompressed and hashed once more, about 0.5 GB/s and core.
"""

from collections.abc import Sequence

from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.work_items import Team
from bigmodel.data.store import files
from bigmodel.data.store.mds_index import RESTORE, Listed, compare, in_lines
from bigmodel.sizes import counted_noun


def compare_with_indexes(shards: Sequence[Listed], team: Team, progress: Progress) -> None:
    """Raise `UserError` for all differences between shards and their indexes; say which hashes are not known here."""
    if not shards:
        return
    weights = [files.size(shard.file) for shard in shards]
    found = team.run("comparing with index.json", compare, [(shard,) for shard in shards], weights)
    differences = [difference for one in found for difference in one.differences]
    if differences:
        points = counted_noun(len(differences), "point")
        raise UserError(f"index.json and its shards differ in {points}:\n  {in_lines(differences)}\n{RESTORE}")
    if unknown := sorted(set().union(*(one.unknown for one in found))):
        names = ", ".join(unknown)
        progress.console.print(f"index.json: hashes by {names} are not compared: not known here", markup=False)
