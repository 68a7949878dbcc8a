"""Bytes of the tensors of one micro-batch on a GPU, from settings alone. Imports no torch.

In: settings, rows of the embedding, packed sequences of a micro-batch. Out: the peak over four moments, of which the
largest counts:

    loss        all blocks hold what their backward reads; the head has its gradients
    last norm   its backward
    last block  the backward of its feed-forward; with activation checkpointing what is computed again is there too
    last dense  the same of the last block before those with experts, which are done then
    keys        the same, with the gradients of gathered keys and values (`training.sequence_parallel_method`)

What a block holds is read off its code (`bigmodel.model`), tensor by tensor. Guarantee: within 5% of the tensors that
the code makes, counted on torch's meta device (`bigmodel.inspect.memory.activation_bytes`), by a test.

`low` are the bytes of the run's precision, WIDE those of fp32.
"""

from dataclasses import dataclass
from typing import NamedTuple

from bigmodel.config.recurrent_settings import GATES
from bigmodel.config.settings import ModelSettings, Settings
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.state_memory import WIDE, bytes_of

HASH_BYTES = 24  # of dropout's 64-bit hash, for each element while it is made
CHUNK_BYTES = 2**29  # of the loss: at most so many bytes of logits at once (kernels/linear_cross_entropy.py)
BLOCK_BYTES = (
    2**26
)  # of each of four arrays of a step of the divergence from a teacher (kernels/linear_distillation.py)


class Held(NamedTuple):
    """Bytes that one block keeps for its backward: without checkpointing, and of these with selective checkpointing."""

    all: int
    kept: int

    def __add__(self, other: "Held") -> "Held":  # type: ignore[override]
        return Held(self.all + other.all, self.kept + other.kept)


class Stack(NamedTuple):
    """Bytes: of all blocks until their backward, of the last block's recomputation, of gradients inside it, and, with
    other blocks before the last ones, of recomputation and gradients there less what the last ones have let go."""

    held: int
    again: int
    inside: int
    earlier: int = 0


class Taught(NamedTuple):
    """The teacher of [distillation], as far as a micro-batch sees it: width of its states, bytes of a number."""

    model: ModelSettings
    low: int


def activation_plan(settings: Settings, vocabulary: int, packs: int, teacher: Taught | None = None) -> int:
    """Peak bytes of a micro-batch of `packs` packed sequences, forward and backward, on each rank."""
    return sum(activation_parts(settings, vocabulary, packs, teacher).values())


def activation_parts(settings: Settings, vocabulary: int, packs: int, teacher: Taught | None = None) -> dict[str, int]:
    """The peak in two parts: "loss buffers" are the logits of a chunk with their gradient and, where the loss is the
    peak, the gradients that it computes; "activations" are the rest."""
    model, kind = settings.model, settings.training.activation_checkpointing
    side = _Side.of_target(settings, packs)
    rows = vocabulary // settings.training.tensor_parallel_ranks  # of the output matrix on a rank
    stacks = [side.decoder(kind)]
    source = _Side.of_source(settings, packs)
    if source and not model.is_recurrent:
        stacks.append(source.stack([source.block()] * source.model.num_layers, kind))
    of_sources = source.states_and_gradient() if source else 0
    others = model.num_mtp_modules * (side.last_norm() + 2 * side.states() + side.matrix_gradient(rows))
    twice = side.states() if kind != "none" and side.is_input_held_twice else 0
    again = stacks[0].again - twice
    head = side.head(rows) + (side.tokens * teacher.model.hidden_size * teacher.low if teacher else 0)
    moments = [
        others + side.last_norm() + side.states() + head,
        others + side.states() + side.norm_backward(),
        others + again + stacks[0].inside,
        others + again + (0 if model.is_recurrent else side.gathered_gradients()),
        again + HASH_BYTES * side.tokens * model.hidden_size * (model.dropout > 0),
        stacks[0].earlier - twice,
    ]
    if source and len(stacks) > 1:  # the last block of the encoder, when the decoder's are done
        moments.append(stacks[1].again + stacks[1].inside + source.states() - of_sources - stacks[0].held)
    if teacher:
        moments.append(others + side.last_norm() + side.of_teacher(teacher))
    held = sum(stack.held for stack in stacks) + of_sources
    held += side.positions() + (source.positions() if source else 0)
    held += _gathered(settings, side)
    loss = side.chunk(vocabulary, teacher is not None) + (head if moments[0] == max(moments) else 0)
    peak = held + max(moments) + side.chunk(vocabulary, teacher is not None)
    return {"activations": peak - loss, "loss buffers": loss}


