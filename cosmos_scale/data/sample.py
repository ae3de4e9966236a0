"""What identifies one draw of one sample, and how a damaged one is reported."""

from typing import NamedTuple


class SampleKey(NamedTuple):
    """All randomness of a sample is a function of these four integers.

    seed: the run's seed. epoch: from 0. sample: position in the merged index of all sources.
    repeat: which of the sample's visits in the epoch, from 0; above 0 only in a source with a weight above 1.
    """

    seed: int
    epoch: int
    sample: int
    repeat: int = 0


class DamagedSample(Exception):
    """This sample cannot be used; the text says why. The loader counts it, logs shard and key, and substitutes."""
