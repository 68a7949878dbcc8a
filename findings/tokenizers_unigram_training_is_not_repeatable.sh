#!/usr/bin/env bash
# tokenizers trains another Unigram model of the same text each time, in one thread too; a BPE is the same each time.
# Input: 400 lines of 40 made words, in one order; UnigramTrainer and BpeTrainer, 300 tokens; TOKENIZERS_PARALLELISM=false
# and RAYON_NUM_THREADS=1; each in six processes.
# Expected: six equal files, as of BpeTrainer, and no race with one thread.
# Seen: six different files of the Unigram model; scores differ in their last digits. So a hash of a Unigram
# tokenizer.json tells nothing about whether its text was the same, and a training cannot be verified by repeating it.
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
import random
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

drawn = random.Random(1)
words = ["".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 9))) for _ in range(900)]
text = [" ".join(drawn.choices(words, k=40)) for _ in range(400)]
model, trainer = {
    "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=300, show_progress=False)),
    "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=300, show_progress=False)),
}[sys.argv[1]]
tokenizer = Tokenizer(model)
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.train_from_iterator(text, trainer)
print(tokenizer.to_str())
PYTHON
export TOKENIZERS_PARALLELISM=false RAYON_NUM_THREADS=1
for kind in unigram bpe; do
  for number in 1 2 3 4 5 6; do "$python" finding.py "$kind" >"$kind-$number.json"; done
  echo "$kind: $(sha256sum "$kind"-*.json | cut -d' ' -f1 | sort -u | wc -l) different files of 6"
done
"$python" - <<'PYTHON'
import hashlib
import importlib.metadata
import json

files = {kind: [open(f"{kind}-{number}.json").read() for number in range(1, 7)] for kind in ("unigram", "bpe")}
different = {kind: len({hashlib.sha256(one.encode()).hexdigest() for one in found}) for kind, found in files.items()}
scores = [dict(json.loads(one)["model"]["vocab"]) for one in files["unigram"]]
shared = set.intersection(*(set(one) for one in scores))
spread = max(max(one[piece] for one in scores) - min(one[piece] for one in scores) for piece in shared)
print(f"tokenizers {importlib.metadata.version('tokenizers')}: pieces in all six {len(shared)}, largest difference {spread:.3g}")
assert different["bpe"] == 1, different
assert different["unigram"] > 1, "tokenizers now trains the same Unigram model each time"
assert 0 < spread < 1e-6, spread
PYTHON
echo "holds: the same text gives another Unigram file each time"
