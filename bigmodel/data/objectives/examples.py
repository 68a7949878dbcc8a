"""Examples: which objective a document is given, how long its examples are, and what is in them.

Takes the data settings and the run's seed. Gives, for pieces of documents, the columns that the plan needs
(`Chunk`'s last four) and, for one piece and its document, an `Example`. Guarantees: what is planned follows from
(seed, source, epoch, shard, row) and lengths; what is drawn follows from these and the piece's start. Neither rank,
step nor pack occurs, so an example is the same in any world and after any restart.

With one side (`data.source_sequence_length` = 0) a source is laid before its targets; with two it goes to the encoder.
Costs: nothing for causal language modelling, whose plan has no further columns (`plain`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from bigmodel.config.settings import DataSettings, ObjectiveSettings, UserError
from bigmodel.data.objectives import objectives
from bigmodel.data.objectives.objectives import NUM_MARKS, ChunkText, Example, SpecialTokens
from bigmodel.data.randomness import make_key, words

PAIRS = "pairs"
UL2 = (  # Tay et al. 2023, table 1: mode, density, mean span; S predicts the last quarter
    *(("R", 0.15, span) for span in (3.0, 8.0)),
    *(("X", density, span) for density, span in ((0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0))),
)
UL2_PREFIX_SHARE = 0.75
WITH_MARKS = ("fill_in_the_middle", "span_corruption", "ul2", "masked")


class Pair(NamedTuple):
    """A stored pair: both texts with BOS and EOS."""

    source: np.ndarray
    target: np.ndarray


Document = np.ndarray | Pair


class Planned(Protocol):
    """What making needs of a `bigmodel.data.plan.shuffle.Chunk`."""

    @property
    def source(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def objective(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective as the plan numbers them."""

    name: str  # in metrics; UL2's are ul2_r, ul2_s and ul2_x
    settings: ObjectiveSettings
    share: float  # of all documents, and on the average of their tokens
    mode: str = ""


def objectives_of(data: DataSettings) -> list[Objective]:
    """In the order of their numbers; the number after the last is that of pairs."""
    wanted = data.objectives or [ObjectiveSettings(kind="span_corruption" if data.source_sequence_length else "causal")]
    total = sum(one.share for one in wanted)
    found = []
    for one in wanted:
        share = one.share / total
        if one.kind != "ul2":
            found.append(Objective(one.kind, one, share))
            continue
        share /= len(UL2) + 1
        for mode, density, span in UL2:
            corruption = ObjectiveSettings(kind="span_corruption", density=density, mean_span=span)
            found.append(Objective(f"ul2_{mode.lower()}", corruption, share, mode))
        found.append(Objective("ul2_s", ObjectiveSettings(kind="prefix", prefix_share=UL2_PREFIX_SHARE), share, "S"))
    return found


def num_special_tokens(data: DataSettings) -> int:
    """Ids above the tokenizer's that the objectives need."""
    kinds = {objective.settings.kind for objective in objectives_of(data)}
    modes = any(objective.mode for objective in objectives_of(data))
    needed = modes or data.masked_decoder_share or kinds & set(WITH_MARKS)
    return NUM_MARKS + data.sentinels if needed else 0


def nothing_asked(where: str, data: DataSettings) -> str:
    """An error for the user: documents too short for what is asked of them."""
    asked = ", ".join(
        f"{one.kind} with ahead = {one.ahead}" if one.kind == "causal" else one.kind for one in data.objectives
    )
    return (
        f"data.objectives = {asked}: nothing is asked in {where}, whose documents have no token so far ahead, or none "
        "to hide; set a smaller ahead, add another objective, or drop short documents (prepare.min_characters)"
    )


