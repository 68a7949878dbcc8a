import doctest
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from bigmodel.config.settings import DataSettings
from bigmodel.data.load import batch as batch_module
from bigmodel.data.load.batch import IGNORED, build_batch, document_seeds, draw, make_dropout_seeds
from bigmodel.data.load.stream import reader
from bigmodel.data.objectives import causal as causal_module
from bigmodel.data.objectives.causal import causal
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.shuffle import Chunk
from tests.support.memory_store import MemoryStore, token

DOCUMENTS = [[1, 11, 12, 13, 2], [1, 21, 22, 2], [1, 31, 32, 33, 34, 2]]
SETTINGS = DataSettings(max_document_length=8, sequence_length=8, max_documents=2)
FIRST, SECOND, THIRD = Chunk(0, 0, 0, 0, 4, 0), Chunk(0, 0, 1, 0, 3, 0), Chunk(0, 0, 2, 0, 5, 0)


def read(chunk):
    return np.array(DOCUMENTS[chunk.row])


def example(packs=((FIRST, SECOND), (THIRD,)), step=0):
    return build_batch(packs, read, SETTINGS, make_dropout_seeds(1, step, range(len(packs)), 8))


def test_the_examples_in_the_docstrings_hold():
    for module in (batch_module, causal_module):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


def test_a_batch_of_two_packs_and_three_documents():
    batch = example()
    assert batch.tokens.tolist() == [1, 11, 12, 13, 1, 21, 22, 0, 1, 31, 32, 33, 34, 0, 0, 0]
    assert batch.labels.tolist() == [11, 12, 13, 2, 21, 22, 2, -100, 31, 32, 33, 34, 2, -100, -100, -100]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8, 13, 16, 16]
    assert (batch.num_tokens, batch.num_labels, batch.num_documents) == (12, 12, 3)
    types = [
        batch.tokens.dtype,
        batch.labels.dtype,
        batch.positions.dtype,
        batch.dropout_seeds.dtype,
        batch.cu_seqlens.dtype,
    ]
    assert types == [torch.int64] * 4 + [torch.int32]


def test_the_literals_above_are_those_of_the_docstring():
    for literal in ("[0, 4, 7, 8, 13, 16, 16]", "[1, 11, 12, 13, 1, 21, 22, 0, 1, 31, 32, 33, 34, 0, 0, 0]"):
        assert literal in batch_module.Batch.__doc__


def test_an_empty_pack_is_padding_only():
    batch = example(packs=((FIRST,), ()))
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 16, 16, 16, 16]
    assert batch.labels[4:].tolist() == [IGNORED] * 12
    assert (batch.num_labels, batch.num_documents) == (4, 1)


def test_a_full_pack_has_no_padding_document():
    pack = (FIRST, Chunk(0, 0, 2, 1, 4, 0))
    assert example(packs=(pack,)).cu_seqlens.tolist() == [0, 4, 8, 8]


def test_a_piece_of_a_long_document_ends_with_the_next_piece_s_first_token():
    stored = np.array([1, 41, 42, 43, 44, 2])
    assert [part.tolist() for part in causal(stored, 0, 3)] == [[1, 41, 42], [41, 42, 43]]
    assert [part.tolist() for part in causal(stored, 3, 2)] == [[43, 44], [44, 2]]


def test_num_positions_is_one_less_than_stored_tokens():
    assert num_tokens(np.array([0, 1, 2, 9], dtype=np.uint32)).tolist() == [0, 0, 1, 8]


def test_a_plan_of_other_data_is_noticed():
    with pytest.raises(AssertionError, match="length index does not belong to these shards"):
        causal(np.arange(5), 0, 5)
    with pytest.raises(AssertionError, match="no range of a document"):
        causal(np.arange(5), 2, 0)


def test_a_pack_over_a_limit_is_refused():
    with pytest.raises(AssertionError, match="more than sequence_length = 8"):
        example(packs=((FIRST, THIRD),))
    with pytest.raises(AssertionError, match="3 documents; max_documents = 2"):
        example(packs=((FIRST, SECOND, SECOND),))
    with pytest.raises(AssertionError, match="8 dropout seeds for 16 positions"):
        build_batch([(), ()], read, SETTINGS, make_dropout_seeds(1, 0, [0], 8))


