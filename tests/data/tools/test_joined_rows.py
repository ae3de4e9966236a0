"""Several rows for one picture: counted, or joined to one sample with all captions."""

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos_scale.data.tools import build as build_module
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.data.tools.build_report import BuildReport
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture
from tests.data.tools.test_build import read_whole
from tests.data.tools.test_build_again import contents

# Two pictures by several names, far apart; a missing picture; a row without a caption.
NAMES = ("0.jpg", "1.jpg", "none.jpg", "0", "2.jpg", "./0.jpg", "1.jpg", "none.jpg", "0.jpg")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(number))
    lines = [f'{name},"caption\n{number}"' for number, name in enumerate(NAMES, start=1)]
    (tmp_path / "rows.csv").write_text("image,caption\n" + "\n".join([*lines[:-1], "0.jpg,"]) + "\n")
    return tmp_path


def build(folder: Path, out: str = "out", *, captions: str = "rows.csv", **options: Any) -> BuildReport:
    where = (folder / "images", folder / captions, folder / out)
    return build_shards(*where, samples_per_shard=2, progress=False, **{"workers": 1, **options})


def test_rows_of_one_picture_are_counted(inputs: Path) -> None:
    report = build(inputs)
    assert (report.samples, report.repeated) == (6, 3)
    assert "3 rows name a picture that an earlier row named: each row is a sample" in report.describe()
    assert "(--join-rows makes one sample a picture)" in report.describe()


def test_joined_rows_are_one_sample_of_all_captions(inputs: Path) -> None:
    report = build(inputs, join_rows=True)
    assert "3 rows joined to an earlier row's sample of the same picture" in report.describe()
    found = {key: document for key, (_, document) in read_whole(inputs / "out").items()}
    assert found == {
        "000000001": {
            "caption": ["caption\n1", "caption\n4", "caption\n6"],
            "origin": {"captions": "rows.csv", "row": 1, "image": "0.jpg", "joined_rows": [4, 6]},
        },
        "000000002": {
            "caption": ["caption\n2", "caption\n7"],
            "origin": {"captions": "rows.csv", "row": 2, "image": "1.jpg", "joined_rows": [7]},
        },
        "000000005": {"caption": "caption\n5", "origin": {"captions": "rows.csv", "row": 5, "image": "2.jpg"}},
    }
    lines = [json.loads(line) for line in (inputs / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [3, 8, 9]
    assert {path.name for path in (inputs / "out").iterdir()} >= {"000000.tar", "index.json"}


def test_a_joined_build_goes_on_to_the_same_bytes(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "index_shards", stop)
        with pytest.raises(InterruptedError):
            build(inputs, join_rows=True)
    with pytest.raises(UserError, match="its build was begun with join-rows true, not false"):
        build(inputs)
    with pytest.raises(UserError, match='its build was begun with orientation "upright", not "keep"'):
        build(inputs, join_rows=True, orientation="keep")
    report = build(inputs, join_rows=True, workers=2)
    assert report.repeated == 3
    build(inputs, "whole", join_rows=True)
    assert contents(inputs / "out") == contents(inputs / "whole")


def test_links_to_one_file_are_one_picture(inputs: Path) -> None:
    (inputs / "images" / "link.jpg").symlink_to("0.jpg")
    (inputs / "images" / "folder").symlink_to(".")
    (inputs / "links.csv").write_text("image,caption\n0.jpg,a\n1.jpg,b\nlink.jpg,c\nfolder/0.jpg,d\n")
    assert build(inputs, captions="links.csv").repeated == 2
    build(inputs, "joined", captions="links.csv", join_rows=True)
    found = [document["caption"] for _, document in read_whole(inputs / "joined").values()]
    assert found == [["a", "c", "d"], "b"]


def test_damage_and_texts_that_stay_whole_name_every_row(inputs: Path) -> None:
    (inputs / "images" / "1.jpg").write_bytes(b"no picture")
    rows = [
        {"image": "0.jpg", "original_caption": "one", "vlm_caption": "A."},
        {"image": "0.jpg", "original_caption": "one", "vlm_caption": ["B.", "C."]},
        {"image": "1.jpg", "caption": "a"},
        {"image": "1.jpg", "caption": "b"},
        {"image": "2.jpg", "original_caption": "one"},
        {"image": "2.jpg", "original_caption": "two"},
    ]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = build(inputs, captions="rows.jsonl", join_rows=True)
    ((_, document),) = read_whole(inputs / "out").values()
    assert (document["original_caption"], document["caption"]) == ("one", ["A.", "B.", "C."])
    lines = [json.loads(line) for line in (inputs / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [3, 4, 5, 6]
    assert "original_caption stays one text, and row 6 has another" in lines[-1]["reason"]
    assert report.rejected.total() == 4
