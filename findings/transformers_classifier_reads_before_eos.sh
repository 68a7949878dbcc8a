#!/usr/bin/env bash
# A classifier of transformers whose padding token is its end token reads the token before the end, not the end.
# Input: LlamaForSequenceClassification with pad_token_id = eos_token_id, as after the usual
# `tokenizer.pad_token = tokenizer.eos_token`; one sequence that ends with the end token, and a mask of ones.
# Expected: the scores at the end token, the last one that the mask keeps.
# Seen: the scores one token earlier: the place is the last id that differs from pad_token_id; the mask is not asked.
# With a padding token of its own the same model reads the end. 5.24.0 does as 4.57.6.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet transformers==4.57.6 torch==2.13.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForSequenceClassification

END = 2


def place_read(pad: int) -> list[int]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
        pad_token_id=pad, eos_token_id=END,
    )
    model = LlamaForSequenceClassification(config).eval()
    ids = torch.tensor([[1, 5, 6, END]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        scores = model(ids, attention_mask=mask).logits[0]
        everywhere = model.score(model.model(ids, attention_mask=mask).last_hidden_state)[0]
    return torch.isclose(everywhere, scores, atol=1e-6).all(-1).nonzero().flatten().tolist()


seen = {"own padding token": place_read(0), "padding is the end": place_read(END)}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print("expected: place [3] in both")
print(f"seen:     {seen}")
sys.exit(seen != {"own padding token": [3], "padding is the end": [2]})
PYTHON
"$python" finding.py
