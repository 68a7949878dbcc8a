#!/usr/bin/env bash
# The ByteLevel decoder of tokenizers does not give back an added token with a letter of Latin-1.
# Input: a byte-level BPE with the added token "é" (or "über"), which encode() finds.
# Expected: decode(encode(text)) is the text, the point of a byte-level vocabulary.
# Seen: U+FFFD. The added token is plain text, but the decoder reads it in the byte alphabet of the vocabulary, where
# "é" stands for the single byte 0xE9.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
text = "caf\u00e9"
without = tokenizer.decode(tokenizer.encode(text).ids)
tokenizer.add_tokens(["\u00e9"])
seen = tokenizer.decode(tokenizer.encode(text).ids)
print(f"tokenizers {tokenizers.__version__}")
print(f"expected: {ascii(text)}, as without the added token: {ascii(without)}")
print(f"seen:     {ascii(seen)}")
sys.exit(not (without == text and seen == "caf\ufffd"))
PYTHON
"$python" finding.py
