"""Retrieval during training: what is wrong with its data shows when it is opened, and the run's limits hold for it."""

from pathlib import Path

import pytest
import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.periodic import PeriodicRetrieval
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import write_shards

CPU = torch.device("cpu")


def config(folder: Path, captions: str = "raw_caption", max_pixels: int = 10**6) -> RunConfig:
    vision = {"width": 64, "layers": 1, "image_size": 16, "patch_size": 8}
    text = {"width": 64, "layers": 1, "heads": 1, "context_length": 16}
    return RunConfig.model_validate(
        {
            "model": {"vision": vision, "text": text, "embed_dim": 64, "pooler_heads": 1},
            "data": {"max_pixels": max_pixels},
            "eval": {"retrieval": {"shards": str(folder), "captions": captions}},
        }
    )


@pytest.mark.parametrize("rank", [0, 3])  # three samples: rank 3 of 4 has some to do, rank 0 none
def test_a_wrong_key_is_found_at_the_start_on_every_rank(tmp_path: Path, rank: int) -> None:
    run = config(write_shards(tmp_path, [3]), captions="raw_captoin")
    with pytest.raises(
        UserError, match=r"^eval\.retrieval: .*no captions under 'raw_captoin'; its keys are raw_caption$"
    ):
        PeriodicRetrieval(run, Tokenizer(16), rank, 4, CPU)


def test_pictures_past_the_runs_max_pixels_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(write_shards(tmp_path, [3]), max_pixels=100)
    model = CosmosModel(run.model)
    model.init_weights(torch.Generator().manual_seed(0))
    result, error = PeriodicRetrieval(run, Tokenizer(16), 0, 1, CPU).run(model, lambda tensor: tensor)
    assert result is None
    assert error is not None
    assert capsys.readouterr().err.count("more than max_pixels 100") == 3
