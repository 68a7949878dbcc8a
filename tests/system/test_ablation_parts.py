"""The parts of tools.ablate: statistics against NumPy and SciPy, costs by literals, variants and their refusals."""

import math
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.run_directory import append_json_line, read_json, write_json
from tests.support.tiny_run import write_run
from tools.ablate import ablate, list_jobs, numbers_of, of_title, sbatch_script
from tools.ablation_results import Row, band, markdown_of, paired_difference, spread, t_quantile, write_table
from tools.ablation_variants import Job, Variant, from_file, from_texts, require_sound, values_of
from tools.ablation_work import Cost, Failed, Stopped, Tail, cost_of, locked, result_of_training, stoppable, work

# Statistics.


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.9995])
def test_the_quantile_of_student_is_scipy_s(degrees: int, probability: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


def test_the_interval_is_that_of_a_paired_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, baseline = {1: 3.1, 2: 3.3, 3: 2.9, 9: 1.0}, {3: 3.0, 2: 3.1, 1: 3.0, 7: 5.0}
    found = paired_difference(ours, baseline)
    exact = stats.ttest_rel([3.1, 3.3, 2.9], [3.0, 3.1, 3.0]).confidence_interval(0.95)
    assert found
    assert found.mean == pytest.approx(0.2 / 3)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((exact.low, exact.high))
    alone = paired_difference({1: 2.0}, {1: 1.5})
    assert str(alone) == "+0.5000"
    assert paired_difference({1: 2.0}, {2: 1.5}) is None


def test_a_spread_is_the_standard_deviation_over_seeds() -> None:
    assert str(spread([1.0, 2.0, 4.0])) == f"2.3333 ± {np.std([1, 2, 4], ddof=1):.4f}"
    assert str(spread([1.5])) == "1.5000"
    assert math.isnan(spread([1.5]).deviation)


def test_the_last_table_has_what_several_processes_finish_at_once(tmp_path: Path) -> None:
    jobs = [Job(Variant(f"v{number}", tmp_path, commands=(("true",),)), 1, tmp_path) for number in range(6)]
    jobs[0].directory.parent.parent.mkdir()

    def finish(job: Job) -> None:
        job.directory.parent.mkdir()
        write_json(job.beside("result.json"), {"loss": 1.0})
        write_table(jobs, tmp_path, "a command")

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(finish, jobs))
    assert "none finished" not in (tmp_path / "table.md").read_text()
    assert all(found["seeds"] for found in read_json(tmp_path / "results.json")["variants"].values())


def test_a_row_of_the_table_is_one_line_whatever_its_note_has(tmp_path: Path) -> None:
    row = Row(Variant("a", tmp_path, note="x | y\nz"), [], {1: {"loss": 1.0}})
    about = {"command": "", "commit": "", "date": "", "processor": ""}
    assert markdown_of([row], about).splitlines()[-1].endswith(r"| 1 | x \| y z |")


def test_a_band_has_the_steps_of_all_seeds() -> None:
    found = band(
        [([10, 20, 30], [3.0, 2.0, 1.0]), ([10, 30, 40], [5.0, 2.0, 0.0])],
        [np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])],
    )
    assert found.steps == [10, 30]
    assert found.means.tolist() == [4.0, 1.5]
    assert found.seconds.tolist() == [1.5, 3.5]
    assert found.deviations == pytest.approx(np.std([[3.0, 1.0], [5.0, 2.0]], axis=0, ddof=1))


# CPU seconds.


def line(attempt: str, step: int, seconds: float) -> dict:
    return {"attempt": attempt, "step": step, "cpu_seconds": seconds}


def test_starts_and_repeated_steps_cost_nothing() -> None:
    lines = [line("a", 2, 9.0), line("a", 6, 11.0), line("b", 3, 20.0), line("b", 5, 21.0), line("b", 9, 25.0)]
    # a: steps 3 to 6 in 2 s. b: resumed; steps 7 to 9 are three of four in 4 s.
    assert cost_of(lines) == Cost([0, 2, 6, 9], [0.0, 0.0, 2.0, 5.0], [(2, 6), (6, 9)])
    # Steps 7 to 10 had no watcher: the lines of another attempt begin after them.
    gap = [line("a", 2, 9.0), line("a", 6, 11.0), line("b", 10, 8.0), line("b", 12, 9.0)]
    assert cost_of(gap) == Cost([0, 2, 6, 10, 12], [0.0, 0.0, 2.0, 2.0, 3.0], [(2, 6), (10, 12)])
    assert cost_of([]) == Cost([0], [0.0], [])


