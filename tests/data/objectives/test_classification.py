"""Examples of labelled documents, labels that are no class, and settings that do not fit classes."""

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.objectives import classification
from bigmodel.data.objectives.classification import ClassNumbers
from bigmodel.data.objectives.examples import Examples, Pair
from bigmodel.data.plan.attention_work import count_work
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.visible_pairs import visible_pairs
from bigmodel.data.prepare import embedded_verbs, labels
from bigmodel.model import class_head
from tests.support.example_batches import BOS, EOS, fragment_of, text

CLASSES = {"classification": {"classes": ["a", "b"]}}
SMALL = {"max_document_length": 8, "sequence_length": 16}
SIDES = {"source_sequence_length": 16, "max_source_length": 8}
KINDS = {"decoder": SMALL, "encoder": SMALL, "encoder_decoder": SMALL | SIDES}


@pytest.mark.parametrize("module", [classification, class_head, labels, embedded_verbs])
def test_the_examples_in_docstrings_are_right(module: Any) -> None:
    found = doctest.testmod(module)
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_one_label_and_the_planned_tokens_at_every_length(kind: str) -> None:
    settings = Settings.model_validate(CLASSES | {"model": {"kind": kind}, "data": KINDS[kind]})
    examples = Examples(settings.data, 1, 60)
    examples.find_class = lambda label, *place: int(label[1])
    for length in range(1, 20):
        document = Pair(text(length), np.array([BOS, 7, EOS]))
        chunk = fragment_of(0, document, examples, 0)
        example = examples.make(chunk, document)
        assert (len(example.tokens), len(example.source)) == (chunk.num_tokens, chunk.source_positions)
        assert example.labels[-1] == 7
        assert (chunk.num_labels, (example.labels[:-1] == -100).all()) == (1, True)
        read = example.source if kind == "encoder_decoder" else example.tokens
        assert len(read) == min(8, length + {"decoder": 1, "encoder": 2, "encoder_decoder": 1}[kind])


def test_a_decoder_reads_a_labelled_document_causally_in_the_count_of_its_work() -> None:
    settings = Settings.model_validate(CLASSES | {"data": SMALL, "model": {"num_layers": 3}})
    chunk = fragment_of(0, Pair(text(5), np.array([BOS, 3, EOS])), Examples(settings.data, 1), 0)
    work = count_work(
        PackTable.of_packs([(chunk,)]), settings.data, lambda *lengths: visible_pairs(*lengths, settings=settings.model)
    )
    assert (work.positions, work.pairs) == (6, 3 * 21)


class Labelled:
    """A store of one label: the tokenizer has a token for each character, and lower case for all."""

    directory, sources = Path("data/mail"), ["mail"]

    def encode(self, text: str) -> np.ndarray:
        return np.array([1, *map(ord, text.lower()), 2], np.uint16)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(map(chr, ids[1:-1]))


def test_a_label_that_is_no_class_is_named_with_its_document() -> None:
    store = Labelled()
    find = ClassNumbers(store, ["spam", "ham"])
    assert [find.number(store.encode(name), 0, 0, 0) for name in ("ham", "spam")] == [1, 0]
    with pytest.raises(
        UserError, match=r"data/mail: the label 'eggs' of document 5 in shard 3 of source 'mail' is none"
    ):
        find.number(store.encode("eggs"), 0, 3, 5)
    with pytest.raises(UserError, match="'Spam' and 'spam' have the same tokens"):
        ClassNumbers(store, ["Spam", "ham", "spam"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"classification": {"classes": ["a"]}}, "one class alone needs no model; name at least two"),
        ({"classification": {"classes": ["a", " "]}}, "' ' is an empty name; every class needs one"),
        ({"classification": {"classes": ["a", "b", "a"]}}, "names 'a' twice; name every class once"),
        (
            {"classification": {"classes": ["a", "b"], "pooling": "first"}},
            "the first token sees no other; leave it out",
        ),
        (
            {
                "classification": {"classes": ["a", "b"], "pooling": "mean"},
                "model": {"kind": "encoder_decoder"},
                "data": {"source_sequence_length": 64},
            },
            "the decoder has one token",
        ),
        (CLASSES | {"training": {"z_loss": 1e-4}}, "training.z_loss cannot be combined with classes"),
        (CLASSES | {"model": {"num_mtp_modules": 1}}, "model.num_mtp_modules cannot be combined"),
        (CLASSES | {"data": {"objectives": [{"kind": "causal"}]}}, "data.objectives cannot be combined"),
    ],
)
def test_settings_that_do_not_fit_classes_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.model_validate(table)
