"""Makes the files of this folder by the programs whose formats they have. CI reads the files and needs no such program.

python make.py tokenizer        tokenizers 0.22.2: a byte-level BPE of 258 tokens: begin 0, end 1, the 256 bytes
python make.py megatron         megatron-core 0.16.1, its IndexedDatasetBuilder
python make.py dolma            dolma 1.2.1 with numpy 1.26.4 and tokenizers 0.19.1, its command `tokens`
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TEXTS = [f"Document {number}:" + " time and people" * (1 + number * number % 7) for number in range(12)]
BOS, EOS = 0, 1
TYPES = ("uint8", "uint16", "int32", "int64")


def ids_of(text):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(HERE / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|bos|>", "<|eos|>", *alphabet]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(names[:2])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)


def make_megatron():
    """A document per text with an end token, in each type; `sentences`: two sequences per document, an empty document
    in the middle, no end tokens; `modes` and `images`: multimodal, all modes 0, and one mode 1."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def built(name, dtype, **options):
        return IndexedDatasetBuilder(str(HERE / f"{name}.bin"), dtype=dtype, **options)

    for name in TYPES:
        builder = built(name, getattr(numpy, name))
        for text in TEXTS:
            ids = [*ids_of(text), EOS]
            builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(HERE / f"{name}.idx"))
    builder = built("sentences", numpy.uint16)
    for number, text in enumerate(TEXTS):
        ids = ids_of(text)
        builder.add_document(torch.tensor(ids), [9, len(ids) - 9])
        if number == 5:
            builder.add_document(torch.tensor([]), [])
    builder.finalize(str(HERE / "sentences.idx"))
    for name, mode in (("modes", 0), ("images", 1)):
        builder = built(name, numpy.uint16, multimodal=True)
        for text in TEXTS[:2]:
            builder.add_item(torch.tensor([*ids_of(text), EOS]), mode)
            builder.end_document()
        builder.finalize(str(HERE / f"{name}.idx"))


def make_dolma():
    """`dolma-0-00000`: begin and end tokens; `dolma_end-0-00000`: end tokens alone. dolma shuffles the documents; the
    third column of the .csv.gz has their numbers."""
    source = HERE / "texts.jsonl"
    source.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    command = ["dolma", "tokens", "--documents", source.name, "--tokenizer.name_or_path", "tokenizer.json"]
    command += ["--tokenizer.eos_token_id", str(EOS), "--tokenizer.pad_token_id", str(EOS), "--processes", "1"]
    command += ["--max_size", "1000000", "--dtype", "uint16"]
    for name, options in (("dolma", ["--tokenizer.bos_token_id", str(BOS)]), ("dolma_end", [])):
        out = HERE / f"{name}.out"
        subprocess.run([*command, *options, "--destination", out.name], check=True, cwd=HERE)
        for file in out.glob("part-*"):
            file.rename(HERE / file.name.replace("part", name))
        shutil.rmtree(out)
    source.unlink()


if __name__ == "__main__":
    {"tokenizer": make_tokenizer, "megatron": make_megatron, "dolma": make_dolma}[sys.argv[1]]()
