"""`UserError`: raised for every problem that the user can fix."""

import re


class UserError(ValueError):
    """A problem that the user can fix: printed without a traceback, exit code 2. Secrets in URLs are masked."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


def without_secrets(text: str) -> str:
    """The text with passwords and keys in URLs replaced by ***."""
    text = re.sub(r"(://[^/@?\s]*:)[^/@?\s]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=)[^&\s'\":;,]+", r"\1***", text)
