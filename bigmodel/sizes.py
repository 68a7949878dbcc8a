"""Readable numbers. Imports nothing."""

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def byte_size(number: float) -> str:
    """Bytes in three digits and a decimal unit.

    >>> [byte_size(number) for number in (0, 950, 999_600, 1_234_567, 5e8, 80e9)]
    ['0 bytes', '950 bytes', '1 MB', '1.23 MB', '500 MB', '80 GB']
    """
    for size, unit in UNITS:
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"


def counted_noun(number: int, noun: str) -> str:
    """
    >>> counted_noun(1, "rank"), counted_noun(1200, "rank")
    ('1 rank', '1,200 ranks')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(number: float) -> str:
    """A number with two decimals; small ones with two significant digits.

    >>> [amount(number) for number in (0.0, 0.0031, 0.5, 12.345, 81920.0)]
    ['0.00', '0.0031', '0.50', '12.35', '81,920.00']
    """
    return f"{number:.2g}" if 0 < number < 0.095 else f"{number:,.2f}"


def short_number(number: float) -> str:
    """
    >>> [short_number(number) for number in (0, 950, 12_345, 1_234_567, 5e9)]
    ['0', '950', '12.3k', '1.2M', '5.0G']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units.

    >>> [duration(seconds) for seconds in (0.4, 59.6, 90, 719, 12_000, 200_000)]
    ['0 s', '1 min', '2 min', '12 min', '3 h 20 min', '2 d 8 h']
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"{hours // 24} d {hours % 24} h"


def short_duration(seconds: float) -> str:
    """As `duration`; below a minute and a half with three digits.

    >>> [short_duration(seconds) for seconds in (0, 6.11e-5, 0.4815, 0.9999, 7.734, 89.9, 12_000)]
    ['0 s', '61.1 µs', '482 ms', '1 s', '7.73 s', '89.9 s', '3 h 20 min']
    """
    for size, unit in ((1e6, "µs"), (1e3, "ms")):
        if 0 < seconds * size < 999.5:
            return f"{seconds * size:.3g} {unit}"
    return f"{seconds:.3g} s" if 0 < seconds < 90 else duration(seconds)
