"""Loads exported folders with this interpreter's transformers and prints what it finds, as JSON by folder.

    python load_export.py ROOT

ROOT holds folders, each with `case.json`: prompt and decoder prompt (ids) and texts. It imports nothing of the project,
so that an interpreter with another version of transformers can run it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def load(folder: Path) -> dict[str, Any]:
    """Logits or states of the prompt, the greedy continuation, ids of the texts, and what the loader complains of."""
    case = json.loads((folder / "case.json").read_text())
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    two_sides, encoder = kind in ("t5", "mt5"), kind in ("bert", "modernbert")
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSeq2SeqLM if two_sides else auto
    model, said = auto.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    model.eval()
    prompt = {"input_ids": torch.tensor([case["prompt"]])}
    begin = {"decoder_input_ids": torch.tensor([case["decoder"]])} if two_sides else {}
    with torch.no_grad():
        logits = model(**prompt, **begin)[0][0].tolist()
    greedy = []
    if not encoder:
        made = model.generate(
            **prompt, attention_mask=torch.ones_like(prompt["input_ids"]), max_new_tokens=8, do_sample=False
        )
        greedy = made[0, 1 if two_sides else len(case["prompt"]) :].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if kind == "qwen2":
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return {
        "version": transformers.__version__,
        "logits": logits,
        "greedy": greedy,
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in case["texts"]],
        "with_ends": tokenizer.encode(case["texts"][0]),
        "complaints": {name: sorted(map(str, keys)) for name, keys in said.items() if keys},
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = {
        folder.name: load(folder) for folder in sorted(Path(sys.argv[1]).iterdir()) if (folder / "case.json").exists()
    }
    Path(sys.argv[2]).write_text(json.dumps(found))
