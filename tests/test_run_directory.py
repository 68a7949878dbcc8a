"""The run directory: what it says of every start, and what it does not say of secrets."""

import json
import secrets
import subprocess
from pathlib import Path

from bigmodel.run_directory import describe_environment, record_start, shown_variables, without_secret_texts


def test_variables_are_shown_by_allow_list_and_secrets_are_not() -> None:
    environment = {
        "RANK": "3",
        "SLURM_JOB_ID": "17",
        "NCCL_DEBUG": "WARN",
        "AWS_ENDPOINT_URL": "https://me:hunter2@store:9000",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "aws_session_token": "hunter2",
        "AWS_SESSION_TOKEN": "hunter2",
        "SLURM_JWT_TOKEN": "hunter2",
        "BIGMODEL_PASSWORD": "hunter2",
        "TORCH_API_KEY": "hunter2",
        "NCCL_SECRET": "hunter2",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/home/hunter2",
        "DATABASE_URL": "hunter2",
    }
    shown = shown_variables(environment)
    assert "hunter2" not in json.dumps(shown)
    assert shown == {
        "RANK": "3",
        "SLURM_JOB_ID": "17",
        "NCCL_DEBUG": "WARN",
        "AWS_ENDPOINT_URL": "https://(redacted)@store:9000",
        "AWS_SECRET_ACCESS_KEY": "(redacted)",
        "AWS_SESSION_TOKEN": "(redacted)",
        "SLURM_JWT_TOKEN": "(redacted)",
        "BIGMODEL_PASSWORD": "(redacted)",
        "TORCH_API_KEY": "(redacted)",
        "NCCL_SECRET": "(redacted)",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_every_start_leaves_all_that_was_in_force(tmp_path: Path, monkeypatch) -> None:
    secret = secrets.token_hex()  # one that no uncommitted change of this repository holds
    monkeypatch.setenv("NCCL_API_KEY", secret)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text('{"schema": 2}')
    run = tmp_path / "run"
    run.mkdir()
    changed = [
        record_start(run, {"run": {"seed": seed, "directory": f"{seed}"}}, {"stage": seed}, tmp_path / "data")
        for seed in (1, 2)
    ]
    assert changed == [[], [("deepspeed.stage", 1, 2), ("run.seed", 1, 2)]]
    first, second = (json.loads((run / f"starts/000{number}.json").read_text()) for number in (1, 2))
    assert (first["settings"], second["settings"]) == tuple(
        {"run": {"seed": seed, "directory": f"{seed}"}} for seed in (1, 2)
    )
    assert json.loads((run / "settings.json").read_text()) == second["settings"]
    assert json.loads((run / "deepspeed.json").read_text()) == second["deepspeed"] == {"stage": 2}
    assert json.loads((run / "environment.json").read_text()) == second["environment"]
    assert (run / "data_manifest.json").read_text() == '{"schema": 2}'
    (run / "starts/0002.json").write_text("{")
    assert record_start(run, {}, {}, tmp_path / "data") == [], "a damaged record of the past stops no run"
    assert not any(secret.encode() in path.read_bytes() for path in run.rglob("*.json"))


def test_urls_in_settings_keep_their_place_and_lose_their_secrets(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    settings = {
        "data": {"remote": "s3://bucket/run?access_key=me&Secret_Key=hunter2", "mix": {}, "lanes": 2},
        "prepare": {"sources": [{"files": ["https://me:hunter2@store/a.parquet"]}]},
        "checkpoint": {"remote": "abfs://container@account.dfs.core.windows.net/run"},
    }
    record_start(tmp_path, settings, {"wandb": {"team": "https://me:hunter2@host"}}, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "data": {"remote": "s3://bucket/run?access_key=***&Secret_Key=***", "mix": {}, "lanes": 2},
        "prepare": {"sources": [{"files": ["https://me:***@store/a.parquet"]}]},
        "checkpoint": {"remote": "abfs://container@account.dfs.core.windows.net/run"},
    }
    start = json.loads((tmp_path / "starts/0001.json").read_text())
    assert "hunter2" not in json.dumps([start["settings"], start["deepspeed"]])


def test_a_change_that_is_kept_holds_no_secret_and_all_else() -> None:
    change = """
+API_KEY = "sk-hunter2hunter2"
+settings = {'auth_token': 'hunter2hunter2', "tokens": 5}
+export AWS_SECRET_ACCESS_KEY=hunter2hunter2
+remote = "https://me:hunter2@host/a"
+key = "weight"
+num_tokens = self.count_all_the_tokens(batch)
"""
    assert (
        without_secret_texts(change)
        == """
+API_KEY = "(redacted)"
+settings = {'auth_token': '(redacted)', "tokens": 5}
+export AWS_SECRET_ACCESS_KEY=(redacted)
+remote = "https://me:***@host/a"
+key = "weight"
+num_tokens = self.count_all_the_tokens(batch)
"""
    )


def test_the_environment_names_commit_change_and_versions(tmp_path: Path) -> None:
    found = describe_environment(Path(__file__).parents[1])
    assert set(found) == {"commit", "uncommitted_diff", "untracked", "host", "versions", "variables"}
    assert found["versions"]["torch"][0].isdigit()
    assert describe_environment(tmp_path)["commit"] == ""


def test_the_change_has_new_sources_too_and_leaves_the_index_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@host", "-c", "core.excludesFile=/dev/null")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    (tmp_path / "old.py").write_text("rate = 1\n")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", "."), git("commit", "--quiet", "--message=first")
    (tmp_path / "old.py").write_text("rate = 2\n")
    (tmp_path / "new folder").mkdir()
    new = {"new folder/new.py": 'rate = 3\nAPI_KEY = "sk-hunter2hunter2"\n', "ignored.py": "rate = 4\n"}
    new |= {"large.py": "rate = 5\n" * 10_000, "credentials.json": '"hunter2"', "data.bin": "rate = 6"}
    for name, text in new.items():
        (tmp_path / name).write_text(text)
    before = (tmp_path / ".git/index").read_bytes(), sorted((tmp_path / ".git").rglob("*"))
    found = describe_environment(tmp_path)
    assert ((tmp_path / ".git/index").read_bytes(), sorted((tmp_path / ".git").rglob("*"))) == before
    assert found["untracked"] == ["credentials.json", "data.bin", "large.py", "new folder/new.py"]
    added = [line for line in found["uncommitted_diff"].splitlines() if line.startswith("+") and "rate" in line]
    assert added == ["+rate = 2", "+rate = 3"]
    assert "+++ b/new folder/new.py" in found["uncommitted_diff"]
    assert "hunter2" not in json.dumps(found)

    git("checkout", "--quiet", "old.py")
    (tmp_path / "change.patch").write_text(found["uncommitted_diff"] + "\n")
    (tmp_path / "new folder/new.py").unlink()
    git("apply", "change.patch")
    assert (tmp_path / "old.py").read_text() == "rate = 2\n"
    assert (tmp_path / "new folder/new.py").read_text() == 'rate = 3\nAPI_KEY = "(redacted)"\n'
