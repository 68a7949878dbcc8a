"""Settings of the data: from text to shards ([prepare]), from shards to packed sequences ([data])."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from bigmodel.config.augmentation_settings import NoiseSettings, SegmentationSettings
from bigmodel.config.sections import SET, UNSET, ReadBy, Section, key_of, setting
from bigmodel.data.objectives.noise_table import NOISES
from bigmodel.data.objectives.table import OBJECTIVES

READ_BY_OBJECTIVE = {"kind": ReadBy(OBJECTIVES)}
WITH_SPECIAL_TOKENS: dict[str, Any] = {
    "only_with": {"needs_special_tokens": True},
    "why": "no objective needs special tokens, no augmentation masks, and data.masked_decoder_share is 0",
}
WORDS: dict[str, Any] = {"only_with": {"tokenizer_model": "word"}}


class SourceSettings(Section):
    """One named source of documents to prepare."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100, description="source name; becomes a folder")
    files: list[str] = Field(
        min_length=1,
        description="paths, URLs (s3://, gs://, abfs://, hdfs:// and others of fsspec) or glob patterns of .parquet, "
        ".arrow, .jsonl, .ndjson, .json (an array, or objects), .txt (one document per file), .tar (WebDataset) or "
        ".mds files, or .lance folders; those of JSON, text and tars also compressed (gzip, bz2, xz, zstd, lz4), .mds "
        "also .br, .bz2, .gz, .snappy, .zst, .zstd; a path that exists is taken literally, even with * or [ ]",
    )
    format: Literal["", "parquet", "arrow", "jsonl", "json", "text", "mds", "webdataset", "lance"] = Field(
        "", description="format of the files; empty: by the names and first bytes"
    )
    column: str = Field(
        "text",
        description="column that holds the text; a.b is field b of column a; in a tar a suffix, for text also txt",
    )
    target_column: str | None = Field(None, description="second text of a source-target pair (encoder-decoder data)")
    tag: str = setting(
        "",
        only_with={"target_column": SET},
        description='text put before each source text, for example "<BT> " for back-translated sources',
    )
    split_by: Literal["pair", "target"] = setting(
        "pair",
        only_with={"target_column": SET},
        description="what decides between training and validation; target: pairs with equal targets, in all sources "
        "with this value, go the same way",
    )
    prompt_column: str | None = setting(
        None,
        only_with={"target_column": UNSET},
        description="text before that of `column`: only the latter, the response, is trained",
    )
    messages_column: str | None = setting(
        None,
        only_with={"target_column": UNSET, "prompt_column": UNSET},
        description="column that holds a chat: a list of messages with role and content (or from and value), and a "
        "weight if wanted; only what the assistant says is trained",
    )
    weight_column: str | None = setting(
        None,
        only_with={"is_supervised": True},
        why="only chats and responses (messages_column, prompt_column) have weights",
        description="column with the weight of a record in the loss, 0 to 1; null: 1",
    )

    label_column: str | None = Field(
        None, description="class of the document: text, integers, or true and false; see classification.classes"
    )

    @property
    def is_supervised(self) -> bool:
        """Whether only a part of each record is trained."""
        return bool(self.prompt_column or self.messages_column)

    @model_validator(mode="after")
    def _target_or_label(self) -> "SourceSettings":
        for name in ("target_column", "messages_column", "prompt_column") if self.label_column else ():
            if other := getattr(self, name):
                raise ValueError(
                    f"prepare.sources {self.name!r}: {name} = {other!r} and label_column = {self.label_column!r}: a "
                    "document has a text to predict or a class; leave one of them out"
                )
        return self


class DecontaminationSettings(Section):
    """Drop documents that share an n-gram of words with evaluation text."""

    files: list[str] = Field(min_length=1, description="evaluation files, in any format of a source")
    column: str = Field("text", description="column that holds their text")
    ngram: int = Field(13, ge=1, description="length of the n-gram in words; case and punctuation are ignored")


