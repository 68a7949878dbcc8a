"""Examples of a run: the objective of each document, the lengths of its examples, the examples.

In: data settings, the run's seed. Out: for chunks, the columns of the plan (`Chunk`'s last four); for a chunk and its
document, an `Example`. Example: span corruption of BOS 11 12 13 14 EOS that hides 12 and 14 is planned as 5 source
tokens and 6 labels; `make` gives the source 11 S0 13 S1 EOS and the labels S0 12 S1 14 S2 EOS.

Guarantees: the plan depends on (seed, source, epoch, shard, row) and lengths only, random draws on these and the
chunk's start. Rank, step and pack do not occur, so an example is the same at any world size and after any restart.

With one side (`data.source_sequence_length` = 0) the source comes before the target; with two it goes to the encoder.
Costs nothing for causal language modelling, whose plan has no further columns (`is_plain`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from bigmodel.config.settings import DataSettings, ObjectiveSettings, UserError
from bigmodel.data.objectives import decoder as decoder_inputs
from bigmodel.data.objectives.classification import (
    Find,
    classification,
    classification_of_source,
    kept_tokens,
    weighted,
)
from bigmodel.data.objectives.example import NUM_MARKS, Example, Rule, SpecialTokens, chunk_text_of, rule_of
from bigmodel.data.objectives.noise import noised, noised_lengths
from bigmodel.data.objectives.noise_table import NOISES
from bigmodel.data.objectives.pairs import pair, pair_lengths
from bigmodel.data.objectives.supervised import SUPERVISED, Measured, Supervised, supervised
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.randomness import make_key, words

PAIRS, CLASSIFICATION = "pairs", "classification"


class Pair(NamedTuple):
    """A stored pair: both texts with BOS and EOS."""

    source: np.ndarray
    target: np.ndarray


Document = np.ndarray | Pair | Supervised


class Planned(Protocol):
    """The fields of `bigmodel.data.plan.shuffle.Chunk` that `Examples.make` uses."""

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
    """An objective with its share; the plan refers to it by number."""

    name: str  # in metrics; UL2's are ul2_r, ul2_s and ul2_x
    settings: ObjectiveSettings
    share: float  # of all documents, and on average of their tokens
    mode: str = ""

    @property
    def rule(self) -> Rule:
        return rule_of(self.settings.kind)


def objectives_of(data: DataSettings) -> list[Objective]:
    """In the order of their numbers; the next number is that of pairs."""
    total = sum(one.share for one in data.wanted_objectives)
    found = []
    for one in data.wanted_objectives:
        denoisers = rule_of(one.kind).denoisers(one)
        share = one.share / total / len(denoisers)
        found += [Objective(name, settings, share, mode) for name, settings, mode in denoisers]
    return found


def num_special_tokens(data: DataSettings) -> int:
    """Ids above the tokenizer's that the objectives need."""
    if not data.needs_special_tokens:
        return 0
    kinds = {one.kind for one in data.wanted_objectives if OBJECTIVES[one.kind].special_tokens}
    given = {"span_corruption"} if data.first_sentinel else set()
    if data.mask_token:
        given |= {"masked", "denoising"}
    all_given = kinds <= given and (data.mask_token or not (data.masked_decoder_share or data.masks_augmented))
    return 0 if all_given else NUM_MARKS + (0 if data.first_sentinel else data.sentinels)


def nothing_asked(where: str, data: DataSettings) -> str:
    """An error for the user: documents too short to have labels."""
    asked = ", ".join(_in_words(one) for one in data.objectives)
    return (
        f"data.objectives = {asked}: no label in {where}, whose documents have no token that far ahead, none to hide, "
        f"or no answer within data.max_document_length = {data.max_document_length}; set a smaller ahead or a larger "
        "length, add another objective, or drop short documents (prepare.min_characters)"
    )


def _in_words(objective: ObjectiveSettings) -> str:
    read = [f"{name} = {getattr(objective, name)}" for name in OBJECTIVES[objective.kind].reads]
    return f"{objective.kind} with {' and '.join(read)}" if read else objective.kind


