"""The dry run looks at all that a launch refuses: the same refusals, the same exit status, and nothing written."""

import io
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_scale.cli import main as cli
from cosmos_scale.config import CheckpointConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.data.training import room
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.run.folder import check_disk_room, check_folder
from cosmos_scale.run.opening import checkpoint_bytes
from cosmos_scale.run.start import open_run
from cosmos_scale.run.trackers import check_trackers
from cosmos_scale.testing.runs import last_checkpoint, train_to_end, write_run

COLUMNS = 80
LOOKS = ["device", "data", "starts from", "shards", "captions", "pictures", "evaluation"]
LOOKS += ["loaders", "weights", "output"]
CHECKPOINT = "step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: SceneShards) -> Path:
    """The YAML of a run of 8 steps that has done 4; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    gallery = {"kind": "retrieval", "every": 100, "shards": str(scenes.gallery)}
    run = write_run(folder, scenes, checkpoint={"every": 2}, eval=[gallery])
    train_to_end(run, "train.max_steps=4").require(0)
    assert last_checkpoint(run).name == CHECKPOINT
    return run


def rows(printed: str) -> dict[str, tuple[str, str]]:
    """The verdict and the text of each row of the table."""
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in printed.partition("what a launch here would find:\n")[2].splitlines():
        if line[2:16].strip():
            name = line[2:16].strip()
            found[name] = (line[16:26].strip(), line[26:])
        else:
            found[name] = (found[name][0], f"{found[name][1]} {line.strip()}")
    return found


def test_shards_under_two_names_are_told_once_when_a_run_begins(
    trained: Path, tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(scenes.train)
    twice = f"data.sources=[{{name: a, shards: '{scenes.train}'}}, {{name: b, shards: '{tmp_path / 'link'}'}}]"
    assert cli.main(["train", "--dry-run", str(trained), twice, f"output={tmp_path}"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("warning: data sources a and b have ") == 1
    assert rows(shown.out)["data"][1].startswith("160 samples an epoch")
    verdict, text = rows(shown.out)["shards"]
    assert verdict == "ok"
    assert "there; data sources a and b have " in text
    begun = train_to_end(trained, twice, "train.max_steps=1", f"output={tmp_path / 'new'}")
    begun.require(0)
    assert begun.errors.count("warning: data sources a and b have ") == 1


def test_an_evaluation_on_the_shards_of_training_is_told(
    trained: Path, tmp_path: Path, scenes: SceneShards, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = f"eval=[{{kind: retrieval, name: seen, every: 100, shards: '{scenes.train}', max_samples: 4}}]"
    said = f"warning: eval.seen: reads 1 shard that the run trains on, such as {scenes.train}/train-00000.tar: "
    for changed, times in ((), 0), ((seen,), 1):
        assert cli.main(["train", "--dry-run", str(trained), *changed, f"output={tmp_path}"]) == 0
        shown = capsys.readouterr()
        assert shown.err.count(said) == times
        assert rows(shown.out)["evaluation"][0] == "ok"
    begun = train_to_end(trained, seen, "train.max_steps=1", f"output={tmp_path / 'new'}")
    begun.require(0)
    assert begun.errors.count(said) == 1


def test_a_run_that_can_start_is_all_ok(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(trained.parent.rglob("*"))
    assert cli.main(["train", "--dry-run", str(trained)]) == 0
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert list(found) == LOOKS
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert found["data"][1].startswith("80 samples an epoch")
    assert found["starts from"][1].replace(" ", "").endswith(f"{CHECKPOINT},afterstep4")
    assert captured.err == ""
    assert sorted(trained.parent.rglob("*")) == before
    new = tmp_path / "a" / "b"
    assert cli.main(["train", "--dry-run", str(trained), f"output={new}"]) == 0
    assert not new.parent.exists()


def test_the_table_fits_80_columns_and_any_output(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.main(["train", "--dry-run", str(trained), f"output={tmp_path}", "name=größe"]) == 0
    output.seek(0)
    printed = output.read().partition("what a launch here would find:")[2]
    assert "gr\\xf6\\xdfe" in printed.replace("\n", "").replace(" ", "")
    words = [line[26:].split() for line in printed.splitlines() if len(line) > COLUMNS]
    assert all(len(found) == 1 for found in words), "a path longer than the column"


# By the row that refuses: overrides ({run}: the trained run's folder, {tmp}: an empty one), and a part of the message.
REFUSED = [
    ("device", ["model.attention=flash_attn_2"], "model.attention: 'flash_attn_2' cannot run here"),
    ("data", ["data.sources.0.shards={tmp}", "data.samples=8"], "no index at"),
    ("starts from", ["optimizer.lr=0.5", "seed=3"], "seed: 3, was 0; optimizer.lr: 0.5, was 0.001"),
    ("starts from", ["resume=never"], "resume: 'never', but"),
    ("starts from", ["resume={tmp}"], "none there; rule: name a step-* folder"),
    ("starts from", ["name=new", "resume={tmp}/torn"], "has 10 bytes, not the"),
    ("starts from", ["resume={run}/tiny/checkpoints/step-00000002"], "step-00000004 is newer"),
    ("shards", ["name=new", "data.sources.0.shards={tmp}/lost"], "cannot be opened"),
    ("evaluation", ["name=new", "eval.0.captions=captoin"], "no captions under 'captoin'"),
    (
        "evaluation",
        ["name=new", "eval.0.shards={tmp}/nowhere"],
        "eval.retrieval: data source retrieval: no .tar shards match",
    ),
    ("weights", ["name=new", "init_from={tmp}"], "init_from: checkpoint {tmp}: none there"),
    (
        "weights",
        ["name=new", "init_from={run}/tiny", "model.vision.width=128"],
        "does not fit the model: size mismatch of visual.",
    ),
    (
        "weights",
        ["name=new", "init_from={run}/tiny", "model.text.layers=2"],
        "resblocks.1.ln_1.weight: none there, [32] in the model; rule: ",
    ),
    ("weights", ["name=new", "init_from={tmp}/torn"], "init_from: checkpoint file"),
    ("output", ["output={tmp}/file"], "output: {tmp}/file/tiny cannot be written to: Not a directory"),
    ("output", ["output={tmp}/file/below"], "cannot be written to: Not a directory"),
    ("output", ["output={tmp}", "name=odd"], "metrics.jsonl is no file; rule: move it away"),
    ("output", ["output={tmp}", "name=taken"], "taken/evaluation/retrieval is no folder; rule: move it away"),
]


@pytest.mark.parametrize(("row", "overrides", "said"), REFUSED, ids=[f"{case[0]}: {case[1][-1]}" for case in REFUSED])
def test_what_a_launch_refuses_the_dry_run_refuses(
    row: str,
    overrides: list[str],
    said: str,
    trained: Path,
    scenes: SceneShards,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "0.tar").write_bytes(b"")  # shards without an index
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "taken" / "evaluation").mkdir(parents=True)
    (tmp_path / "taken" / "evaluation" / "retrieval").write_text("")
    shutil.copytree(scenes.train, tmp_path / "lost", ignore=shutil.ignore_patterns("*.tar"))
    shutil.copytree(last_checkpoint(trained), tmp_path / "torn")
    next((tmp_path / "torn").glob("*.safetensors")).write_bytes(bytes(10))
    places = {"run": str(trained.parent), "tmp": str(tmp_path)}
    filled = [override.format(**places) for override in overrides]
    if not any(override.startswith("output=") for override in filled) and "name=new" in filled:
        filled.append(f"output={tmp_path}")

    assert cli.main(["train", "--dry-run", str(trained), *filled]) == 2
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert found[row][0] == "REFUSED", captured.out
    assert [name for name, (verdict, _) in found.items() if verdict == "REFUSED"] == [row]
    assert captured.err.count("\n") == 1
    assert said.format(**places) in captured.err
    with pytest.raises(UserError) as launch:
        open_run(load_config(trained, filled), start_ranks("cpu"))
    assert captured.err == f"cosmos-scale train: {launch.value}\n"


def test_several_refusals_are_counted(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda: 2**20)
    wrong = ["seed=3", "data.workers=8", "model.attention=flash_attn_2"]
    assert cli.main(["train", "--dry-run", str(trained), *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("cosmos-scale train: model.attention: ")
    assert captured.err.endswith(" (and 2 more)\n")
    assert rows(captured.out)["weights"] == ("-", "not looked at, since there is no answer on: starts from")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", str(trained), "device=cuda"]) == 2
    captured = capsys.readouterr()
    assert rows(captured.out)["device"][0] == "REFUSED"
    assert captured.err.startswith("cosmos-scale train: device: 'cuda', but torch sees no CUDA device")


def test_a_folder_of_extensions_that_cannot_be_made_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    assert cli.main(["train", "--dry-run", str(trained)]) == 2
    captured = capsys.readouterr()
    assert rows(captured.out)["device"][0] == "REFUSED"
    assert captured.err.startswith("cosmos-scale train: TORCH_EXTENSIONS_DIR: /proc/none: ")


def test_torchs_own_folder_that_cannot_be_made_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user of a container to whom neither the environment nor the home belongs."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("cosmos_scale.run.dry_run.use_own_environment", lambda: None)  # an environment of others
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert cli.main(["train", "--dry-run", str(trained)]) == 2
    captured = capsys.readouterr()
    assert rows(captured.out)["device"][0] == "REFUSED"
    assert captured.err.startswith("cosmos-scale train: TORCH_EXTENSIONS_DIR: not set, and /proc/none/torch_extensions")


def test_memory_for_the_loaders_is_looked_at(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ["data.workers=8", "data.prefetch=100"]
    monkeypatch.setattr(room, "free_memory", lambda: 2**20)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=0, f_blocks=0, f_bavail=0))  # no limit
    assert cli.main(["train", "--dry-run", str(trained), *many]) == 2
    captured = capsys.readouterr()
    assert rows(captured.out)["loaders"][0] == "REFUSED"
    assert captured.err.startswith(
        "cosmos-scale train: data.prefetch: 100 batches ready in each worker (8 a rank, 1 rank) "
    )
    assert "but this host, or the limit of its container, has " in captured.err
    with pytest.raises(UserError) as launch:
        open_run(load_config(trained, many), start_ranks("cpu"))
    assert str(launch.value).startswith("data.prefetch: 100 batches ready")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_frsize=1, f_blocks=2**20, f_bavail=2**20))
    assert cli.main(["train", "--dry-run", str(trained), *many]) == 2
    assert "but /dev/shm has 0.0; rule: " in capsys.readouterr().err


def test_a_plan_without_shards_refuses_nothing_for_their_absence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = [f"data.sources.0.shards={tmp_path}/x", f"eval.0.shards={tmp_path}/y", "data.samples=80"]
    for others, evaluation in ((["name=new", f"output={tmp_path}"], "not here"), ([], "MISSING")):
        assert cli.main(["train", "--dry-run", str(trained), *absent, *others]) == 0
        found = rows(capsys.readouterr().out)
        verdicts = [found[name][0] for name in ("data", "shards", "captions", "evaluation")]
        assert verdicts == ["not here", "-", "-", evaluation]
        assert found["starts from"][0] == "ok"  # its checkpoint and keys are looked at all the same
    # A run that is resumed goes on without its gallery.
    assert found["evaluation"][1].endswith("cannot be opened now: retrieval")
    assert cli.main(["train", "--dry-run", str(trained), *absent, "seed=9"]) == 2


def test_pictures_past_max_pixels_are_told_by_dry_run_and_launch_alike(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = ["name=new", f"output={tmp_path}"]
    assert cli.main(["train", "--dry-run", str(trained), *new]) == 0
    found = rows(capsys.readouterr().out)
    assert found["pictures"] == ("ok", "64 pictures looked at, none exceeds data.max_pixels")
    assert cli.main(["train", "--dry-run", str(trained), *new, "data.max_pixels=9"]) == 2
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert found["pictures"][0] == "REFUSED"
    assert "64 of 64 pictures looked at exceed data.max_pixels 9 (the largest: " in captured.err
    assert "(the largest: 128 x 128): they are left out" in captured.err  # those of the gallery
    with pytest.raises(UserError, match=r"64 of 64 pictures looked at exceed data\.max_pixels 9 .*; rule: a larger"):
        open_run(load_config(trained, [*new, "data.max_pixels=9"]), start_ranks("cpu"))


def test_a_batch_of_one_sample_is_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", str(trained), f"output={tmp_path}", "train.global_batch=1"]) == 0
    said = (
        "train.global_batch: 1: with one sample there is none to tell it from: each loss is 0, and nothing is learned"
    )
    assert f"warning: {said}; rule: 2 or more" in capsys.readouterr().err


def test_a_path_that_is_too_long_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run", str(trained), f"output={tmp_path / ('n' * 300)}"]) == 2
    captured = capsys.readouterr()
    assert "/checkpoints: cannot be listed: File name too long" in captured.err
    assert rows(captured.out)["output"][0] == "REFUSED"


def test_links_in_a_circle_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "checkpoints").symlink_to("checkpoints")
    for where in ([], [f"resume={last_checkpoint(trained)}"]):
        assert cli.main(["train", "--dry-run", str(trained), f"output={tmp_path}", *where]) == 2
        captured = capsys.readouterr()
        assert "/checkpoints: cannot be listed: Too many levels of symbolic links" in captured.err


def test_a_full_disk_is_refused(trained: Path, tmp_path: Path) -> None:
    """A disk without a free byte, on which a file can still be made."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written to: File too large"):
            check_folder(load_config(trained, []), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize(
    ("key", "package"), [("log.wandb.mode=offline", "wandb"), ("log.tensorboard=true", "tensorboard")]
)
def test_a_package_that_is_missing_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(UserError, match=f"log.{package}: the package {package} is not installed"):
        check_trackers(load_config(trained, [key]).log)


def test_an_output_that_cannot_be_written_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    config = load_config(trained, [])
    check_folder(config, tmp_path / "a" / "b")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be written to: No such file"):
        check_folder(config, tmp_path / "dangling" / "run")
    (tmp_path / "run" / "config.yaml").mkdir(parents=True)
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml is no file; rule: "):
        check_folder(config, tmp_path / "run")
    with pytest.raises(UserError, match="checkpoints is no folder; rule: "):
        check_folder(config, tmp_path / "run2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "run", "run2"]


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path: Path) -> None:
    disk = shutil.disk_usage(tmp_path)
    with pytest.raises(UserError, match=r"^output: .* MiB left, but a checkpoint takes [\d,]+; rule: make room"):
        check_disk_room(tmp_path / "new" / "run", disk.total, CheckpointConfig())
    left = tmp_path / "checkpoints" / "step-00000002.tmp"  # deleted when the run starts
    left.mkdir(parents=True)
    (left / "fragments-00000.safetensors").touch()
    os.truncate(left / "fragments-00000.safetensors", disk.total)
    check_disk_room(tmp_path, disk.total, CheckpointConfig())


def test_files_that_may_not_be_as_large_as_a_checkpoint_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = checkpoint_bytes(load_config(trained, []))
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed - 1, limit[1]))
    try:
        assert cli.main(["train", "--dry-run", str(trained), "name=other"]) != 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "output: a checkpoint takes files of " in " ".join(capsys.readouterr().err.split())


