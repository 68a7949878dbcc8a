#!/usr/bin/env bash
# prometheus_client's parser of the text format renames a counter: `tokens` on the page becomes `tokens_total`.
# Input: a valid page of text format 0.0.4, which asks for no suffix; Prometheus stores this series as `tokens`.
# Expected: the sample's name as on the page; a test of an endpoint relies on it.
# Seen: `tokens_total`; the name that Prometheus will query is not found, and one that it does not have is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet prometheus-client==0.26.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys
from importlib.metadata import version

from prometheus_client.parser import text_string_to_metric_families

page = "# TYPE tokens counter\ntokens 5\n"
seen = [sample.name for family in text_string_to_metric_families(page) for sample in family.samples]
print(f"prometheus-client {version('prometheus-client')}")
print("expected: ['tokens']")
print(f"seen:     {seen}")
sys.exit(seen != ["tokens_total"])
PYTHON
"$python" finding.py
