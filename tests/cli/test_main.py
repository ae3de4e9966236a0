"""The command line as a user meets it: help, refusals on one line, and every command down to its result."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_scale.cli import main as cli
from cosmos_scale.cli import train
from cosmos_scale.cli.output import lasting_output
from cosmos_scale.engine.ranks import tell_lost_contact
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import write_shards
from tests.conftest import REPOSITORY


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("data",),
        ("data", "build"),
        ("data", "index"),
        ("data", "inspect"),
        ("data", "verify"),
        ("eval", "retrieval"),
        ("checkpoint",),
        ("checkpoint", "inspect"),
        ("configs",),
        ("convert",),
        ("profile",),
        ("setup",),
        ("train",),
    ],
)
def test_help_explains_every_command(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert " ".join(("cosmos-scale", *arguments)) in help_text
    assert arguments == ("setup",) or "examples:" in help_text


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["train", "--help"], 0), (["train", "configs/run/demo.yaml", "train.epoch=2"], 2)],
)
def test_help_and_mistyped_keys_wait_for_no_torch(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from cosmos_scale.cli.main import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, check=False)
    assert ended.returncode == status


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "errors"),
    [
        (lambda: 0, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("seed: -1 is wrong")), 2, "cosmos-scale data: seed: -1 is wrong\n"),
        (raising(KeyboardInterrupt()), 130, "cosmos-scale data: interrupted\n"),
        (raising(OSError(errno.ENOSPC, "No space left")), 2, "cosmos-scale data: No space left\n"),
        (raising(OSError(errno.EDQUOT, "Quota exceeded", "a/b")), 2, "cosmos-scale data: a/b: Quota exceeded\n"),
    ],
)
def test_one_place_turns_errors_into_exit_statuses(
    command: Callable[[], int], status: int, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.exit_status("cosmos-scale data", command) == status
    assert capsys.readouterr().err == errors


def test_mistakes_in_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.exit_status("cosmos-scale data", raising(ZeroDivisionError()))


def test_every_command_says_that_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosmos_scale.config.load.load_config", interrupted)
    for command in ("train", "data inspect", "data verify"):
        assert cli.main([*command.split(), "run.yaml"]) == 130
        assert capsys.readouterr().err == f"cosmos-scale {command}: interrupted\n"


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_before_ranks_start_one_process_of_a_machine_tells(
    local_rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert cli.main(["train", "absent.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


def test_train_names_an_unknown_option_with_its_own_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "run.yaml", "--dryrun"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("usage: cosmos-scale train ")
    assert errors.endswith("cosmos-scale train: error: unrecognized arguments: --dryrun\n")


@pytest.mark.parametrize(
    "arguments",
    [(), ("data",), ("tain",), ("data", "build"), ("data", "index", "a", "--workers=0"), ("data", "index", "a", "b=1")],
)
def test_a_wrong_call_shows_the_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: cosmos-scale" in capsys.readouterr().err


def test_train_hands_its_arguments_to_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(REPOSITORY / "configs" / "run" / "merged30m_vitb16.yaml")
    for arguments in (
        ["--dry-run", "--world-size", "128", run, "train.epochs=2"],
        [run, "--world-size", "128", "train.epochs=2", "--dry-run"],
    ):
        assert cli.main(["train", *arguments]) == 0
        assert re.search(r"steps of the schedules +13,152", capsys.readouterr().out)


def test_train_refuses_a_wrong_key_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = str(REPOSITORY / "configs" / "run" / "cc3m_vitb16.yaml")
    assert "train.epoch: no such key; did you mean train.epochs?" in failure(capsys, "train", run, "train.epoch=2")


@pytest.mark.parametrize("ranks", ["0", "-2", "two"])
def test_train_refuses_a_number_of_ranks_that_cannot_be(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(REPOSITORY / "configs" / "run" / "cc3m_vitb16.yaml")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--dry-run", f"--world-size={ranks}", run])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(f"argument --world-size: {ranks} must be a whole number of at least 1\n")


def test_train_without_arguments_asks_for_the_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: RUN.yaml\n")


def test_data_build_and_index_make_usable_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.jpg")
        rows.append({"image": f"{number}.jpg", "caption": f"Picture {number}. It is noise."})
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "shards"
    build = ["data", "build", "--images", str(pictures), "--captions", str(captions), "--out", str(out), "--quiet"]
    assert cli.main([*build, "--samples-per-shard", "3", "--workers", "1"]) == 0
    assert "5 samples in 2 indexed shards" in capsys.readouterr().out
    assert cli.main(["data", "index", str(out), "--out", str(tmp_path / "index"), "--quiet", "--workers", "1"]) == 0
    assert "5 samples in 2 shards" in capsys.readouterr().out


def test_data_refusals_fit_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in failure(capsys, "data", "index", str(tmp_path), "--quiet")
    nowhere = str(tmp_path / "nowhere")
    message = failure(capsys, "data", "build", "--images", nowhere, "--captions", nowhere, "--out", nowhere, "--quiet")
    assert nowhere in message


def test_output_that_nobody_reads_ends_quietly(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [1])
    command = [sys.executable, "-m", "cosmos_scale.cli", "data", "verify", str(folder), "--workers=1"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert (process.wait(60), errors) == (141, "")


def test_eval_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    assert absent in failure(capsys, "eval", "retrieval", "--checkpoint", absent, "--data", absent)


@pytest.mark.parametrize("module", ["cosmos_scale.cli", "cosmos_scale.train", "cosmos_scale.demo"])
def test_an_interrupt_of_the_imports_is_one_line(module: str, tmp_path: Path) -> None:
    """The first module that each program imports interrupts it, as Ctrl-C would."""
    for name in ("argparse", "torch"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    command = [sys.executable, "-m", module, "--help"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode != 0
    assert ended.stderr.endswith(": interrupted\n")
    assert ended.stderr.count("\n") == 1


def test_an_interrupt_before_the_command_is_known_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cosmos_scale.cli.main._parse", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "cosmos-scale: interrupted\n"


@pytest.mark.parametrize("module", ["cosmos_scale.cli", "cosmos_scale.train", "cosmos_scale.demo"])
def test_an_interrupt_that_an_imported_module_swallows_ends_the_program(module: str, tmp_path: Path) -> None:
    """Extension modules such as torch's lose an interrupt of their imports, make another error of it, or abort."""
    for name in ("argparse", "torch"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException: pass\n"
        )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    # A shell may start tests with interrupts ignored, which processes inherit.
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        f"os.execv(sys.executable, [sys.executable, '-m', {module!r}, '--help'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (130, 1)
    assert ended.stderr.endswith(": interrupted\n")


