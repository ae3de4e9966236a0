"""Messages over pipes: among other lines, cut anywhere, and without waiting for a reader."""

import os

from cosmos_scale.launch.wire import Inbox, Outbox


def test_messages_are_told_from_other_lines() -> None:
    reads, writes = os.pipe()
    inbox, outbox = Inbox(reads), Outbox(writes)
    os.write(writes, b"Welcome to this host\r\n")
    outbox.send({"line": "a\nb", "of": 1})
    os.write(writes, b"no end of a login script's line")
    outbox.send({"line": "c"})
    os.write(writes, b"no end")
    assert inbox.messages() == (
        [{"line": "a\nb", "of": 1}, {"line": "c"}],
        ["Welcome to this host", "no end of a login script's line"],
    )
    os.close(writes)
    assert inbox.messages() == ([], ["no end"])
    assert inbox.closed
    os.close(reads)


def test_messages_wait_for_a_slow_reader_and_only_output_is_dropped() -> None:
    reads, writes = os.pipe()
    inbox, outbox = Inbox(reads), Outbox(writes)
    text = "x" * 60_000
    kept = sum(outbox.send({"line": text}, may_drop=True) for _ in range(100))
    assert 50 < kept < 100
    assert outbox.send({"ended": 0})
    found = []
    while outbox.is_waiting:
        found += inbox.messages()[0]
        outbox.flush()
    found += inbox.messages()[0]
    assert found == [{"line": text}] * kept + [{"ended": 0}]
    os.close(reads)
    outbox.send({"alive": True})
    assert outbox.closed
    os.close(writes)


def test_messages_are_held_until_the_program_is_there() -> None:
    reads, writes = os.pipe()
    inbox, outbox = Inbox(reads), Outbox(writes, is_held=True)
    outbox.send({"job": 1})
    assert (inbox.messages(), outbox.is_waiting) == (([], []), False)
    outbox.is_held = False
    outbox.flush()
    assert inbox.messages() == ([{"job": 1}], [])
    os.close(reads)
    os.close(writes)


def test_a_line_without_end_is_cut() -> None:
    reads, writes = os.pipe()
    inbox = Inbox(reads, 65536)
    os.write(writes, b"y" * 60_000)
    assert inbox.lines() == []
    os.write(writes, b"y" * 60_000 + b"\nnext\n")
    assert [len(line) for line in inbox.lines()] == [65536, 4]
    os.close(reads)
    os.close(writes)