def _gathered(settings: Settings, side: "_Side") -> int:
    """Of tensor-parallel ranks: the positions of the others, in the inputs of the two first products of one block, and
    in the head with their gradient."""
    return 4 * (settings.training.tensor_parallel_ranks - 1) * side.states()


@dataclass(frozen=True)
class _Side:
    """A stack of blocks: its tokens, and those of the source that its blocks attend to.

    `adapters`: of one block, path of the matrix -> (ranks, rows) summed over its parts; None without [lora]: all
    weights are trained. Parameters of `training.freeze` are taken for trained ones. `gathered`: tokens of all ranks
    that share the sequence, if their keys are gathered.
    """

    model: ModelSettings
    low: int
    tokens: int
    sources: int
    adapters: dict[str, tuple[int, int]] | None
    gathered: int = 0

    @classmethod
    def of_target(cls, settings: Settings, packs: int) -> "_Side":
        data, low = settings.data, bytes_of(settings.training.precision)
        tokens, sources = packs * data.sequence_length, packs * data.source_sequence_length
        sharing = settings.training.ranks_per_sequence
        is_gathered = (
            settings.training.sequence_parallel_ranks > 1 and settings.training.sequence_parallel_method == "all_gather"
        )
        return cls(
            settings.model, low, tokens // sharing, sources, _adapters(settings, "blocks.0."), tokens * is_gathered
        )

    @classmethod
    def of_source(cls, settings: Settings, packs: int) -> "_Side | None":
        data, low = settings.data, bytes_of(settings.training.precision)
        if not settings.model.has_source:
            return None
        model = settings.model if settings.model.is_recurrent else settings.model.encoder
        return cls(model, low, packs * data.source_sequence_length, 0, _adapters(settings, "encoder.blocks.0."))

    def states(self) -> int:
        return self.low * self.tokens * self.model.hidden_size

    @property
    def is_input_held_twice(self) -> bool:
        """Whether a block's input is also what its first product or, in fp32, its first norm keeps."""
        return self.adapters is None and (self.model.norm_placement in ("output", "post") or self.low == WIDE)

    def decoder(self, kind: str) -> Stack:
        """Of its blocks; those with experts are the last ones."""
        model = self.model
        if model.is_recurrent:
            return self.stack(self.recurrent_blocks(), kind)
        sparse = model.num_expert_layers
        dense = [self.block()] * (model.num_layers + model.num_mtp_modules - sparse)
        if not sparse:
            return self.stack(dense, kind)
        last = self.stack([self.block(has_experts=True)] * sparse, kind, self.inside_experts())
        if not dense:
            return last
        first = self.stack(dense, kind)
        earlier = first.again + first.inside - last.held
        return Stack(first.held + last.held, last.again, last.inside, earlier)

    def stack(self, blocks: list[Held], kind: str, inside: int = 0) -> Stack:
        """`inside`: of the gradients in the last block; 0: see there."""
        (all_, kept), inside = blocks[-1], inside or self.inside()
        if kind == "none":
            return Stack(sum(block.all for block in blocks), 0, inside)
        if kind == "full":
            return Stack(self.states() * len(blocks), all_, inside)
        return Stack(sum(block.kept + self.states() for block in blocks), all_ - kept, inside)

    def inside(self) -> int:
        """Gradients in the feed-forward or of a norm after it; of a recurrent layer those of its gates and states."""
        inner = 2 * self.model.intermediate_size
        if self.model.is_recurrent:
            inner = {"rnn": 6, "gru": 15, "lstm": 14}[self.model.cell] * self.model.hidden_size
        return self._or_norm(self.low * self.tokens * inner + self.states())

    def inside_experts(self) -> int:
        """Gradients of a layer with experts at the largest of three moments: of its rows; of their inner states and of
        the output matrices; of both factors of the inner states. By the last two the rows' outputs are gone, at all
        three the shared experts, but for the gradient of their input."""
        experts, model = self.model.experts, self.model
        assert experts is not None
        pairs, width, inner = self.tokens * experts.per_token, model.hidden_size, model.expert_width
        matrices = experts.count * inner * width
        routed = self.low * max(pairs * width, pairs * inner + matrices, 2 * pairs * inner - pairs * width)
        if experts.shared:
            shared = experts.shared * inner
            routed += self.states() - self.feed_forward(shared).all
            routed = max(routed, self.low * self.tokens * 2 * shared)
        return self._or_norm(routed + self.states())

    def _or_norm(self, in_products: int) -> int:
        ends_with_norm = self.model.norm_placement != "pre"
        return max(in_products, (self.norm_backward() - self.norm()) * ends_with_norm)

    def block(self, has_experts: bool = False) -> Held:
        model = self.model
        held = self.attention() + (self.experts() if has_experts else self.feed_forward(model.intermediate_size))
        sublayers = 2
        if model.kind == "encoder_decoder" and model.source_attention == "cross":
            held += self.cross_attention()
            sublayers = 3
        norms = 2 if model.norm_placement == "sandwich" else 1
        masks = self.tokens * model.hidden_size * (model.dropout > 0)
        return held + Held(sublayers * (norms * self.norm() + masks), 0)

    def norm(self) -> int:
        """RMSNorm: its input in fp32, one number and, for the weight's gradient, the input divided by the root of the
        mean square. LayerNorm: its input in fp32, and two numbers."""
        width = self.model.hidden_size
        if self.model.norm == "layer":
            return WIDE * self.tokens * (width + 2)
        return WIDE * self.tokens * ((2 if self.adapters is None else 1) * width + 1)

    def last_norm(self) -> int:
        return 0 if self.model.norm_placement == "post" else self.norm()

    def product(self, path: str, inputs: int, outputs: int, tokens: int = 0, is_read: bool = True) -> Held:
        """A matrix: its input, unless another one counts it, and its output, which selective checkpointing keeps and
        of which the rest of the block counts what is read. Adapters keep A x; B A x is kept as outputs of products."""
        tokens = tokens or self.tokens
        ranks, rows = (self.adapters or {}).get(path, (0, 0))
        has_gradient = self.adapters is None or ranks > 0
        of_input = inputs * has_gradient * is_read
        return Held(self.low * tokens * (of_input + ranks), self.low * tokens * (outputs + ranks + rows))

    def attention(self) -> Held:
        """Query, key and value in one tensor; rotated queries and keys; out with the logarithm of its sums."""
        model, low, tokens = self.model, self.low, self.tokens
        queries, keys = (heads * model.resolved_head_dim for heads in (model.num_heads, model.num_kv_heads))
        out = low * tokens * queries + WIDE * tokens * model.num_heads
        held = self.product("attention.query_key_value", model.hidden_size, queries + 2 * keys)
        held += self.product("attention.output", queries, model.hidden_size, is_read=False) + Held(out, out)
        more = low * tokens * (queries + 2 * keys) + self.head_norms(tokens, (model.num_heads, model.num_kv_heads))
        if model.position_embedding == "rotary" or model.qk_norm:
            more += low * tokens * (queries + keys)
        more += low * self.gathered * 2 * keys
        if model.kind == "encoder_decoder" and model.source_attention == "mixed":
            # The source's keys and values, then keys and values of both sides in reverse order.
            held += self.product("attention.source_key_value", 0, 2 * keys, self.sources)
            more += low * (tokens + 2 * self.sources) * 2 * keys + self.head_norms(self.sources, (model.num_kv_heads,))
        return held + Held(more, 0)

    def gathered_gradients(self) -> int:
        """Of gathered keys and values, in fp32: those sent and those received."""
        return 2 * WIDE * self.gathered * 2 * self.model.num_kv_heads * self.model.resolved_head_dim

    def cross_attention(self) -> Held:
        model, low, tokens, sources = self.model, self.low, self.tokens, self.sources
        queries, keys = (heads * model.resolved_head_dim for heads in (model.num_heads, model.num_kv_heads))
        out = low * tokens * queries + WIDE * tokens * model.num_heads
        held = self.product("cross_attention.query", model.hidden_size, queries)
        held += self.product("cross_attention.key_value", 0, 2 * keys, sources)
        held += self.product("cross_attention.output", queries, model.hidden_size, is_read=False) + Held(out, out)
        more = low * (tokens * queries + sources * 2 * keys)
        more += self.head_norms(tokens, (model.num_heads,)) + self.head_norms(sources, (model.num_kv_heads,))
        if model.qk_norm:
            more += low * (tokens * queries + sources * keys)
        return held + Held(more, 0)

    def head_norms(self, tokens: int, heads: tuple[int, ...]) -> int:
        """RMSNorms over the channels of each head, or of all heads together."""
        if not self.model.qk_norm:
            return 0
        is_each = self.model.qk_norm_over == "head"
        copies = (self.low < WIDE) + (self.adapters is None)  # in fp32 the input is part of the projection
        width = copies * self.model.resolved_head_dim
        return sum(WIDE * tokens * (width * number + (number if is_each else 1)) for number in heads)

    def experts(self) -> Held:
        """Rows of the chosen experts: input, gate and up, the activated gate, the product of both, output. The
        router: its input, in low precision a copy in fp32, logits, scores and what the balance reads of them, and of
        each pair of token and expert its number, its weight and its place. The shared experts."""
        experts, model, width = self.model.experts, self.model, self.model.hidden_size
        assert experts is not None
        pairs, inner = self.tokens * experts.per_token, model.expert_width
        products = self.low * (pairs * (2 * inner + 2 * width) + self.tokens * width)  # rows in and out, their sums
        logits = WIDE * self.tokens * experts.count
        held = Held(self.low * pairs * (2 * width + 4 * inner), products + logits)
        held += Held(WIDE * self.tokens * width + 3 * logits + pairs * (3 * 8 + 3 * WIDE), 0)
        if experts.shared:
            held += self.feed_forward(experts.shared * inner)
        return held

    def feed_forward(self, intermediate_size: int) -> Held:
        """Gate and up, the activated gate, the product of both; not gated: up and its activation, relu only the
        latter."""
        model, width = self.model, self.model.hidden_size
        inner = self.low * self.tokens * intermediate_size
        first = "gate_up" if model.gated else "up"
        held = self.product(f"feed_forward.{first}", width, (2 if model.gated else 1) * intermediate_size)
        held += self.product("feed_forward.down", intermediate_size, width)
        if model.gated:
            return held + Held(3 * inner, 0)
        is_once = model.activation == "relu" and held.all > 0
        return held + Held(0 if is_once else inner, 0)

    def recurrent_blocks(self) -> list[Held]:
        """cuDNN's layers keep about as much as our scan (`bigmodel.model.recurrent.layer`), in the run's precision:
        gates, states and, with more than one gate, an inner value; lstm two kinds of states."""
        model, width = self.model, self.model.hidden_size
        numbers = {"rnn": 1, "gru": 5, "lstm": 7}[model.cell] * (WIDE if model.peepholes else self.low)
        rows = [self.tokens] * model.num_layers + [self.sources] * model.num_layers * model.has_source
        kept = GATES[model.cell] * self.low
        blocks = [Held(number * width * (numbers + (model.dropout > 0)), number * width * kept) for number in rows]
        embedded = self.norm() + self.states()
        if model.has_source:
            embedded += (WIDE * 2 + self.low) * self.sources * width
            embedded += 6 * self.states()  # attention to the source: query, what it found, both joined, its tanh
        return [blocks[0] + Held(embedded, 0), *blocks[1:]]

    def states_and_gradient(self) -> int:
        """Of an encoder with its last norm; every block of the decoder adds to the gradient."""
        return (0 if self.model.is_recurrent else self.last_norm()) + 3 * self.states()

    def positions(self) -> int:
        """Cosines and sines, one table for each kind of layer."""
        model = self.model
        if model.position_embedding != "rotary" or model.is_recurrent:
            return 0
        kinds = 2 if model.sliding_window and model.full_attention_every else 1
        return kinds * WIDE * self.tokens * model.rotary_channels

    def matrix_gradient(self, vocabulary: int) -> int:
        """Of the output matrix, in fp32."""
        return WIDE * vocabulary * self.model.hidden_size if self.adapters is None else 0

    def head(self, vocabulary: int) -> int:
        """The gradients that the loss computes in its forward: of the states and of the output matrix; in the backward
        one of them again, in the precision of the weights."""
        if self.model.classification:
            return 0
        gradient = self.matrix_gradient(vocabulary)
        return self.states() + gradient + gradient // WIDE * self.low

    def norm_backward(self) -> int:
        """Of the last norm, at its largest."""
        wide = 16 if self.model.norm == "layer" or self.adapters is not None else 24 if self.low < WIDE else 28
        return wide * self.tokens * self.model.hidden_size

    def of_teacher(self, teacher: Taught) -> int:
        """Of its forward, at the end of a block's feed-forward."""
        theirs = teacher.model
        inner = (4 if theirs.gated else 2) * theirs.intermediate_size
        return self.tokens * (3 * theirs.hidden_size + inner) * teacher.low

    def chunk(self, vocabulary: int, has_teacher: bool = False) -> int:
        """Logits of a part of the tokens, of a teacher too, and their gradient."""
        if self.model.classification:
            return 0
        logits = min(CHUNK_BYTES, WIDE * self.tokens * vocabulary * (1 + has_teacher))
        own = logits // (1 + has_teacher)
        of_divergence = 4 * min(BLOCK_BYTES, WIDE * self.tokens * vocabulary) * has_teacher
        return logits + own // WIDE * self.low + of_divergence


def _adapters(settings: Settings, block: str) -> dict[str, tuple[int, int]] | None:
    if not settings.lora.rank:
        return None
    found: dict[str, tuple[int, int]] = {}
    for one in parameters_of(settings, 1):
        path, is_adapter, rest = one.name.removeprefix(block).partition(".lora.")
        if one.name.startswith(block) and is_adapter:
            ranks, rows = found.get(path, (0, 0))
            found[path] = (ranks + one.shape[0], rows) if rest.endswith(".a.weight") else (ranks, rows + one.shape[0])
    return found