def test_of_random_packs_documents_are_whole_and_apart_and_targets_are_ignored_exactly_at_padding():
    store = MemoryStore({"a": [[5, 9, 2, 30, 1, 7], [12, 3, 3]], "b": [[4, 4, 21, 2]]})
    data = DataSettings(max_document_length=9, sequence_length=16, max_documents=3, packing_buffer=2)
    order, num_padded = Order(store, data, global_batch_size=3, seed=5), 0
    for _ in range(20):
        packs = order.next_step()
        batch = build_batch(packs, reader(store), data, make_dropout_seeds(5, 0, range(3), 16))
        cu_seqlens = batch.cu_seqlens.tolist()
        assert len(cu_seqlens) == 3 * (3 + 1) + 1
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, 48)
        assert cu_seqlens == sorted(cu_seqlens)
        real = torch.zeros(48, dtype=torch.bool)
        for number, pack in enumerate(packs):
            place = 16 * number
            for f in pack:
                here = slice(place, place + f.length)
                assert cu_seqlens[cu_seqlens.index(place) + 1] == here.stop
                expected = token(f.source, f.shard, f.row, np.arange(f.start, f.start + f.length))
                assert batch.tokens[here].tolist() == expected.tolist()
                assert batch.labels[here].tolist() == (expected + 1).tolist()
                assert batch.positions[here].tolist() == list(range(f.length))
                real[here] = True
                place = here.stop
        assert torch.equal(batch.labels != IGNORED, real)
        assert not batch.tokens[~real].any()
        assert not batch.positions[~real].any()
        assert batch.num_labels == batch.num_tokens == int(real.sum())
        assert batch.num_documents == sum(len(pack) for pack in packs)
        num_padded += int((~real).sum())
    assert num_padded > 0


def test_keys_belong_to_seed_step_and_pack_and_not_to_the_micro_batch():
    assert np.array_equal(make_dropout_seeds(1, 7, range(4), 8)[16:].tolist(), make_dropout_seeds(1, 7, [2, 3], 8))
    assert np.array_equal(make_dropout_seeds(1, 7, [3, 0], 8)[8:], make_dropout_seeds(1, 7, [0], 8))
    different = [
        make_dropout_seeds(1, 7, [0], 8),
        make_dropout_seeds(2, 7, [0], 8),
        make_dropout_seeds(1, 8, [0], 8),
        make_dropout_seeds(1, 7, [1], 8),
    ]
    assert len(np.unique(np.concatenate(different))) == 32


def test_seeds_of_documents_belong_to_the_chunk_and_its_pass_and_not_to_its_place():
    one, other, long = Chunk(0, 3, 1, 0, 5, 2), Chunk(1, 3, 1, 0, 3, 2), Chunk(0, 0, 9, 24, 8, 0)

    def seeds(*packs, seed=1):
        return document_seeds(seed, packs, ["a", "b"], 8).reshape(-1, 8)

    together, alone = seeds((one, other), (long,)), seeds((), (long,), (other,), (one,))
    assert np.array_equal(together[0, :5], alone[3, :5])
    assert np.array_equal(together[0, 5:], alone[2, :3])
    assert np.array_equal(together[1], alone[1])
    assert not alone[0].any()
    halves = [(row >> 32, row & 0xFFFFFFFF) for row in (together[0, :5], together[0, 5:], together[1])]
    assert all(len(set(upper)) == 1 and len(set(lower)) == len(lower) for upper, lower in halves)
    changed = [one._replace(**{name: 7}) for name in ("shard", "row", "start", "epoch")] + [one._replace(source=1)]
    others = np.concatenate([seeds((piece,))[0, :5] for piece in [one, *changed]] + [seeds((one,), seed=2)[0, :5]])
    assert len(np.unique(others >> 32)) == 7


def test_the_fingerprint_changes_with_every_tensor_and_not_with_a_copy():
    batch = example()
    assert batch.fingerprint() == example().to("cpu").fingerprint()
    assert batch.fingerprint() != example(step=1).fingerprint()  # keys
    for name in ("tokens", "labels", "positions", "cu_seqlens", "dropout_seeds"):
        changed = example()
        getattr(changed, name)[-1] += 1
        assert changed.fingerprint() != batch.fingerprint()


def test_a_batch_does_not_change():
    with pytest.raises(FrozenInstanceError):
        example().num_labels = 3


def test_the_text_picture_of_a_small_batch():
    assert draw(example(), num_packs=2) == [
        "pack    0|AAAABBB.|",
        "   tokens    1   11   12   13    1   21   22    0",
        "   labels   11   12   13    2   21   22    2 -100",
        "positions    0    1    2    3    0    1    2    0",
        "pack    1|AAAAA...|",
        "   tokens    1   31   32   33   34    0    0    0",
        "   labels   31   32   33   34    2 -100 -100 -100",
        "positions    0    1    2    3    4    0    0    0",
        "3 documents, 12 positions, 4 of padding (.)",
    ]


def test_the_text_picture_of_a_long_pack_is_to_scale():
    assert draw(example(), num_packs=2, width=4) == [
        "pack    0|AABB|",
        "pack    1|AAA.|",
        "3 documents, 12 positions, 4 of padding (.)",
    ]
