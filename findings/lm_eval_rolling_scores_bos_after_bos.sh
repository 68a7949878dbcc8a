#!/usr/bin/env bash
# lm_eval counts the start token as a word to predict in perplexities, where the tokenizer puts one in front.
# Input: HFLM.loglikelihood_rolling of "a b c" with a random Llama and a tokenizer whose post-processor adds <s>.
# Expected: log p(a | <s>) + log p(b | <s> a) + log p(c | <s> a b): each word of the text once, after one start token.
# Seen: the ids of the text keep their <s>, and lm_eval puts its own prefix, again <s>, before them. So log p(<s> | <s>)
# is in the sum, a pair that no training text has, and every word is scored after two start tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet lm_eval==0.4.13 transformers==4.57.6 accelerate==1.15.0 torch==2.13.0
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=6, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32,
)
model = LlamaForCausalLM(config).eval()


def log_probability(ids: list[int]) -> float:
    """Sum of log p(ids[i + 1] | ids[:i + 1])."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(rows[place, word].item() for place, word in enumerate(ids[1:]))


request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=("a b c",), idx=0)
seen = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1).loglikelihood_rolling([request])[0]
one, two = log_probability([0, 3, 4, 5]), log_probability([0, 0, 3, 4, 5])
print(f"lm_eval {version('lm_eval')}, transformers {version('transformers')}, torch {torch.__version__}")
print(f"expected: {one:.4f}, a b c after <s>")
print(f"seen:     {seen:.4f}; <s> a b c after <s> gives {two:.4f}")
sys.exit(abs(seen - two) > 1e-3 or abs(seen - one) < 0.1)
PYTHON
"$python" finding.py
