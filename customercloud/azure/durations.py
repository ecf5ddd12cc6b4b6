"""ISO 8601 durations as rotation policies have them: years, months, weeks and days, no clock times. Pure."""

from __future__ import annotations

import calendar
import datetime as dt
import re
from typing import Final

_PATTERN: Final = re.compile(r"P(?=\d)(?:(\d{1,4})Y)?(?:(\d{1,4})M)?(?:(\d{1,5})W)?(?:(\d{1,5})D)?")
_DAYS_PER_YEAR: Final = 365
_DAYS_PER_MONTH: Final = 30


class DurationError(ValueError):
    """Not a duration that a rotation policy may have."""


def _parts(text: str) -> tuple[int, int]:
    """(months, days). Raises DurationError."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise DurationError(text[:32])
    years, months, weeks, days = (int(part or 0) for part in match.groups())
    return 12 * years + months, 7 * weeks + days


def moved(moment: dt.datetime, text: str, *, back: bool = False) -> dt.datetime:
    """`moment` plus the duration (minus, when `back`); a day that the month lacks becomes its last.

    Raises DurationError for what is no duration, or leads out of the years 1 … 9999.
    """
    months, days = _parts(text)
    sign = -1 if back else 1
    total = moment.year * 12 + moment.month - 1 + sign * months
    year, month = divmod(total, 12)
    if not dt.MINYEAR <= year <= dt.MAXYEAR:
        raise DurationError(text[:32])
    day = min(moment.day, calendar.monthrange(year, month + 1)[1])
    try:
        return moment.replace(year=year, month=month + 1, day=day) + dt.timedelta(days=sign * days)
    except OverflowError:
        raise DurationError(text[:32]) from None


def approximate_days(text: str) -> int:
    """For comparison with the service's minima. Raises DurationError."""
    months, days = _parts(text)
    years, months = divmod(months, 12)
    return years * _DAYS_PER_YEAR + months * _DAYS_PER_MONTH + days
