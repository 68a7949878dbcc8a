"""GGUF: one file with weights in Q8_0, settings and tokenizer, which llama.cpp and its kin load. The only file that
imports gguf.

In: weights under the names of a Hugging Face class. Out: the file. Q8_0: 32 consecutive weights have 8 bits each and
share one fp16 scale. Rows of another length than a multiple of 32 are fp16, norms and biases fp32, as llama.cpp itself
has them.
Costs: one matrix in memory at a time.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.data.store.fast_tokenizer import GPT2_PATTERN, PATTERNS
from bigmodel.model.huggingface.folder import Described
from bigmodel.model.rotary import rotary_frequencies

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
BLOCK = 32  # weights with one scale
# llama.cpp's names of the patterns that split a text into words.
WORDS = {
    PATTERNS["ByteLevel"]: "gpt-2",
    PATTERNS["GPT-2"]: "gpt-2",
    PATTERNS["Llama 3, cl100k"]: "llama-bpe",
    PATTERNS["Qwen 2"]: "qwen2",
    PATTERNS["Llama 4, o200k"]: "gpt-4o",
    PATTERNS["Mistral NeMo"]: "tekken",
}
OTHER_WORDS = (
    "llama.cpp has no name for the pattern by which tokenizer.json splits words; GPT-2's is written: long numbers and "
    "line breaks can get other tokens there than in training"
)


def problem_of_gguf(kind: str, settings: ModelSettings) -> str:
    """Why llama.cpp cannot hold a model of type `kind`; empty if it can."""
    if kind not in ARCHITECTURES:
        return f"{kind} is not written as GGUF, only {', '.join(ARCHITECTURES)} are"
    if settings.classification:
        return "classification.classes: GGUF has no class for it"
    if settings.sliding_window:
        return f"model.sliding_window = {settings.sliding_window}: llama.cpp has no window for {kind}"
    if settings.rope_scaling and settings.rope_scaling.kind == "yarn":
        return 'model.rope_scaling.kind = "yarn" is not written as GGUF'
    return ""


def require_gguf() -> ModuleType:
    """The package. Raises `UserError` if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("--quantize q8_0 needs the package gguf; pip install 'bigmodel[gguf]'") from None
    return gguf


def rounded(weight: Tensor) -> Tensor:
    """What a reader gets for a weight."""
    gguf = require_gguf()
    kind = _type_of(gguf, list(weight.shape))
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.float().numpy(), kind), kind)).view(weight.shape)


def write_gguf(
    path: Path,
    kind: str,
    settings: ModelSettings,
    weights: Described,
    left_out: Collection[str],
    positions: int,
    ids: Mapping[str, int],
    tokenizer: bytes,
    template: str = "",
) -> list[str]:
    """Write the file; gives remarks. left_out: names. positions: of the longest text. ids: as in config.json.
    tokenizer: tokenizer.json with the ids above the vocabulary. Raises `UserError` for a tokenizer that llama.cpp does
    not know."""
    gguf = require_gguf()
    rows = weights.shape("model.embed_tokens.weight")[0]
    remarks, words = _words_of(json.loads(tokenizer))
    writer = gguf.GGUFWriter(None, ARCHITECTURES[kind])
    _add_settings(gguf, writer, settings, positions, rows)
    _add_tokenizer(gguf, writer, tokenizer, words, rows, ids)
    if template:
        writer.add_chat_template(template)
    tensors = _tensors(gguf, kind, settings, weights, left_out)
    for name, (shape, _) in tensors.items():
        stored = _type_of(gguf, shape)
        lengths = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(name, lengths, np.dtype(np.uint8), math.prod(lengths), raw_dtype=stored)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape, read in tensors.values():
        writer.write_tensor_data(gguf.quantize(read().float().numpy(), _type_of(gguf, shape)).view(np.uint8))
    writer.close()
    return remarks


Read = Callable[[], Tensor]


def _tensors(
    gguf: ModuleType, kind: str, settings: ModelSettings, weights: Described, left_out: Collection[str]
) -> dict[str, tuple[list[int], Read]]:
    """Shape and reader of each tensor by its name in the file."""
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind])
    known = gguf.get_tensor_name_map(architecture, settings.num_layers)
    found: dict[str, tuple[list[int], Read]] = {}
    for name in [name for name in weights if name not in left_out]:
        theirs = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"gguf has no name for {name}"
        heads = {"q_proj": settings.num_heads, "k_proj": settings.num_kv_heads}.get(name.split(".")[-2], 0)
        turned = heads if ARCHITECTURES[kind] == "llama" else 0

        def read(name: str = name, heads: int = turned) -> Tensor:
            return _interleaved(weights[name], heads) if heads else weights[name]

        found[theirs] = (weights.shape(name), read)
    if settings.rope_scaling and settings.rope_scaling.kind == "llama3":
        plain = rotary_frequencies(settings.model_copy(update={"rope_scaling": None}))[0]
        factors = plain / rotary_frequencies(settings)[0]
        found["rope_freqs.weight"] = ([len(factors)], lambda: factors)
    return found


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of llama.cpp's "llama", which rotates neighbours: channel i of the first
    half of a head, then channel i of the second half."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _type_of(gguf: ModuleType, shape: list[int]) -> Any:
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    return types.F16 if shape[-1] % BLOCK else types.Q8_0


def _add_settings(gguf: ModuleType, writer: Any, settings: ModelSettings, positions: int, rows: int) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(positions)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_heads)
    writer.add_head_count_kv(settings.num_kv_heads)
    writer.add_key_length(settings.resolved_head_dim)
    writer.add_value_length(settings.resolved_head_dim)
    writer.add_rope_dimension_count(settings.rotary_channels)
    writer.add_rope_freq_base(settings.rope_theta)
    writer.add_layer_norm_rms_eps(settings.norm_epsilon)
    writer.add_vocab_size(rows)
    if settings.rope_scaling and settings.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings.rope_scaling.factor)


def _words_of(description: Mapping[str, Any]) -> tuple[list[str], str]:
    """Remarks, and llama.cpp's name of how words are split."""
    step = description["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    if description["model"].get("type") != "BPE" or steps[-1].get("type") != "ByteLevel":
        raise UserError(
            "--quantize q8_0: tokenizer.json is no byte-level BPE, the only kind that is written as GGUF; use "
            "--quantize int8"
        )
    pattern = GPT2_PATTERN if len(steps) == 1 else steps[0].get("pattern", {}).get("Regex", "")
    is_known = len(steps) <= 2 and pattern in WORDS
    return ([], WORDS[pattern]) if is_known else ([OTHER_WORDS], WORDS[GPT2_PATTERN])


def _add_tokenizer(
    gguf: ModuleType, writer: Any, tokenizer: bytes, words: str, rows: int, ids: Mapping[str, int]
) -> None:
    description = json.loads(tokenizer)
    special = {one["id"]: one["special"] for one in description.get("added_tokens", [])}
    library = tokenizers.Tokenizer.from_str(tokenizer.decode())
    names = {number: name for name, number in library.get_vocab(with_added_tokens=True).items()}
    kinds = gguf.TokenType
    of_added = {True: kinds.CONTROL, False: kinds.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(
        [
            of_added[special[number]] if number in special else kinds.NORMAL if number in names else kinds.UNUSED
            for number in range(rows)
        ]
    )
    merges = description["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_eos_token_id(ids["eos_token_id"])
    writer.add_pad_token_id(ids["pad_token_id"])
    writer.add_add_bos_token(library.encode("a").ids[:1] == [ids["bos_token_id"]])
    writer.add_add_eos_token(False)
