"""Checkpoint files: any number of ranks writes them, any number reads them, and a broken one says so in one line."""

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Size

from cosmos_scale.checkpoint.files import BrokenCheckpoint
from cosmos_scale.checkpoint.state import (
    MANIFEST,
    FragmentReader,
    RunState,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    manifest_digest,
    newest,
    read_manifest,
    read_state,
)
from cosmos_scale.checkpoint.writer import CheckpointWriter
from cosmos_scale.config import CheckpointConfig, RunConfig
from cosmos_scale.errors import UserError
from cosmos_scale.fragments import Fragment
from cosmos_scale.testing.ranks import run_ranks
from tests.checkpoint.edit import content_of, rewrite

# Odd sizes, so that no cut between ranks falls on a parameter's end; a scale, which is [1] inside and [] outside.
SHAPES = {"visual.proj": (7, 5), "visual.ln.weight": (13,), "logit_scale": (1,)}
KINDS = {"weight": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5, "ema": 0.75}


def whole(name: str, kind: str) -> torch.Tensor:
    """What a parameter must hold: numbers that differ from place to place, parameter to parameter, kind to kind."""
    first = 1000 * list(SHAPES).index(name)
    return torch.arange(first, first + Size(SHAPES[name]).numel()).float() + KINDS[kind]


def fragments(rank: int, world_size: int, *, filled: bool = True) -> list[Fragment]:
    """One rank's equal share of all parameters laid end to end, as ZeRO cuts them."""
    total = sum(Size(shape).numel() for shape in SHAPES.values())
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    found, offset = [], 0
    for name, shape in SHAPES.items():
        count = Size(shape).numel()
        start, end = max(low - offset, 0), min(high - offset, count)
        offset += count
        if start < end:
            parts = {kind: whole(name, kind)[start:end].clone() for kind in KINDS}
            if not filled:
                parts = {kind: torch.full_like(part, torch.nan) for kind, part in parts.items()}
            found.append(Fragment(name=name, shape=Size(shape), start=start, owned=True, **parts))
    return found


def state(step: int) -> RunState:
    config = RunConfig().model_dump(mode="json")
    return RunState(step, 8 * step, step, 2, {"cur_scale": 2.0}, "digest", config)


def save_all(rank: int, world_size: int, root: Path, steps: list[int], config: CheckpointConfig) -> list[Path | None]:
    """Save some steps, each while the one before may still be under way; returns what waiting for the last returns."""
    group = dist.group.WORLD
    assert group is not None
    with CheckpointWriter(root, fragments(rank, world_size), group, config) as writer:
        for step in steps:
            writer.save(state(step))
        return [writer.wait(), writer.wait()]


def keep(last: int, every: int | None = None) -> CheckpointConfig:
    return CheckpointConfig(keep_last=last, keep_every=every)


def load_all(rank: int, world_size: int, folder: Path) -> RunState:
    own = fragments(rank, world_size, filled=False)
    loaded = load_checkpoint(folder, own)
    for fragment in own:
        for kind, tensor in fragment.tensors().items():
            expected = whole(fragment.name, kind)[fragment.start : fragment.start + len(tensor)]
            assert torch.equal(tensor, expected), (rank, fragment.name, kind)
    return loaded


