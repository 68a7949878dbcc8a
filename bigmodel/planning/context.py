"""What every part of the plan starts from: settings, effective DeepSpeed JSON, vocabulary, cluster, prepared data.

In: settings of a run file, a cluster, `--vocabulary`. Out: a `Context`. Imports no torch.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.parallel_settings import refuse_across_nodes, refuse_undivided_rows
from bigmodel.config.settings import Settings, UserError
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.store.manifest import MANIFEST, Manifest
from bigmodel.launcher.cluster import Cluster

GPUS_OF_NODE = 8  # where only the number of ranks is given


class Context(NamedTuple):
    """`settings` agree with `effective`; `vocabulary`: rows of the embedding; `manifest`: None before data exist."""

    settings: Settings
    effective: dict[str, Any]
    vocabulary: int
    cluster: Cluster
    ranks: int
    manifest: Manifest | None


def context_of(settings: Settings, cluster: Cluster, tokens: int = 0) -> Context:
    """`tokens`: of the tokenizer; 0: those of `vocabulary_of`. Raises `UserError`."""
    ranks = cluster.nodes * cluster.ranks_on_node
    effective, settings = resolve_deepspeed(settings, ranks)
    refuse_across_nodes(settings, cluster.ranks_on_node)
    manifest = manifest_of(settings)
    return Context(settings, effective, vocabulary_of(settings, tokens), cluster, ranks, manifest)


def cluster_of_ranks(ranks: int) -> Cluster:
    """Nodes of 8 where that divides the number of ranks, else one node.

    >>> cluster_of_ranks(64).nodes, cluster_of_ranks(12).nodes
    (8, 1)
    """
    nodes = ranks // GPUS_OF_NODE if ranks % GPUS_OF_NODE == 0 else 1
    return Cluster(nodes=nodes, gpus_per_node=ranks // nodes)


def manifest_of(settings: Settings) -> Manifest | None:
    """Of the prepared data, if there are any."""
    if not (settings.data.directory / MANIFEST).exists():
        return None
    return Manifest.read(settings.data.directory)


def vocabulary_of(settings: Settings, tokens: int = 0) -> int:
    """Rows of the embedding. `tokens`: of the tokenizer; 0: of the prepared data, before they exist of the tokenizer of
    `prepare.tokenizer`, without one `prepare.vocabulary`. Raises `UserError`."""
    if not tokens:
        manifest = manifest_of(settings)
        tokens = manifest.vocabulary if manifest else _tokens_of(settings)
    rows = settings.model.num_rows(tokens + num_special_tokens(settings.data))
    refuse_undivided_rows(settings.training.tensor_parallel_ranks, rows)
    return rows


def _tokens_of(settings: Settings) -> int:
    given = settings.prepare.tokenizer
    if given is None:
        return settings.prepare.vocabulary
    path = given / "tokenizer.json" if given.is_dir() else given
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = table["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max(max(ids, default=0), *(one["id"] for one in table.get("added_tokens", [])), 0) + 1
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = error.strerror if isinstance(error, OSError) else f"not a tokenizer.json ({error})"
        raise UserError(
            f"{_named(path)}: {problem}; the number of tokens is not known: prepare the data, or give --vocabulary N"
        ) from None


def _named(path: Path) -> str:
    return f"prepare.tokenizer = {json.dumps(str(path))}"