class PrepareSettings(Section):
    """From text to shards."""

    sources: list[SourceSettings] = Field([], description="empty: the embedded corpus, Python's own standard library")
    embedded: Literal["text", "pairs", "chats", "verbs"] = setting(
        "text",
        only_with={"sources": UNSET},
        description="content of the embedded corpus: code and documentation, pairs of function and description, short "
        "chats about sums and letters, or functions labelled with the verb of their name",
    )
    vocabulary: int = setting(
        32_000,
        only_with={"tokenizer": UNSET},
        why="it has its own vocabulary",
        ge=258,
        le=2**32 - 1,
        description="tokens of the trained tokenizer, special tokens included; of words: at most",
    )
    tokenizer_model: Literal["bpe", "word"] = setting(
        "bpe",
        only_with={"tokenizer": UNSET},
        why="it has its own model",
        description="of the trained tokenizer: bpe, byte-level; or word: the most frequent words, each a token, and "
        "<unk>, the unknown token, for all others. Blank space is not kept: decoded words are joined by one space",
    )
    words: Literal["punctuation", "whitespace"] = setting(
        "punctuation",
        **WORDS,
        description="where a text is cut into words: at blank space and around every punctuation mark, which is a word "
        "of its own; or at blank space alone, for text that is cut already",
    )
    lowercase: bool = setting(False, **WORDS, description="words in lower case")
    min_frequency: int = setting(2, **WORDS, ge=1, description="a word that is rarer in the training text has no token")
    tokenizer: Path | None = Field(
        None,
        description='absent or "train": a tokenizer is trained; else the path of a tokenizer.json or of a Hugging Face '
        "tokenizer folder",
    )
    chat_template: Path | None = setting(
        None,
        only_with={"has_chats": True},
        why="no source has a messages_column",
        description="file of a Jinja chat template; absent: that of the tokenizer's folder, or a plain one",
    )
    dropped_characters_share: float = setting(
        0.0,
        only_with={"tokenizer": SET},
        why="a trained tokenizer has tokens for all characters",
        ge=0,
        le=1,
        description="largest share of the characters that the tokenizer may drop because it has no token for them",
    )
    bpe_dropout: Literal["refuse", "off"] = setting(
        "refuse",
        only_with={"tokenizer": SET},
        why="a trained tokenizer has none",
        description="what to do with a tokenizer whose BPE leaves out merges at random: refuse it, or use all merges",
    )
    validation_share: float = Field(0.02, gt=0, lt=0.5, description="share of documents, by hash, kept for validation")
    shard_tokens: int = Field(32_000_000, ge=1_000, description="tokens in a full shard")
    content: Literal["tokens", "text"] = Field(
        "tokens", description="content of shards: token ids, or text that is tokenized while training"
    )
    segmentation: SegmentationSettings | None = setting(
        None,
        only_with={"content": "text"},
        description="random segmentations of the training texts, other ones in each pass; absent: the tokenizer's",
    )
    unicode_nfc: bool = Field(False, description="convert text to Unicode normal form C (composed)")
    remove_control_characters: bool = Field(False, description="except tab, line feed and carriage return")
    min_characters: int = Field(0, ge=0, description="shorter documents are dropped")
    max_characters: int = Field(0, ge=0, description="longer documents are dropped; 0: no limit")
    deduplicate: bool = Field(True, description="of equal texts in all sources, keep the first")
    decontaminate: DecontaminationSettings | None = None
    malformed_share: float = setting(
        0.0,
        only_with={"sources": SET},
        ge=0,
        le=1,
        description="largest share of a source's records that may be malformed; they are dropped",
    )
    workers: int = setting(
        0,
        only_with={"scheduler": UNSET},
        why="the workers of the scheduler do the work",
        ge=0,
        description="processes; 0: one per core",
    )
    scheduler: str = Field("", description="address of a Dask scheduler, whose workers are used; empty: this machine")

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _train_means_none(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                f"prepare.tokenizer = {value}: is a URL, and tokenizers are read from this machine; copy the file or "
                "the folder here and give its path"
            )
        return None if value == "train" else value

    @property
    def has_chats(self) -> bool:
        return any(source.messages_column for source in self.sources) or self.embedded == "chats"

    @model_validator(mode="after")
    def _supervised_sources_are_tokens(self) -> "PrepareSettings":
        if self.content == "text" and (self.has_chats or any(source.is_supervised for source in self.sources)):
            raise ValueError(
                'prepare.content = "text": chats and responses are stored as tokens, because their weights belong to '
                'tokens; set content = "tokens"'
            )
        return self

    @model_validator(mode="after")
    def _names_and_limits_make_sense(self) -> "PrepareSettings":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"prepare.sources: two sources are named {name!r}; give each its own name")
        if self.max_characters and self.max_characters < self.min_characters:
            raise ValueError(
                f"prepare.max_characters = {self.max_characters} is below prepare.min_characters = "
                f"{self.min_characters}: no document would be left; raise the first, or set it to 0 for no limit"
            )
        return self


