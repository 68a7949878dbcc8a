#!/usr/bin/env bash
# transformers 5 takes partial_rotary_factor in every configuration, but Llama, Mistral and Qwen rotate the whole head.
# Input: partial_rotary_factor = 0.5 for heads of 8 numbers.
# Expected: 2 frequencies, so that 4 of the 8 numbers of a head are rotated. The key is one of the common rotary
# parameters: all these configurations put it into rope_parameters, and the models with whole rotation do not refuse it.
# Seen: 2 frequencies for Phi-3 and StableLM, 4 for Llama, Mistral, Qwen2 and Qwen3, without a warning. A run by such a
# configuration trains another model than it says.
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

import torch
import transformers
from transformers import AutoConfig, AutoModel

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
seen = {}
for kind in ("phi3", "stablelm", "llama", "mistral", "qwen2", "qwen3"):
    config = AutoConfig.for_model(kind, **sizes, partial_rotary_factor=0.5)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    seen[kind] = AutoModel.from_config(config).rotary_emb.inv_freq.numel()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: 2 frequencies in each")
print(f"seen:     {seen}")
sys.exit(seen != {"phi3": 2, "stablelm": 2, "llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 4})
PYTHON
"$python" finding.py
