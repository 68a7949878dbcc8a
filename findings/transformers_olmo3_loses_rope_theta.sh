#!/usr/bin/env bash
# transformers 5 gives the sliding layers of an OLMo 3 another rotary base than its config.json says; 4.57 does not.
# Input: a config.json of an OLMo 3 as transformers 4.57 writes it: `rope_theta` and `rope_scaling` at the top level,
# rope_theta = 10,000, yarn in the layers with full attention. Published models have 500,000, the default of the class,
# and are read right by chance.
# Expected: both kinds of layers have rope_theta = 10,000, as in 4.57, which wrote the file.
# Seen: full attention has 10,000, sliding attention 500,000: the key is taken out of the table for the first kind, and
# the second gets the default of the class. The model loads without a warning and computes other numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet transformers==5.24.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import json
import sys

import transformers
from transformers import AutoConfig

config = {
    "model_type": "olmo3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 16,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.1,
    },
}
with open("config.json", "w") as file:
    json.dump(config, file)
read = AutoConfig.from_pretrained(".").rope_parameters
seen = {kind: read[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")}
print(f"transformers {transformers.__version__}")
print("expected: rope_theta 10000.0 in both kinds of layers")
print(f"seen:     {seen}")
sys.exit(seen != {"full_attention": 10000.0, "sliding_attention": 500000.0})
PYTHON
"$python" finding.py
