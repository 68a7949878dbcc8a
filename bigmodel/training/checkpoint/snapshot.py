"""A rank's file in memory: its shards, copied into one buffer that has the layout of the file.

In: an engine at the end of a step. Out: the bytes of a safetensors file, and each shard as a view of them. Guarantee:
later updates of the engine do not change them; the bytes are those of `safetensors.torch.save`. Layout (safetensors
README, "Format"): 8 bytes, the length of the header, little-endian; the header, JSON with spaces up to a multiple of 8;
the numbers, sorted by name. Cost: the rank's state once in memory, to the end of the run. The pages of a new buffer
cost twice the copy: a thread makes them during the first steps.
"""

import json
import mmap
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from bigmodel.training.checkpoint.format import States

FLOAT_BYTES = 4


class Snapshot:
    """`take` replaces the content; nothing may still read the content before.

    content: the bytes of the file. tensors: flat, fp32, by "KEY.NAME@START", views of `content`.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None  # makes the pages
        self.content = memoryview(b"")
        self.tensors: dict[str, Tensor] = {}

    def prepare(self, engine: States) -> None:
        """Make the memory for `take`, beside training; nothing if it is there."""
        if self._thread or len(self._buffer):
            return
        sizes = {place: shard.numel() for place, shard in _shards_of(engine).items()}
        self._buffer = torch.empty(len(header(sizes)) + sum(sizes.values()) * FLOAT_BYTES, dtype=torch.uint8)
        pages = self._buffer.numpy()[:: mmap.PAGESIZE]
        self._thread = threading.Thread(target=pages.fill, args=(0,), name="checkpoint memory", daemon=True)
        self._thread.start()

    @torch.no_grad()
    def take(self, engine: States) -> None:
        """Copy this rank's shards to the CPU."""
        if self._thread:
            self._thread.join()
        shards = _shards_of(engine)
        head = header({place: shard.numel() for place, shard in shards.items()})
        size = len(head) + sum(shard.numel() for shard in shards.values()) * FLOAT_BYTES
        if len(self._buffer) != size:
            self.content, self.tensors = memoryview(b""), {}  # the old buffer goes before the new one comes
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(size, dtype=torch.uint8)
        self.content = memoryview(self._buffer.numpy())
        self.content[: len(head)] = head
        numbers = self._buffer[len(head) :].view(torch.float32)
        sizes = [shard.numel() for shard in shards.values()]
        self.tensors = dict(zip(shards, numbers.split(sizes), strict=True)) if sizes else {}
        for place, shard in shards.items():
            self.tensors[place].view(shard.shape).copy_(shard)


def _shards_of(engine: States) -> dict[str, Tensor]:
    """This rank's shards by "KEY.NAME@START", sorted by name."""
    owned = {name: engine.owned(name) for name in engine.names()}
    found = {f"{key}.{name}@{start}": shard for name in owned for key, (start, shard) in owned[name].items()}
    return {place: found[place] for place in sorted(found)}


def header(sizes: Mapping[str, int]) -> bytes:
    """The first bytes of a safetensors file of flat fp32 tensors. sizes: elements by name, sorted by name."""
    table, end = {}, 0
    for name, size in sizes.items():
        start, end = end, end + size * FLOAT_BYTES
        table[name] = {"dtype": "F32", "shape": [size], "data_offsets": [start, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
