"""Embeddings begin with the vectors of a file: which token takes which, what the others get, what a resume reads."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigmodel.config.settings import Settings, UserError, load_settings, settings_from_table
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.world import ALONE, end_world, start_world
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.start import new_model
from bigmodel.training.token_vectors import read_vectors
from tests.support.ranks import run_ranks
from tests.support.tiny_corpus import tiny_settings
from tests.support.tiny_run import write_run
from tools.train_vectors import Sentences, near, train_vectors

WHOLE = {"zero_optimization": {"stage": 0}}
ROWS_OF_NO_TOKEN = 2000
SIZES = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16}
OF = {"time": 1.0, "year": 2.0, "people": 3.0, "document": 4.0, "Document": 5.0, "way": 6.0, "unseen": 7.0}


def vector(first: float, channels: int = 8) -> list[float]:
    return [first, *np.linspace(-first, first, channels - 1).round(3).tolist()]


def write_vectors(path: Path, words: dict[str, float], channels: int = 8) -> Path:
    rows = (f"{word} {' '.join(map(str, vector(first, channels)))}\n" for word, first in words.items())
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus in words."""
    folder = tmp_path_factory.mktemp("words")
    return prepare(tiny_settings(folder, tokenizer_model="word", vocabulary=258, shard_tokens=1000), quiet())


def made(folder: Path, file: Path, **model: Any) -> tuple[Transformer, Transformer, Any, Tokenizer]:
    """The model, the same one without vectors, what was read, and the tokenizer."""
    settings = Settings.model_validate({"data": {"directory": folder}, "model": SIZES | {"vectors": file} | model})
    store, tokenizer = ShardStore(folder, "train"), Tokenizer.load(folder, fast=False)
    vectors = read_vectors(settings, store, ALONE)
    one = new_model(settings, WHOLE, tokenizer.vocabulary + ROWS_OF_NO_TOKEN, True, vectors)
    other = Transformer(settings.model, tokenizer.vocabulary + ROWS_OF_NO_TOKEN)
    init_weights(other, settings.run.seed)
    return one, other, vectors, tokenizer


def test_a_token_takes_the_vector_of_its_word_and_the_others_are_drawn_like_these(words: Path, tmp_path: Path) -> None:
    one, other, vectors, tokenizer = made(words, write_vectors(tmp_path / "glove.txt", OF))
    rows = one.embedding.weight.detach()
    with_vector = [word for word in OF if tokenizer.number_of(word) is not None]
    assert with_vector == ["time", "year", "people", "Document", "way"]
    numbers = [tokenizer.number_of(word) for word in with_vector]
    expected = np.array([vector(OF[word]) for word in with_vector], np.float32)
    assert np.array_equal(rows[numbers].numpy(), expected)
    assert vectors.found.tolist() == sorted(numbers)
    absent = np.delete(rows.numpy(), numbers, axis=0)
    spread = expected.std(0) / len(absent) ** 0.5
    assert (np.abs(absent.mean(0) - expected.mean(0)) < 5 * spread + 1e-6).all()
    assert np.allclose(absent.std(0), expected.std(0), rtol=0.1)
    for name, weight in other.named_parameters():
        assert name == "embedding.weight" or torch.equal(weight, dict(one.named_parameters())[name])


def test_tokens_without_a_vector_keep_the_model_s_own_weights_if_asked(words: Path, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "glove.txt", OF)
    one, other, vectors, _ = made(words, file, vectors_absent="model", tied_embeddings=True)
    changed = (one.embedding.weight != other.embedding.weight).any(1).nonzero().flatten()
    assert changed.tolist() == vectors.found.tolist()
    assert one.head.weight is one.embedding.weight


def test_lower_case_comes_after_the_own_spelling_and_tokens_of_a_bpe_lose_their_space(
    words: Path, shards: Path, tmp_path: Path
) -> None:
    file = write_vectors(tmp_path / "glove.txt", {"document": 4.0, "time": 1.0, "time ": 9.0, "Document": 5.0})
    file.write_text(file.read_text().replace("  ", " "))  # time twice: the first one counts
    one, _, vectors, tokenizer = made(words, file)
    assert one.embedding.weight[tokenizer.number_of("Document"), 0] == 5.0
    assert one.embedding.weight[tokenizer.number_of("time"), 0] == 1.0
    assert vectors.repeated == 1
    one, *_ = made(words, write_vectors(tmp_path / "other.txt", {"Document": 5.0, "document": 4.0}))
    assert one.embedding.weight[tokenizer.number_of("Document"), 0] == 5.0
    one, *_ = made(words, write_vectors(tmp_path / "lower.txt", {"document": 4.0}))
    assert one.embedding.weight[tokenizer.number_of("Document"), 0] == 4.0
    one, _, vectors, tokenizer = made(shards, write_vectors(tmp_path / "bpe.txt", {"time": 1.0}))
    token = tokenizer.number_of("Ġtime")
    assert vectors.found.tolist() == [token]
    assert one.embedding.weight[token, 0] == 1.0


