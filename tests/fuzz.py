"""`make fuzz`: the parser under random damage, for a minute or as many SECONDS as the environment says."""

from __future__ import annotations

import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

import co2d
from heads import WELL_FORMED, parse


def fuzz_parser(seed: int, rounds: int) -> None:
    """Spoil well-formed heads at random: they are refused, unfinished, or still well-formed by the book."""
    rng = random.Random(seed)
    for _ in range(rounds):
        message = bytearray(rng.choice(WELL_FORMED)[0])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(message))
            message[at:at + rng.randint(0, 2)] = bytes(rng.choice(b"\r\n\t :\x00\x7f\xffA/?%5") for _ in range(rng.randint(0, 3)))
        try:
            request = parse([bytes(message)])
        except co2d.Refused:
            continue
        if request is not None:
            judge(bytes(message), request)


def judge(message: bytes, request: co2d.Request) -> None:
    """What must hold of every head that is accepted."""
    head = message[:message.index(b"\r\n\r\n") + 4]
    bare = head.replace(b"\r\n", b"")
    assert not set(bare) & set(b"\x00\r\n\x7f"), head
    assert request.method.encode() in co2d.METHODS and "transfer-encoding" not in request.headers, head
    assert request.headers.get("content-length", "0").isdigit(), head


def main() -> int:
    """Fuzz with new seeds until the time is over; the exit status."""
    end, seed = time.monotonic() + float(os.environ.get("SECONDS", "60")), int(time.time())
    rounds = 0
    while time.monotonic() < end:
        try:
            fuzz_parser(seed, 10000)
        except Exception as error:
            print("seed %d: %r" % (seed, error))
            return 1
        seed, rounds = seed + 1, rounds + 10000
    print("%d damaged requests, none accepted that should not be" % rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
