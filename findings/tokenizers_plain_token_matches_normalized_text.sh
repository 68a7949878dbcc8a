#!/usr/bin/env bash
# A plain added token of tokenizers is found in normalized text, a special one only literally.
# Input: a normalizer Lowercase, the token "<eos>" added once with add_tokens(), once with add_special_tokens().
# Expected: the same text matches in both; "special" speaks of skipping the token while decoding.
# Seen: the plain token also matches "<EOS>" in a document, so a document can hold a token that its text does not spell.
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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


def with_token(special: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["<eos>"])
    return tokenizer


seen = {name: with_token(name == "special").encode("a <EOS> a").tokens for name in ("plain", "special")}
print(f"tokenizers {tokenizers.__version__}")
print("expected: the same tokens from both")
print(f"seen:     {seen}")
sys.exit(seen != {"plain": ["a", "<eos>", "a"], "special": ["a", "[UNK]", "a"]})
PYTHON
"$python" finding.py
