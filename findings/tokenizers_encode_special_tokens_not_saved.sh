#!/usr/bin/env bash
# encode_special_tokens of tokenizers is not in tokenizer.json, while truncation and padding are.
# Input: a tokenizer that reads special tokens in documents as plain text (encode_special_tokens = True), saved, loaded.
# Expected: the same ids from the loaded tokenizer.
# Seen: the loaded one makes a special token of the same text, so a document can fake its own end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet tokenizers==0.22.2
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.add_special_tokens(["<eos>"])
tokenizer.encode_special_tokens = True
tokenizer.enable_truncation(8)
loaded = Tokenizer.from_str(tokenizer.to_str())
before, after = (one.encode("a <eos> a").tokens for one in (tokenizer, loaded))
print(f"tokenizers {tokenizers.__version__}")
print(f"expected: {before}, truncation {tokenizer.truncation['max_length']}")
print(f"seen:     {after}, truncation {loaded.truncation['max_length']}")
sys.exit(not (before == ["a", "[UNK]", "a"] and after == ["a", "<eos>", "a"] and loaded.truncation))
PYTHON
"$python" finding.py
