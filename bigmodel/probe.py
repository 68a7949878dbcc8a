"""What this machine offers, as plain values: how the launcher, which imports no torch, learns of a node's devices."""

import os
import platform
import shutil
from typing import Any

from bigmodel.rundir import package_versions


def probe() -> dict[str, Any]:
    """Host, processors, memory (bytes), devices and versions. Imports torch; costs a second or two."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {
        "host": os.uname().nodename,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory_free_bytes": shutil.disk_usage("/dev/shm").free,
        "devices": devices,
        "versions": package_versions(),
    }
