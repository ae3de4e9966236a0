"""Runs from OpenCLIP's weights, and from a run's own for another image size: what is said, kept and refused."""

from pathlib import Path

import pytest
import torch

from cosmos_scale.checkpoint.initial import open_initial
from cosmos_scale.checkpoint.interchange.names import is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.resize import IMAGE_TABLE, resize_tables
from cosmos_scale.checkpoint.state import load_weights, read_run_config, read_state
from cosmos_scale.cli import main as cli
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.testing.runs import last_checkpoint, train_to_end, write_run
from tests.checkpoint.edit import content_of, rewrite

DID = (
    "OpenCLIP state dict (",  # and its digest
    "student and teacher are the same model; image positions resized from 8 x 8 to 4 x 4 patches; "
    "heads and distill_logit_scale drawn from seed 0; by the config, since the file does not tell: activation gelu, "
    "vision.head_width 32 (most models of these sizes have 64), text.heads 2 (most models of these sizes have 1)",
)


def drawn(run: Path, seed: int, *overrides: str) -> dict[str, torch.Tensor]:
    model = CosmosModel(load_config(run, overrides).model)
    model.init_weights(torch.Generator().manual_seed(seed))
    return dict(model.state_dict())


def test_a_run_from_openclips_weights(tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = write_run(tmp_path, scenes, checkpoint={"at_start": True, "every": 0}), tmp_path / "towers.pt"
    state = drawn(run, 3, "model.vision.image_size=64")
    towers = {name: tensor for name, tensor in state.items() if not is_of_heads(name)}
    torch.save(towers, path)

    assert cli.main(["train", "--dry-run", str(run), f"init_from={path}"]) == 2
    refused = capsys.readouterr().err
    assert (
        f"init_from: checkpoint {path}: found OpenCLIP state dict without the cross-modality heads; rule: " in refused
    )
    assert cli.main(["train", "--dry-run", str(run), f"init_from={path}", "init_heads=new"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"OpenCLIP state dict, {len(towers)} tensors fit the model" in printed
    assert DID[1] in printed

    started = train_to_end(run, f"init_from={path}", "init_heads=new", "train.max_steps=1").require(0)
    assert f"init_from: {path}: {DID[0]}" in started.output
    assert f"); {DID[1]}\n" in started.output
    first = tmp_path / "tiny" / "checkpoints" / "step-00000000"
    heads = {name: tensor for name, tensor in drawn(run, 0).items() if is_of_heads(name)}
    expected = heads | resize_tables(towers, tensor_shapes(load_config(run).model))
    for which in ("student", "teacher"):
        found = load_weights(first, which)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    origin = read_state(first).origin
    assert origin.startswith(f"{path}: {DID[0]}")
    assert origin.endswith(DID[1])

    path.unlink()  # a resumed run needs it no more
    resumed = train_to_end(run, f"init_from={path}", "init_heads=new", "train.max_steps=2").require(0)
    assert "init_from: " not in resumed.output
    assert read_state(last_checkpoint(run)).origin == origin
    assert last_checkpoint(run).name == "step-00000002"
    a_run_of_another_size(run)


def a_run_of_another_size(run: Path) -> None:
    """Our own checkpoint for another image size, and one that was written before there was an activation."""
    folder = last_checkpoint(run)
    overrides = ["name=large", f"init_from={run.parent}/tiny"]
    found = open_initial(load_config(run, [*overrides, "model.vision.image_size=48"]))
    assert found.notes == ["image positions resized from 4 x 4 to 6 x 6 patches"]
    assert found.read("teacher")[IMAGE_TABLE].shape == (37, 64)
    with pytest.raises(UserError, match=r"^init_from: .*: needs model.activation gelu, but the config says quick_gelu"):
        open_initial(load_config(run, [*overrides, "model.activation=quick_gelu"]))
    with pytest.raises(UserError, match=r"needs model.text.heads 2, but the config says 4"):
        open_initial(load_config(run, [*overrides, "model.text.heads=4"]))
    content = content_of(folder)
    del content["state"]["config"]["model"]["activation"], content["state"]["config"]["init_heads"]
    del content["state"]["origin"]
    rewrite(folder, content)
    assert read_run_config(folder).model.activation == "gelu"
    assert open_initial(load_config(run, overrides)).notes == []
