"""Optimizer state in files: what `offload_optimizer.device = "nvme"` does here.

DeepSpeed's own swapper empties masters, moments and gradients between updates and hands them back a part at a time in
buffers of its own; the norm, averages of weights and checkpoints, which go by parameter name, would all have to go
through it. Here the tensors stay where everything looks for them, and their memory is a file: the kernel writes pages
out when memory is short and reads them back when they are touched. Exact by construction; nothing else changes.
Costs: 16 bytes of disk per element of a rank's share with two moments (20 with an average of weights); reads and
writes go through the page cache, so an update is as fast as the disk once the state is larger than the free memory.
At the start DeepSpeed makes masters and gradients in memory (8 bytes per element) before they move.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bigmodel.config.settings import UserError


class MappedFiles:
    """Tensors of one rank whose memory lies in files of `folder`.

    The files have no name after they were made, so they are gone with the process, whatever ended it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, type and values, whose memory is a new file.

        Raises `UserError` where the folder cannot be written or has not the space, all of which is taken at once:
        a full disk is found here and not at a later write.
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
                "may be written and has about 16 bytes per parameter and rank's share free"
            ) from None
        flat.copy_(tensor.detach().view(-1))
        return flat.view(tensor.shape)
