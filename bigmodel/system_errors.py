"""What the system refuses: room on a disk, memory, open files, a connection. In: an error. Out: its kind, its remedy.
Imports nothing outside Python."""

import errno
import traceback
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS,)
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
OUT_OF_MEMORY = (  # of torch's CPU allocator, CUDA, cuBLAS, NCCL, C++, Linux; torch has no one class for them
    "can't allocate memory", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'", "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection was likely closed")  # gloo, TCPStore


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


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended. NCCL's words are others."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)


def innermost_lines(error: BaseException) -> str:
    """The innermost lines of this project in the traceback: "loop.py:212 in _train, world.py:67 in sum_"."""
    here = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if here in Path(frame.filename).parents]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames[-3:])


def line_of(error: BaseException) -> str:
    """One line for the user: file, reason and remedy."""
    if is_out_of_memory(error):
        return f"out of memory: {asked_for(error)}"
    if is_lost_peer(error):
        words = next(text for text in LOST_PEER if text in str(error))
        return f"another rank has ended: {words[0].lower()}{words[1:]}, in {innermost_lines(error)}"
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