class Examples:
    """The examples of a run. `vocabulary`: the tokenizer's size; not needed to plan."""

    def __init__(self, data: DataSettings, seed: int, vocabulary: int = 0) -> None:
        """Raises `UserError` if an objective's shortest example does not fit a pack, and for special tokens that the
        tokenizer lacks."""
        self.data, self._seed, self._vocabulary = data, seed, vocabulary
        for name in ("first_sentinel", "mask_token"):
            if vocabulary and getattr(data, name) >= vocabulary:
                raise UserError(
                    f"data.{name} = {getattr(data, name)}: the tokenizer of {data.directory} has the ids 0 to "
                    f"{vocabulary - 1}; set the id of its token, or leave it out"
                )
        self.objectives = objectives_of(data)
        self.find_class: Find | None = None  # with classes: to make examples, not to plan them
        self.kinds_of_tokens: np.ndarray | None = None  # to make examples whose sentences are permuted
        self._in_place = [noise for noise in data.augmentation if NOISES[noise.kind].in_place]
        self.class_weights: np.ndarray | None = None  # (classes,) float32, in the loss; None: all 1
        self._bounds = np.cumsum([objective.share for objective in self.objectives])[:-1]
        self.longest = np.array([self._longest_piece(objective) for objective in self.objectives])

    @property
    def is_plain(self) -> bool:
        """Whether chunks are their own examples: plain text in causal order, one side."""
        first = self.objectives[0]
        alone = len(self.objectives) == 1 and first.rule.is_plain(first.settings)
        return alone and not self._two_sides and not self._masks_inputs(first)

    @property
    def pairs(self) -> int:
        """The number of the objective of pairs."""
        return len(self.objectives)

    @cached_property
    def names(self) -> list[str]:
        """Names of objectives by number."""
        return [*(objective.name for objective in self.objectives), CLASSIFICATION if self.data.classes else PAIRS]

    @property
    def _two_sides(self) -> bool:
        return self.data.source_sequence_length > 0

    # ---- plan ----

    def choose(self, source: int, epoch: int, shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The objective's number of each document, drawn by shares in every epoch: (n,).

        A draw does not depend on the document's length or on other draws, so it is the same in any lane and order. A
        share s is thus one of documents, and on average of tokens: over n documents whose lengths have the standard
        deviation c times the mean, the share of tokens deviates by sqrt(s (1 - s) (1 + c^2) / n).

        Raises `UserError` if the sentinels are too few for the longest chunk.
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
        """(n, 4) for chunks of plain text: `Chunk`'s objective, tokens, labels and source positions.

        `lengths`: positions of each chunk; `remaining`: positions of its document after it.
        """
        columns = np.empty((len(numbers), 4), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            columns[mine] = self._columns(number, *self._lengths(number, lengths[mine], remaining[mine]))
        return columns

    def measure_pairs(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The same for pairs whose texts have these numbers of positions."""
        data = self.data
        if data.classes:
            return self._measure_labelled(sources)
        read, said = pair_lengths(sources, targets, data.longest_source, data.max_document_length)
        return self._columns(self.pairs, noised_lengths(data.augmentation, read - 1) + 1, said, said)

    def measure_supervised(self, source: str, documents: Measured) -> np.ndarray:
        """The same for supervised documents. Raises `UserError` for a model that is no decoder."""
        if self._two_sides or self.data.trains_encoder:
            what = "masked tokens" if self.data.trains_encoder else "data.source_sequence_length"
            raise UserError(
                f"data source {source!r} holds chats, or prompts with responses, which train a decoder; remove "
                f"{what}, or leave the source out with data.mix"
            )
        nothing = np.zeros_like(documents.tokens)
        return np.stack([nothing + SUPERVISED, documents.tokens, documents.labels, nothing], axis=1)

    def _measure_labelled(self, texts: np.ndarray) -> np.ndarray:
        one, data = np.ones_like(texts), self.data
        if self._two_sides:
            read = np.minimum(texts, data.longest_source)
            return self._columns(self.pairs, noised_lengths(data.augmentation, read - 1) + 1, one, one)
        kept = kept_tokens(texts, data.max_document_length, data.ends_classified)
        around = 1 + data.ends_classified  # BOS and EOS
        kept = noised_lengths(data.augmentation, kept - around) + around
        return self._columns(self.pairs, np.zeros_like(texts), kept, one)

    def _lengths(
        self, number: int, lengths: np.ndarray, remaining: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source tokens, decoder tokens, labels) of chunks under an objective."""
        objective = self.objectives[number]
        return objective.rule.lengths(objective.settings, objective.mode, lengths, remaining)

    def _columns(self, number: int, source: np.ndarray, decoder: np.ndarray, asked: np.ndarray) -> np.ndarray:
        data = self.data
        if not self._two_sides:
            return np.stack([np.full_like(source, number), source + decoder, asked, np.zeros_like(source)], axis=1)
        if data.dropped_decoder_share:
            decoder = asked = decoder_inputs.num_kept(decoder, data.dropped_decoder_share)
        if data.fixed_target_tokens:
            asked = np.minimum(asked, data.fixed_target_tokens)
            decoder = np.full_like(decoder, data.fixed_target_tokens)
        return np.stack([np.full_like(source, number), decoder, asked, source], axis=1)

    def _longest_piece(self, objective: Objective) -> int:
        """The most positions of a chunk whose example fits the limits on one document."""
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
            needed = objective.rule.num_sentinels(objective.settings, longest)
            if needed > self.data.sentinels:
                more = "a longer mean_span" if self.data.first_sentinel else f"data.sentinels = {needed}"
                raise UserError(
                    f"data.sentinels = {self.data.sentinels} is too few for {objective.name}: a chunk of {longest} "
                    f"tokens has {needed - 1} hidden spans; set {more} or a shorter data.max_document_length"
                )

    # ---- make ----

    def make(self, chunk: Planned, document: Document) -> Example:
        """The example of a chunk of `document`, for one side or two."""
        if isinstance(document, Supervised):
            return supervised(document, self.data.max_document_length)
        place = (chunk.source, chunk.epoch, chunk.shard, chunk.row, chunk.start)
        key = make_key("example", self._seed, *place)
        if isinstance(document, Pair) and self.data.classes:
            return self._labelled(chunk, document, key)
        if isinstance(document, Pair):
            special_tokens = self._marks(document.source)
            positions = np.array([len(document.source) - 1]), np.array([len(document.target) - 1])
            read, said = pair_lengths(*positions, self.data.longest_source, self.data.max_document_length)
            example = pair(*document, int(read[0]), int(said[0]), special_tokens.bos)
            example = example._replace(source=self._augmented(example.source, 0, 1, key, special_tokens))
        else:
            special_tokens = self._marks(document)
            chunk_text = chunk_text_of(document, chunk.start, chunk.length)
            objective = self.objectives[chunk.objective]
            example = objective.rule.make(objective.settings, objective.mode, chunk_text, key, special_tokens)
            if self._masks_inputs(objective):
                inputs = noised(self._in_place, example.tokens[1:], make_key("inputs", key), special_tokens.mask)
                example = example._replace(tokens=np.concatenate([example.tokens[:1], inputs]))
        return self._laid_out(example, key, special_tokens)

    def _augmented(self, tokens: np.ndarray, first: int, after: int, key: int, marks: SpecialTokens) -> np.ndarray:
        """Tokens with data.augmentation on all but the `first` ones and the last `after` ones."""
        if not self.data.augmentation:
            return tokens
        end = len(tokens) - after
        own = make_key("augmentation", key)
        text = noised(self.data.augmentation, tokens[first:end], own, marks.mask, self.kinds_of_tokens)
        return np.concatenate([tokens[:first], text, tokens[end:]])

    def _masks_inputs(self, objective: Objective) -> bool:
        return bool(self._in_place) and OBJECTIVES[objective.settings.kind].has_noisy_inputs

    def check_augmentation(self, has_texts: bool, has_pairs: bool) -> None:
        """Raise `UserError` for a noise that no example of the data has. `has_texts`: plain ones."""
        masks = has_texts and any(self._masks_inputs(objective) for objective in self.objectives)
        for noise in self.data.augmentation:
            if not has_pairs and not (masks and NOISES[noise.kind].in_place):
                raise UserError(
                    f'data.augmentation: kind = "{noise.kind}" has no effect on this data: it changes the source texts '
                    "of pairs, and labelled documents; mask_tokens also changes the inputs of causal text; for plain "
                    'text set data.objectives = [{ kind = "denoising", noise = [...] }], or leave it out'
                )

    def _labelled(self, chunk: Planned, document: Pair, key: int) -> Example:
        assert self.find_class, "examples of labelled documents need the numbers of the classes"
        number = self.find_class(document.target, chunk.source, chunk.shard, chunk.row)
        data, texts, marks = self.data, np.array(len(document.source) - 1), self._marks(document.source)
        if self._two_sides:
            example = classification_of_source(document.source, number, min(int(texts), data.longest_source))
            example = example._replace(source=self._augmented(example.source, 0, 1, key, marks))
        else:
            length = int(kept_tokens(texts, data.max_document_length, data.ends_classified))
            example = classification(document.source, number, length, data.ends_classified)
            tokens = self._augmented(example.tokens, 1, int(data.ends_classified), key, marks)
            example = example._replace(tokens=tokens, labels=example.labels[len(example.labels) - len(tokens) :])
        return example if self.class_weights is None else weighted(example, self.class_weights)

    def _marks(self, document: np.ndarray) -> SpecialTokens:
        data = self.data
        ends = int(document[0]), int(document[-1])
        return SpecialTokens(
            *ends, self._vocabulary, data.sentinels, data.first_sentinel, data.mask_token, self.kinds_of_tokens
        )

    def _laid_out(self, example: Example, key: int, special_tokens: SpecialTokens) -> Example:
        data = self.data
        if not self._two_sides:
            return decoder_inputs.one_side(example)
        if data.target_ahead > 1:
            example = decoder_inputs.later(example, data.target_ahead)
        if data.masked_decoder_share:
            share, starts = data.masked_decoder_share, data.target_ahead
            example = decoder_inputs.mask_inputs(example, share, key, special_tokens.mask, starts)
        if data.dropped_decoder_share:
            example = decoder_inputs.drop_positions(example, data.dropped_decoder_share, key)
        if data.fixed_target_tokens:
            example = decoder_inputs.fixed(example, data.fixed_target_tokens)
        return example
