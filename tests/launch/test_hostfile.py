"""Hostfiles: what is read, and each odd line refused by its number."""

from pathlib import Path

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.launch.hostfile import Host, read_hostfile, this_host


def test_hosts_are_read_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two nodes\nnode-b slots=8\n\n  user@10.0.0.1   slots = 4  # the old one\n")
    assert read_hostfile(file) == [Host("node-b", 8), Host("user@10.0.0.1", 4)]
    file.write_bytes(b"\xef\xbb\xbfnode-b slots=8\r\n")  # as editors of Windows leave it
    assert read_hostfile(file) == [Host("node-b", 8)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host; rule: a line is `NAME slots=N`"),
        ("# nothing\n", "names no host"),
        ("a slots=1\nb\n", "line 2: 'b' is no host with its slots; rule: a line is"),
        ("a slots=1 slots=2\n", "line 1: 'a slots=1 slots=2' is no host with its slots"),
        ("a 8\n", "line 1: 'a 8' is no host"),
        ("slots=8\n", "line 1: 'slots=8' is no host"),
        ("-oProxyCommand=x slots=8\n", "line 1: '-oProxyCommand=x slots=8' is no host"),
        ("a slots=0\n", "line 1: 'a slots=0': slots=0; rule: a whole number from 1 to 99999"),
        ("a slots=-1\n", "slots=-1; rule: a whole number"),
        ("a slots=many\n", "slots=many; rule: a whole number"),
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: 'a slots=2': a stands in line 1 too; rule: a host has one line"),
    ],
    ids=str,
)
def test_odd_lines_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        read_hostfile(file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; rule: a file with a line a host"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(UserError, match="is no file"):
        read_hostfile(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text"):
        read_hostfile(tmp_path / "bytes")


def test_only_this_machine_is_here() -> None:
    assert this_host(2).is_here
    assert Host("localhost", 1).is_here
    assert not Host("10.99.0.1", 1).is_here
