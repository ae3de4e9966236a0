"""The start of a run: ranks whose hosts do not hold the same files are told so, instead of training on a mixture."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.checkpoint.interchange.reading import read_public
from cosmos_scale.checkpoint.state import load_weights
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.run import folder
from cosmos_scale.run.folder import check_folder
from cosmos_scale.run.run import start_run
from cosmos_scale.run.start import open_run
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.runs import train_to_end, write_run
from cosmos_scale.testing.shard_files import write_shards
from tests.checkpoint.edit import content_of, rewrite
from tests.evaluation.labelled import write_folders, write_labelled_shards
from tests.evaluation.segmentation.own_set import OwnSet

# Keys that may change on resume, but decide when ranks meet: ranks that differ would wait for one another forever.
OF_ALL_RANKS = (
    "log.every=7",
    "checkpoint.every=7",
    "zero.stage=1",
    "train.micro_batches=2",
    "train.max_steps=7",
    "non_finite=skip",
)


def prepared(rank: int, world_size: int, cases: list[list[tuple[Path, list[str]]]]) -> list[str]:
    """Prepare runs, for each rank from its own file and overrides: what each case ended with."""
    said = []
    for case in cases:
        run, overrides = case[rank]
        try:
            open_run(load_config(run, overrides), start_ranks("cpu"))
            said.append("prepared")
        except UserError as error:
            said.append(str(error))
    return said


def test_hosts_with_other_indexes_or_keys_are_refused(tmp_path: Path) -> None:
    runs = []
    for host, counts in (("a", [9, 7]), ("b", [9, 7]), ("c", [9, 8])):
        source = write_shards(tmp_path / host / "shards", counts)
        (tmp_path / host / "run").mkdir()
        runs.append(write_run(tmp_path / host / "run", SceneShards(source, source), output=str(tmp_path / "out")))
    same, copied, other = runs
    one, two = run_ranks(
        prepared,
        2,
        [
            [(same, []), (copied, [])],  # files of each host's own, but the same ones
            [(same, []), (other, [])],
            [(same, []), (same, ["seed=1", "data.views.flip=0.1"])],
            [(same, []), (same, ["data.workers=1", "data.prefetch=1", "data.remote.retries=0"])],
            *([(same, []), (same, [override])] for override in OF_ALL_RANKS),
        ],
    )
    assert one == two
    assert one[0] == "prepared"
    assert one[1].startswith("data.sources: ranks see different indexes (rank 0: ")
    assert one[2] == "rank 1 and rank 0 differ in seed, data.views.flip; rule: all ranks share one run's keys"
    assert one[3] == "prepared"
    for override, said in zip(OF_ALL_RANKS, one[4:], strict=True):
        key = override.partition("=")[0]
        assert said == f"rank 1 and rank 0 differ in {key}; rule: all ranks share one run's keys"


def test_a_launch_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    assert "differ in seed" in run_ranks(prepared, 2, [[(run, []), (run, ["seed=1"])]])[0][0]
    assert not (tmp_path / "tiny").exists()


def dali_lacks_on_rank_1(rank: int, world_size: int, run: Path) -> str:
    def require() -> None:
        if rank == 1:
            raise UserError("data.decoder: dali is missing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_scale.data.training.loader.require_dali", require)
        try:
            start_run(load_config(run, ["data.decoder=dali"]), start_ranks("cpu"))
        except UserError as error:
            return str(error)
    return "started"


def test_what_the_loader_of_one_rank_lacks_all_ranks_hear(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    assert run_ranks(dali_lacks_on_rank_1, 2, run) == ["data.decoder: dali is missing (rank 1)"] * 2


def test_a_run_without_one_batch_writes_nothing(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    with pytest.raises(UserError, match="an epoch must hold at least one batch"):
        open_run(load_config(run, ["train.global_batch=1000"]), start_ranks("cpu"))
    assert not (tmp_path / "tiny").exists()


def opened_on_a_full_disk(rank: int, world_size: int, path: Path) -> tuple[str, bool]:
    """Open a run, and again where files may have 100 bytes: what the run says, and whether config.yaml stayed."""
    config = load_config(path)
    written = config.output / config.name / "config.yaml"
    ranks = start_ranks("cpu")
    open_run(config, ranks)
    before = written.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        open_run(config, ranks)
        said = "opened"
    except UserError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return said, written.read_bytes() == before


def test_a_full_disk_leaves_the_written_config(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [8])
    run = write_run(tmp_path, SceneShards(shards, shards), output=str(tmp_path / "out"))
    ((said, stayed),) = run_ranks(opened_on_a_full_disk, 1, run)
    assert said.endswith(" cannot be written to: File too large")
    assert stayed


def test_hosts_with_other_galleries_are_refused(tmp_path: Path, scenes: SceneShards) -> None:
    """Copies are one gallery; other samples, and the same names and counts with other pictures, are not."""
    runs = []
    for host, counts in (("a", [9, 7]), ("b", [9, 7]), ("c", [9, 8]), ("d", [9, 7])):
        gallery = write_shards(tmp_path / host / "gallery", counts)
        if host == "d":
            for path in gallery.glob("*.tar"):
                path.write_bytes(path.read_bytes().replace(b"sentence", b"SENTENCE"))
            index_shards(str(gallery), None, workers=1, progress=False)
        (tmp_path / host / "run").mkdir()
        evaluator = {"kind": "retrieval", "name": "held", "every": 4, "shards": str(gallery)}
        runs.append(write_run(tmp_path / host / "run", scenes, output=str(tmp_path / "out"), eval=[evaluator]))
    same, copied, other, rewritten = runs
    one, two = run_ranks(prepared, 2, [[(same, []), (run, [])] for run in (copied, other, rewritten)])
    assert one == two
    assert one[0] == "prepared"
    for said, samples in ((one[1], 17), (one[2], 16)):
        assert re.fullmatch(
            rf"eval\.held: ranks see different data \(rank 0: 16 samples, index .*, captions raw_caption, "
            rf"rank 1: {samples} samples, index .*\); rule: every host has the same gallery, so copy its shards along "
            "with their index",
            said,
        )


def test_what_hosts_lack_is_named_by_what_their_evaluations_read(tmp_path: Path, scenes: SceneShards) -> None:
    hosts = [tmp_path / name for name in "ab"]
    for host, count in zip(hosts, (2, 3), strict=True):
        folders = write_folders(host / "folders", [count, 2])
        rows = [json.dumps({"image": f"bird/{number:03d}.jpg", "caption": "a bird"}) for number in range(count)]
        (folders / "pairs.jsonl").write_text("\n".join(rows))
        write_labelled_shards(host / "labelled", [count], ["bird", "cat"])
        own_set = OwnSet(host / "masked")
        if count == 3:
            for folder in ("images", "masks"):
                shutil.copy(own_set.folder / folder / "0.png", own_set.folder / folder / "more.png")
    classified, names = {"kind": "classification"}, "and the same files of names and templates, so copy them whole"
    own = {"images": "masked/images", "masks": "masked/masks", "classes": "masked/names.txt", "background": True}
    rules: list[tuple[dict[str, Any], str]] = [
        (classified | {"data": "folders"}, f"class folders with the same pictures, {names}"),
        (classified | {"data": "labelled", "dataset": "webdataset"}, f"shards, {names}"),
        (
            {"kind": "retrieval", "data": "folders/pairs.jsonl", "dataset": "pairs"},
            "gallery, so copy its file of captions along with the pictures",
        ),
        (
            {"kind": "segmentation", **own},
            "pictures and masks, and the same file of class names, so copy them whole",
        ),
    ]
    for host in hosts:
        write_run(host, scenes, output=str(tmp_path / "out"))
    overrides = [[f"eval={json.dumps([{**section, 'every': 1}])}"] for section, _ in rules]
    one, two = run_ranks(built, 2, [[(host, override) for host in hosts] for override in overrides])
    assert one == two
    for said, (section, rule) in zip(one, rules, strict=True):
        assert said.startswith(f"eval.{section['kind']}: ranks see different data (rank 0: ")
        assert said.endswith(f"; rule: every host has the same {rule}")


def built(rank: int, world_size: int, cases: list[list[tuple[Path, list[str]]]]) -> list[str]:
    """Open runs from each rank's own folder, and say what each case ended with.

    Relative paths mean other files on each rank then, as paths on hosts with disks of their own do.
    """
    said = []
    for case in cases:
        folder, overrides = case[rank]
        os.chdir(folder)
        try:
            open_run(load_config(folder / "run.yaml", overrides), start_ranks("cpu"))
            said.append("prepared")
        except UserError as error:
            said.append(str(error))
    return said


def test_hosts_with_other_weights_under_one_path_are_refused(tmp_path: Path, scenes: SceneShards) -> None:
    path = "tiny/checkpoints/step-00000002"
    own, copied, other = (tmp_path / host for host in ("own", "copied", "other"))
    own.mkdir()
    train_to_end(write_run(own, scenes, checkpoint={"every": 2}), "train.max_steps=2").require(0)
    weights = load_weights(own / path, "student")
    torch.save({"student": weights, "teacher": weights}, own / "public.pt")
    shutil.copytree(own, copied)
    shutil.copytree(own, other)
    torch.save({"student": weights, "teacher": weights | {"logit_scale": torch.tensor(1.0)}}, other / "public.pt")
    rewrite(other / path, content_of(other / path) | {"written": "2020-01-01T00:00:00+00:00"})
    ways = [[f"output={tmp_path}/new", way] for way in (f"init_from={path}", f"resume={path}", "init_from=public.pt")]
    cases = [[(own, overrides), (host, overrides)] for host in (copied, other) for overrides in ways]
    one, two = run_ranks(built, 2, cases)
    assert one[:3] == two[:3] == ["prepared"] * 3
    assert one[3:] == two[3:]
    manifests = [(host / path / "manifest.json").read_bytes() for host in (own, other)]
    digests = [hashlib.sha256(manifest).hexdigest()[:16] for manifest in manifests]
    seen = f"by the digests of their manifests (rank 0: {digests[0]}, rank 1: {digests[1]})"
    rule = "rule: all ranks read one shared folder, or equal copies of it"
    for key, said in zip(("init_from", "resume"), one[3:5], strict=True):
        assert said == f"{key}: ranks see different checkpoints in {path}, {seen}; {rule}"
    student = read_public(own / "public.pt", "student").digest
    teacher, others = (read_public(host / "public.pt", "teacher").digest for host in (own, other))
    seen = f"by the digests of their weights (rank 0: {student} {teacher}, rank 1: {student} {others})"
    assert one[5] == f"init_from: ranks see different checkpoints in public.pt, {seen}; {rule}"


def test_hosts_with_other_checkpoints_of_the_run_that_is_named_are_refused(tmp_path: Path, scenes: SceneShards) -> None:
    """The one that rank 0 has found was not deleted: the other host never had it."""
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    train_to_end(write_run(own, scenes, checkpoint={"every": 1}), "train.max_steps=2").require(0)
    shutil.copytree(own, other)
    shutil.rmtree(other / "tiny/checkpoints/step-00000002")
    keys = ["resume", "init_from"]
    cases = [[(host, [f"output={tmp_path}/new", f"{key}=tiny"]) for host in (own, other)] for key in keys]
    one, two = run_ranks(built, 2, cases)
    assert one == two
    seen = "ranks see different checkpoints: tiny/checkpoints/step-00000002 (rank 0: there, rank 1: not there)"
    assert one == [f"{key}: {seen}; rule: all ranks read one shared folder, or equal copies of it" for key in keys]


def built_in_vain(rank: int, world_size: int, cases: list[list[tuple[Path, list[str]]]]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cosmos_scale.run.start.SEEN_WITHIN", 0.5)
        return built(rank, world_size, cases)


def test_hosts_that_do_not_share_the_folder_are_refused_at_the_start(tmp_path: Path, scenes: SceneShards) -> None:
    hosts = [tmp_path / name for name in "ab"]
    for host in hosts:
        host.mkdir()
        write_run(host, scenes, output="here")
    one, two = run_ranks(built_in_vain, 2, [[(host, []) for host in hosts]])
    assert one == two
    assert one[0] == (
        f"output: here/tiny/launch.lock, which rank 0 has written, is not seen on host {socket.gethostname()}; "
        "rule: all ranks share one folder (rank 1)"
    )
    assert (tmp_path / "a" / "here" / "tiny" / "launch.lock").read_text() == ""  # given back


def test_a_file_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that both can write to; root, as which tests may run, is refused no file."""

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    run = write_run(tmp_path, SceneShards(tmp_path, tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(folder, "regular_only", refuse)
    with pytest.raises(UserError, match=r"^output: .*/metrics\.jsonl cannot be written to: Permission denied$"):
        check_folder(load_config(run, []), tmp_path)
