"""What is masked, in variables, settings, command lines and changes, and what is not."""

import json
import time

from bigmodel.config.secret_text import is_secret, without_secret_texts, without_secrets, without_secrets_inside
from bigmodel.config.user_error import UserError
from bigmodel.run_directory import shown_variables

SECRET = """
SLURM_JWT KUBERNETES_BEARER PYTORCH_PASS BIGMODEL_DBPASS AWS_CRED NCCL_AUTH TORCH_COOKIE DS_PRIVATE AWS_SAS TORCH_DSN
NCCL_OAUTH2 OMPI_AUTHORIZATION SLURM_DB_PWD TRITON_APIKEY TORCH_CREDS AWS_PRIVATEKEY dbPass api-key
OMPI_MCA_passphrase SLURM_JWTS githubToken
"""
ORDINARY = """
PATH AUTHOR AUTHORED BYPASS NCCL_BYPASS_CHECK COMPASS passes num_passes CUDA_PASSTHROUGH PWD OLDPWD MONKEY_PATCH
TOKENIZERS_PARALLELISM tokenizer NCCL_IB_PKEY NCCL_PAT_ENABLE SASS_DUMP keyword TORCH_COMPILE_CACHE_KEY_TAG DSNAP
NCCL_DEBUG CREDIT privateer
"""
LONG = "hunter2" * 5
PEM = ["-----BEGIN RSA PRIVATE KEY-----", "MIIhunter2" * 6, "hunter2+/ab=", "-----END RSA PRIVATE KEY-----"]


def test_a_name_is_secret_by_its_parts() -> None:
    assert [name for name in SECRET.split() if not is_secret(name)] == []


def test_an_ordinary_name_is_none() -> None:
    assert [name for name in ORDINARY.split() if is_secret(name)] == []


def test_a_value_is_secret_by_its_shape() -> None:
    for text in (
        "postgres://me:hunter2@host/db",
        "redis://:hunter2@host",
        "amqp://me:hunter2@hunter2@host",  # a password with @
        "https://host/a?sv=1&sig=hunter2&se=2",
        "https://host/a?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        "Authorization: Bearer hunter2",
        f"AKIA{'HUNTER2'.ljust(16, 'X')}",
        *(
            f"{prefix}{LONG}"
            for prefix in ("ghp_", "github_pat_", "glpat-", "hf_", "sk-proj-", "nvapi-", "AIza", "npm_")
        ),
        *(
            f"{prefix}{LONG}"
            for prefix in ("xoxb-", "sk_live_", "pypi-", "ya29.", "hvs.", "dckr_pat_", "ATATT3x", "gsk_")
        ),
        f"SG.{LONG}.{LONG}",
        f"AccountName=before;AccountKey={LONG}{LONG}==;EndpointSuffix=after",
        f"eyJhbGciOiJI.eyJ{LONG}.{LONG}",
        "\n".join(PEM),
        "\\n".join(PEM),  # in one line of an .env file
        "\n".join(f"+{line}" for line in PEM),  # in a change
        "\n".join(PEM[:2]),  # cut off
    ):
        masked = {
            "in a variable": json.dumps(shown_variables({"NCCL_OTHER": f"before {text} after"})),
            "in a setting": json.dumps(without_secrets_inside({"other": [{"files": [f"before {text} after"]}]})),
            "in a message": str(UserError(f"before {text} after")),
            "in a change": without_secret_texts(f"+other: before {text} after"),
        }
        for where, shown in masked.items():
            assert "hunter2" not in shown.lower(), where
            assert "before" in shown, where
            assert "after" in shown or text == "\n".join(PEM[:2]), where


def test_ordinary_text_stays() -> None:
    for text in (
        "abfs://container@account.dfs.core.windows.net/run",
        "http://host:9000/a@v2",
        "https://host/a?design=wide&passes=3",
        "sk-learn and hf_hub, the bearer of news",
        'key = "weight"; token = "<eos>"; passes = "forward_and_backward"',
        "author = 'a long name without spaces'.replace('a', 'b')",
        "num_tokens = self.count_all_the_tokens(batch)",
        "--passes forward_and_backward --tokenizer some_long_file_name.json --key-value-heads 4",
        'sorted(rows, key=itemgetter("key", "another_column"))["keyword"], "another_column"',
        "2026-11-29T22:00:00 commit 1bf93ac0f4643a7eace606e9f43315773d9aaaaa",
    ):
        assert without_secret_texts(text) == text
        assert without_secrets_inside({"other": text}) == {"other": text}


def test_a_secret_setting_is_masked_by_its_name_and_numbers_stay() -> None:
    settings = {"comet": {"api_key": "hunter2", "enabled": True}, "data": {"mask_token": 3, "auth": ["hunter2", ""]}}
    assert without_secrets_inside(settings) == {
        "comet": {"api_key": "(redacted)", "enabled": True},
        "data": {"mask_token": 3, "auth": ["(redacted)", ""]},
    }


def test_a_command_line_keeps_its_options_and_loses_its_secrets() -> None:
    line = f"PGPASS=hunter2 train --api-key {LONG} --password=hunter2 --steps 5 --set data.remote=s3://a:hunter2@b"
    assert (
        without_secret_texts(line)
        == "PGPASS=(redacted) train --api-key (redacted) --password=(redacted) --steps 5 --set data.remote=s3://a:***@b"
    )


def test_a_change_of_a_program_loses_the_values_that_it_gives_to_secret_names() -> None:
    for line in (
        f'+os.environ["WANDB_API_KEY"] = "{LONG}"',
        f"+os.environ['SLURM_JWT']='{LONG}'",
        f'+os.environ.setdefault("DB_PASS", "{LONG}")',
        f'+    settings["password"] = "{LONG[:7]}"',
        f'+    {{"api_key": "{LONG}", "auth" : "{LONG}"}}',
    ):
        masked = without_secret_texts(line)
        assert "hunter2" not in masked, line
        assert masked.startswith(line[: line.index("hunter2") - 1]), line


def test_a_long_change_is_masked_in_linear_time() -> None:
    words = "a" * 200_000 + " " + "key" * 60_000 + " " + "://a:" * 20_000 + "-----BEGIN PRIVATE KEY-----\n" * 20
    began = time.process_time()
    without_secrets(without_secret_texts(words))
    assert time.process_time() - began < 3