def save_where_a_rank_cannot(rank: int, world_size: int, root: Path) -> str:
    """Rank 1 may write files of 100 bytes at most, which stands for a full disk."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        save_all(rank, world_size, root, [12], keep(1))
    except UserError as error:
        return str(error)
    return "saved"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3, 6, 9 by two ranks that keep two."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    assert run_ranks(save_all, 2, root, [3, 6, 9], keep(2)) == [[root / "step-00000009"] * 2] * 2
    return root


def test_other_numbers_of_ranks_read_what_two_wrote(saved: Path) -> None:
    for world_size in (2, 3):
        assert run_ranks(load_all, world_size, saved / "step-00000009") == [state(9)] * world_size
    assert load_all(0, 1, saved / "step-00000009") == state(9)


def test_only_the_newest_are_kept(saved: Path) -> None:
    assert [folder.name for folder in checkpoints(saved)] == ["step-00000006", "step-00000009"]
    assert sorted(folder.name for folder in saved.iterdir()) == ["step-00000006", "step-00000009"]


def test_going_back_does_not_delete_what_was_just_saved(saved: Path, tmp_path: Path) -> None:
    """A run resumed from an older checkpoint saves below the newest ones."""
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    run_ranks(save_all, 1, root, [7], keep(1))
    assert (root / "step-00000007" / MANIFEST).exists()


def test_folders_without_a_manifest_do_not_count(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved, root)
    shutil.copytree(root / "step-00000009", root / "step-00000012.tmp")  # killed before the rename
    shutil.copytree(root / "step-00000009", root / "step-00000015")
    (root / "step-00000015" / MANIFEST).unlink()  # a copy that broke off
    for other in ("step-00000018.broken", "step-00000018 (copy)", "step-x"):
        shutil.copytree(root / "step-00000009", root / other)
    expected = root / "step-00000009"
    assert newest(root) == find_checkpoint(root) == find_checkpoint(tmp_path / "run") == expected
    assert find_checkpoint(root / "step-00000006") == root / "step-00000006"
    assert newest(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="nowhere: none there"):
        find_checkpoint(tmp_path / "nowhere")


def test_one_that_its_run_deletes_meanwhile_is_said_to_be_deleted(saved: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "step-00000009", "deleted since it was found.*name the run again.*checkpoint.keep_last"
    shutil.copytree(saved / "step-00000009", folder)
    with FragmentReader(folder, read_manifest(folder)) as reader:
        shutil.rmtree(folder)
        for read in (read_manifest, manifest_digest, lambda _: reader.file("fragments-00001.safetensors")):
            with pytest.raises(BrokenCheckpoint, match=said):
                read(folder)


def test_weights_of_both_models(saved: Path) -> None:
    for which, kind in (("student", "weight"), ("teacher", "ema")):
        weights = load_weights(saved / "step-00000009", which)  # type: ignore[arg-type]
        assert weights.keys() == SHAPES.keys()
        assert weights["logit_scale"].shape == ()
        for name, tensor in weights.items():
            assert torch.equal(tensor.reshape(-1), whole(name, kind))


def test_weights_of_a_broken_one_are_refused(saved: Path, tmp_path: Path) -> None:
    """As evaluation and init_from ask for them."""
    folder = tmp_path / "step-00000009"
    shutil.copytree(saved / "step-00000009", folder)
    file = folder / "fragments-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BrokenCheckpoint, match=r"fragments-00001\.safetensors: is damaged between bytes"):
        load_weights(folder, "student")


def test_the_library_of_the_format_reads_the_files(saved: Path) -> None:
    found: dict[str, dict[int, torch.Tensor]] = {}
    pieces = content_of(saved / "step-00000009")["parameters"]
    for path in sorted(saved.glob("step-00000009/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, which it needs
                (start,) = (start for name, start, _ in pieces[key.split("|")[0]]["pieces"] if name == path.name)
                found.setdefault(key, {})[start] = file.get_tensor(key)
    assert found.keys() == {f"{name}|{kind}" for name in SHAPES for kind in KINDS}
    for key, parts in found.items():
        assert torch.equal(torch.cat([parts[start] for start in sorted(parts)]), whole(*key.split("|")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no manifest", r"no readable manifest\.json"),
        ("torn manifest", r"no readable manifest\.json"),
        ("manifest without state", r"no readable manifest\.json"),
        ("manifest of a list", r"no readable manifest\.json"),
        ("other format", "format 99; rule: this version reads format 2"),
        ("newer state", "holds later, which this version does not know; rule: go on with the version that wrote it, "),
        ("built shards", "holds 'built shards 1', no checkpoint; rule: name a step-"),
        ("missing file", r"fragments-00001\.safetensors.*must be whole"),
        ("truncated file", r"fragments-00001\.safetensors.*must be whole"),
        ("empty file", r"fragments-00001\.safetensors.*must be whole"),
        ("another rank's file", r"fragments-00001\.safetensors.*must be whole"),
        ("flipped bit", r"fragments-00001\.safetensors: is damaged between bytes 0 and \d+; rule: it must be whole"),
        ("lost piece", "elements; rule: none may lack"),
        ("lost parameter", "has no parameter 'visual.proj'"),
        ("other shape", r"visual\.proj has shape \[5, 7\], the model \[7, 5\]"),
    ],
)
def test_broken_checkpoints_are_refused_in_one_line(saved: Path, tmp_path: Path, damage: str, message: str) -> None:
    folder = tmp_path / "step-00000009"
    shutil.copytree(saved / "step-00000009", folder)
    path, file = folder / MANIFEST, folder / "fragments-00001.safetensors"
    text = path.read_text()
    manifest = content_of(folder)
    pieces = manifest["parameters"]["visual.proj"]["pieces"]
    if damage == "no manifest":
        path.unlink()
    elif damage == "torn manifest":
        path.write_text(text[: len(text) // 2])
    elif damage == "manifest of a list":
        path.write_text("[1]")
    elif damage == "built shards":
        path.write_text('{"format": "built shards 1"}')
    elif damage == "missing file":
        file.unlink()
    elif damage == "truncated file":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "empty file":
        file.write_bytes(b"")
    elif damage == "flipped bit":
        data = bytearray(file.read_bytes())
        data[-3] ^= 16
        file.write_bytes(data)
    elif damage == "another rank's file":
        shutil.copy(folder / "fragments-00000.safetensors", file)
    else:
        if damage == "manifest without state":
            del manifest["state"]
        elif damage == "other format":
            manifest["format"] = 99
        elif damage == "newer state":
            manifest["state"]["later"] = 1
        elif damage == "lost piece":
            pieces.pop()
        elif damage == "lost parameter":
            del manifest["parameters"]["visual.proj"]
        elif damage == "other shape":
            manifest["parameters"]["visual.proj"]["shape"] = [5, 7]
        rewrite(folder, manifest)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(folder, fragments(0, 1, filled=False))
    assert re.search(message, str(refusal.value))
    assert "\n" not in str(refusal.value)
    if damage in ("other format", "newer state", "built shards"):  # `resume: auto` does not pass over them as damaged
        assert not isinstance(refusal.value, BrokenCheckpoint)


def test_any_flipped_bit_is_found(saved: Path, tmp_path: Path) -> None:
    """In the manifest, in a file's header and in its tensors; and named as damage, which an older checkpoint mends."""
    folder = tmp_path / "step-00000009"
    shutil.copytree(saved / "step-00000009", folder)
    for name in (MANIFEST, "fragments-00001.safetensors"):
        path = folder / name
        data = path.read_bytes()
        for place in range(0, len(data), 7):  # 7 has no common factor with the 4 bytes of a number
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(BrokenCheckpoint, match=name):
                load_checkpoint(folder, fragments(0, 1, filled=False))
        path.write_bytes(data)
    load_checkpoint(folder, fragments(0, 1, filled=False))


def test_failing_to_write_ends_all_ranks_and_keeps_the_last_checkpoint(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(saved, root)
    messages = run_ranks(save_where_a_rank_cannot, 2, root)
    assert len(set(messages)) == 1
    assert "fragments-00001.safetensors" in messages[0]
    assert "rank 1" in messages[0]
    # Nothing stays of the one that failed: on a full disk it would only be in the way.
    assert sorted(folder.name for folder in root.iterdir()) == ["step-00000006", "step-00000009"]


def test_state_survives_as_it_was(saved: Path) -> None:
    assert read_state(saved / "step-00000006") == state(6)
