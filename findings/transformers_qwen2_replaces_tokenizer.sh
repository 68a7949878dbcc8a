#!/usr/bin/env bash
# transformers 5 reads the tokenizer of a folder with model_type qwen2 as Qwen2Tokenizer, whatever tokenizer_class says.
# Input: a folder as save_pretrained() writes it: tokenizer.json without a normalizer, 257 tokens, and
# tokenizer_class = "TokenizersBackend", the class that takes tokenizer.json as it stands; beside it a config.json.
# Expected: the ids of tokenizer.json, as with model_type qwen3, llama or mistral.
# Seen: with qwen2 an NFC normalizer is put in and <|endoftext|> added, without a warning. "e" with a combining accent
# becomes other ids, and the tokenizer has 258 tokens: one that the file does not know.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
made = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<eos>"])}, []))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(".")
with open("tokenizer_config.json") as file:
    assert json.load(file)["tokenizer_class"] == "TokenizersBackend"
text = "e\u0301"
expected = made.encode(text).ids, 257
seen = {}
for kind in ("llama", "mistral", "qwen3", "qwen2"):
    with open("config.json", "w") as file:
        json.dump({"model_type": kind}, file)
    read = AutoTokenizer.from_pretrained(".")
    seen[kind] = read(text).input_ids, len(read)
print(f"transformers {transformers.__version__}")
print(f"expected: {expected[0]}, {expected[1]} tokens for each model_type")
for kind, (ids, size) in seen.items():
    print(f"seen:     {ids}, {size} tokens for {kind}")
changed = seen.pop("qwen2")
sys.exit(changed != ([127, 102], 258) or any(other != expected for other in seen.values()))
PYTHON
"$python" finding.py
