"""Public checkpoints in all commands that take a checkpoint: evaluations, attention maps, inspection."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosmos_scale.checkpoint.interchange.reading import find_model
from cosmos_scale.cli import main as cli
from cosmos_scale.config import ClassificationConfig, DataConfig
from cosmos_scale.data.scenes.layouts import write_layouts
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.classification import Classification
from cosmos_scale.evaluation.evaluator import Encoder, Numbers, Setting, measure
from cosmos_scale.evaluation.loading import load_encoder, models_of
from cosmos_scale.evaluation.published import PUBLISHED_ROWS, row_of_file
from cosmos_scale.model.cosmos import CosmosModel
from tests.checkpoint.interchange.made import SIZES, openclip_model, save_cosmos, state_of, towers
from tests.evaluation.labelled import write_folders

CPU = torch.device("cpu")
PARAMETERS = {"image tower": 504_320, "text tower": 3_267_328, "heads": 46_208, "log-scales": 2}
HEADS = "attention heads: 2 in the image tower, 1 in the text tower (tensors do not tell)"
GELU = "activation: gelu (tensors do not tell)"


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("animals"), (4, 3, 5))


@pytest.fixture(scope="module")
def cosmos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cosmos(tmp_path_factory.mktemp("public") / "cosmos_tiny.pt")


@pytest.fixture(scope="module")
def openclip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The towers of the COSMOS checkpoint's student under OpenCLIP's names."""
    path = tmp_path_factory.mktemp("public") / "tiny.safetensors"
    save_file(towers(state_of(1)), path)
    return path


def numbers_of(seed: int, animals: Path, **changes: Any) -> Numbers:
    """The numbers of a model drawn from a seed, without any file of it."""
    config = SIZES.model_copy(update=changes)
    model = CosmosModel(config).eval()
    model.load_state_dict(state_of(seed))
    encoder = Encoder(model, Setting.of_model(config, DataConfig(), CPU))
    section = ClassificationConfig(kind="classification", data=str(animals))
    return measure(Classification(section, encoder.setting), encoder)


