"""Stores: errors that may pass and others, waits between tries, secrets; patterns that name remote shards."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cosmos_scale.config import RemoteConfig, RunConfig
from cosmos_scale.config.load import dump_config
from cosmos_scale.data.samples.sample import UnreachableShard
from cosmos_scale.data.shards.pace import Pace, TooSlow
from cosmos_scale.data.shards.patterns import parse_pattern
from cosmos_scale.data.shards.reader import Entry, Location, ShardFile, ShardReader
from cosmos_scale.data.shards.store import (
    CommandStore,
    FilesystemStore,
    Missing,
    NoEnd,
    NoParts,
    Stores,
    Transient,
    WebStore,
    WrongSize,
    fetch_into,
    join_url,
    redact,
    retried,
)
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.errors import UserError
from tests.data.web_server import Fault, web_server

DATA = bytes(range(256)) * 40  # 10,240 bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files" / "refused").mkdir(parents=True)
    for name in ("a.tar", "b.tar", "refused/a.tar"):
        (tmp_path / "files" / name).write_bytes(DATA)
    return tmp_path / "files"


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's memory file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/m/a.tar": DATA, "/m/b-1.tar": DATA, "/m/b-2.tar": DATA, "/m/c.txt": DATA, "/m/d/e.tar": DATA})
    yield "memory://m"
    filesystem.rm("/m", recursive=True)


def test_a_web_servers_ranges(folder: Path, tmp_path: Path) -> None:
    web = WebStore(5.0)
    with web_server(folder, tmp_path / "log") as server:
        url = f"{server.url}/a.tar"
        for offset, size in ((0, 1), (7, 300), (10_000, 240)):
            assert web.read(url, offset, size, len(DATA)) == DATA[offset : offset + size]
        assert b"".join(web.pieces(url, len(DATA))) == DATA
        assert len({request.client for request in server.requests()}) == 1  # one connection served all
        assert [request.sent for request in server.requests()] == [1, 300, 240, len(DATA)]
        for expected in (len(DATA) - 1, len(DATA) + 1):
            with pytest.raises(WrongSize) as wrong:
                web.read(url, 0, 1, expected)
            assert (wrong.value.found, wrong.value.final) == (str(len(DATA)), True)
            with pytest.raises(WrongSize):
                list(web.pieces(url, expected))
        with pytest.raises(WrongSize) as wrong:
            web.read(url, len(DATA), 5, 2 * len(DATA))
        assert wrong.value.found == str(len(DATA))
        with pytest.raises(Missing, match=r"^not found \(HTTP 404\)$"):
            web.read(f"{server.url}/none.tar", 0, 1, 1)
        with pytest.raises(UserError, match=r"/refused/a\.tar\?\*\*\*: access is refused \(HTTP 403\)$"):
            web.read(f"{server.url}/refused/a.tar?token=secret", 0, 1, len(DATA))
    with pytest.raises(Transient, match="Connection refused"):
        web.read(url, 0, 1, len(DATA))
    web.close()


def test_a_proxy_that_refuses_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    web = WebStore(5.0)
    with pytest.raises(
        Transient, match=r"refused \(through the proxy http://\S*127\.0\.0\.1:\d+ of the env"
    ) as refusal:
        web.read("http://shards.invalid/a.tar", 0, 1, 1)
    assert "secret" not in str(refusal.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(Transient, match=r"Connection refused$"):
        web.read(f"http://127.0.0.1:{free_port()}/a.tar", 0, 1, 1)
    web.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "HTTP 500"),
        ("drop", "closed connection"),
        ("cut", "IncompleteRead"),
        ("hang", r"no answer for 0\.5 s"),
        ("wrong", "another range"),
    ],
)
def test_faults_of_a_web_server_may_pass(folder: Path, tmp_path: Path, fault: Fault, reason: str) -> None:
    web = WebStore(0.5 if fault == "hang" else 20.0)
    with web_server(folder, tmp_path / "log", fail_every=2, fault=fault) as server:
        for _ in range(2):
            assert web.read(f"{server.url}/a.tar", 100, 1000, len(DATA)) == DATA[100:1100]
            with pytest.raises(Transient, match=reason) as failure:
                web.read(f"{server.url}/a.tar", 100, 1000, len(DATA))
            assert not failure.value.final
    web.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fault", ["drip", "drip head"])
def test_a_web_server_that_drips_is_not_waited_for(folder: Path, tmp_path: Path, fault: Fault) -> None:
    told = r"^the server sends [\d.]+ bytes/s for 0\.\d+ s; rule: data\.remote\.lowest_speed: at least 1000 over "
    web = WebStore(0.3, 1000.0)  # the server sends 20 bytes a second
    with web_server(folder, tmp_path / "log", fail_every=1, fault=fault) as server:
        url = f"{server.url}/a.tar"
        with pytest.raises(Transient, match=told + r"data\.remote\.timeout_s, 0\.3 s$") as failure:
            web.read(url, 100, 1000, len(DATA))
        assert not failure.value.final
        with pytest.raises(Transient, match=told):
            list(web.pieces(url, None))
        with pytest.raises(Transient, match=told), (tmp_path / "copy").open("wb") as file:
            fetch_into(file, url, RemoteConfig(retries=1, backoff_s=0.01, timeout_s=0.3))
        assert len(server.requests()) == 4  # the last was tried again
        shard = ShardFile("web", url, len(DATA), url)
        reader = ShardReader(RemoteConfig(retries=0, timeout_s=0.3))
        with pytest.raises(UserError, match=r"/a\.tar: shard of source web cannot be opened: the server sends "):
            reader.check([shard])
        with pytest.raises(UnreachableShard, match="the server sends "):
            reader.read(Location(shard, Entry("a", 512, 1000, 2048, 10, "txt")))
        reader.close()
    web.close()
    with web_server(folder, tmp_path / "log", length=None) as server, pytest.raises(NoEnd):  # silent, and not slow
        list(WebStore(0.3, 1000.0).pieces(f"{server.url}/a.tar", None))


def test_slowness_is_looked_at_before_the_next_wait_and_not_during_the_first() -> None:
    pace = Pace(60.0, 1000.0)
    pace.add(59.0, 0)  # the server's own time before its answer
    pace.add(61.0, 10)
    with pytest.raises(TooSlow, match=r"^0\.164 bytes/s for 61 s; "):
        pace.check()
    pace = Pace(60.0, 1000.0)
    for _ in range(3):
        pace.add(70.0, 70_000)
        pace.check()
    pace = Pace(60.0, 0.0)
    pace.add(1.0, 1)
    pace.add(1000.0, 1)
    pace.check()


def test_a_server_without_ranges_is_told_by_its_answer_and_not_listened_to(folder: Path, tmp_path: Path) -> None:
    (folder / "large.tar").write_bytes(bytes(50_000_000))
    web = WebStore(5.0)
    with web_server(folder, tmp_path / "log", ranges=False) as server:
        with pytest.raises(NoParts):
            web.read(f"{server.url}/large.tar", 0, 1000, 50_000_000)
        while not server.requests():  # the server writes the request down when it notices the hang-up
            time.sleep(0.01)
        assert server.requests()[0].sent < 20_000_000  # the buffers' size, not the file's
        assert b"".join(web.pieces(f"{server.url}/a.tar", len(DATA))) == DATA
    web.close()


@pytest.mark.parametrize("length", ["abc", "-5", "", None])
def test_answers_whose_length_is_wrong_or_missing_are_read_where_their_size_is_known(
    folder: Path, tmp_path: Path, length: str | None
) -> None:
    web = WebStore(20.0)
    with web_server(folder, tmp_path / "log", length=length) as server:  # which keeps its connections open
        url = f"{server.url}/a.tar"
        assert web.read(url, 100, 1000, len(DATA)) == DATA[100:1100]
        assert b"".join(web.pieces(url, len(DATA))) == DATA
        said = "no end of its answer for 0.5 s, and no Content-Length"
        if length is not None:
            said = f"says Content-Length: {length!r}; rule: the number of its answer's bytes"
        with pytest.raises(NoEnd, match=re.escape(said)), (tmp_path / "copy").open("wb") as file:
            fetch_into(file, url, RemoteConfig(retries=3, backoff_s=60.0, timeout_s=0.5 if length is None else 60.0))
        assert len(server.requests()) == 3  # nothing was tried again
    web.close()


def test_contradicting_lengths_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    with (
        web_server(folder, tmp_path / "log", length="5, 7") as server,
        pytest.raises(UserError, match=r"Content-Length contained multiple unmatching values \(5, 7\)"),
    ):
        retried(lambda: WebStore(20.0).read(f"{server.url}/a.tar", 0, 9, len(DATA)), RemoteConfig(backoff_s=60.0))


def test_a_page_in_the_place_of_a_shard_is_called_one(folder: Path, tmp_path: Path) -> None:
    (folder / "login.html").write_bytes(DATA)
    web = WebStore(5.0)
    with web_server(folder, tmp_path / "log") as server:
        for read in (lambda url: web.read(url, 0, 1, 9), lambda url: list(web.pieces(url, 9))):
            with pytest.raises(Transient, match=r"^the server sent a web page, as for a login, instead of the shard$"):
                read(f"{server.url}/login.html")
            with pytest.raises(WrongSize):
                read(f"{server.url}/a.tar")


def test_waits_double_up_to_a_limit_and_then_the_last_failure_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # the waits would be minutes
    tries: list[int] = []

    def fail() -> None:
        tries.append(0)
        raise Transient(f"try {len(tries)}")

    with pytest.raises(Transient, match=r"^try 9$"):
        retried(fail, RemoteConfig(retries=8, backoff_s=0.5))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize("failure", [WrongSize("5", final=True), Missing(), UserError("no")])
def test_what_does_not_pass_is_tried_once(failure: Exception) -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(0)
        raise failure

    remote = RemoteConfig(retries=2, backoff_s=0.0)
    with pytest.raises(type(failure)):
        retried(fail, remote)
    assert len(tries) == 1
    if isinstance(failure, Missing):
        with pytest.raises(Missing):
            retried(fail, remote, await_missing=True)
        assert len(tries) == 4


def test_commands(folder: Path) -> None:
    commands = CommandStore(5.0)
    assert b"".join(commands.pieces(f"pipe:cat {folder}/a.tar | cat", None)) == DATA
    with pytest.raises(NoParts):
        commands.read(f"pipe:cat {folder}/a.tar", 0, 1, 1)
    with pytest.raises(Transient, match=r"^the command failed with status 3: to https://\*\*\*@h/x\?\*\*\*$"):
        list(commands.pieces("pipe:printf ab; echo why >&2; echo to https://u:p@h/x?t=1 >&2; exit 3 #.tar", None))


@pytest.mark.timeout(30)
def test_a_command_that_falls_silent_is_ended_with_all_it_started(tmp_path: Path) -> None:
    commands = CommandStore(0.3)
    with pytest.raises(Transient, match=r"wrote nothing for 0\.3 s"):
        list(commands.pieces(f"pipe:printf ab; sleep 250 & echo $! > {tmp_path}/silent; wait", None))
    with pytest.raises(
        Transient, match=r"^the command wrote [\d.]+ bytes/s for 0\.\d+ s; rule: data\.remote\.lowest_speed"
    ):
        list(CommandStore(0.3, 1000.0).pieces("pipe:while printf a; do sleep 0.05; done", None))
    begun = commands.pieces(f"pipe:echo $$ > {tmp_path}/endless; exec yes", None)
    assert next(begun).startswith(b"y\ny\n")
    begun.close()
    for name in ("silent", "endless"):
        status = Path(f"/proc/{(tmp_path / name).read_text().strip()}/stat")
        while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)


def test_file_systems_of_fsspec(memory: str, folder: Path) -> None:
    files = FilesystemStore()
    for url in (f"{memory}/a.tar", f"file://{folder}/a.tar"):
        assert files.read(url, 7, 300, len(DATA)) == DATA[7:307]
        assert b"".join(files.pieces(url, len(DATA))) == DATA
        with pytest.raises(WrongSize) as wrong:
            files.read(url, 7, 300, 1000)
        assert (wrong.value.found, wrong.value.final) == (str(len(DATA)), True)
        with pytest.raises(Missing, match=r"^not found$"):
            files.read(url.replace("a.tar", "none.tar"), 0, 1, 1)
    with pytest.raises(UserError, match=r"^nowhere://\*\*\*@h/a\.tar: .*[Pp]rotocol"):
        files.read("nowhere://user:secret@h/a.tar", 0, 1, 1)


def test_a_forked_process_opens_stores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores(RemoteConfig(timeout_s=1.0))
    first = stores.of("http://h/a.tar")
    assert stores.of("https://other/a.tar") is first
    assert isinstance(stores.of("memory://a.tar"), FilesystemStore)
    assert isinstance(stores.of("pipe:cat a.tar"), CommandStore)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert stores.of("http://h/a.tar") is not first


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("http://h/a.tar", "", "http://h/a.tar"),
        ("at https://me:pw@h/a.tar?X=1&Y=2, and", "", "at https://***@h/a.tar?*** and"),
        ("s3://key:secret@b/a?.tar", "", "s3://***@b/a?.tar"),
        ("GET /a.tar?X=1 by me:pw", "http://me:pw@h/a.tar?X=1", "GET /a.tar?*** by ***"),
    ],
)
def test_secrets_are_left_out(text: str, address: str, shown: str) -> None:
    assert redact(text, address) == shown


def test_a_web_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"^http://\[::1/a\.tar: not a valid URL: Invalid IPv6 URL$"):
        Stores(RemoteConfig(timeout_s=1.0)).of("http://[::1/a.tar")
    assert Stores(RemoteConfig(timeout_s=1.0)).of("http://[::1]/a.tar")


def test_a_folders_query_stays_at_the_end() -> None:
    assert join_url("https://h/a/?t=1", "b.tar") == "https://h/a/b.tar?t=1"
    assert join_url("s3://b/a", "b.tar") == "s3://b/a/b.tar"
    assert join_url("memory://", "b.tar") == "memory:///b.tar"


@pytest.mark.parametrize(
    ("pattern", "names", "first_address", "folder"),
    [
        ("https://h/x/{0..1}.tar", ["0.tar", "1.tar"], "https://h/x/0.tar", "https://h/x"),
        ("https://me:pw@h/{x,y}/0.tar?t={1}", ["x/0.tar", "y/0.tar"], "https://me:pw@h/x/0.tar?t={1}", None),
        ("https://[::1]:80/0.tar", ["0.tar"], "https://[::1]:80/0.tar", "https://[::1]:80"),
        ("s3://b/x/{0..1}.tar", ["0.tar", "1.tar"], "s3://b/x/0.tar", "s3://b/x"),
        ("pipe:aws s3 cp s3://b/x/{0..1}.tar -", ["0.tar", "1.tar"], "pipe:aws s3 cp s3://b/x/0.tar -", None),
        ("pipe:zstd -dc '/x/{a,b}/0.tar.zst'", ["a/0.tar.zst", "b/0.tar.zst"], "pipe:zstd -dc '/x/a/0.tar.zst'", None),
        ("pipe:cat 0.tar", ["0.tar"], "pipe:cat 0.tar", None),
        ("pipe:curl https://u:p@h/{0..1}.tar?t=1 | cat", ["0.tar", "1.tar"], None, None),
    ],
)
def test_patterns_of_remote_shards(
    pattern: str, names: list[str], first_address: str | None, folder: str | None
) -> None:
    shards = parse_pattern(pattern)
    assert shards.list_names() == names
    assert shards.known_names() == (names, [])
    assert first_address is None or shards.address(names[0]) == first_address
    assert folder is None or shards.folder == folder
    means = shards.means()
    assert all(means(name) for name in names)
    assert not means("other.tar")
    for secret in ("me:", "pw", "u:p", "t="):
        assert secret not in shards.shown + shards.show(names[0])


def test_folders_and_wildcards_where_they_can_be_listed(memory: str) -> None:
    assert parse_pattern(memory).list_names() == ["a.tar", "b-1.tar", "b-2.tar"]
    assert parse_pattern(f"{memory}/b-*.tar").list_names() == ["b-1.tar", "b-2.tar"]
    assert parse_pattern(f"{memory}/{{a,b-?}}.tar").list_names() == ["a.tar", "b-1.tar", "b-2.tar"]
    assert parse_pattern(f"{memory}/*/e.tar").list_names() == ["d/e.tar"]
    assert parse_pattern(f"{memory}/b-*.tar").known_names() == ([], [])  # no server was asked
    means = parse_pattern(f"{memory}/b-*.tar").means()
    assert [name for name in ("a.tar", "b-1.tar", "d/b-1.tar") if means(name)] == ["b-1.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("https://me:pw@h/x", r"^https://\*\*\*@h/x: a web server has no list of its files; name the shards"),
        ("https://h/*.tar", r"^https://h/\*\.tar: a web server has no list"),
        ("https://{a,b}/0.tar", r"braces may stand in the path"),
        ("pipe:./make {0..3} secret", r"^pipe: the command must name a \.tar file"),
        ("pipe:cat /x/0.tar --from {a,b}", r"^pipe: \.\.\. /x/0\.tar: 2 commands, but 1 names"),
        ("s3://b/{a,..}/0.tar", r"must not lead through \.\.$"),
    ],
)
def test_patterns_that_cannot_be(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_pattern(pattern).list_names()


def test_what_is_written_of_a_configuration_holds_no_secret() -> None:
    url = "https://me:pw@h/{0..9}.tar?token=secret"
    config = RunConfig.model_validate(
        {
            "data": {"sources": [{"name": "a", "shards": url, "index": url}, {"name": "b", "shards": "/x?[ab]/*.tar"}]},
            "eval": [{"kind": "retrieval", "shards": url, "index": url}],
        }
    )
    assert config.data.sources[0].shards == url
    written = dump_config(config)
    assert written.count("https://***@h/{0..9}.tar?***") == 4
    assert "/x?[ab]/*.tar" in written
    for secret in ("me:pw", "secret"):
        assert secret not in written
