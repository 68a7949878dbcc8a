"""`UserError`: what everything a user can mend raises. The command line prints it without a traceback, exit code 2."""

import re


class UserError(ValueError):
    """Something the user can mend: printed without a traceback, exit code 2. Secrets inside URLs are not shown."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


def without_secrets(text: str) -> str:
    """A text with URLs, as it may be shown or stored: passwords and keys inside them become ***."""
    text = re.sub(r"(://[^/@?\s]*:)[^/@?\s]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=)[^&\s'\":;,]+", r"\1***", text)
