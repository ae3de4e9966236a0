"""The configs of the package: how they are named, found and listed, and how one is written as a start."""

import resource
from pathlib import Path

import pytest

from cosmos_scale.cli import main as cli
from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import find_run, shipped_configs, shipped_file
from cosmos_scale.errors import UserError
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def test_every_config_is_listed_with_a_description() -> None:
    found = shipped_configs()
    assert {one.file.resolve() for one in found} == {*REPOSITORY.glob("configs/*/*.yaml")}
    assert all(len(one.description) > 20 for one in found)
    for one in found:
        assert shipped_file(one.name) == one.file


def test_a_base_is_named_from_any_folder(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: [cosmos:model/vitb32, cosmos:train/batch1024]\nname: mine\n")
    config = load_config(file)
    assert (config.model.vision.patch_size, config.train.global_batch, config.train.epochs) == (32, 1024, 32)
    file.write_text("train: {schedule_steps: 10}\nextends: cosmos:train/published\n")
    with pytest.raises(UserError, match=r"mine\.yaml: optimizer\.warmup_steps: 2000 must be less than"):
        load_config(file)


@pytest.mark.parametrize("base", ["cosmos:train/publisht", "cosmos:../configs/train/published", "cosmos:", "cosmos:x"])
def test_a_base_that_is_not_shipped_is_refused(base: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {base!r}\n")
    with pytest.raises(UserError) as refusal:
        load_config(file)
    assert str(refusal.value).startswith(f"{file}: extends: {base}: no config of this name is shipped")


def test_a_bare_name_is_the_shipped_run(tmp_path: Path) -> None:
    shipped = shipped_file("cc3m_vitb16")
    assert find_run("cc3m_vitb16") == (shipped, f"cc3m_vitb16: the shipped run, {shipped}")
    (tmp_path / "cc3m_vitb16.yaml").write_text("name: mine\n")
    (tmp_path / "cc3m_vitb16").write_text("name: mine\n")
    found = find_run("cc3m_vitb16")
    assert found.file == shipped
    assert found.said.endswith("; ./cc3m_vitb16.yaml is another file, and is taken by this name")
    assert find_run("cc3m_vitb16.yaml") == (Path("cc3m_vitb16.yaml"), "")
    assert find_run("./cc3m_vitb16") == (Path("cc3m_vitb16"), "")
    assert find_run("cosmos:run/cc3m_vitb16").file == shipped
    (tmp_path / "cc3m_vitb16.yaml").unlink()
    assert find_run("cc3m_vitb16").said.endswith("; ./cc3m_vitb16 is another file, and is taken by this name")


def test_a_file_without_suffix_is_read_where_no_shipped_run_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("name: mine\n")
    assert find_run("mine") == (Path("mine"), "")


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^cc3m_vitb61: no such config file, and no .*; did you mean cc3m_vitb16\? "):
        find_run("cc3m_vitb61")
    with pytest.raises(
        UserError, match=r"^\?: no such config file, and no .* has this name; `cosmos-scale configs` lists"
    ):
        find_run("?")
    for text in ("cc3m_vitb16.yaml", "configs/run/cc3m_vitb16.yaml"):
        with pytest.raises(UserError) as refusal:
            find_run(text)
        assert str(refusal.value) == f"{text}: no such config file; the shipped run of this name is called cc3m_vitb16"


@pytest.mark.parametrize("command", [("train",), ("data", "inspect"), ("data", "verify")], ids=" ".join)
def test_every_command_takes_a_bare_name_and_says_what_it_took(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*command, "cc3m_vitb16", "train.epoch=2"]) == 2
    said, refused = capsys.readouterr().err.splitlines()
    assert said == f"cc3m_vitb16: the shipped run, {shipped_file('cc3m_vitb16')}"
    assert "train.epoch: no such key" in refused
    monkeypatch.setenv("RANK", "1")
    assert cli.main([*command, "cc3m_vitb16", "train.epoch=2"]) == 2
    assert "the shipped run" not in capsys.readouterr().err


def test_a_folder_of_shards_keeps_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    assert cli.main(["data", "verify", "demo"]) == 2
    assert f"no .tar shards match {tmp_path}/demo" in capsys.readouterr().err


def test_configs_are_listed_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(lines).isascii()
    names = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert names == {one.name for one in shipped_configs()}


def test_a_disk_that_is_full_leaves_no_part_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        assert cli.main(["configs", "--write", "cc3m_vitb16", "my_run.yaml"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--write: my_run.yaml cannot be written: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_written_as_a_start_and_never_over_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["configs", "--write", "cc3m_vitb16", "my_run.yaml"]) == 0
    assert capsys.readouterr().out.startswith("my_run.yaml: a copy of cc3m_vitb16")
    assert load_config(tmp_path / "my_run.yaml") == load_config(shipped_file("cc3m_vitb16"))
    (tmp_path / "my_run.yaml").write_text("name: changed\n")
    for name, file, words in (
        ("demo", "my_run.yaml", "my_run.yaml exists; rule: name a new file"),
        ("demo", "absent/my_run.yaml", "absent/my_run.yaml cannot be written: No such file or directory"),
        ("demo", "my_run", "my_run must end in .yaml"),
        ("demmo", "other.yaml", "demmo: no config of this name is shipped; did you mean demo?"),
    ):
        assert cli.main(["configs", "--write", name, file]) == 2
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.err.count("\n") == 1
    assert (tmp_path / "my_run.yaml").read_text() == "name: changed\n"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "my_run.yaml"]
