"""The command line, whose last rank ends without a word when it is to encode pictures."""

import os
from collections.abc import Sequence

import pytest
from torch import Tensor

from cosmos_scale.cli import main as program
from cosmos_scale.evaluation.evaluator import Encoder

DIED = 9


def main(argv: Sequence[str]) -> int:
    """Run `cosmos-scale`."""
    encode = Encoder.images

    def images(self: Encoder, images: Tensor) -> Tensor:
        if self.setting.rank == self.setting.world_size - 1:
            os._exit(DIED)
        return encode(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "images", images)
        return program.main(argv)