def test_only_new_steps_of_a_metrics_file_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    step = '{"kind": "step", "step": %d, "loss": 2.5}\n'
    file.write_text(step % 1 + step % 2)
    tail = Tail(file)
    assert tail.last()[0] == 0
    with open(file, "a") as more:
        more.write(step % 3 + '{"kind": "evaluation", "step": 3}\n' + (step % 4)[:20])
    assert tail.last() == (3, 2.5)
    shorter = tmp_path / "new"
    shorter.write_text(step % 1)
    shorter.replace(file)  # what a resumed run does
    assert tail.last() == (3, 2.5)
    with open(file, "a") as more:
        more.write(step % 2)
    assert tail.last() == (2, 2.5)


def test_a_classification_has_its_scores(tmp_path: Path) -> None:
    job = Job(Variant("x", tmp_path), 1, tmp_path)
    job.directory.mkdir(parents=True)
    for step, loss, accuracy in ((5, 2.0, 0.5), (9, 2.5, 0.6)):
        scores = {"accuracy": accuracy, "macro_f1": 0.4}
        found = {"kind": "evaluation", "step": step, "nats_per_token": loss, "bits_per_byte": None, "scores": scores}
        append_json_line(job.directory / "metrics.jsonl", found)
    found = result_of_training(job)
    assert (found["loss"], found["best_loss"], found["accuracy"], found["macro_f1"]) == (2.5, 2.0, 0.6, 0.4)
    (job.directory / "metrics.jsonl").write_text("")
    with pytest.raises(Failed, match="has no evaluation"):
        result_of_training(job)


# Variants.


def test_commas_in_brackets_and_quotes_do_not_part_values() -> None:
    assert list(values_of('data.objectives=[{kind="causal", ahead=2}, {kind="ul2"}],[],"a,b",3')) == [
        'data.objectives=[{kind="causal", ahead=2}, {kind="ul2"}]',
        "data.objectives=[]",
        'data.objectives="a,b"',
        "data.objectives=3",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.dropout", "must have the form section.key=value,value"),
        ("dropout=1", "must have the form"),
        ("model.dropout=1,,2", "has an empty value"),
        ("model.dropout=[1,2", "a bracket or quote is not closed"),
    ],
)
def test_what_is_no_list_of_values_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(values_of(text))


def test_each_value_is_a_variant_and_a_grid_has_every_combination(tmp_path: Path) -> None:
    texts = ["model.dropout=0.1,0.2", "optimizer.kind=muon,lion"]
    alone = [variant.overrides for variant in from_texts(tmp_path, texts, grid=False)]
    assert alone == [(), *((one,) for text in texts for one in values_of(text))]
    grid = [variant.name for variant in from_texts(tmp_path, texts, grid=True)]
    assert grid[0] == "baseline"
    assert grid[1] == "model.dropout=0.1, optimizer.kind=muon"
    assert len(set(grid)) == 5
    with pytest.raises(UserError, match=r"model\.dropout: given twice"):
        from_texts(tmp_path, [*texts, "model.dropout=0.3"], grid=False)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path, tmp_path / "shards")


def jobs_of(run_file: Path, *vary: str, **more: str) -> list[Job]:
    return list_jobs(run_file, run_file.parent / "out", [*vary], None, False, "1,2", ["evaluation.at_end=true"])


def test_all_problems_are_said_before_anything_runs(run_file: Path) -> None:
    jobs = jobs_of(run_file, "model.dropuot=0.1", "model.dropout=2", "training.global_batch_size=3", "model.dropout2=1")
    with pytest.raises(UserError) as problem:
        require_sound(jobs, ranks=1)
    lines = str(problem.value).splitlines()
    assert lines[0] == "nothing was started:"
    assert len(lines) == 5
    assert "did you mean 'dropout'?" in lines[1]
    assert "is not a multiple of data.lanes = 2" in lines[3]
    assert not (run_file.parent / "out").exists()


def test_a_run_without_a_loss_at_its_end_is_refused(run_file: Path) -> None:
    jobs = list_jobs(run_file, run_file.parent / "out", ["model.dropout=0"], None, False, "1", [])
    with pytest.raises(UserError, match=r"baseline: evaluation.at_end = false: .*set it to true"):
        require_sound(jobs, ranks=1)


