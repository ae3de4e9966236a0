"""What identifies one draw of one sample, and how a damaged one is reported."""

from typing import NamedTuple


class SampleKey(NamedTuple):
    """All randomness of a sample is a function of these three integers.

    seed: the run's seed. epoch: from 0. sample: position in the merged index of all sources.
    """

    seed: int
    epoch: int
    sample: int


class DamagedSample(Exception):
    """This sample cannot be used; the text says why. The loader counts it, logs shard and key, and substitutes."""
