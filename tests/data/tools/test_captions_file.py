"""What a captions file says twice is not dropped without a word."""

from pathlib import Path

from cosmos_scale.data.tools.captions_file import DEFAULT_COLUMNS, read_rows


def test_a_key_that_stands_twice_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "one", "caption": "two"}\n{"image": "b.jpg", "caption": "three"}\n')
    first, second = read_rows(path, DEFAULT_COLUMNS)
    assert first.fault == "not json: the key 'caption' stands twice in one object"
    assert second.fault is None
