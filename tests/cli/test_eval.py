"""`cosmos-scale eval retrieval` on a checkpoint of a real run."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cosmos_scale.checkpoint import find_checkpoint, load_weights
from cosmos_scale.cli import main as cli
from cosmos_scale.cli.eval_command import main_ranks_choice, require_same_options
from cosmos_scale.config import RetrievalConfig
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.engine.contact import Contact
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.exit_status import REFUSED
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.shard_files import flip_bytes, picture, sample, write_shard, write_shards
from tests.checkpoint.edit import content_of, rewrite
from tests.data.web_server import web_server
from tests.evaluation.measured import retrieval_of


def evaluated(capsys: pytest.CaptureFixture[str], checkpoint: Path, shards: SceneShards, *options: str) -> str:
    """What the command prints of a checkpoint."""
    data = ["--checkpoint", str(checkpoint), "--data", str(shards.gallery)]
    assert cli.main(["eval", "retrieval", *data, "--device", "cpu", *options]) == 0
    return capsys.readouterr().out


def test_json_says_what_the_run_itself_measured(
    checkpoints: Path, shards: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    measured = next(record for record in records if record["kind"] == "eval")
    for which in ("student", "teacher"):
        printed = json.loads(evaluated(capsys, checkpoints, shards, "--weights", which, "--json"))
        assert list(printed)[:4] == ["checkpoint", "weights", "data", "captions"]
        assert printed["checkpoint"] == str(checkpoints / "step-00000002")
        assert printed["images"] == printed["texts"] == 40
        for key in ("image_to_text_R@1", "image_to_text_R@10", "text_to_image_R@1", "text_to_image_R@10"):
            # The same weights on the same machine; one pair of 40 is the least that could differ.
            assert printed[key] == pytest.approx(measured[f"{which}/{key}"], abs=1e-6)


def test_table_names_checkpoint_and_chance(
    checkpoints: Path, shards: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--weights", "teacher", "--captions", "longIB_captions", "--batch", "7"]
    printed = evaluated(capsys, checkpoints / "step-00000000", shards, *options)
    assert "step-00000000" in "".join(printed.split())  # the title is wrapped
    assert "image to text" in printed
    assert "2.50 %" in printed


def test_student_and_teacher_differ_after_training_only(checkpoints: Path) -> None:
    def equal(step: str) -> bool:
        student, teacher = (load_weights(checkpoints / step, which) for which in ("student", "teacher"))
        assert student.keys() == teacher.keys()
        return all(torch.equal(student[name], teacher[name]) for name in student)

    assert equal("step-00000000")
    assert not equal("step-00000002")


def test_several_correct_texts_and_batches_do_not_matter(checkpoints: Path, shards: SceneShards) -> None:
    one, other = (
        retrieval_of(checkpoints / "step-00000002", shards.gallery, captions="longIB_captions", batch=batch)
        for batch in (7, 64)
    )
    assert one["texts"] > one["images"] == 40
    # Batches of other sizes round differently, which may swap two near neighbours.
    assert one["image_to_text_R@10"] == pytest.approx(other["image_to_text_R@10"], abs=1 / 40 + 1e-6)


def test_user_errors_name_what_is_wrong(checkpoints: Path, shards: SceneShards, tmp_path: Path) -> None:
    def evaluate_with(folder: Path, data: str, captions_key: str = "raw_caption") -> None:
        retrieval_of(folder, data, captions=captions_key, batch=8)

    last = find_checkpoint(checkpoints.parent)
    assert last == checkpoints / "step-00000002"
    with pytest.raises(UserError, match="none there"):
        find_checkpoint(tmp_path / "missing")
    with pytest.raises(UserError, match=r"manifest\.json"):
        evaluate_with(tmp_path, str(shards.gallery))
    with pytest.raises(UserError, match="no_such_key"):
        evaluate_with(last, str(shards.gallery), captions_key="no_such_key")
    with pytest.raises(UserError, match="nowhere"):
        evaluate_with(last, str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(last, broken)
    manifest = content_of(broken)
    del manifest["parameters"]["logit_scale"]
    rewrite(broken, manifest)
    with pytest.raises(UserError, match=r"broken: does not fit the model: Missing key.*logit_scale") as error:
        evaluate_with(broken, str(shards.gallery))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_without_shards_is_told_of_the_other_layouts(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place = tmp_path / "mine.csv"
    place.mkdir() if kind == "folder" else place.write_text("image,caption\n")
    assert cli.main(["eval", "retrieval", "--checkpoint", str(checkpoints), "--data", str(place)]) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"cosmos-scale eval retrieval: --data: {place} has no .tar shards; rule: for another layout --dataset NAME: "
    )
    assert "coco_val2017" in line
    assert "pairs" in line


def test_pictures_past_the_runs_max_pixels_are_left_out(
    checkpoints: Path, shards: SceneShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "step-00000002"
    shutil.copytree(checkpoints / "step-00000002", few)
    manifest = content_of(few)
    manifest["state"]["config"]["data"]["max_pixels"] = 100
    rewrite(few, manifest)
    with pytest.raises(UserError):
        retrieval_of(few, shards.gallery)
    assert capsys.readouterr().err.count("more than max_pixels 100") == 40


def test_what_is_left_out_stands_beside_the_numbers(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"caption": "no original"}, *[{"original_caption": f"thing {place}"} for place in range(5)]]
    members = [{**sample(place), "json": json.dumps(document).encode()} for place, document in enumerate(documents)]
    flip_bytes(write_shard(tmp_path / "0.tar", members), 1200, 20)  # the first picture, which would lack the key anyway
    index_shards(str(tmp_path), None, workers=1, progress=False)
    command = ["eval", "retrieval", "--checkpoint", str(checkpoints), "--data", str(tmp_path), "--device", "cpu"]
    assert cli.main([*command, "--captions", "original_caption", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["images"], numbers["left_out_without_captions"], numbers["left_out_damaged"]) == (5, 1, 0)
    assert cli.main([*command, "--captions", "original_caption"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out of 6 samples: 1 without captions under original_caption" in printed
    assert cli.main(command) == 2
    assert "original_caption (5 samples), caption (1 sample); name the key: --captions" in capsys.readouterr().err


def test_shards_of_a_server_are_evaluated_by_an_index_of_this_machine(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, index = write_shards(tmp_path / "shards", [3, 4]), tmp_path / "index"
    index.mkdir()
    for file in (*shards.glob("*.npy"), shards / "index.json"):
        file.rename(index / file.name)
    options = ["--index", str(index), "--device", "cpu", "--json"]
    with web_server(shards, tmp_path / "log") as server:
        data = f"{server.url}/{{00000..00001}}.tar"
        assert cli.main(["eval", "retrieval", "--checkpoint", str(checkpoints), "--data", data, *options]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 7


def test_samples_that_indexing_rejected_are_said_not_to_count(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [{**sample(place), "png": picture(place)} for place in range(4)]
    members[1]["jpg"] = members[2]["jpg"] = b"no picture"
    write_shard(tmp_path / "0.tar", members)
    report = index_shards(str(tmp_path), None, workers=1, progress=False)
    assert (report.samples, report.unread) == (2, 2)
    command = ["eval", "retrieval", "--checkpoint", str(checkpoints), "--data", str(tmp_path), "--device", "cpu"]
    assert cli.main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 2
    said = f"{tmp_path}: not in the index, so never read: 2 samples and 2 second pictures (rejected.jsonl)"
    assert captured.err.splitlines().count(said) == 1


def test_own_pairs_are_measured_and_their_features_kept(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, run)
    rows = [{"image": f"{number}.jpg", "caption": [f"thing {number}", f"{number}"]} for number in range(6)]
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number) if number else b"broken")
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["eval", "retrieval", "--checkpoint", str(run), "--dataset", "pairs", "--device", "cpu", "--cache"]
    printed = []
    for options in (["--json"], ["--json", "--batch", "2"], []):
        assert cli.main([*command, "--data", str(tmp_path / "pairs.jsonl"), *options]) == 0
        captured = capsys.readouterr()
        printed.append(captured.out)
        # What was left out is told where pictures are read, and counted also where their features were kept.
        assert captured.err.count("left out: 0.jpg") == (len(printed) == 1)
    numbers = json.loads(printed[0])
    assert printed[1] == printed[0]
    assert (numbers["dataset"], numbers["images"], numbers["texts"]) == ("pairs", 5, 10)
    assert 1 <= numbers["image_to_text_median_rank"] <= numbers["texts"]
    assert 1 <= numbers["text_to_image_mean_rank"] <= numbers["images"]
    assert "mean rank" in printed[2]
    assert "left out of 6 samples: 1 damaged or too large" in " ".join(printed[2].split())
    assert len(list((run / "features").iterdir())) == 1


def chosen(rank: int, world_size: int, root: Path) -> list[Path]:
    """What each rank takes of a run and of a file; rank 1 finds a newer checkpoint in the run."""
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, Contact(rank, {}))
    found = root / "checkpoints" / f"step-0000000{rank}"
    return [main_ranks_choice(root, found, ranks), main_ranks_choice(root / "x.pt", root / "x.pt", ranks)]


def test_all_ranks_measure_the_checkpoint_that_rank_0_found(tmp_path: Path) -> None:
    expected = [tmp_path / "checkpoints" / "step-00000000", tmp_path / "x.pt"]
    assert run_ranks(chosen, 2, tmp_path) == [expected, expected]


def refused_options(rank: int, world_size: int, options: dict[str, Any], keys: dict[str, Any]) -> str:
    """What ranks are told of which rank 1 has other options and another section than rank 0."""
    assert dist.group.WORLD is not None
    ranks = Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD, Contact(rank, {}))
    given = argparse.Namespace(checkpoint=Path("a"), weights="both", batch=8, json=rank == 0, out=Path(f"out{rank}"))
    section = RetrievalConfig(kind="retrieval", shards="a", index=f"host{rank}", max_samples=9)
    if rank == 1:
        vars(given).update(options)
        section = section.model_copy(update=keys)
    try:
        require_same_options(given, section, ranks)
    except JointError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize(
    ("options", "keys", "said"),
    [
        ({}, {}, ""),
        ({"batch": 16}, {}, "--batch: 8 on rank 0, 16 on rank 1; rule: all ranks have the same"),
        ({"checkpoint": Path("b")}, {}, "--checkpoint: a on rank 0, b on rank 1; rule: all ranks have the same"),
        ({}, {"max_samples": 5}, "--max-samples: rank 1 has other values than rank 0; rule: all ranks have the same"),
    ],
)
def test_ranks_with_other_options_are_refused(options: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    """They would measure parts that do not make up the whole: each rank's part follows from its own options."""
    assert run_ranks(refused_options, 2, options, keys) == [said, said]