@pytest.mark.parametrize(("text", "option"), [("run.seed=5", "--seeds"), ('run.directory="x"', "--out")])
def test_a_setting_that_each_run_has_of_its_own_is_refused(run_file: Path, text: str, option: str) -> None:
    for vary, common in ((text, []), ("model.dropout=0", [text])):
        jobs = list_jobs(
            run_file, run_file.parent / "out", [vary], None, False, "1", [*common, "evaluation.at_end=true"]
        )
        with pytest.raises(UserError, match=rf"has no effect, {option} says it; leave it out"):
            require_sound(jobs, ranks=1)


def test_a_text_without_the_loss_fails_with_the_reason(tmp_path: Path) -> None:
    for content, said in (("loss nix", "finds 'nix', no number; correct pattern"), ("none", "has no 'loss ")):
        _, variant = variants_from(
            tmp_path,
            "[variants.a]\nresult = '{out}/r.txt'\npattern = 'loss ([a-z]+)'\n"
            f"commands = [['bash', '-c', 'echo {content} > {{out}}/r.txt']]",
        )
        job = Job(variant, 1, tmp_path / content[:4])
        with locked(job, wait=False) as held:
            assert held is not None
            with pytest.raises(Failed, match=said):
                work(job, 1, held, lambda *_: None)


def test_a_value_of_the_baseline_is_left_out(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = require_sound(jobs_of(run_file, "model.dropout=0.1,0.2"), ranks=1)
    assert [job.title for job in sound] == [
        "baseline, seed 1",
        "model.dropout=0.2, seed 1",
        "baseline, seed 2",
        "model.dropout=0.2, seed 2",
    ]
    assert capsys.readouterr().out == "model.dropout=0.1: has the settings of 'baseline', and is left out\n"


def test_variants_share_prepared_data_where_prepare_is_the_same(run_file: Path) -> None:
    jobs = jobs_of(run_file, "prepare.vocabulary=300,400", "model.dropout=0", "data.directory=elsewhere")
    folders = {job.variant.name: job.settings().data.directory for job in jobs if job.seed == 1}
    own = run_file.parent / "shards"
    assert folders["baseline"] == folders["model.dropout=0"] == own
    assert folders["data.directory=elsewhere"] == Path("elsewhere")
    varied = [folders["prepare.vocabulary=300"], folders["prepare.vocabulary=400"]]
    assert len({own, *varied}) == 3
    assert all(folder.parent == run_file.parent / "out" / "data" for folder in varied)
    other = Job(Variant("x", run_file, ("prepare.vocabulary=300", "model.dropout=0")), 7, run_file.parent / "out")
    assert other.settings().data.directory == varied[0]


def variants_from(folder: Path, text: str) -> list[Variant]:
    file = folder / "variants.toml"
    file.write_text(text)
    return from_file(folder / "run.toml", file)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[variants]\n", "has no variants"),
        ("[variants.a]\nsett = []", r'\[variants."a"\]: sett is unknown; known: set, run'),
        ('[variants.a]\nset = "x.y=1"', "set = 'x.y=1': must be a list"),
        ("[variants.a]\nset = [1]", "1 must be a text"),
        ('[variants.a]\nagainst = "b"', "'a' names 'b', which is no variant; known: baseline, a"),
        ('[variants.a]\nset = ["model.from={run:b}"]', "'a' names 'b', which is no variant"),
        ('[variants.baseline]\nset = ["model.dropout=0"]', "a variant has the name of the baseline"),
        ('[variants.a]\ncommands = [["true"]]', "commands and result belong together"),
        ('[variants.a]\ncommands = [["true"]]\nresult = "x"\nset = []', "is not trained"),
        ('[variants.a]\nset = []\nkey = "x"', "key has no effect without result"),
        (
            '[variants.a]\ncommands = [["true"]]\nresult = "x"\nkey = "x"\npattern = "y"',
            "key is for a JSON file, pattern for a text",
        ),
        ('[variants.a]\ncommands = [["true"]]\nresult = "x"\npattern = "(y"', "is no regular expression"),
        ('[variants.a]\ncommands = [["true"]]\nresult = "x"\npattern = "y"', "has no group"),
        ('[variants.a]\ncommands = [["true"]]\nresult = "{data}/x"', "{data} is for commands"),
        ('[variants.a]\nbefore = ["true"]', "must be a list of words"),
        (
            '[variants.a]\nset = ["model.from={run:b}"]\n[variants.b]\nset = ["model.from={run:a}"]',
            "'a' needs its own result",
        ),
    ],
)
def test_a_file_of_variants_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        variants_from(tmp_path, text)


