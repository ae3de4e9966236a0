"""The gallery for retrieval: slices of ranks, texts of every shape, damage left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_scale.data.decode.torch_cpu import evaluation_image
from cosmos_scale.data.shards.index import index_shards
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.gallery import Gallery, GalleryBatch
from cosmos_scale.testing.shard_files import flip_bytes, open_folder, picture, sample, write_shard, write_shards


def gallery(
    folder: Path,
    rank: int,
    world_size: int,
    key: str = "raw_caption",
    most: int | None = None,
    max_pixels: int = 10**6,
) -> list[GalleryBatch]:
    opened = Gallery(open_folder(folder), key, image_size=16, max_pixels=max_pixels, max_samples=most)
    return list(opened.batches(rank, world_size, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_ranks_cover_each_sample_once_in_order(tmp_path: Path, world_size: int) -> None:
    folder = write_shards(tmp_path, [4, 5, 2])
    for most in (None, 7, 100):
        batches = [batch for rank in range(world_size) for batch in gallery(folder, rank, world_size, most=most)]
        ids = [number for batch in batches for number in batch.sample_ids.tolist()]
        assert ids == list(range(min(11, most or 11)))
        for batch in batches:
            assert len(batch.images) == len(batch.texts) == len(batch.sample_ids) <= 3
            for image, texts, number in zip(batch.images, batch.texts, batch.sample_ids.tolist(), strict=True):
                assert torch.equal(image, evaluation_image(picture(number), 16, 10**6))
                assert list(texts) == json.loads(sample(number)["json"])["raw_caption"]


def test_damaged_samples_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[Any] = ["one text", ["x", " "], [], 5, None, [1], ["y"]]
    # Without the url, documents that hold no text at all would not be indexed.
    documents = [json.dumps({"t": value, "url": "u"}).encode() for value in values]
    members = [{**sample(number), "json": document} for number, document in enumerate(documents)]
    path = write_shard(tmp_path / "0.tar", members)
    index_shards(str(tmp_path), None, workers=1, progress=False)
    flip_bytes(path, open_folder(tmp_path).locate(6).entry.image_offset, 20)
    (batch,) = gallery(tmp_path, 0, 1, "t")
    assert batch.sample_ids.tolist() == [0, 1]
    assert [list(texts) for texts in batch.texts] == [["one text"], ["x"]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split(" ")[1] for line in lines] == [f"{number:06d}" for number in (2, 3, 4, 5, 6)]


def test_a_wrong_key_is_an_error_on_every_rank_even_without_work(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, [2])
    for rank in range(4):
        with pytest.raises(UserError, match=r"sample 000000 has no captions under 'caption'; its keys are raw_caption"):
            gallery(folder, rank, 4, "caption")


def test_nan_is_null_in_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: list[Any] = ["a text", float("nan"), ["x", float("nan"), None, "y"], [float("nan")]]
    documents = [json.dumps({"t": value, "url": "u"}).encode() for value in values]
    write_shard(tmp_path / "0.tar", [{**sample(number), "json": document} for number, document in enumerate(documents)])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    (batch,) = gallery(tmp_path, 0, 1, "t")
    assert [list(texts) for texts in batch.texts] == [["a text"], ["x", "y"]]
    assert capsys.readouterr().err.count("t holds no text") == 2