def test_an_output_that_lacks_signs_has_them_spelled_out() -> None:
    code = (
        "import sys; from cosmos_scale.cli.main import exit_status; "
        "sys.exit(exit_status('x', lambda: print('caf\\u00e9 \\u2588 \\udcc3') or 0))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "caf\\xe9 \\u2588 \\udcc3\n", "")


@pytest.mark.parametrize("allowed", [8, 12, 16, 32])
def test_few_open_files_are_enough_or_one_line(allowed: int, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [2, 1])
    code = (
        "import resource, sys; from cosmos_scale.cli.main import main; import cosmos_scale.data.tools.verify\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({allowed}, {allowed}))\n"
        f"sys.exit(main(['data', 'verify', {str(folder)!r}, '--workers', '2']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60
    )
    if ended.returncode:
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert "Too many open files; allow more (ulimit -n)" in ended.stderr
    else:
        assert ended.stdout.endswith("all are sound\n")


@pytest.mark.parametrize("arguments", [("train", "--help-keys"), ("--help",)])
def test_output_on_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cosmos_scale.cli", *arguments]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert "Traceback" not in ended.stderr
    if arguments != ("--help",):  # argparse ends the process itself
        assert ended.stderr == "cosmos-scale train: standard output: cannot be written: No space left on device\n"
        assert ended.returncode == 2


def test_all_that_a_terminal_is_told_goes_on_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", full)
        with lasting_output():
            for _ in range(2):
                print("lost", flush=True)
            print("é \ud800", file=sys.stderr)
        print("nowhere", flush=True)
    assert capsys.readouterr().err.splitlines()[0] == (
        "warning: standard output: No space left on device; the run goes on without it"
    )


def test_a_lost_contact_is_told_where_the_checkpoints_cannot_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_lost_contact(RuntimeError("gloo: closed"), "1", train._newest_checkpoint(tmp_path / ("n" * 300)))
    said = capsys.readouterr().err
    assert said.startswith("cosmos-scale train: rank 1 lost contact with another rank")
    assert said.endswith("; newest checkpoint: unknown, since their folder cannot be listed\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("data index shards --out a --out b", "argument --out: given twice: a and b; give it once"),
        ("data index shards --captions a b --captions c", "argument --captions: given twice: a b and c; give it once"),
        ("data build --images a --captions b --out c --workers 1 --workers 2", "argument --workers: given twice"),
    ],
)
def test_an_option_given_twice_is_refused(arguments: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments.split())
    assert reason in capsys.readouterr().err


def test_an_option_may_be_repeated_with_one_value(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", [2])
    out = str(tmp_path / "index")
    assert cli.main(["data", "index", str(shards), "--out", out, "--out", out, "--workers", "1", "--quiet"]) == 0


def test_a_deleted_current_folder_is_one_line(tmp_path: Path) -> None:
    """MKL ends a process there as soon as torch is imported."""
    program = (
        "import os, sys; from cosmos_scale.cli.main import main; os.rmdir(os.getcwd()); sys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "checkpoint", "inspect", str(tmp_path.parent)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "cosmos-scale: the current folder is deleted; rule: change to one that is there\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("data", "build", "--images", "a", "--captions", "b", "--out", ""),
            "--out: the path is empty; rule: . is the",
        ),
        (("data", "index", " "), "PATTERN: the path is empty"),
        (("data", "inspect", "shards", "--epoch", "9" * 5000), f"--epoch: {'9' * 20}... must be at most 9,223,372,036"),
        (("data", "verify", "shards", "--workers", str(2**63)), "--workers: 9223372036854775808 must be at most"),
    ],
)
def test_an_empty_path_and_a_number_without_end_are_refused(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert f"error: argument {said}" in capsys.readouterr().err
