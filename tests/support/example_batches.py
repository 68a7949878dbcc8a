"""Batches of made-up documents with any objective: no store, no plan, the same examples as in training."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.data.load.batch import Batch, build_batch, document_seeds, make_dropout_seeds
from bigmodel.data.objectives.examples import Document, Examples, Pair
from bigmodel.data.plan.shuffle import Chunk, Pack
from bigmodel.evaluation.packed_requests import Continuation, make_batch
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer

VOCABULARY = 60  # of the tokenizer; 1 begins and 2 ends a document
BOS, EOS = 1, 2


def text(length: int, seed: int = 0) -> np.ndarray:
    """A stored document with `length` tokens of text."""
    tokens = np.random.default_rng([seed, length]).integers(3, VOCABULARY, length)
    return np.concatenate([[BOS], tokens, [EOS]])


def fragment_of(row: int, document: Document, examples: Examples, objective: int) -> Chunk:
    if isinstance(document, Pair):
        lengths = (np.array([len(side) - 1]) for side in document)
        return Chunk(0, 0, row, 0, len(document.source) - 1, 0, *examples.measure_pairs(*lengths)[0].tolist())
    length = np.array([len(document) - 1])
    columns = examples.measure(np.array([objective]), length, np.zeros_like(length))[0].tolist()
    return Chunk(0, 0, row, 0, int(length[0]), 0, *columns)


def plan_of(packs: Sequence[Sequence[Document]], examples: Examples) -> list[Pack]:
    """The chunks of `batch_of`: documents are numbered in their order."""
    rows, plan = iter(range(sum(map(len, packs)))), list[Pack]()
    for pack in packs:
        numbered = [(next(rows), document) for document in pack]
        plan.append(tuple(fragment_of(row, one, examples, row % examples.pairs) for row, one in numbered))
    return plan


def batch_of(
    packs: Sequence[Sequence[Document]], data: DataSettings, seed: int = 1, by_document: bool = False, **more: object
) -> Batch:
    """One pack per list of documents; plain documents take the objectives in turn. With classes, the first token of a
    label is the number of its class. `by_document`: dropout seeds."""
    examples = Examples(data, seed, VOCABULARY)
    examples.find_class = lambda label, *place: int(label[1])
    documents, plan = [document for pack in packs for document in pack], plan_of(packs, examples)
    numbers = range(len(packs))
    keys = make_dropout_seeds(seed, 0, numbers, data.sequence_length)
    source_seeds = make_dropout_seeds(seed, 0, numbers, data.source_sequence_length, "source positions")
    if by_document:
        sizes = (data.sequence_length, "positions"), (data.source_sequence_length, "source positions")
        keys, source_seeds = (document_seeds(seed, plan, ["text"], *size) for size in sizes)
    return build_batch(plan, lambda piece: documents[piece.row], data, keys, examples, source_seeds, **more)


def model_of(vocabulary: int = 400, seed: int = 5, **changes: object) -> Transformer:
    """A small model with initial weights; 400 covers the tokenizer's ids and all special tokens."""
    size = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40}
    model = Transformer(ModelSettings(**(size | changes)), vocabulary)
    init_weights(model, seed)
    return model


def logits_of(forward: Callable[[Batch, str], Tensor], inputs: list[int], source: list[int] | None = None) -> Tensor:
    """(inputs, V) logits of one document, alone in its batch."""
    size, source_size = max(2, len(inputs)), 0 if source is None else max(1, len(source))
    data = DataSettings(max_document_length=size, sequence_length=size, source_sequence_length=source_size)
    return forward(make_batch([Continuation(inputs, [], source)], data), "logits")[: len(inputs)]
