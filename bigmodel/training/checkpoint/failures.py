"""Why a checkpoint was not saved."""

import errno

from bigmodel.config.user_error import MachineError, UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class SaveError(UserError):
    """The checkpoint of a step was not saved; `reason` is one of `run_accounting.SAVE_FAILURES`."""

    def __init__(self, message: str, step: int = 0, code: int = errno.EIO) -> None:
        super().__init__(message)
        self.step = step
        self.reason = "disk_full" if code in DISK_FULL else "permission" if code in FORBIDDEN else "io_error"
        self.is_gone = code in GONE  # the folder was moved or deleted; the next save makes it anew


class NotFiniteError(SaveError, MachineError):
    """Numbers to be saved are not finite; no setting lets the run go on."""

    def __init__(self, message: str, step: int = 0) -> None:
        super().__init__(message, step)
        self.reason = "not_finite"
