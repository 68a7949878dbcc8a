#!/usr/bin/env bash
# webdataset gives the samples of the first of two joined tar files and drops the others, without a warning.
# Input: `cat a.tar.gz b.tar.gz`. The gzip file of two members is valid (RFC 1952), and the tar file of two archives is
# what `tar -i` reads; plain `tar` and tarfile stop after the first as well, since POSIX lets an archive end there.
# Expected: both samples, or an error for the bytes that follow, as a reader of training data owes.
# Seen: the first sample alone. WebDataset() has no argument for ignore_zeros, with which tarfile reads both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet webdataset==1.0.2
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import io
import sys
import tarfile
import warnings
from importlib.metadata import version

import webdataset


def shard(key: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo(f"{key}.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    return file.getvalue()


with open("joined.tar.gz", "wb") as file:
    file.write(shard("first") + shard("second"))
with tarfile.open("joined.tar.gz", ignore_zeros=True) as archive:
    assert archive.getnames() == ["first.txt", "second.txt"]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    seen = [sample["__key__"] for sample in webdataset.WebDataset("joined.tar.gz", shardshuffle=False)]
said = [str(warning.message) for warning in said if not issubclass(warning.category, ResourceWarning)]
print(f"webdataset {version('webdataset')}")
print("expected: ['first', 'second'], or an error")
print(f"seen:     {seen}, warnings {said}")
sys.exit(seen != ["first"] or bool(said))
PYTHON
"$python" finding.py
