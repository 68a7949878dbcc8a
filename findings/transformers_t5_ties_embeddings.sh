#!/usr/bin/env bash
# transformers 5 makes a T5 whose configuration says tie_word_embeddings=False with tied embeddings all the same.
# Input: T5Config(tie_word_embeddings=False, feed_forward_proj="gated-gelu"), the configuration of T5 1.1, UL2 and mT5,
# for a model with new weights.
# Expected: an output matrix of its own, as the key says and as transformers 4.57 makes it.
# Seen: lm_head.weight is shared.weight, and the configuration reads True afterwards. So a pretraining run of a T5 1.1
# trains another model under 5 than under 4. Weights of a trained model, where the two differ, are kept apart on load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet transformers==5.24.0 torch==2.13.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import transformers
from transformers import T5Config, T5ForConditionalGeneration

config = T5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4,
    tie_word_embeddings=False, feed_forward_proj="gated-gelu",
)
model = T5ForConditionalGeneration(config)
seen = model.lm_head.weight is model.shared.weight, model.config.tie_word_embeddings
print(f"transformers {transformers.__version__}")
print("expected: tied: False, tie_word_embeddings: False")
print(f"seen:     tied: {seen[0]}, tie_word_embeddings: {seen[1]}")
sys.exit(seen != (True, True))
PYTHON
"$python" finding.py