def test_the_room_looked_for_is_that_of_a_checkpoint(trained: Path) -> None:
    saved = sum(file.stat().st_size for file in last_checkpoint(trained).glob("*.safetensors"))
    assert checkpoint_bytes(load_config(trained, [])) == pytest.approx(saved, rel=0.002)  # headers come on top


@pytest.mark.parametrize("disk", ["nowhere", "/proc"])
def test_checkpoints_linked_to_a_disk_that_takes_none_are_refused(trained: Path, tmp_path: Path, disk: str) -> None:
    """Without the look a run would train to its first checkpoint, and end there. To /proc not even root can write."""
    (tmp_path / "checkpoints").symlink_to(disk)
    with pytest.raises(UserError, match=r"^output: .*/checkpoints cannot be written to: No such file"):
        check_folder(load_config(trained, []), tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "damaged.jsonl", "tensorboard", "evaluation"])
@pytest.mark.parametrize("target", ["gone/file", "self"])
def test_a_link_to_nowhere_is_refused(trained: Path, tmp_path: Path, name: str, target: str) -> None:
    """A run would train to its end and lose all its records."""
    link = tmp_path / name
    link.symlink_to(link if target == "self" else tmp_path / target)
    with pytest.raises(UserError, match=rf"^output: .*/{name} is a link to .*, which is not there; rule: "):
        check_folder(load_config(trained, []), tmp_path)


def test_a_link_to_a_file_to_be_made_is_taken(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "not yet there")
    check_folder(load_config(trained, []), tmp_path)
