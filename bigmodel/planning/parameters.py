"""The parameters of a model by name and shape, from its settings alone. Imports no torch.

In: settings, number of embedding rows. Out: every parameter. Guarantee: names,
shapes and which are trained equal those of the built model, by a test over all kinds of models.

Example: a decoder of 12 layers and width 768 with 32,000 rows has blocks.0.attention.query_key_value.weight
(2304, 768) and 110 more.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from bigmodel.config.lora_settings import MATRICES, is_target
from bigmodel.config.recurrent_settings import GATES
from bigmodel.config.settings import ModelSettings, Settings

Role = Literal["matrix", "embedding", "vector"]
Shape = tuple[int, ...]
# What tensor-parallel ranks share by rows, and by columns (bigmodel/training/zero/tensor_parallel.py).
BY_ROWS = re.compile(
    r"(embedding|head)\.weight|.*blocks\.\d+\.(attention\.query_key_value|feed_forward\.(gate_)?up)\..*"
)
BY_COLUMNS = re.compile(r".*blocks\.\d+\.(attention\.output|feed_forward\.down)\.weight")


@dataclass(frozen=True)
class Parameter:
    """`rows`: of each matrix that a joined one holds; empty: it is one."""

    name: str
    shape: Shape
    role: Role
    is_trained: bool = True
    rows: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_of_experts(self) -> bool:
        """Whether its rows are experts, which ranks may share."""
        return self.name.endswith((".experts.gate_up", ".experts.down"))

    @property
    def is_of_tensors(self) -> bool:
        """Whether tensor-parallel ranks share it."""
        return bool(BY_ROWS.fullmatch(self.name) or BY_COLUMNS.fullmatch(self.name))

    def part(self, size: int) -> "Parameter":
        """An equal part of it on one of `size` ranks."""
        rows, *columns = self.shape
        if BY_COLUMNS.fullmatch(self.name):
            return replace(self, shape=(rows, columns[0] // size))
        return replace(self, shape=(rows // size, *columns))


def parameters_of(settings: Settings, vocabulary: int) -> list[Parameter]:
    """All parameters, with [lora]'s adapters; those of `training.freeze` are not trained. `vocabulary`: rows of the
    embedding, `model.num_rows` of the number of tokens."""
    model = settings.model
    found = [*(_recurrent(model, vocabulary) if model.is_recurrent else _transformer(model, vocabulary))]
    if settings.lora.rank:
        found = [one for parameter in found for one in (parameter, *_adapters(parameter, settings))]
    return [one if _is_trained(one.name, settings) else replace(one, is_trained=False) for one in found]


def held_of(parameters: Sequence[Parameter], settings: Settings) -> list[Parameter]:
    """Of one rank: its parts of what ranks share, and all others."""
    size = settings.training.expert_parallel_ranks * settings.training.tensor_parallel_ranks
    shared = {one.name for one in shared_of(parameters, settings)}
    return [one.part(size) if one.name in shared else one for one in parameters]


def shared_of(parameters: Sequence[Parameter], settings: Settings) -> list[Parameter]:
    """Experts (`training.expert_parallel_ranks`) or matrices (`tensor_parallel_ranks`) of which a rank holds a part."""
    if settings.training.tensor_parallel_ranks > 1:
        return [one for one in parameters if one.is_of_tensors]
    return [one for one in parameters if one.is_of_experts and settings.training.expert_parallel_ranks > 1]


def active_of(parameters: Sequence[Parameter], settings: Settings) -> int:
    """How many of them a token passes: of experts its share, of all else everything."""
    experts = settings.model.experts
    unused = 1 - experts.per_token / experts.count if experts else 0.0
    return sum(one.numel - round(one.numel * unused if one.is_of_experts else 0) for one in parameters)


def _transformer(model: ModelSettings, vocabulary: int) -> Iterator[Parameter]:
    yield Parameter("embedding.weight", (vocabulary, model.hidden_size), "embedding")
    yield from _input("input.", model)
    if model.kind == "encoder_decoder":
        encoder = model.encoder
        if encoder.separate_embeddings:
            yield Parameter("encoder.embedding.weight", (vocabulary, encoder.hidden_size), "embedding")
        yield from _bias_by_distance("encoder.", encoder)
        yield from _input("encoder.input.", encoder)
        for layer in range(encoder.num_layers):
            yield from _block(f"encoder.blocks.{layer}.", encoder, layer)
        yield from _last_norm("encoder.norm.", encoder)
    yield from _bias_by_distance("", model)
    for layer in range(model.num_layers):
        yield from _block(f"blocks.{layer}.", model, layer)
    for number in range(model.num_mtp_modules):
        yield from _block(f"extra_blocks.{number}.", model, model.num_layers + number)
    yield from _last_norm("norm.", model)
    yield from _head(model, vocabulary)


def _input(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    if model.position_embedding == "learned":
        yield Parameter(f"{prefix}positions.weight", (model.max_positions, model.hidden_size), "embedding")
    if model.num_token_types:
        yield Parameter(f"{prefix}token_types.weight", (model.num_token_types, model.hidden_size), "embedding")
    if model.embedding_norm:
        yield from _norm(f"{prefix}norm.", model)


def _bias_by_distance(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    if model.position_embedding == "relative_bias":
        shape = (model.relative_buckets, model.num_heads)
        yield Parameter(f"{prefix}relative_bias.weight", shape, "embedding")


def _norm(prefix: str, model: ModelSettings, width: int = 0) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}weight", (width or model.hidden_size,), "vector")
    if model.norm == "layer" and model.norm_bias:
        yield Parameter(f"{prefix}bias", (width or model.hidden_size,), "vector")


def _last_norm(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    if model.norm_placement != "post":
        yield from _norm(prefix, model)


def _matrix(prefix: str, outputs: int, inputs: int, bias: bool, rows: tuple[int, ...] = ()) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}weight", (outputs, inputs), "matrix", rows=rows)
    if bias:
        yield Parameter(f"{prefix}bias", (outputs,), "vector")


def _block(prefix: str, model: ModelSettings, layer: int) -> Iterator[Parameter]:
    """In the order in which `Block` makes its modules."""
    is_mixed = model.kind == "encoder_decoder" and model.source_attention == "mixed"
    is_cross = model.kind == "encoder_decoder" and not is_mixed
    if not (layer == 0 and model.embedding_norm and model.norm_placement == "pre"):
        yield from _norm(f"{prefix}attention_norm.", model)
    yield from _self_attention(f"{prefix}attention.", model, is_mixed)
    if is_cross:
        yield from _norm(f"{prefix}cross_attention_norm.", model)
        yield from _cross_attention(f"{prefix}cross_attention.", model)
    yield from _norm(f"{prefix}feed_forward_norm.", model)
    if model.experts and layer >= model.experts.first_dense_layers:
        yield from _experts(f"{prefix}feed_forward.", model)
    else:
        yield from _feed_forward(f"{prefix}feed_forward.", model, model.intermediate_size)
    if model.norm_placement == "sandwich":
        yield from _norm(f"{prefix}attention_output_norm.", model)
        yield from _norm(f"{prefix}feed_forward_output_norm.", model)
        if is_cross:
            yield from _norm(f"{prefix}cross_attention_output_norm.", model)


def _feed_forward(prefix: str, model: ModelSettings, inner: int) -> Iterator[Parameter]:
    width, bias = model.hidden_size, model.feed_forward_bias
    if model.gated:
        yield from _matrix(f"{prefix}gate_up.", 2 * inner, width, bias, (inner, inner))
    else:
        yield from _matrix(f"{prefix}up.", inner, width, bias)
    yield from _matrix(f"{prefix}down.", width, inner, bias)


def _experts(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    experts, width, inner = model.experts, model.hidden_size, model.expert_width
    assert experts is not None
    yield Parameter(f"{prefix}router.weight", (experts.count, width), "matrix")
    yield Parameter(f"{prefix}experts.gate_up", (experts.count, 2 * inner, width), "matrix", rows=(inner, inner))
    yield Parameter(f"{prefix}experts.down", (experts.count, width, inner), "matrix")
    if experts.shared:
        yield from _feed_forward(f"{prefix}shared.", model, experts.shared * inner)


def _self_attention(prefix: str, model: ModelSettings, is_mixed: bool) -> Iterator[Parameter]:
    queries, keys = (heads * model.resolved_head_dim for heads in (model.num_heads, model.num_kv_heads))
    rows, has_bias = (queries, keys, keys), model.attention_bias != "none"
    yield from _matrix(f"{prefix}query_key_value.", sum(rows), model.hidden_size, has_bias, rows)
    yield from _matrix(f"{prefix}output.", model.hidden_size, queries, model.attention_bias == "all")
    yield from _head_norms(prefix, model)
    if is_mixed:
        width = model.encoder.hidden_size
        yield from _matrix(f"{prefix}source_key_value.", 2 * keys, width, has_bias, (keys, keys))


def _cross_attention(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    queries, keys = (heads * model.resolved_head_dim for heads in (model.num_heads, model.num_kv_heads))
    has_bias = model.attention_bias != "none"
    yield from _matrix(f"{prefix}query.", queries, model.hidden_size, has_bias)
    yield from _matrix(f"{prefix}key_value.", 2 * keys, model.encoder.hidden_size, has_bias, (keys, keys))
    yield from _matrix(f"{prefix}output.", model.hidden_size, queries, model.attention_bias == "all")
    yield from _head_norms(prefix, model)


def _head_norms(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    """RMSNorms, which have no bias."""
    for name, heads in (("query_norm", model.num_heads), ("key_norm", model.num_kv_heads)):
        if model.qk_norm:
            width = model.resolved_head_dim * (heads if model.qk_norm_over == "all_heads" else 1)
            yield Parameter(f"{prefix}{name}.weight", (width,), "vector")


def _head(model: ModelSettings, vocabulary: int) -> Iterator[Parameter]:
    classes, width = model.classification, model.hidden_size
    if not classes:
        if not model.tied_embeddings:
            yield Parameter("head.weight", (vocabulary, width), "matrix")
        return
    if classes.head != "linear":
        yield Parameter("head.bias", (len(classes.classes),), "vector")
    yield Parameter("head.weight", (len(classes.classes), width), "matrix")
    if classes.head != "linear":
        yield from _matrix("head.dense.", width, width, classes.head == "bert")
    if classes.head == "modernbert":
        yield Parameter("head.norm.weight", (width,), "vector")
        if model.norm_bias:
            yield Parameter("head.norm.bias", (width,), "vector")


def _recurrent(model: ModelSettings, vocabulary: int) -> Iterator[Parameter]:
    width = model.hidden_size
    yield Parameter("embedding.weight", (vocabulary, width), "embedding")
    yield from _norm("input.norm.", model)
    if model.has_source:
        if model.separate_embeddings:
            yield Parameter("encoder.embedding.weight", (vocabulary, width), "embedding")
        yield from _norm("encoder.input.norm.", model)
        for layer in range(model.num_layers):
            yield from _recurrent_layer(f"encoder.blocks.{layer}.", model)
        yield Parameter("source_attention.query.weight", (width, width), "matrix")
        yield Parameter("source_attention.combine.weight", (width, 2 * width), "matrix")
    for layer in range(model.num_layers):
        yield from _recurrent_layer(f"blocks.{layer}.", model)
    yield from _norm("norm.", model)
    yield from _head(model, vocabulary)


def _recurrent_layer(prefix: str, model: ModelSettings) -> Iterator[Parameter]:
    width, rows = model.hidden_size, GATES[model.cell] * model.hidden_size
    yield Parameter(f"{prefix}input_weight", (rows, width), "matrix")
    yield Parameter(f"{prefix}state_weight", (rows, width), "matrix")
    yield Parameter(f"{prefix}bias", (rows,), "vector")
    if model.cell == "gru":
        yield Parameter(f"{prefix}candidate_bias", (width,), "vector")
    if model.peepholes:
        yield Parameter(f"{prefix}peepholes", (3 * width,), "vector")


def _adapters(matrix: Parameter, settings: Settings) -> Iterator[Parameter]:
    """The adapters of one matrix of a block; multi-token prediction modules have none."""
    path = matrix.name.removesuffix(".weight")
    side, _, place = path.partition("blocks.")
    known = MATRICES.get(place.partition(".")[2]) if side in ("", "encoder.") else None
    if matrix.role != "matrix" or known is None:
        return
    for part, rows in zip(known, matrix.rows or matrix.shape[:1], strict=True):
        if any(is_target(target, path, part) for target in settings.lora.targets):
            for name, shape in (("a", (settings.lora.rank, matrix.shape[1])), ("b", (rows, settings.lora.rank))):
                yield Parameter(f"{path}.lora.{part}.{name}.weight", shape, "matrix")


def _is_trained(name: str, settings: Settings) -> bool:
    if any(fnmatchcase(name, one) or fnmatchcase(name, f"{one}.*") for one in settings.training.freeze):
        return False
    if not settings.lora.rank or ".lora." in name:
        return True
    return name.startswith("head.") and settings.model.classification is not None
