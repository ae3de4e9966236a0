"""A small checkpoint that no training made, and pictures, for all tests of a loaded model."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import cosmos_scale
from cosmos_scale.checkpoint.files import write_tensors
from cosmos_scale.checkpoint.state import RunState, checkpoint_name, write_manifest
from cosmos_scale.config import RunConfig
from cosmos_scale.model.cosmos import CosmosModel
from tests.evaluation.labelled import ANIMALS, tiny_run, write_folders


class Saved(NamedTuple):
    """A run's folder, its one checkpoint, and a folder with pictures of each class."""

    run: Path
    checkpoint: Path
    pictures: Path

    def files(self) -> list[Path]:
        """The pictures, in the order of the classes and of their names."""
        return sorted(self.pictures.glob("*/*.jpg"))


def write_checkpoint(run: Path, config: RunConfig) -> Path:
    """Write a student and a teacher of drawn weights as a run's checkpoint of step 3."""
    folder = run / "checkpoints" / checkpoint_name(3)
    folder.mkdir(parents=True)
    tensors, pieces = {}, []
    for seed, kind in enumerate(("weight", "ema")):
        model = CosmosModel(config.model)
        model.init_weights(torch.Generator().manual_seed(seed))
        for name, parameter in model.named_parameters():
            tensors[f"{name}|{kind}"] = parameter.detach().flatten()
            if kind == "weight":
                pieces.append((name, list(parameter.shape), 0, parameter.numel()))
    state = RunState(3, 24, 3, 1, {}, "", config.model_dump(mode="json"))
    write_manifest(folder, state, [(write_tensors(folder / "rank-00000.safetensors", tensors), pieces)])
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("saved")
    checkpoint = write_checkpoint(root / "run", tiny_run())
    return Saved(root / "run", checkpoint, write_folders(root / "pictures", [2] * len(ANIMALS)))


@pytest.fixture(scope="session")
def model(saved: Saved) -> cosmos_scale.LoadedModel:
    return cosmos_scale.load(saved.run, device="cpu")
