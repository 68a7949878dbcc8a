"""`UserError`: raised for every problem that the user can fix."""

from bigmodel.config.secret_text import without_secrets as without_secrets  # its readers import it from here


class UserError(ValueError):
    """A problem that the user can fix: printed without a traceback, exit code 2. Secrets are masked."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())