class CurriculumStage(Section):
    """A mix that starts later in the run."""

    from_tokens: int = Field(
        ge=1,
        description="the mix starts after this many tokens, over all lanes, at each lane's next packing buffer",
    )
    mix: dict[str, float] = Field(min_length=1, description="share of tokens per source, as in data.mix")


class ObjectiveSettings(Section):
    """How a chunk becomes an example (`bigmodel.data.objectives`: each objective and the paper it is from)."""

    kind: Annotated[str, key_of(OBJECTIVES)] = Field(
        description="; ".join(f"{kind}: {row.about}" for kind, row in OBJECTIVES.items())
    )
    share: float = Field(
        1.0, gt=0, description="mean share of text tokens (inputs and labels), relative to the other objectives"
    )
    ahead: int = setting(
        1, only_with=READ_BY_OBJECTIVE, ge=1, description="causal: the label is the token this far ahead"
    )
    prefix_share: float = setting(
        0.5,
        only_with=READ_BY_OBJECTIVE,
        gt=0,
        lt=1,
        description="prefix: share of a chunk that is read and not predicted",
    )
    spm_share: float = setting(
        0.5,
        only_with=READ_BY_OBJECTIVE,
        ge=0,
        le=1,
        description="fill_in_the_middle: share of documents in suffix-prefix-middle order",
    )
    density: float = setting(
        0.15,
        only_with=READ_BY_OBJECTIVE,
        gt=0,
        lt=1,
        description="span_corruption, masked: share of hidden tokens",
    )
    mean_span: float = setting(
        3.0, only_with=READ_BY_OBJECTIVE, ge=1, description="span_corruption: mean length of a hidden span"
    )
    noise: list[NoiseSettings] = setting(
        [],
        only_with=READ_BY_OBJECTIVE,
        description="denoising: noises on the source, one after another; empty: BART's, permute_sentences and infill "
        "with share 0.3",
    )


