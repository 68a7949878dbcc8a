#!/usr/bin/env bash
# MLflow refuses a local folder as tracking store, its default for years, unless MLFLOW_ALLOW_FILE_STORE=true.
# Input: MlflowClient with the address file:///..., as its own documents have used it since version 0.
# Expected: an experiment in the folder, or a release that is named as the one which ends the support.
# Seen: MlflowException at the first call, in a minor release. With the variable the same call works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet mlflow-skinny==3.17.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import os
import sys
from pathlib import Path

import mlflow


def tried(name: str) -> str:
    try:
        mlflow.MlflowClient(tracking_uri=(Path.cwd() / name).as_uri()).create_experiment("first")
    except mlflow.exceptions.MlflowException as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "an experiment"


os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
plain = tried("plain")
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
allowed = tried("allowed")
print(f"mlflow {mlflow.__version__}")
print("expected: an experiment; an experiment")
print(f"seen:     {plain}; with the variable {allowed}")
sys.exit(not (plain.startswith("MlflowException") and allowed == "an experiment"))
PYTHON
"$python" finding.py