def lines_of(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[list[dict[str, Any]], str]:
    """What a command that succeeds prints: its lines of JSON, and its stderr."""
    assert cli.main([*map(str, command), "--json"]) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def classify(checkpoint: Path, animals: Path, *options: str) -> list[object]:
    return ["eval", "classification", "--checkpoint", checkpoint, "--data", animals, "--device", "cpu", *options]


def numbers_in(line: dict[str, Any], expected: Numbers) -> Numbers:
    return {name: line[name] for name in expected}


def test_both_models_of_a_cosmos_checkpoint(cosmos: Path, animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, said = lines_of(capsys, *classify(cosmos, animals, "--weights", "both", "--cache"))
    assert [(line["checkpoint"], line["weights"]) for line in lines] == [
        (str(cosmos), "student"),
        (str(cosmos), "teacher"),
    ]
    for line, seed in zip(lines, (1, 2), strict=True):
        expected = numbers_of(seed, animals)
        assert numbers_in(line, expected) == expected
    assert said == f"{cosmos}: COSMOS checkpoint of epoch 32\n{cosmos}: assumed {HEADS}\n"
    assert (cosmos.parent / "features").is_dir()
    assert lines_of(capsys, *classify(cosmos, animals, "--cache"))[0] == lines[:1]


def test_an_openclip_file_has_one_model(openclip: Path, animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((line,), said) = lines_of(capsys, *classify(openclip, animals, "--weights", "both"))
    expected = numbers_of(1, animals)
    assert (line["weights"], numbers_in(line, expected)) == ("model", expected)
    kind = "OpenCLIP state dict, without cross-modality heads"
    assert said.splitlines() == [f"{openclip}: {note}" for note in (kind, f"assumed {HEADS}", f"assumed {GELU}")]
    _, said = lines_of(capsys, *classify(openclip, animals, "--activation", "quick_gelu"))
    assert said.splitlines() == [f"{openclip}: {note}" for note in (kind, f"assumed {HEADS}")]
    encoders = [load_encoder(openclip, "student", "cpu", activation) for activation in (None, "quick_gelu")]
    assert [encoder.has_heads for encoder in encoders] == [False, False]
    assert encoders[0].weights != encoders[1].weights  # a cache keeps their features apart
    picture = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(*(encoder.images(picture) for encoder in encoders))


def test_attention_maps_need_heads(
    cosmos: Path, openclip: Path, animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next((animals / "bird").iterdir())
    options = ["--image", picture, "--caption", "a bird", "--device", "cpu", "--out", tmp_path / "maps"]
    ((line,), said) = lines_of(capsys, "attention", "--checkpoint", cosmos, *options)
    assert line["weights"] == "student"
    assert said.startswith(f"{cosmos}: COSMOS checkpoint of epoch 32\n")
    assert cli.main(["attention", "--checkpoint", str(openclip), *map(str, options)]) == 2
    said = capsys.readouterr().err
    assert f"{openclip}: has no cross-modality heads; rule: attention maps need a COSMOS" in said
    assert said.count("\n") == 1


def test_all_sets(cosmos: Path, shards: SceneShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a file that has the name of a published one."""
    shutil.move(write_layouts(shards.gallery, tmp_path / "layouts").captions, tmp_path / "sets" / "coco")
    file = tmp_path / "cosmos_vitb32_cc3m.pt"
    shutil.copy(cosmos, file)
    options = ["--data-root", tmp_path / "sets", "--device", "cpu", "--out", tmp_path / "out", "--weights", "student"]
    assert cli.main(["eval", "all", "--checkpoint", str(file), *map(str, options)]) == 0
    assert f"{file}: assumed {HEADS}" in capsys.readouterr().err
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(one["weights"], one["set"]) for one in document["results"]] == [("student", "coco_val2017")]
    assert document["published"] == "cc3m_vitb32"


def test_names_of_published_files() -> None:
    names = {row_of_file(Path(f"cosmos_{model}_{data}.pt")) for model, data in MODELS_AND_DATA}
    assert names == PUBLISHED_ROWS.keys() - {"sclip_openai_vitb16"}


MODELS_AND_DATA = [
    (model, data) for model in ("vitb16", "vitb32") for data in ("cc3m", "cc12m", "yfcc15m", "merged30m", "pixelprose")
]


def test_another_vocabulary_is_refused(animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = SIZES.model_copy(update={"text": SIZES.text.model_copy(update={"vocab_size": 64})})
    torch.save(state_of(1, small), tmp_path / "small.pt")
    assert cli.main([*map(str, classify(tmp_path / "small.pt", animals))]) == 2
    said = capsys.readouterr().err
    assert "found 64 tokens, not the 49,408 of CLIP's tokenizer; accepted: " in said
    assert said.count("\n") == 1


def test_paths_that_are_not_enough(cosmos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder of a download \(hf download openai/clip-b32 --local-dir DIR\)$"):
        find_model(Path("openai/clip-b32"))
    with pytest.raises(UserError, match=r", or a run with one$"):
        find_model(Path("runs/b32"))
    snapshot = tmp_path / "models--openai--clip-b32" / "snapshots" / "3d74acf9"
    snapshot.mkdir(parents=True)
    with pytest.raises(UserError, match=f", or {snapshot}$"):
        find_model(snapshot.parents[1])
    with pytest.raises(UserError, match=r"none there; rule: .*, or a file in it, such as cosmos_tiny\.pt$"):
        find_model(cosmos.parent)
    student = torch.load(cosmos, weights_only=False)["student"]
    torch.save({"epoch": 1, "student": student}, tmp_path / "student.pt")
    assert models_of(tmp_path / "student.pt", "student") == {"student": "student"}
    with pytest.raises(UserError, match="found a COSMOS checkpoint without a teacher, with a student"):
        models_of(tmp_path / "student.pt", "both")  # before the student is measured


def inspect(capsys: pytest.CaptureFixture[str], path: Path, *options: str, status: int = 0) -> str:
    assert cli.main(["checkpoint", "inspect", str(path), *options]) == status
    captured = capsys.readouterr()
    assert (captured.err if status < 2 else captured.out) == ""
    return captured.out + captured.err


def test_inspection(cosmos: Path, openclip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspect(capsys, cosmos, "--json", "--verify"))
    assert found == {
        "checkpoint": str(cosmos),
        "format": "cosmos",
        "kind": "COSMOS checkpoint of epoch 32",
        "models": ["student", "teacher"],
        "heads": True,
        "guessed": [HEADS],
        "parameters": PARAMETERS,
        "dtypes": ["float32"],
        "config": SIZES.model_dump(mode="json"),
        "bytes": cosmos.stat().st_size,
        "whole": True,
        "verified": True,
        "errors": [],
    }
    assert sum(PARAMETERS.values()) == sum(tensor.numel() for tensor in state_of(1).values())
    found = json.loads(inspect(capsys, openclip, "--json"))
    assert (found["format"], found["models"], found["heads"]) == ("openclip", ["model"], False)
    assert found["guessed"] == [HEADS, GELU]
    assert found["parameters"] == PARAMETERS | {"heads": 0, "log-scales": 1}
    shown = inspect(capsys, openclip)
    assert shown.startswith(f"{openclip}: OpenCLIP state dict\n")
    assert "not there: no attention maps" in " ".join(shown.replace("│", "").split())
    assert "3,771,649" in shown


def test_inspection_of_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = openclip_model().half().state_dict()
    state["ln_final.bias"][2] = float("inf")
    torch.save(state, tmp_path / "inf.pt")
    found = json.loads(inspect(capsys, tmp_path / "inf.pt", "--json"))
    assert (found["dtypes"], found["whole"], found["verified"]) == (["float16"], True, False)
    found = json.loads(inspect(capsys, tmp_path / "inf.pt", "--json", "--verify", status=1))
    assert (found["whole"], len(found["errors"])) == (False, 1)
    assert "1 of 64 numbers of ln_final.bias are not finite" in found["errors"][0]
    assert "state dict, BROKEN" in inspect(capsys, tmp_path / "inf.pt", "--verify", status=1)
    (tmp_path / "text.pt").write_text("some text")
    for path, said in ((tmp_path / "text.pt", "found neither"), (tmp_path / "none.pt", "No such file or directory")):
        text = inspect(capsys, path, status=2)
        assert said in text
        assert text.count("\n") == 1
