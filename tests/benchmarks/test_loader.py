"""Both sides of the loader benchmark do the same work, on photos that are always the same; and it runs."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loader import TURN, Ours, _go_on, main
from cosmos_scale.batch import MEAN, STD
from cosmos_scale.kernels.patches import level_values
from cosmos_scale.testing.photos import CAPTIONS, PIXELS, caption_documents, jpeg_photos
from cosmos_scale.testing.published_views import published_texts, published_views, seed_published


def test_photos_and_captions_are_always_the_same() -> None:
    photos = jpeg_photos(12)
    assert photos == jpeg_photos(12)
    assert len(set(photos)) == 12
    for photo in photos:
        image = Image.open(io.BytesIO(photo))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert abs(image.width * image.height - PIXELS) <= 0.01 * PIXELS  # sides are whole numbers
    documents = caption_documents(3)
    assert documents == caption_documents(3)
    assert [len(sentences) for sentences in documents[0].values()] == [number for number, _, _ in CAPTIONS.values()]


def test_both_sides_draw_views_from_the_same_law() -> None:
    """Brightness, contrast and sharpness of views agree over many draws: no side leaves out a step."""
    count = 48
    samples = list(zip(range(count), jpeg_photos(count), caption_documents(count), strict=True))
    seed_published(0)
    ours = Ours()
    made: dict[str, list[list[float]]] = {"ours": [], "published": []}
    for start in range(0, count, TURN):
        turn = samples[start : start + TURN]
        ours.views(turn)
        for place, (_, photo, _) in enumerate(turn):
            mine = [view for crops in ours.batch for view in crops[:, place]]
            theirs = published_views(photo, _go_on)
            assert [view.shape for view in mine] == [view.shape for view in theirs]
            assert {view.dtype for view in theirs} == {torch.float32}
            mine = [normalised(view) for view in mine]
            for name, views in (("ours", mine), ("published", theirs)):
                made[name].append([measure for view in views for measure in measures(view)])
    mine_NM, theirs_NM = np.array(made["ours"]), np.array(made["published"])
    # Standard errors of the difference of two means; 24 measures are looked at.
    errors = np.sqrt((mine_NM.var(axis=0) + theirs_NM.var(axis=0)) / count)
    assert (np.abs(mine_NM.mean(axis=0) - theirs_NM.mean(axis=0)) <= 4 * errors).all()


def normalised(view: torch.Tensor) -> torch.Tensor:
    """Normalise the levels of a view [3, H, W]."""
    values = level_values(MEAN, STD, torch.float32)
    return torch.stack([values[channel][view[channel].long()] for channel in range(3)])


def measures(view: torch.Tensor) -> list[float]:
    """Mean, spread, and how much neighbours differ, which blur and solarisation change."""
    return [view.mean().item(), view.std().item(), (view[..., 1:] - view[..., :-1]).abs().mean().item()]


def test_the_parts_make_what_the_whole_makes() -> None:
    samples = list(zip(range(3), jpeg_photos(3), caption_documents(3), strict=True))
    ours = Ours()
    ours.views(samples)
    whole = [crops[:, :3].clone() for crops in ours.batch]
    parts: list[str] = []
    ours.views_by_parts(samples, parts.append)
    assert all(torch.equal(crops[:, :3], expected) for crops, expected in zip(ours.batch, whole, strict=True))
    assert parts[:4] == ["decode", "plan", "crops", "colour"]
    ids = ours.texts(samples, _go_on)
    assert ids.shape == (3 * 8, 77)
    assert published_texts(samples[0][2], _go_on).shape == (8, 77)


def test_it_runs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # other tests keep theirs
    file = f"{tmp_path}/loader.json"
    assert main(["--photos", "3", "--rounds", "1", "--json", file]) == 0
    with open(file, encoding="utf-8") as figures:
        rows = {row["name"]: row for row in json.load(figures)}
    assert {
        "loader_speedup",
        "loader_worker_speedup",
        "loader_total_speedup",
        "loader_ours_normalise_ms",
        "loader_published_decode_ms",
    } <= set(rows)
    assert all(row["value"] > 0 for row in rows.values())
    assert "medians of 1 rounds" in rows["loader_speedup"]["note"]