class Examples:
    """The examples of a run. `vocabulary` is the tokenizer's; the plan alone needs none."""

    def __init__(self, data: DataSettings, seed: int, vocabulary: int = 0) -> None:
        """Raises `UserError` where a pack holds no example of an objective."""
        self.data, self._seed, self._vocabulary = data, seed, vocabulary
        self.objectives = objectives_of(data)
        self._bounds = np.cumsum([objective.share for objective in self.objectives])[:-1]
        self.longest = np.array([self._longest_piece(objective) for objective in self.objectives])

    @property
    def is_plain(self) -> bool:
        """Whether documents are plain text in causal order and one side: their pieces are their examples."""
        first = self.objectives[0].settings
        return len(self.objectives) == 1 and first.kind == "causal" and first.ahead == 1 and not self._two_sides

    @property
    def pairs(self) -> int:
        """The number of the objective of pairs."""
        return len(self.objectives)

    @cached_property
    def names(self) -> list[str]:
        """By number."""
        return [*(objective.name for objective in self.objectives), PAIRS]

    @property
    def _two_sides(self) -> bool:
        return self.data.source_sequence_length > 0

    # ---- planned ----

    def choose(self, source: int, epoch: int, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The number of the objective of each document, by shares, drawn anew in every epoch: (n,).

        A document's draw knows neither its length nor other draws, so that it is the same in any lane and order. The
        share s of an objective is then one of documents, and of tokens on the average: of n documents whose lengths
        deviate by c times their mean, the share of tokens deviates by sqrt(s (1 - s) (1 + c^2) / n).

        Raises `UserError` where the sentinels are too few for the longest piece.
        """
        self._check_sentinels()
        if len(self.objectives) == 1:
            return np.zeros(len(rows), dtype=np.int64)
        chosen = np.empty(len(rows), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            mine = np.flatnonzero(shards == shard)
            drawn = words(make_key("objective", self._seed, source, epoch, shard), int(rows[mine].max()) + 1)
            chosen[mine] = np.searchsorted(self._bounds, drawn[rows[mine]] / 2.0**64, side="right")
        return chosen

    def measure(self, numbers: np.ndarray, lengths: np.ndarray, remaining: np.ndarray) -> np.ndarray:
        """(n, 4) of pieces of plain text: `Chunk`'s objective, positions, targets and source positions.

        lengths: positions of each piece; remaining: those that its document has after it.
        """
        columns = np.empty((len(numbers), 4), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            columns[mine] = self._columns(number, *self._lengths(number, lengths[mine], remaining[mine]))
        return columns

    def measure_pairs(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The same of pairs, whose texts have so many positions each."""
        data = self.data
        read, said = objectives.pair_lengths(sources, targets, data.longest_source, data.max_document_length)
        return self._columns(self.pairs, read, said, said)

    def _lengths(
        self, number: int, lengths: np.ndarray, remaining: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, decoder positions, targets) of pieces under an objective."""
        objective = self.objectives[number]
        settings, texts, nothing = objective.settings, lengths - (remaining == 0), np.zeros_like(lengths)
        if settings.kind == "causal":
            return nothing, lengths, objectives.ahead_targets(lengths, remaining, settings.ahead)
        if settings.kind == "fill_in_the_middle":
            return nothing, texts + 4, texts + 4
        if settings.kind == "masked":
            return nothing, lengths + 1, objectives.masked_targets(texts, settings.density)
        if settings.kind == "prefix":
            source, targets = objectives.prefix_lengths(lengths, settings.prefix_share, objective.mode)
        else:
            source, targets = objectives.span_corruption_lengths(
                texts, settings.density, settings.mean_span, objective.mode
            )
        return source, targets, targets

    def _columns(self, number: int, source: np.ndarray, decoder: np.ndarray, asked: np.ndarray) -> np.ndarray:
        data = self.data
        if not self._two_sides:
            return np.stack([np.full_like(source, number), source + decoder, asked, np.zeros_like(source)], axis=1)
        if data.dropped_decoder_share:
            decoder = asked = objectives.num_kept(decoder, data.dropped_decoder_share)
        if data.fixed_target_tokens:
            asked = np.minimum(asked, data.fixed_target_tokens)
            decoder = np.full_like(decoder, data.fixed_target_tokens)
        return np.stack([np.full_like(source, number), decoder, asked, source], axis=1)

    def _longest_piece(self, objective: Objective) -> int:
        """The most positions of a document whose example fits a pack's limits on one document."""
        data, number = self.data, self.objectives.index(objective)
        lengths = np.arange(1, data.max_document_length + data.longest_source + 1)
        source, decoder, _ = self._lengths(number, lengths, np.ones_like(lengths))
        fits = decoder <= (data.fixed_target_tokens or data.max_document_length)
        fits &= source <= data.longest_source if self._two_sides else source + decoder <= data.max_document_length
        if not fits.any():
            raise UserError(
                f"data.max_document_length = {data.max_document_length} and data.max_source_length = "
                f"{data.longest_source} "
                f"hold no example of {objective.name}; raise them"
            )
        return int(lengths[fits].max())

    def _check_sentinels(self) -> None:
        for objective, longest in zip(self.objectives, self.longest.tolist(), strict=True):
            if objective.settings.kind == "span_corruption":
                settings = objective.settings
                _, spans = objectives.noise_counts(np.array(longest), settings.density, settings.mean_span)
                if spans + 1 > self.data.sentinels:
                    raise UserError(
                        f"data.sentinels = {self.data.sentinels} is too few for {objective.name}: a piece of {longest} "
                        f"tokens has {spans} hidden spans; set data.sentinels = {spans + 1} or a shorter "
                        "data.max_document_length"
                    )

    # ---- made ----

    def make(self, chunk: Planned, document: Document) -> Example:
        """What the model reads of a chunk and is asked for, laid out for one side or two."""
        place = (chunk.source, chunk.epoch, chunk.shard, chunk.row, chunk.start)
        key = make_key("example", self._seed, *place)
        if isinstance(document, Pair):
            special_tokens = self._marks(document.source)
            positions = np.array([len(document.source) - 1]), np.array([len(document.target) - 1])
            read, said = objectives.pair_lengths(*positions, self.data.longest_source, self.data.max_document_length)
            example = objectives.pair(*document, int(read[0]), int(said[0]), special_tokens.bos)
        else:
            special_tokens = self._marks(document)
            piece = objectives.piece_of(document, chunk.start, chunk.length)
            example = self._of_text(self.objectives[chunk.objective], piece, key, special_tokens)
        return self._laid_out(example, key, special_tokens)

    def _marks(self, document: np.ndarray) -> SpecialTokens:
        return SpecialTokens(int(document[0]), int(document[-1]), self._vocabulary, self.data.sentinels)

    def _of_text(self, objective: Objective, piece: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
        settings = objective.settings
        if settings.kind == "causal":
            return objectives.causal_ahead(piece, settings.ahead)
        if settings.kind == "prefix":
            return objectives.prefix(piece, settings.prefix_share, objective.mode, special_tokens)
        if settings.kind == "fill_in_the_middle":
            return objectives.fill_in_the_middle(piece, settings.spm_share, key, special_tokens)
        if settings.kind == "masked":
            return objectives.masked(piece, settings.density, key, special_tokens)
        return objectives.span_corruption(
            piece, settings.density, settings.mean_span, objective.mode, key, special_tokens
        )

    def _laid_out(self, example: Example, key: int, special_tokens: SpecialTokens) -> Example:
        data = self.data
        if not self._two_sides:
            return objectives.one_side(example)
        if data.masked_decoder_share:
            example = objectives.mask_inputs(example, data.masked_decoder_share, key, special_tokens.mask)
        if data.dropped_decoder_share:
            example = objectives.drop_positions(example, data.dropped_decoder_share, key)
        if data.fixed_target_tokens:
            example = objectives.fixed(example, data.fixed_target_tokens)
        return example
