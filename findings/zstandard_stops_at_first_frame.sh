#!/usr/bin/env bash
# zstandard's decompress() and read_to_iter() return the first frame of a file and drop the others, without an error.
# Input: two zstd frames end to end; RFC 8878 makes this one file, and pzstd, `cat a.zst b.zst` and writers that flush
# frames make such files.
# Expected: both frames, as from `zstd -d`, gzip.decompress() and this package's own stream_reader().
# Seen: the first frame alone. read_to_iter() takes no argument that reads on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet zstandard==0.25.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import io
import sys

import zstandard

frames = [zstandard.compress(text) for text in (b"first" * 1000, b"second" * 1000)]
file = b"".join(frames)
reader = zstandard.ZstdDecompressor()
seen = {
    "decompress": len(reader.decompress(file)),
    "read_to_iter": sum(map(len, reader.read_to_iter(io.BytesIO(file)))),
    "stream_reader": len(reader.stream_reader(io.BytesIO(file)).read()),
}
print(f"zstandard {zstandard.__version__}")
print("expected: 11000 bytes from each")
print(f"seen:     {seen}")
sys.exit(seen != {"decompress": 5000, "read_to_iter": 5000, "stream_reader": 11000})
PYTHON
"$python" finding.py
