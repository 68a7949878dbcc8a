"""Text of others, as it is printed: paths, names, events. Imports nothing of the project."""

import os
import shlex


def one_line(text: object) -> str:
    r"""On one line; control characters, as escapes and marks of direction are, become U+FFFD.

    >>> one_line("a\tb\n\x1b[31mred")
    'a b \ufffd[31mred'
    """
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(str(text).split()))


def shell_word(text: object) -> str:
    r"""A word for bash, of printable characters only, to be copied from the terminal.

    >>> [shell_word(word) for word in ("runs/a", "my runs/$a", "a\x1b'b", "-a")]
    ['runs/a', "'my runs/$a'", "$'a\\x1b\\x27b'", '-a']
    """
    word = str(text)
    if word.isprintable():
        return shlex.quote(word)
    plain = [one if one.isprintable() and one not in "'\\" else _bytes(one) for one in word]
    return f"$'{''.join(plain)}'"


def _bytes(letter: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))