class DataSettings(Section):
    """Which shards are read and how documents are packed."""

    section = "data"
    _classes: tuple[str, ...] = PrivateAttr(())
    _ends_classified: bool = PrivateAttr(False)
    _class_weights: str | dict[str, float] = PrivateAttr({})

    directory: Path = Field(Path("data/embedded"), description="prepared shards: the folder with manifest.json")
    remote: str = Field(
        "", description="URL of the same folder in a store; files missing in data.directory are fetched from there"
    )
    max_document_length: int = Field(2048, ge=2, description="longer documents are split into chunks of this length")
    sequence_length: int = Field(2048, ge=2, description="tokens in a packed sequence")
    source_sequence_length: int = Field(
        0, ge=0, description="tokens in the source side of a packed sequence, for an encoder; 0: no source side"
    )
    max_source_length: int = setting(
        0,
        only_with={"source_sequence_length": SET},
        ge=0,
        description="tokens of the longest source; 0: source_sequence_length",
    )
    max_documents: int = Field(
        0, ge=0, description="most documents in a packed sequence; 0: sequence_length / 16, but at least 256"
    )
    lanes: int = Field(1, ge=1, description="independent streams of documents; must divide global_batch_size")
    packing_buffer: int = Field(
        500,
        ge=1,
        description="packed sequences of a lane planned together (pairs: more, see mix); a larger buffer leaves "
        "less padding, and a new mix of the curriculum starts later",
    )
    mix: dict[str, float] = Field(
        {},
        description="share of tokens per source; empty: in proportion to their size. For pairs, mix, curriculum and "
        "packing_buffer count the tokens of the source text",
    )
    mix_exponent: float = setting(
        1.0,
        only_with={"mix": UNSET},
        why="mix names the shares",
        ge=0,
        le=1,
        description="share of a source: in proportion to its tokens ** mix_exponent; 1: to its size, 0: all equal, "
        "0.3: mT5's temperature sampling",
    )
    class_mix: dict[str, float] = Field(
        {},
        description="share of documents per class, within each source; documents of a class given more often repeat "
        "sooner; empty: see class_exponent",
    )
    class_exponent: float = setting(
        1.0,
        only_with={"class_mix": UNSET},
        why="class_mix names the shares",
        ge=0,
        le=1,
        description="share of a class: in proportion to its documents ** class_exponent; 1: as they are, 0: all equal",
    )
    max_epochs: dict[str, int] = Field(
        {},
        description="most epochs of a source, or of each of its classes if they are resampled; then the others take "
        "its share; 0 or absent: no limit",
    )
    exclude: Path | None = Field(
        None,
        description="file of documents never trained on, a JSON line for each: source, shard and row; in a run "
        "that has begun, a change needs --new-plan",
    )
    curriculum: list[CurriculumStage] = Field([], description="later mixes, by tokens trained on")
    objectives: list[ObjectiveSettings] = Field(
        [], description="for sources of plain text; empty: causal, or span_corruption with a source side"
    )
    augmentation: list[NoiseSettings] = Field(
        [],
        description="noises, one after another, in training and not in validation: on the source texts of pairs and "
        "on labelled documents; on inputs of causal text only mask_tokens. Labels stay as they are",
    )
    sentinels: int = setting(
        100,
        **WITH_SPECIAL_TOKENS,
        ge=1,
        description="token ids for hidden spans, if an objective needs them",
    )
    first_sentinel: int = setting(
        0,
        **WITH_SPECIAL_TOKENS,
        ge=0,
        description="id of the token that replaces the first hidden span, if the tokenizer has such tokens: the others "
        "count down, as T5's <extra_id_0>, <extra_id_1> ...; 0: ids above the tokenizer's",
    )
    mask_token: int = setting(
        0,
        **WITH_SPECIAL_TOKENS,
        ge=0,
        description="id of the token that replaces a hidden token, if the tokenizer has one, as BERT's [MASK]; 0: an "
        "id above the tokenizer's",
    )
    bidirectional_prefix: bool = setting(
        True,
        only_with={"source_sequence_length": UNSET},
        why="an encoder reads the source",
        description="without a source side: the tokens read but not predicted attend to each other in both directions "
        "(prefix-LM)",
    )
    target_ahead: int = setting(
        1,
        only_with={"source_sequence_length": SET},
        ge=1,
        description="the label of a target's position is the token this far ahead of its input; the first inputs, as "
        "many, are start tokens, so that every token of a target is a label",
    )
    fixed_target_tokens: int = setting(
        0,
        only_with={"source_sequence_length": SET},
        ge=0,
        description="length that every target is cut or padded to; 0: targets keep their length (packed)",
    )
    masked_decoder_share: float = setting(
        0.0,
        only_with={"source_sequence_length": SET},
        ge=0,
        lt=1,
        description="share of decoder inputs replaced by the mask token, so that the decoder relies on the source",
    )
    dropped_decoder_share: float = setting(
        0.0,
        only_with={"source_sequence_length": SET},
        ge=0,
        lt=1,
        description="share of decoder tokens left out, inputs and labels: long targets cost less",
    )
    workers: int = Field(2, ge=1, description="threads per rank that fetch, verify and tokenize ahead of the steps")
    cache_bytes: int = setting(
        0,
        only_with={"remote": SET},
        ge=0,
        description="most bytes of shards kept in data.directory; others are fetched again; 0: no limit",
    )
    stall_seconds: float = Field(
        480.0,
        gt=0,
        description="longest wait for the next batch; then the run fails and names the document; keep it "
        "below training.collective_timeout_seconds, else that ends the run first",
    )

    @property
    def classes(self) -> tuple[str, ...]:
        """`classification.classes`: then the label of a document is its class."""
        return self._classes

    @property
    def ends_classified(self) -> bool:
        """Whether a labelled document keeps its EOS: before an encoder."""
        return self._ends_classified

    @property
    def class_weights(self) -> str | dict[str, float]:
        """`classification.weights`."""
        return self._class_weights

    @property
    def resamples_classes(self) -> bool:
        """Whether the documents of a class have another share than in the data."""
        return bool(self.class_mix) or self.class_exponent != 1.0

    @property
    def resampling(self) -> str:
        """The setting that resamples classes, with its value."""
        return (
            f"data.class_mix = {self.class_mix}" if self.class_mix else f"data.class_exponent = {self.class_exponent}"
        )

    def with_classes(
        self, classes: Sequence[str], ends_classified: bool, weights: str | dict[str, float]
    ) -> "DataSettings":
        """The same data for a model with a classification head. weights: `classification.weights`."""
        copy = self.model_copy()
        copy._classes, copy._ends_classified, copy._class_weights = tuple(classes), ends_classified, weights
        return copy

    @property
    def longest_source(self) -> int:
        return self.max_source_length or self.source_sequence_length

    @property
    def wanted_objectives(self) -> list[ObjectiveSettings]:
        """`objectives`, or the default one if empty."""
        return self.objectives or [
            ObjectiveSettings(kind="span_corruption" if self.source_sequence_length else "causal")
        ]

    @property
    def needs_special_tokens(self) -> bool:
        """Whether there are special tokens of objectives, or sentinels."""
        wanted = any(OBJECTIVES[one.kind].special_tokens for one in self.wanted_objectives)
        return wanted or self.masked_decoder_share > 0 or self.masks_augmented

    @property
    def masks_augmented(self) -> bool:
        """Whether an augmentation needs the mask token."""
        return any(NOISES[one.kind].special_tokens for one in self.augmentation)

    @property
    def permutes_sentences(self) -> bool:
        """Whether examples need the ends of sentences: by default, denoising does."""
        denoising = [one.noise for one in self.wanted_objectives if one.kind == "denoising"]
        noises = [noise for of_objective in denoising for noise in of_objective] + self.augmentation
        return not all(denoising) or any(noise.kind == "permute_sentences" for noise in noises)

    def without_augmentation(self) -> "DataSettings":
        """The same data for validation."""
        return self.model_copy(update={"augmentation": []})

    @property
    def trains_encoder(self) -> bool:
        """Whether an objective trains an encoder alone."""
        return any(OBJECTIVES[one.kind].trains_encoder for one in self.objectives)

    @model_validator(mode="after")
    def _sentinels_count_down(self) -> "DataSettings":
        if 0 < self.first_sentinel < self.sentinels - 1:
            raise ValueError(
                f"data.first_sentinel = {self.first_sentinel}: data.sentinels = {self.sentinels} ids do not fit, "
                "counting down from it; set it to the highest id of them, or data.sentinels to fewer"
            )
        return self

    @model_validator(mode="after")
    def _sides_fit(self) -> "DataSettings":
        if self.source_sequence_length and self.max_source_length > self.source_sequence_length:
            raise ValueError(
                f"data.max_source_length = {self.max_source_length} does not fit data.source_sequence_length = "
                f"{self.source_sequence_length}; lower the first or raise the second"
            )
        if self.fixed_target_tokens > self.max_document_length:
            raise ValueError(
                f"data.fixed_target_tokens = {self.fixed_target_tokens} is above data.max_document_length = "
                f"{self.max_document_length}; lower the first or raise the second"
            )
        if self.dropped_decoder_share and any(objective.ahead > 1 for objective in self.objectives):
            raise ValueError(
                f"data.dropped_decoder_share = {self.dropped_decoder_share}: with ahead above 1 in data.objectives "
                "the number of remaining labels is not known before training; set ahead = 1, or remove the share"
            )
        if self.target_ahead > 1 and any(objective.ahead > 1 for objective in self.objectives):
            raise ValueError(
                f"data.target_ahead = {self.target_ahead}: with ahead above 1 in data.objectives inputs and labels "
                "would both move; set one of them to 1"
            )
        kinds = {objective.kind for objective in self.objectives}
        if self.trains_encoder and (len(kinds) > 1 or self.source_sequence_length):
            alone = next(kind for kind in kinds if OBJECTIVES[kind].trains_encoder)
            raise ValueError(
                f'data.objectives: kind = "{alone}" is for an encoder alone; remove the other kinds and '
                "data.source_sequence_length"
            )
        return self

    @model_validator(mode="after")
    def _max_documents_are_known(self) -> "DataSettings":
        if not self.max_documents:
            object.__setattr__(self, "max_documents", max(256, self.sequence_length // 16))
        return self

    @model_validator(mode="after")
    def _context_fits(self) -> "DataSettings":
        if self.max_document_length > self.sequence_length:
            raise ValueError(
                f"data.max_document_length = {self.max_document_length} does not fit data.sequence_length = "
                f"{self.sequence_length}; "
                "lower the first or raise the second"
            )
        mixes = [("data.mix", self.mix), *((f"data.curriculum[{n}].mix", s.mix) for n, s in enumerate(self.curriculum))]
        for name, mix in mixes:
            if any(share <= 0 for share in mix.values()):
                raise ValueError(f"{name} = {mix}: every share must be above 0; leave a source out to drop it")
        if any(epochs < 0 for epochs in self.max_epochs.values()):
            raise ValueError(f"data.max_epochs = {self.max_epochs}: every number must be 0 (no limit) or above")
        starts = [stage.from_tokens for stage in self.curriculum]
        if starts != sorted(set(starts)):
            raise ValueError(f"data.curriculum: from_tokens = {starts} must rise from stage to stage")
        return self
