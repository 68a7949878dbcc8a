"""`UserError`: raised for every problem that the user can fix."""

from bigmodel.config.secret_text import without_secrets as without_secrets  # its readers import it from here


class UserError(ValueError):
    """A problem that the user can fix: printed without a traceback, exit code 2. Secrets are masked."""

    exit_code = 2

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class MachineError(UserError):
    """A fault that is not the user's, as of a device: printed without a traceback, exit code 1, so that a supervisor
    starts again."""

    exit_code = 1
