"""Optimizer state in memory-mapped files: our `offload_optimizer.device = "nvme"`.

DeepSpeed's swapper empties masters, moments and gradients between updates and returns them part by part in its own
buffers; the norm, weight averages and checkpoints, which work by parameter name, would all have to use it. Here tensors
stay ordinary tensors, and their memory is a file: the operating system writes pages out when memory is short and reads
them back on access. Exact by construction; no other code changes. Costs: 16 bytes of disk per element of a rank's share
with two moments (20 with weight averages); reads and writes go through the page cache, so an update is as fast as the
disk once the state exceeds free memory. At the start DeepSpeed makes masters and gradients in memory (8 bytes per
element) before they move.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bigmodel.config.settings import UserError


class MappedFiles:
    """Tensors of one rank whose memory is files in `folder`.

    The files are unlinked once mapped: they vanish with the process, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, type and values, whose memory is a new file.

        Raises `UserError` where the folder cannot be written or lacks space. All space is allocated at once: a full
        disk fails here, not at a later write.
        """
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor
        try:
            descriptor, name = tempfile.mkstemp(prefix="bigmodel-state-", dir=self._folder)
            try:
                os.posix_fallocate(descriptor, 0, size)
                flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.unlink(name)
                os.close(descriptor)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"zero_optimization.offload_optimizer.nvme_path = {self._folder}: cannot make a file of {size:,} bytes "
                f"there for the optimizer's state ({error}); give a folder on a local disk that exists on every node, "
                "is writable and has about 16 bytes free per parameter of its ranks' shares"
            ) from None
        flat.copy_(tensor.detach().view(-1))
        return flat.view(tensor.shape)
