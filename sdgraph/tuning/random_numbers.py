"""Random numbers by counter: those of a step and a row follow from the seed alone, whatever was drawn before."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Return the generator of the random numbers for one purpose at one position of a training run.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, such as "noise"; other purposes have independent numbers.
        position: up to three counters, such as the step and the row.
    Returns:
        A generator that depends on nothing else, so that a resumed run draws what an uninterrupted one would.
    Example:
        `generator(0, "noise", step, row).standard_normal((4, 64, 64), np.float32)`
    Source:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (Philox).
    """
    counter = [0, *position, *[0] * (3 - len(position))]  # Philox itself counts up in the first word
    key = [seed % 2**64, zlib.crc32(purpose.encode())]
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
