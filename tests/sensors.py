"""What the sensors of a unit say, and the lines that its firmware makes of it: the one place where tests get readings from.

Curves look like the field's: slow swings and a daily one, the same for the same unit id and time. The rest is as real
sensors have it (co2_ou_device: co2unit_measure.py, explorir.py):

    CO2             ten values in 5 s, in steps of 10 ppm. The first two are taken while the sensor warms up: they are way
                    off, 0 or 200010. A value that did not come is `None`; without a sensor all ten are.
    temperature     in steps of 1/16 degC, `None` without a sensor
    five values     that newer firmware appends: filtered CO2, LED normalised, LED signal, zero point, sensor temperature

Ten values come from a table of variants, so that a million readings take seconds.
"""

from __future__ import annotations

import math
import random
import zlib
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, List, NamedTuple, Optional, Sequence

HALF_HOUR = timedelta(minutes=30)
VARIANTS = 256                          # of ten values around the same ppm
MISSING = 0.004                         # share of the variants in which one of the ten did not come


class Climate(NamedTuple):
    """What makes one unit's curves its own."""
    seed: int
    level: float                        # ppm
    swing: float                        # ppm
    cycle: float                        # days of the slow swing
    phase: float                        # radians
    warmth: float                       # degC

    @classmethod
    def of(cls, unit_id: str) -> Climate:
        """Always the same for a unit id, on any version of Python."""
        seed = zlib.crc32(unit_id.encode("utf-8", "surrogateescape"))
        share = [(seed >> shift & 255) / 255 for shift in (0, 8, 16, 24)]
        return cls(seed, 425 + 25 * share[0], 15 + 30 * share[1], 9 + 9 * share[2], 6.28 * share[3], -2 + 6 * share[1])

    def co2(self, day: float) -> float:
        """ppm; `day` counts from 1970 with a fraction."""
        return (self.level + self.swing * math.sin(6.2832 * day / self.cycle + self.phase)
                + 6 * math.sin(6.2832 * (day + 0.2)))

    def temp(self, day: float) -> float:
        """degC: summer, winter, afternoon and night."""
        return (self.warmth + 9 * math.sin(6.2832 * (day - 110) / 365.25)
                + 2.5 * math.sin(6.2832 * (day - 0.35)) + math.sin(day / 1.7 + self.phase))


@lru_cache(maxsize=None)
def ten_values(ppm: int, variant: int, missing: float = MISSING) -> str:
    """Ten CO2 values around `ppm` as a sensor gives them, tab-separated; one of VARIANTS."""
    noise = random.Random(variant)
    warming_up = [noise.choices((0, 200010, ppm), (6, 3, 1))[0], noise.choices((200010, 0, ppm), (6, 1, 3))[0]]
    values = [str(10 * round((value + noise.uniform(-12, 12)) / 10)) if value == ppm else str(value)
              for value in warming_up + [ppm] * 8]
    if noise.random() < missing:
        values[noise.randrange(10)] = "None"
    return "\t".join(values)


def five_values(ppm: int, temp: float) -> str:
    """The raw sensor values that newer firmware appends."""
    return "\t%d\t%d\t%d\t%d\t%d" % (ppm // 10, 31000 + ppm % 97, 30500 + ppm % 53, 32989, int(temp * 10) + 18000)


def reading_line(unit_id: str, nickname: str, when: datetime, ten: Sequence[Any], temp: Any = 4.5, flashes: Any = 0,
                 five: Optional[Sequence[Any]] = None) -> str:
    """One line as firmware writes it, from values that a test has chosen; None is `None`."""
    moment = when.strftime("%Y-%m-%d\t%H:%M:%S")
    return "\t".join([unit_id, nickname, moment, *map(str, (temp, flashes, *ten, *(five or ())))]) + "\n"


def reading_lines(unit_id: str, nickname: str, start: datetime, count: int, period: timedelta = HALF_HOUR,
                  raw: bool = False, missing: float = MISSING) -> List[str]:
    """`count` lines of a readings file, the first at `start`, each with its newline.

    `raw`: with the five values of newer firmware. `missing`: share of the lines in which one of the ten is missing.
    """
    climate = Climate.of(unit_id)
    names = "%s\t%s\t" % (unit_id, nickname)
    step, begin = period.total_seconds() / 86400, (start - datetime(1970, 1, 1)).total_seconds() / 86400
    number = round(begin / step)        # of the first, from 1970 on
    lines = []
    for i in range(count):
        day = begin + i * step
        ppm, temp = int(climate.co2(day)), round(climate.temp(day) * 16) / 16
        flashes, ten = 3 * ((number + i) % 48 == 24), ten_values(ppm, (climate.seed + (number + i) * 167) % VARIANTS, missing)
        moment, five = (start + i * period).strftime("%Y-%m-%d\t%H:%M:%S"), five_values(ppm, temp) if raw else ""
        lines.append("%s%s\t%s\t%d\t%s%s\n" % (names, moment, temp, flashes, ten, five))
    return lines
