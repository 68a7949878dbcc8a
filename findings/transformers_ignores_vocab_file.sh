#!/usr/bin/env bash
# transformers 5 takes a sentencepiece model as vocab_file of a fast tokenizer and makes a tokenizer without its pieces.
# Input: a BPE of 40 pieces, trained by sentencepiece; LlamaTokenizerFast(vocab_file="bpe.model"), which converts such a
# file in 4.57 and is the usual way to a tokenizer.json.
# Expected: the 40 pieces, or an error, if the argument has lost its meaning.
# Seen: a tokenizer of 3 special tokens, without a warning. Every text becomes no token at all, and save_pretrained
# writes that as tokenizer.json.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys

import sentencepiece
import transformers

lines = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
with open("text.txt", "w") as file:
    file.write("\n".join(lines * 50))
sentencepiece.SentencePieceTrainer.train(
    input="text.txt", model_prefix="bpe", model_type="bpe", vocab_size=40, minloglevel=2
)
pieces = sentencepiece.SentencePieceProcessor(model_file="bpe.model")
tokenizer = transformers.LlamaTokenizerFast(vocab_file="bpe.model")
print(f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}")
print(f"expected: {len(pieces)} tokens, the text is {pieces.encode('the quick fox', out_type=str)}")
seen = len(tokenizer), tokenizer.tokenize("the quick fox")
print(f"seen:     {seen[0]} tokens, the text is {seen[1]}")
sys.exit(seen != (3, []))
PYTHON
"$python" finding.py
