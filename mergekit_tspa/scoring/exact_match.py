"""Whether what a model wrote ends with the answer that was asked for."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def matches(written: str, answer: str) -> bool:
    """An answer that is a number is compared with the last number that was written, as numbers: 1,200.0 is
    1200.  Other answers must be the end of what was written; capitals, spaces and a full stop do not count.
    """
    wanted = _number(answer)
    if wanted is None:
        return bool(_folded(answer)) and f" {_folded(written)}".endswith(f" {_folded(answer)}")
    numbers = [_number(found) for found in _NUMBER.findall(written)]
    return bool(numbers) and numbers[-1] == wanted


def _number(text: str) -> Decimal | None:
    text = text.strip().lstrip("$€£").rstrip("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
