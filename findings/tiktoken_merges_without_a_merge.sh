#!/usr/bin/env bash
# tiktoken makes a vocabulary word that no merge leads to; tokenizers, with the same tokenizer.json, never does.
# Input: a byte-level BPE with the words "qx" (a merge) and "zqxj" (no merge), as pruned or extended vocabularies have
# them. Its vocabulary in the order of ids is what tiktoken takes as mergeable ranks.
# Expected: the same ids, as converters of tokenizer.json assume: both run byte-pair encoding on one vocabulary.
# Seen: tiktoken derives merges from ranks and takes a whole word of the text from the vocabulary first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet tokenizers==0.22.2 tiktoken==0.14.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import tiktoken
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # that of ByteLevel
# Letters in the order that gives printable bytes their own code; the words here need no others.
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = [*letters, "qx", "zqxj"]
tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("q", "x")]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
as_bytes = {}
for byte in range(256):
    printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
    as_bytes[chr(byte) if printable else chr(256 + len([c for c in as_bytes if ord(c) > 255]))] = bytes([byte])
ranks = {b"".join(as_bytes[letter] for letter in word): i for i, word in enumerate(words)}
fast = tiktoken.Encoding("same", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
seen = tokenizer.encode("zqxj").tokens, [fast.decode([one]) for one in fast.encode("zqxj")]
print(f"tokenizers {tokenizers.__version__}, tiktoken {tiktoken.__version__}")
print(f"expected: {seen[0]} from both")
print(f"seen:     tokenizers {seen[0]}, tiktoken {seen[1]}")
sys.exit(seen != (["z", "qx", "j"], ["zqxj"]))
PYTHON
"$python" finding.py
