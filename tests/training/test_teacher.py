"""A run with a teacher: the same on any ranks and after a resume; a teacher that does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings, UserError, load_settings, settings_from_table
from bigmodel.data.store.same_tokenizer import difference
from bigmodel.distributed.world import ALONE
from bigmodel.inspect.memory import activation_bytes, state_bytes
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.teacher import open_teacher, refuse_another, state_of
from tests.support.model_folder import write_model
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_run import write_run

STUDENT = ["distillation.weight=0.7", "distillation.temperature=2", "distillation.top_k=20", "model.num_layers=1"]


def arguments(run_file: Path, *changes: str) -> list[str]:
    return ["train", str(run_file), *(part for change in changes for part in ("--set", change))]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]


def column(run: Path, name: str) -> list[float]:
    return [line[name] for line in steps_of(run)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """With a run `teacher` of 6 steps, and a Hugging Face folder `llama`."""
    folder = tmp_path_factory.mktemp("taught")
    run_file = write_run(folder, shards, name="teacher")
    run_ranks(1, command, arguments(run_file, "training.steps=6"), folder / "printed")
    write_model(folder / "llama", shards)
    return folder


@pytest.mark.timeout(300)
def test_a_distillation_is_the_same_on_two_ranks_and_after_a_resume_and_keeps_its_teacher(
    folder: Path, shards: Path
) -> None:
    changes = [*STUDENT, f"distillation.teacher={folder / 'teacher'}", "training.steps=8"]
    train = arguments(write_run(folder, shards, name="one"), *changes)
    run_ranks(1, command, train, folder / "printed")
    assert f"teacher {folder / 'teacher'}: " in (folder / "printed.0").read_text()
    run_ranks(2, command, arguments(write_run(folder, shards, stage=3, name="two"), *changes), folder / "printed")
    one, two = folder / "one", folder / "two"
    assert len(steps_of(one)) == 8
    for name in ("loss", "distillation_loss", "gradient_norm"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4)
    assert 0 < column(one, "distillation_loss")[7] < column(one, "distillation_loss")[0]

    # The checkpoint has the student alone.
    found = checkpoint.of_run(one)
    assert set(found.state["teacher"]) == {"folder", "sha256"}
    assert not any(name.startswith(("teacher", "blocks.1.")) for name in found.description["shapes"])
    of_teacher = checkpoint.of_run(folder / "teacher").description["shapes"]
    assert {name for name in of_teacher if not name.startswith("blocks.1.")} == set(found.description["shapes"])

    # Resumed from step 4: bitwise. With another teacher: refused, without a trace.
    weights, before = checkpoint.read_weights(found), [column(one, name) for name in ("loss", "distillation_loss")]
    shutil.rmtree(found.path)
    (code,) = finish(
        start_ranks(1, command, [*train, "--set", f"distillation.teacher={folder / 'llama'}"], folder / "p")
    )
    assert code == 2
    assert "is not the teacher that the run began with" in (folder / "p.0").read_text()
    run_ranks(1, command, train, folder / "printed")
    assert "resuming at step 4" in (folder / "printed.0").read_text()
    assert [column(one, name) for name in ("loss", "distillation_loss")] == before
    resumed = checkpoint.read_weights(checkpoint.of_run(one))
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def student(folder: Path, shards: Path, teacher: Path, *changes: str) -> Settings:
    return load_settings(write_run(folder, shards, name="student"), [f"distillation.teacher={teacher}", *changes])


def refusal(settings: Settings, num_tokens: int = 300) -> str:
    with pytest.raises(UserError) as caught:
        open_teacher(settings, num_tokens, ALONE)
    assert str(caught.value).startswith(f'distillation.teacher = "{settings.distillation.teacher}"')
    return str(caught.value)


def test_a_teacher_is_a_run_or_a_hugging_face_folder_in_a_precision_of_its_own(folder: Path, shards: Path) -> None:
    run, llama = (
        open_teacher(student(folder, shards, folder / name, "distillation.precision=bf16"), 300, ALONE)
        for name in ("teacher", "llama")
    )
    assert run
    assert llama
    for one in (run, llama):
        assert {parameter.dtype for parameter in one.model.parameters()} == {torch.bfloat16}
        assert torch.get_default_dtype() == torch.float32
    weights = checkpoint.read_weights(checkpoint.of_run(folder / "teacher"))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16())
    exact = open_teacher(student(folder, shards, folder / "teacher"), 300, ALONE)
    assert exact
    assert len({run.sha256, llama.sha256, exact.sha256}) == 3
    refuse_another(run, state_of(run))
    refuse_another(None, state_of(run))
    refuse_another(run, {})
    with pytest.raises(UserError, match="its weights, settings or precision differ"):
        refuse_another(run, state_of(exact))


def changed(folder: Path, target: Path, file: str, change: Any) -> Path:
    """A copy of a folder with one JSON file changed."""
    shutil.copytree(folder, target)
    table = json.loads((target / file).read_text())
    change(table)
    (target / file).write_text(json.dumps(table))
    return target


def exchanged(table: dict[str, Any]) -> None:
    """Two tokens of a tokenizer.json, with each other."""
    vocab = table["model"]["vocab"]
    first, second = list(vocab)[70:72]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def test_a_teacher_that_cannot_teach_the_student_is_refused(folder: Path, shards: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(student(folder, shards, tmp_path / "none"))
    assert "config.json: cannot be read as JSON" in refusal(student(folder, shards, shards))
    llama, run = folder / "llama", folder / "teacher"
    assert "knows 300 tokens, and the data have 301" in refusal(student(folder, shards, llama), 301)
    t5 = write_model(tmp_path / "t5", shards, "t5")
    assert "is an encoder-decoder model, and the student an autoregressive" in refusal(student(folder, shards, t5))
    other = changed(llama, tmp_path / "other", "tokenizer.json", exchanged)
    assert "has another tokenizer than data.directory" in refusal(student(folder, shards, other))
    (other / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(student(folder, shards, other))
    classes = changed(
        run, tmp_path / "classes", "settings.json", lambda table: table.update(classification={"classes": ["a", "b"]})
    )
    assert "predicts classes, not tokens" in refusal(student(folder, shards, classes))
    untrained = tmp_path / "untrained"
    shutil.copytree(run, untrained, ignore=lambda _, names: [name for name in names if name.startswith("step-")])
    assert "has no checkpoint yet" in refusal(student(folder, shards, untrained))

    def positions(table: dict[str, Any]) -> None:
        table["model"] |= {"position_embedding": "learned", "max_positions": 47}

    damaged = changed(run, tmp_path / "damaged", "settings.json", lambda table: None)
    for file in (damaged / "checkpoints").glob("step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"distillation\.teacher: .* is whole; .*; restore one from a copy$"):
        open_teacher(student(folder, shards, damaged), 300, ALONE)
    newest = max(path.name for path in (run / "checkpoints").iterdir())
    short = changed(run, tmp_path / "short", f"checkpoints/{newest}/state.json", positions)
    assert "has 47 learned positions, and the longest document 48" in refusal(student(folder, shards, short))


def test_a_teacher_whose_data_were_prepared_again_with_another_tokenizer_is_refused(
    folder: Path, shards: Path, tmp_path: Path
) -> None:
    def prepared_before(table: dict[str, Any]) -> None:
        table["tokenizer_sha256"] = "0" * 64

    teacher = changed(folder / "teacher", tmp_path / "teacher", "data_manifest.json", prepared_before)
    told = refusal(student(folder, shards, teacher))
    assert f"{shards / 'tokenizer.json'} is not the tokenizer that this run was trained with" in told


def test_tokenizers_differ_in_ids_ends_or_rules(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    ours = Path(shutil.copy(shards / "tokenizer.json", tmp_path / "ours"))

    def told(change: Any) -> str:
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        return difference(ours, changed(tmp_path / "ours", tmp_path / "theirs", "tokenizer.json", change))

    assert told(lambda table: None) == ""
    assert told(lambda table: table["model"].update(dropout=0.1)) == ""
    assert "its normalizer is another one" in told(lambda table: table.update(normalizer={"type": "NFC"}))
    assert "its model is another one" in told(lambda table: table["model"]["merges"].reverse())

    def one_more(table: dict[str, Any]) -> None:
        table["added_tokens"].append(table["added_tokens"][0] | {"id": 300, "content": "<extra_id_0>"})

    assert told(one_more) == ""

    assert " in the data and " in told(exchanged)


TAUGHT = {"distillation": {"teacher": "big", "weight": 1.0}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"classification": {"classes": ["a", "b"]}}, "a teacher's predictions are over tokens, not over classes"),
        ({"training": {"sequence_parallel_ranks": 2}}, "the teacher reads whole packed sequences; set it to 1"),
        ({"run": {"directory": "./big"}}, "a run cannot be its own teacher"),
        ({"training": {"z_loss": 1e-4}}, "training.z_loss = 0.0001 with distillation.weight = 1"),
        ({"training": {"label_smoothing": 0.1}}, "training.label_smoothing = 0.1 with distillation.weight = 1"),
    ],
)
def test_settings_that_make_no_sense_with_a_teacher_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_from_table(TAUGHT | more, Path("run.toml"))
    assert words in str(caught.value)
    assert str(caught.value).startswith("run.toml: ")


def test_adapters_on_the_teacher_itself_need_a_part_of_the_labels(folder: Path, shards: Path) -> None:
    same = [f"model.from={folder / 'llama'}", "lora.rank=2", "model.qk_norm=false"]
    with pytest.raises(UserError, match="the student begins equal to the teacher and has nothing to learn"):
        student(folder, shards, folder / "llama", *same, "distillation.weight=1")
    assert student(folder, shards, folder / "llama", *same).lora.rank == 2


def test_the_memory_plan_counts_the_teacher_on_each_rank(folder: Path, shards: Path) -> None:
    plain = load_settings(write_run(folder, shards, name="student"))
    taught = student(folder, shards, folder / "teacher", "distillation.precision=bf16")
    size = sum(weight.numel() for weight in checkpoint.read_weights(checkpoint.of_run(folder / "teacher")).values())
    for settings, bytes_ in ((plain, 0), (taught, 2 * size)):
        effective, resolved = resolve_deepspeed(settings, 4)
        assert state_bytes(resolved, effective, 300, 4).device.get("teacher", 0) == bytes_
    activations = [activation_bytes(one, resolve_deepspeed(one, 4)[0], 300) for one in (plain, taught)]
    states = 96 * 32 * 2
    assert activations[1] - activations[0] > states + 4 * 96 * 300  # and the logits of the second model
