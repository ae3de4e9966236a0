"""Names that differ by their Unicode form alone (NFC, NFD) are told of, where they look alike in all messages."""

import json
import re
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pytest

from cosmos_scale.data.samples.normal_forms import other_forms
from cosmos_scale.data.tools.build import build_shards
from cosmos_scale.errors import UserError
from cosmos_scale.testing.shard_files import picture
from tests.data.prepare.downloads import Download, dreamlip_row, write_dreamlip, write_tar
from tests.data.prepare.test_pairing import rejects
from tests.data.prepare.test_prepare import run

NAME = "caf\u00e9"
NEAR = "one that differs by its Unicode form alone"


def test_only_texts_with_two_forms_have_another() -> None:
    assert other_forms("cafe") == other_forms("\u4e2d") == {}
    assert other_forms(NAME) == {"cafe\u0301": "NFD"}
    assert other_forms("cafe\u0301") == {NAME: "NFC"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_prepare_says_it_of_the_image_and_of_the_row(tmp_path: Path, form: Literal["NFC", "NFD"]) -> None:
    (tmp_path / "captions").mkdir()
    urls = [f"https://x.org/{NAME}.jpg", "https://x.org/1.jpg", "https://x.org/2.jpg"]
    rows = [dreamlip_row(number, normalize(form, url)) for number, url in enumerate(urls)]
    write_dreamlip(tmp_path / "captions" / "a.csv", rows)
    other = normalize("NFD" if form == "NFC" else "NFC", urls[0])
    items = [Download("000000000", other, picture(0)), Download("000000001", urls[1], picture(1))]
    write_tar(tmp_path / "images", "00000", items)
    run(tmp_path)
    assert rejects(tmp_path / "out") == [
        ("000000000", None, f"image without captions: no row has its url, but {NEAR} is in a row"),
        (None, 3, "no image: no shard lists its url"),
        (None, 1, f"no image: no shard lists its url, but {NEAR} is listed"),
    ]


def test_prepare_says_it_where_nothing_can_be_joined(tmp_path: Path) -> None:
    (tmp_path / "captions").mkdir()
    write_dreamlip(tmp_path / "captions" / "a.csv", [dreamlip_row(0, f"https://x.org/{NAME}.jpg")])
    write_tar(
        tmp_path / "images", "00000", [Download("000000000", normalize("NFD", f"https://x.org/{NAME}.jpg"), picture(0))]
    )
    with pytest.raises(UserError, match=re.escape("some differ by their Unicode form alone (NFC and NFD)")):
        run(tmp_path)


def test_build_says_it_of_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "images" / normalize("NFD", NAME)
    folder.mkdir(parents=True)
    (folder / f"{normalize('NFD', NAME)}.jpg").write_bytes(picture(0))
    (folder / "b.jpg").write_bytes(picture(1))
    nfd = normalize("NFD", NAME)
    names = [f"{NAME}/{NAME}.jpg", f"{NAME}/b", f"{nfd}/{NAME}", f"{nfd}/b.jpg", f"{nfd}/{NAME}2.jpg"]
    rows = [json.dumps({"image": name, "caption": "a cat"}) for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    build_shards(
        tmp_path / "images", tmp_path / "a.jsonl", tmp_path / "out", samples_per_shard=9, workers=1, progress=False
    )
    said = f"picture not found: {NEAR} (NFD) is there; rename it or change the row"
    assert [(row, reason) for _, row, reason in rejects(tmp_path / "out")] == [
        (1, said),
        (2, said),
        (3, said),
        (5, "picture not found"),
    ]
