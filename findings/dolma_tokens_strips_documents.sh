#!/usr/bin/env bash
# `dolma tokens` takes white space off both ends of every document before it is tokenized.
# Input: a document of code whose first line is indented and whose last line ends, and a byte-level tokenizer.
# Expected: the ids of the text as it stands in the field `text`, with the end token behind them.
# Seen: the two spaces in front and the line end behind are gone; no option keeps them. A model trained on such files
# sees no file of code that ends with a line end, and the first line of a piece of code loses its indentation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet dolma==1.2.1
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import gzip
import json
import pathlib
import subprocess
import sys
from importlib.metadata import version

import numpy
from tokenizers import Tokenizer, models, pre_tokenizers

END = 256
text = "  x = 1\n  y = 2\n"
letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.save("tokenizer.json")
with gzip.open("code.json.gz", "wt") as file:
    file.write(json.dumps({"id": "1", "text": text, "source": "code"}) + "\n")
command = [
    sys.executable, "-m", "dolma.cli.__main__", "tokens", "--documents", "code.json.gz", "--destination", "out",
    "--tokenizer.name_or_path", "tokenizer.json", "--tokenizer.eos_token_id", str(END),
    "--tokenizer.pad_token_id", str(END), "--dtype", "uint16", "--processes", "1",
]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(part,) = pathlib.Path("out").glob("*.npy")
seen = numpy.fromfile(part, dtype=numpy.uint16).tolist()
expected = [*tokenizer.encode(text).ids, END]
print(f"dolma {version('dolma')}, tokenizers {version('tokenizers')}")
print(f"expected: {expected}")
print(f"seen:     {seen}")
sys.exit(seen != [*tokenizer.encode(text.strip()).ids, END] or seen == expected)
PYTHON
"$python" finding.py
