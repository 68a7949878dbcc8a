#!/usr/bin/env bash
# transformers reads a GGUF file of Qwen3 and passes over qwen3.attention.key_length: heads of 64 channels do not load.
# Input: a file by the gguf package, of one layer, 2 heads of 64 channels, with key_length and value_length 64.
# Expected: head_dim 64 and the file's numbers. The file's other sizes are read.
# Seen: head_dim 128, the class's default, and a RuntimeError of size mismatches. Files with heads of 128 channels load.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet torch==2.13.0 transformers==4.57.6 accelerate==1.15.0 gguf==0.19.0 numpy==2.1.3
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import importlib.metadata
import sys

import gguf
import numpy as np
import torch
import transformers

WIDTH, HEADS, ROWS = 96, 2, 40


def write(path: str, channels: int) -> None:
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(channels)
    writer.add_value_length(channels)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(ROWS)
    inner = HEADS * channels
    shapes = {
        "token_embd": (ROWS, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (inner, WIDTH),
        "blk.0.attn_k": (inner, WIDTH),
        "blk.0.attn_v": (inner, WIDTH),
        "blk.0.attn_output": (WIDTH, inner),
        "blk.0.attn_q_norm": (channels,),
        "blk.0.attn_k_norm": (channels,),
        "blk.0.ffn_gate": (WIDTH, WIDTH),
        "blk.0.ffn_up": (WIDTH, WIDTH),
        "blk.0.ffn_down": (WIDTH, WIDTH),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: str) -> str:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file=path, dtype=torch.float32)
    except RuntimeError as error:
        return "size mismatch" if "size mismatch" in str(error) else str(error)
    return f"head_dim {model.config.head_dim}"


transformers.utils.logging.set_verbosity_error()
seen = {}
for channels in (64, 128):
    write(f"{channels}.gguf", channels)
    seen[channels] = load(f"{channels}.gguf")
print(f"transformers {transformers.__version__}, gguf {importlib.metadata.version('gguf')}")
print("expected: head_dim 64 and head_dim 128")
print(f"seen:     {seen[64]} and {seen[128]}")
sys.exit(seen != {64: "size mismatch", 128: "head_dim 128"})
PYTHON
"$python" finding.py 2>&1 | grep -v "it/s"
exit "${PIPESTATUS[0]}"