def test_the_share_of_training_tokens_is_that_of_all_tokens_of_a_small_corpus(words: Path, tmp_path: Path) -> None:
    _, _, vectors, tokenizer = made(words, write_vectors(tmp_path / "glove.txt", OF))
    store = ShardStore(words, "train")
    for source in store.sources:
        texts = [store.document(source, 0, row)[1:-1] for row in range(len(store.lengths(source, 0)))]
        spelled = [tokenizer.token_of(int(token)) for token in np.concatenate(texts)]
        assert vectors.shares[source] == pytest.approx(sum(word in OF for word in spelled) / len(spelled))


def test_an_encoder_s_own_embeddings_begin_with_the_vectors_too(words: Path, tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "glove.txt", OF)
    settings = Settings.model_validate({
        "data": {"directory": words, "source_sequence_length": 64},
        "model": SIZES | {"vectors": file, "kind": "encoder_decoder", "separate_embeddings": True},
    })  # fmt: skip
    vectors = read_vectors(settings, ShardStore(words, "train"), ALONE)
    model = new_model(settings, WHOLE, 300, True, vectors)
    number = vectors.found[0]
    assert torch.equal(model.encoder.embedding.weight[number], model.embedding.weight[number])
    assert not torch.equal(model.encoder.embedding.weight, model.embedding.weight)
    narrow = settings.model.model_copy(update={"encoder_hidden_size": 16})
    with pytest.raises(UserError, match=r"vectors have 8 channels, and model\.encoder_hidden_size = 16; set"):
        read_vectors(settings.model_copy(update={"model": narrow}), ShardStore(words, "train"), ALONE)


def test_a_recurrent_model_begins_with_the_vectors_too(words: Path, tmp_path: Path) -> None:
    model = {"kind": "lstm", "hidden_size": 8, "num_layers": 1, "vectors": write_vectors(tmp_path / "glove.txt", OF)}
    settings = Settings.model_validate({"data": {"directory": words}, "model": model})
    vectors = read_vectors(settings, ShardStore(words, "train"), ALONE)
    one, number = new_model(settings, WHOLE, 300, True, vectors), Tokenizer.load(words).number_of("year")
    assert one.embedding.weight[number].tolist() == np.array(vector(2.0), np.float32).tolist()


def test_a_file_that_does_not_fit_is_refused(words: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"glove\.txt: its vectors have 9 channels, and model\.hidden_size = 8; set"):
        made(words, write_vectors(tmp_path / "glove.txt", OF, channels=9))
    with pytest.raises(ValueError, match=r"model\.vectors = a\.txt and model\.from = b: the embeddings begin with"):
        Settings.model_validate({"model": {"vectors": "a.txt", "from": "b"}})
    with pytest.raises(UserError, match=r"no token of .*tokenizer\.json has a vector there; choose a file"):
        made(words, write_vectors(tmp_path / "other.txt", {"unseen": 1.0}))
    with pytest.raises(UserError, match=rf"^model\.vectors = {tmp_path}/gone\.txt: cannot be read: No such file"):
        made(words, tmp_path / "gone.txt")


def train(run_file: Path, steps: int, *more: str) -> None:
    """On a rank."""
    from bigmodel.training import loop

    assert loop.train(load_settings(run_file, [f"training.steps={steps}", "schedule.kind=constant", *more])) == 0


def test_a_run_on_two_ranks_begins_with_the_vectors_and_a_resume_does_not_open_the_file(
    words: Path, tmp_path: Path
) -> None:
    """ZeRO-3, frozen embeddings: after training and a resume they are still those of the file."""
    file = write_vectors(tmp_path / "glove.txt", OF, channels=32)
    run_file = write_run(tmp_path, words, stage=3)
    more = (f"model.vectors={file}", 'training.freeze=["embedding"]')
    run_ranks(2, train, run_file, 2, *more)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.unlink()
    run_ranks(1, train, run_file, 4, *more)
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert found.state["step"] == 4
    weights = checkpoint.read_weights(found)
    number = Tokenizer.load(words).number_of("people")
    assert weights["embedding.weight"][number].tolist() == np.array(vector(3.0, 32), np.float32).tolist()
    events = [event for event in read_json_lines(tmp_path / "run/events.jsonl") if event["event"] == "vectors"]
    assert [event["found"] for event in events] == [{"as spelled": 5, "by their text": 0, "in lower case": 0}]
    assert [event["sha256"] for event in events] == [digest]
    assert settings_from_table({"model": {"from": str(tmp_path / "run")}}, Path("b.toml")).model.vectors is None


