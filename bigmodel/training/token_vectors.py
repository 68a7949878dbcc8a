"""Embeddings that begin with word vectors (`model.vectors`).

In: a file of vectors, the tokenizer and some of the training tokens. Out: a vector for each token whose word the file
has, and the embedding matrices filled with them; the other rows are drawn, keyed by seed and name.

A token takes the vector of the first of these words that the file has: the token as tokenizer.json spells it; its text
without blank space around it (a token of a BPE that begins with a space); this text in lower case. Of a word that the
file has twice, the first vector counts, as in gensim.

Guarantees: all ranks have read the same content, or none trains. A resumed run does not open the file: its weights are
in the checkpoint, and events.jsonl has the hash of the content. Costs: every rank reads the whole file once, in a
start without a checkpoint, and has one more embedding matrix in memory meanwhile.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.data.objectives.examples import Document, Pair
from bigmodel.data.objectives.supervised import Supervised
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.rendezvous import name_rank
from bigmodel.distributed.world import World
from bigmodel.exchange.word_vectors import Say, WordVectors, open_vectors
from bigmodel.model.init import generator_of
from bigmodel.run_directory import record_event

COUNTED_TOKENS = 500_000  # of the training data, over all sources
EMBEDDINGS = ("embedding.weight", "encoder.embedding.weight")
SPELLINGS = ("as spelled", "by their text", "in lower case")
UNREADABLE = "\ufffd"

Whole = Callable[[nn.Parameter], AbstractContextManager]


@dataclass(frozen=True)
class TokenVectors:
    """`rows`: (tokens, H) fp32, zero without a vector. `spellings`: (tokens,) number in SPELLINGS; -1: no vector."""

    file: str
    form: str
    sha256: str
    in_file: int
    repeated: int
    rows: np.ndarray
    spellings: np.ndarray
    shares: dict[str, float]  # by source: of the counted training tokens, those with a vector
    absent: str

    @property
    def found(self) -> np.ndarray:
        """Ids of tokens with a vector."""
        return np.flatnonzero(self.spellings >= 0)

    @torch.no_grad()
    def fill(self, model: nn.Module, seed: int, whole: Whole | None = None) -> None:
        """Fill the embeddings; a tied output matrix is one of them. `whole`: as in `init_weights`."""
        vectors = torch.from_numpy(self.rows[self.found])
        deviation, mean = torch.std_mean(vectors, 0, correction=0)
        for name, parameter in model.named_parameters():
            if name not in EMBEDDINGS:
                continue
            with whole(parameter) if whole else contextlib.nullcontext():
                if self.absent == "normal":
                    noise = torch.randn(parameter.shape, generator=generator_of(seed, f"{name} without vectors"))
                    parameter.copy_(mean + deviation * noise)
                parameter[torch.from_numpy(self.found)] = vectors.to(parameter)

    def report(self, directory: Path, say: Say) -> None:
        """Print how much of the vocabulary has a vector, and keep it with the hash in events.jsonl."""
        by_spelling = {name: int((self.spellings == number).sum()) for number, name in enumerate(SPELLINGS)}
        record_event(
            directory, "vectors", file=self.file, form=self.form, sha256=self.sha256, vectors=self.in_file,
            repeated=self.repeated, tokens=len(self.spellings), found=by_spelling, training_tokens=self.shares,
        )  # fmt: skip
        some = ", ".join(f"{count:,} {name}" for name, count in by_spelling.items() if count)
        say(
            f"{self.file}: {self.form}, {self.in_file:,} vectors: {len(self.found):,} of {len(self.spellings):,} "
            f"tokens have one ({some})"
        )
        if self.shares:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items())
            say(f"training tokens with a vector, counted in the first shards: {shares}")
        if self.repeated:
            say(f"{self.repeated:,} words are repeated in the file: their first vector is used")


def read_vectors(settings: Settings, store: ShardStore, world: World) -> TokenVectors:
    """Collective. Raises `UserError`, on every rank, for a file that does not fit the model or is damaged, and for
    ranks with different files."""
    found, told = None, ("", "")
    try:
        found = _read(settings, store, _say if world.rank == 0 else lambda line: None)
        told = (found.sha256, "")
    except UserError as error:
        names_file_alone = str(error).startswith(f"{settings.model.vectors}: ")
        told = ("", f"model.vectors = {error}" if names_file_alone else str(error))
    all_told = world.gather_objects(told)
    if complaint := next((complaint for _, complaint in all_told if complaint), ""):
        raise UserError(complaint)
    different = [rank for rank, (sha256, _) in enumerate(all_told) if sha256 != all_told[0][0]]
    if different:
        raise UserError(
            f"model.vectors = {settings.model.vectors}: {name_rank(different[0])} has another file there than rank 0; "
            "copy the same one to every node"
        )
    assert found, "each rank has read the file or told why not"
    return found


def _read(settings: Settings, store: ShardStore, say: Say) -> TokenVectors:
    tokenizer = Tokenizer.load(store.file("tokenizer.json"), fast=False)
    wanted = spellings_of(tokenizer)
    with open_vectors(str(settings.model.vectors), say) as file:
        _check_size(file, settings.model)
        rows, spellings, repeated = collect(file, wanted, tokenizer.vocabulary)
    if not (spellings >= 0).any():
        raise UserError(
            f"model.vectors = {file.file}: no token of {store.directory}/tokenizer.json has a vector there; choose a "
            'file of the same language, or prepare.tokenizer_model = "word"'
        )
    shares = {} if store.remote else _shares(store, spellings >= 0)
    facts = file.file, file.form, file.sha256, file.count, repeated
    return TokenVectors(*facts, rows, spellings, shares, settings.model.vectors_absent)


def _check_size(file: WordVectors, model: ModelSettings) -> None:
    sides = {"hidden_size": model.hidden_size}
    if model.separate_embeddings:
        sides["encoder_hidden_size"] = model.encoder.hidden_size
    for name, size in sides.items():
        if size != file.channels:
            raise UserError(
                f"model.vectors = {file.file}: its vectors have {file.channels} channels, and model.{name} = {size}; "
                f"set model.{name} = {file.channels}, or choose another file"
            )


def spellings_of(tokenizer: Tokenizer) -> dict[bytes, list[tuple[int, int]]]:
    """Word -> (token, number in SPELLINGS) of all tokens that can take its vector."""
    wanted: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for token in range(tokenizer.vocabulary):
        name = tokenizer.token_of(token)
        if name is None:  # a gap in the ids
            continue
        text = tokenizer.decode([token]).strip()
        words = [name] if not text or UNREADABLE in text else [name, text, text.lower()]
        for number, word in enumerate(words):
            if word not in words[:number]:
                wanted[word.encode()].append((token, number))
    return dict(wanted)


def collect(
    file: WordVectors, wanted: dict[bytes, list[tuple[int, int]]], tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(tokens, channels) vectors, (tokens,) their numbers in SPELLINGS, and the number of repeated words."""
    rows = np.zeros((tokens, file.channels), np.float32)
    spellings = np.full(tokens, -1, np.int8)
    seen: set[bytes] = set()
    repeated = 0
    for word, vector in file.read(wanted):
        if word in seen:
            repeated += 1
            continue
        seen.add(word)
        for token, number in wanted[word]:
            if spellings[token] < 0 or number < spellings[token]:
                rows[token], spellings[token] = vector, number
    return rows, spellings, repeated


def _shares(store: ShardStore, has_vector: np.ndarray) -> dict[str, float]:
    """By source, of its first shard's tokens, begin and end apart."""
    most = COUNTED_TOKENS // max(1, len(store.sources))
    shares = {}
    for source in store.sources:
        counted, found = 0, 0
        for tokens in _first_texts(store, source):
            counted, found = counted + len(tokens), found + int(has_vector[tokens].sum())
            if counted >= most:
                break
        if counted:
            shares[source] = found / counted
    return shares


def _first_texts(store: ShardStore, source: str) -> Iterator[np.ndarray]:
    for row in range(len(store.lengths(source, 0)) if store.num_shards(source) else 0):
        document: Document | Any = store.document(source, 0, row)
        if isinstance(document, Supervised):
            yield document.tokens[1:-1]
        else:
            yield from (side[1:-1] for side in (document if isinstance(document, Pair) else (document,)))


def _say(line: str) -> None:
    print(line, flush=True)