def test_names_of_runs_and_files_are_filled_in(tmp_path: Path) -> None:
    text = '[variants."a/b"]\nset = ["model.from={run:baseline}", "run.seed={seed}"]'
    _, variant = variants_from(tmp_path, text)
    job = Job(variant, 5, tmp_path)
    assert variant.needs == ["baseline"]
    assert job.filled(variant.overrides[0]) == f"model.from={tmp_path}/runs/baseline/seed-5"
    assert job.filled("{run} {out} {seed} {x}") == f"{job.directory} {job.directory}.files 5 {{x}}"
    assert job.directory.parent.name.startswith("a-b-")
    plain = Job(Variant("x", write_run(tmp_path, tmp_path / "shards")), 5, tmp_path)
    assert plain.command(["see", "{data}/x", "{seed}"]) == ["see", f"{tmp_path}/shards/x", "5"]


@pytest.mark.parametrize("seeds", ["", "1,1", "1,x", "-1"])
def test_seeds_are_different_whole_numbers(seeds: str) -> None:
    assert numbers_of("1, 20") == [1, 20]
    with pytest.raises(UserError, match="must be different whole numbers"):
        numbers_of(seeds)


# Work.


def test_two_callers_never_work_on_one_job(tmp_path: Path) -> None:
    job = Job(Variant("x", tmp_path), 1, tmp_path)
    with locked(job, wait=False) as first, locked(job, wait=False) as second:
        assert first is not None
        assert second is None
    with locked(job, wait=False) as later:
        assert later is not None


def test_one_signal_stops_and_the_next_does_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before


def test_an_array_has_a_task_for_each_run_that_is_left(tmp_path: Path) -> None:
    titles = ["baseline, seed 1", "it's a x, seed 2"]
    script = sbatch_script(tmp_path / "my out", titles, ["--partition=gpu"], ["run.toml", "--set", "a.b=c d"])
    assert "#SBATCH --array=0-1\n" in script
    assert f'#SBATCH --output="{tmp_path}/my out/slurm/%A_%a.out"\n' in script
    assert "#SBATCH --partition=gpu\n" in script
    assert " -m tools.ablate run.toml --set 'a.b=c d' --task " in script
    said = [line.replace("exec ", "printf '%s\\n' ") for line in script.splitlines() if not line.startswith("cd ")]
    told = subprocess.run(
        ["bash", "-c", "\n".join(said)], capture_output=True, text=True, check=True, env={"SLURM_ARRAY_TASK_ID": "1"}
    )
    assert told.stdout.splitlines()[-1] == titles[1]


def test_a_task_of_an_array_stays_the_same_run_when_variants_are_added(run_file: Path) -> None:
    before, after = jobs_of(run_file, "model.dropout=0.1"), jobs_of(run_file, "model.dropout=0,0.1")
    for job in before:
        assert of_title(after, job.title) == job
    with pytest.raises(UserError, match=r"--task model\.dropout=0, seed 1: no such run any more; submit"):
        of_title(before, "model.dropout=0, seed 1")


def test_options_of_sbatch_are_options_and_leave_the_array_alone(run_file: Path) -> None:
    for option in ("partition=gpu", "--array=0-9", "-a1"):
        with pytest.raises(UserError, match=re.escape(f"--sbatch {option}: must be an option")):
            ablate(run_file, run_file.parent / "out", ["model.dropout=0"], slurm=True, sbatch=[option], dry_run=True)


# The variants of the project.

FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "ablations").glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_variants_of_the_project_are_sound(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the command of the first line, which `make ablations` runs: none is refused or equal to another one."""
    words = file.read_text().splitlines()[0].removeprefix("# python -m tools.ablate ").split()
    assert words[1:3] == ["--variants", f"benchmarks/ablations/{file.name}"]
    jobs = list_jobs(Path(__file__).parents[2] / words[0], tmp_path, [], file, False, "1", [])
    assert require_sound(jobs, ranks=1) == jobs
    assert capsys.readouterr().out == ""
    assert len(jobs) > 2
