#!/usr/bin/env bash
# s3fs says that an object does not exist, and cannot read it, if another process wrote it after the folder was listed.
# Input: a process lists a folder of checkpoints once; another client then writes `latest`. S3 itself is consistent.
# Expected: exists() and cat() ask the store, at least before they say no.
# Seen: both answer from the listing, which never expires; a new S3FileSystem() is the same object with the same
# listing. An object that was deleted still exists. use_listings_cache=False avoids it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet s3fs==2026.9.0 aiobotocore==3.10.0 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import logging
import os
import sys

import boto3
import s3fs
from moto.server import ThreadedMotoServer

logging.disable()
os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_DEFAULT_REGION="us-east-1")
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"
client = boto3.client("s3", endpoint_url=url)
client.create_bucket(Bucket="bucket")
client.put_object(Bucket="bucket", Key="run/step-1", Body=b"1")
store = s3fs.S3FileSystem(endpoint_url=url)
store.ls("bucket/run")
client.put_object(Bucket="bucket", Key="run/latest", Body=b"step-2")
client.delete_object(Bucket="bucket", Key="run/step-1")
again = s3fs.S3FileSystem(endpoint_url=url)
try:
    content = again.cat("bucket/run/latest").decode()
except FileNotFoundError:
    content = "FileNotFoundError"
seen = again.exists("bucket/run/latest"), content, again.exists("bucket/run/step-1")
server.stop()
print(f"s3fs {s3fs.__version__}")
print("expected: `latest` exists: True, cat: step-2, the deleted object exists: False")
print(f"seen:     `latest` exists: {seen[0]}, cat: {seen[1]}, the deleted object exists: {seen[2]}")
sys.exit(seen != (False, "FileNotFoundError", True))
PYTHON
"$python" finding.py