def test_ranks_with_different_files_do_not_train(words: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        write_vectors(tmp_path / f"glove-{rank}.txt", OF | {"year": 2.0 + rank}, channels=32)
    run_ranks(2, read_on_ranks, words, tmp_path)


def read_on_ranks(words: Path, folder: Path) -> None:
    world = start_world()
    file = folder / f"glove-{os.environ['RANK']}.txt"
    settings = Settings.model_validate({"model": {"hidden_size": 32, "num_heads": 4, "vectors": file}})
    with pytest.raises(UserError, match=r"rank 1.* has another file there than rank 0; copy the same one"):
        read_vectors(settings, ShardStore(words, "train"), world)
    end_world()


def test_vectors_that_gensim_trains_on_the_corpus_fit_every_token_that_occurs(words: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim is not installed: pip install gensim")
    for name in ("a.txt", "b.bin"):
        count = train_vectors(words, tmp_path / name, channels=8, epochs=1)
        theirs = models.KeyedVectors.load_word2vec_format(str(tmp_path / name), binary=name.endswith("bin"))
        one, _, vectors, tokenizer = made(words, tmp_path / name)
        special = {tokenizer.bos, tokenizer.eos, tokenizer.unknown}
        assert count == len(theirs) == len(vectors.found)
        assert vectors.found.tolist() == sorted({*range(tokenizer.vocabulary)} - special)
        for token in vectors.found.tolist():
            expected = theirs[tokenizer.token_of(token)]
            assert np.array_equal(one.embedding.weight[token].detach().numpy(), expected)
    assert np.array_equal(models.KeyedVectors.load_word2vec_format(str(tmp_path / "a.txt")).vectors, theirs.vectors)


def test_near_tokens_are_counted_by_the_inverse_of_their_distance() -> None:
    texts = np.random.default_rng(1).integers(0, 9, (7, 30)).astype(str).tolist()
    texts += [["3"], [], ["4", "4"]]
    expected: dict[tuple[str, str], float] = {}
    for text in texts:
        for place, one in enumerate(text):
            for other in range(max(0, place - 4), min(len(text), place + 5)):
                if other != place:
                    pair = (one, text[other])
                    expected[pair] = expected.get(pair, 0.0) + 1 / abs(place - other)
    names, pairs, counts = near(texts, window=4)
    found = {(names[a], names[b]): count for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True)}
    assert found == pytest.approx(expected)


def test_glove_s_vectors_are_read_by_gensim_and_fit_how_often_tokens_are_near(words: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim is not installed: pip install gensim")
    for name in ("a.txt", "b.txt"):
        count = train_vectors(words, tmp_path / name, kind="glove", channels=8, epochs=15)
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    theirs = models.KeyedVectors.load_word2vec_format(str(tmp_path / "a.txt"), no_header=True)
    one, _, vectors, tokenizer = made(words, tmp_path / "a.txt")
    assert count == len(theirs) == len(vectors.found)
    names, pairs, counts = near(Sentences(words), window=5)
    table = np.zeros((count, count))
    table[pairs[:, 0], pairs[:, 1]] = np.log1p(counts)
    table -= table.mean(0) + table.mean(1)[:, None] - table.mean()  # the biases take the frequency of each token
    products = np.stack([theirs[name] for name in names]) @ np.stack([theirs[name] for name in names]).T
    assert np.corrcoef(products.ravel(), table.ravel())[0, 1] > 0.25  # of other vectors: below 0.05
    for token in vectors.found.tolist():
        assert np.array_equal(one.embedding.weight[token].detach().numpy(), theirs[tokenizer.token_of(token)])


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"window": 0}, "--window 0: must be at least 1"),
        ({"channels": 0}, "--channels 0: must be at least 1"),
        ({"seed": 1 << 32}, r"--seed 4294967296: must be at least 1, and below 2\*\*32"),
        ({"out": "absent/vectors.txt"}, "vectors.txt: must be a file in a folder that exists"),
    ],
)
def test_numbers_and_files_that_gensim_cannot_train_to_are_refused(
    changes: dict[str, Any], refusal: str, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / changes.pop("out", "vectors.txt")
    with pytest.raises(UserError, match=refusal):
        train_vectors(words, out, **changes)
