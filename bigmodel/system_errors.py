"""What the system refuses: room on a disk, memory, open files. In: an error. Out: its kind and its remedy. Imports
nothing."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS,)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
OUT_OF_MEMORY = (  # of torch's CPU allocator, CUDA, cuBLAS, NCCL, C++, Linux; torch has no one class for them
    "can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'", "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip


def remedy_for(error: BaseException) -> str:
    """What a user can do about a full or read-only disk or too many open files; empty for another error."""
    number = error.errno if isinstance(error, OSError) else 0
    if number in DISK_FULL:
        return "free some space, or raise the quota"
    if number in READ_ONLY:
        return "mount its file system read-write (dmesg says why the kernel has changed it), or move run.directory"
    if number in TOO_MANY_FILES or "Too many open files" in str(error):  # torch raises a RuntimeError
        return (
            "raise the limit of open files (ulimit -n 65536; under SLURM: --propagate=NOFILE), or see with lsof -p "
            "what holds them"
        )
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, is a failed allocation, on a device or not."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    names = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, RuntimeError) and ("OutOfMemoryError" in names or any(t in str(error) for t in OUT_OF_MEMORY)):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def line_of(error: BaseException) -> str:
    """One line for the user: file, reason and remedy."""
    if is_out_of_memory(error):
        return f"out of memory: {asked_for(error)}"
    reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
    where = getattr(error, "filename", None) or "a file"
    return f"{where}: {reason}; {remedy_for(error)}, and run the same command again"


def asked_for(error: BaseException) -> str:
    """What was asked for, in the words of the allocator; without its advice, which is longer than the news."""
    while error.__cause__ is not None and not str(error):
        error = error.__cause__
    text = " ".join(str(error).split()).partition(" If reserved but unallocated")[0]
    text = text.partition(" Exception raised from ")[0].rpartition("DefaultCPUAllocator: ")[2]
    return text.removeprefix("CUDA out of memory. ") or "Python's own memory"
