"""`data inspect`: its numbers against the test's own counts, its contact sheet against the loader's views."""

import io
import json
import tarfile
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from cosmos_scale.cli import main as cli
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.data.decode import Views
from cosmos_scale.data.shards.index import index_shards, open_sources
from cosmos_scale.data.tools import inspect
from cosmos_scale.data.tools.contact_sheet import Original, contact_sheet, to_image
from cosmos_scale.data.tools.inspect import SourceCounts, Survey, Tally
from cosmos_scale.data.tools.inspect_report import histogram, mean, print_survey, quantile
from cosmos_scale.data.training.loader import TrainLoader
from cosmos_scale.data.training.order import EpochOrder
from cosmos_scale.model.tokenizer import Tokenizer
from cosmos_scale.testing.shard_files import Member, flip_bytes, open_folder, picture, write_shard, write_shards
from tests.data.web_server import web_server

# Views that only crop, so that a box can be compared with its view.
PLAIN = {
    "local_crops": 2,
    "local_size": 8,
    "flip": 0.0,
    "grey": 0.0,
    "solarise": 0.0,
    "jitter": {"probability": 0.0},
} | {"blur": {"first_global": 0.0, "other_globals": 0.0, "local": 0.0}}
KINDS = ("JPEG", "JPEG", "JPEG", "PNG", "WEBP")


def member(number: int) -> Member:
    kind = KINDS[number % len(KINDS)]
    image = picture(number, kind, (20 + number % 7, 30 - number % 3))
    sentences = [" ".join(["word"] * (1 + (number + place) % 9)) for place in range(1 + number % 4)]
    document = {"raw_caption": sentences[:1], "longIB_captions": sentences}
    return {"__key__": f"{number:06d}", kind.lower(): image, "json": json.dumps(document).encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate((range(70), range(70, 83), range(83, 150))):
        write_shard(folder / f"{shard}.tar", [member(number) for number in numbers])
    index_shards(str(folder), None, workers=1, progress=False)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["data", "inspect", *map(str, arguments), "--quiet", "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def read_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(capsys, *arguments, "--json"))
    return report


def test_counts_are_those_of_the_tar_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats, widths, aspects, sentences = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    image_bytes = text_bytes = 0
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            for info in archive:
                file = archive.extractfile(info)
                assert file is not None
                if info.name.endswith(".json"):
                    text_bytes += info.size
                    document = json.loads(file.read())
                    sentences[str(len(document["raw_caption"]) + len(document["longIB_captions"]))] += 1
                else:
                    image_bytes += info.size
                    image = Image.open(io.BytesIO(file.read()))
                    formats[f"{image.format} {image.mode}"] += 1
                    widths[str(image.width)] += 1
                    aspects[str(round(100 * image.width / image.height))] += 1
    found = read_json(capsys, folder, "--all", "--out", tmp_path)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found["sources"] == [{"name": str(folder), "shards": 3, "samples": 150, "size": size}]
    assert (found["samples"], found["read"], found["damaged"]) == (150, 150, {})
    assert (found["image_bytes"], found["text_bytes"], found["formats"]) == (image_bytes, text_bytes, dict(formats))
    measures = found["measures"]
    assert measures["width, pixels"]["histogram"] == dict(widths)
    assert measures["width / height, %"]["histogram"] == dict(aspects)
    assert measures["sentences to choose from"]["histogram"] == dict(sentences)
    assert found["pictures"] == [str(tmp_path / "statistics.png"), str(tmp_path / "views.png")]


@pytest.mark.parametrize("epoch", [0, 2])
def test_caption_lengths_are_those_of_the_training_batches(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], epoch: int
) -> None:
    config = RunConfig.model_validate(
        {
            "seed": 5,
            "model": {"vision": {"image_size": 16}},
            "data": {
                "sources": [{"name": "x", "shards": str(folder)}],
                "views": {"local_crops": 0},
                "workers": 0,
            },
            "train": {"global_batch": 50},
        }
    )
    loader = TrainLoader(config, open_folder(folder), Tokenizer(77), 0, 1)
    with closing(loader.batches(3 * epoch)) as batches:
        lengths = np.concatenate([batch.caption_lengths.numpy() for batch in islice(batches, 3)], axis=1)
    assert lengths.shape == (8, 150)
    found = read_json(capsys, folder, "--all", "--seed", 5, "--epoch", epoch, "--out", tmp_path)
    for name, rows in (("global", lengths[:2]), ("local", lengths[2:])):
        values, counts = np.unique(rows, return_counts=True)
        expected = {str(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}
        assert found["measures"][f"tokens, {name} caption"]["histogram"] == expected
    assert found["context_length"] == 77
    assert found["cut_global"] == found["cut_local"] == 0.0


def test_the_share_of_captions_that_are_cut_off(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Raw captions have 1 to 9 words of one token each, and two tokens around them.
    shorter = ["data.captions.sampling=raw", "model.text.context_length=8", "--out", tmp_path]
    found = read_json(capsys, folder, "--all", *shorter)
    tokens = {str(length): 8 * sum(number % 9 == length - 3 for number in range(150)) for length in range(3, 12)}
    both = Counter(found["measures"]["tokens, global caption"]["histogram"])
    both.update(found["measures"]["tokens, local caption"]["histogram"])
    assert both == tokens
    assert found["cut_global"] == pytest.approx(sum(number % 9 > 5 for number in range(150)) / 150)


def test_a_part_is_drawn_at_random_and_said_to_be_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [read_json(capsys, folder, "--samples", 40, "--seed", seed, "--out", tmp_path) for seed in (0, 0, 1)]
    assert {report["read"] for report in reports} == {40}
    assert all(sum(report["formats"].values()) == 40 for report in reports)
    assert reports[0] == reports[1] != reports[2]
    out = run(capsys, folder, "--samples", 40, "--out", tmp_path)
    assert "read: 40 samples drawn at random; captions as epoch 0 of seed 0 draws them, sampling textcrop\n" in out
    assert "read: all samples;" in run(capsys, folder, "--out", tmp_path)


def test_workers_change_no_number(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = read_json(capsys, folder, "--all", "--out", tmp_path)
    assert cli.main(["data", "inspect", str(folder), "--all", "--json", "--workers=2", f"--out={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out) == alone


def test_shards_elsewhere_are_read_alike(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = read_json(capsys, folder, "--samples", 20, "--out", tmp_path)
    with web_server(folder, tmp_path / "log") as server:
        found = read_json(capsys, f"{server.url}/{{0..2}}.tar", "--index", folder, "--samples", 20, "--out", tmp_path)
    assert found["measures"] == local["measures"]


def test_damaged_samples_are_counted_by_reason(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "0.tar", [member(number) for number in range(12)])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    for number in (2, 5):
        flip_bytes(tmp_path / "0.tar", open_folder(tmp_path).locate(number).entry.image_offset, 30)
    document = open_folder(tmp_path).locate(7).entry
    flip_bytes(tmp_path / "0.tar", document.text_offset, 1)
    found = read_json(capsys, tmp_path, "--out", tmp_path)
    assert found["damaged"] == {"the picture is not a JPEG, PNG or WebP": 2, "unreadable json": 1}
    assert sum(found["formats"].values()) == 9
    out = run(capsys, tmp_path, "--out", tmp_path)
    assert (
        "damaged: 3 of 12 (25.00%); `data verify` names them all\n  2 x the picture is not a JPEG, PNG or WebP\n" in out
    )


def write_run(path: Path, folder: Path, **data: Any) -> Path:
    sources = [
        {"name": "one", "shards": str(folder / "0.tar"), "index": str(folder)},
        {"name": "two", "shards": str(folder / "{1..2}.tar"), "index": str(folder), "weight": 2.5},
    ]
    model = {"vision": {"image_size": 16, "patch_size": 8}, "text": {"context_length": 16}}
    views = {"sources": sources, "window": 32, "views": PLAIN, "captions": {"count": 3}, **data}
    path.write_text(yaml.safe_dump({"seed": 3, "model": model, "data": views, "train": {"global_batch": 64}}))
    return path


def test_a_runs_own_sources_views_and_captions(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run.yaml", folder)
    found = read_json(capsys, path, "--all", "--out", tmp_path, "data.captions.count=4")  # overrides may come last
    assert [(source["name"], source["shards"], source["samples"]) for source in found["sources"]] == [
        ("one", 1, 70),
        ("two", 2, 80),
    ]
    counts = {
        kind: sum(found["measures"][f"tokens, {kind} caption"]["histogram"].values()) for kind in ("global", "local")
    }
    assert counts == {"global": 300, "local": 300}
    assert "together" in run(capsys, path, "--out", tmp_path)


def test_the_sheet_shows_what_training_makes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a source of weight 2.5: positions late in the epoch are often a sample's second or third visit."""
    drawn: list[tuple[Views, list[str]]] = []
    originals: list[Original] = []

    def noted(samples: Any, path: Path, global_captions: int, zoom: int, rows: Any) -> None:
        drawn.extend(samples)
        originals.extend(rows)
        contact_sheet(samples, path, global_captions, zoom, rows)

    monkeypatch.setattr(inspect, "contact_sheet", noted)
    path = write_run(tmp_path / "run.yaml", folder)
    run(capsys, path, "--out", tmp_path, "--epoch", 1, "--first", 200, "--rows", 10)
    config = load_config(path, ["train.global_batch=10", "data.workers=0"])
    index = open_sources(config.data.sources)
    loader = TrainLoader(config, index, tokenizer := Tokenizer(16), 0, 1)
    assert loader.steps_per_epoch == 27  # 70 visits to the first source, 200 to the second
    with closing(loader.batches(27 + 20)) as batches:
        batch = next(batches)
    assert len(drawn) == 10
    assert EpochOrder(index.source_shards(), config.seed, 32).visits(1, np.arange(200, 210)).repeats.max() > 0
    for place, ((views, captions), original) in enumerate(zip(drawn, originals, strict=True)):
        assert original.title.startswith(f"{int(batch.sample_ids[place]):06d} in ")
        assert original.title.endswith(f", position {200 + place} of epoch 1")
        np.testing.assert_array_equal(views.global_crops, batch.global_crops[:, place])
        np.testing.assert_array_equal(tokenizer(captions), batch.captions[:, place])
        for view, (top, left, height, width) in zip(
            [*views.global_crops, *views.local_crops], original.boxes, strict=True
        ):
            crop = Image.fromarray(original.picture[top : top + height, left : left + width, :3])
            side = view.shape[-1]
            resized = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int64)
            # Two resizers of 8-bit pixels round differently. Noise in another box would differ by tens of levels.
            assert np.abs(np.asarray(to_image(view)) - resized).mean() <= 1.0
    sheet = Image.open(tmp_path / "views.png")
    assert sheet.width > 224 * 2
    assert sheet.height > 10 * 224  # 16 pixels are shown as 224


def test_the_sheet_names_substitutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "0.tar", [member(number) for number in range(12)])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    flip_bytes(tmp_path / "0.tar", open_folder(tmp_path).locate(5).entry.image_offset, 30)
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "contact_sheet", lambda *arguments: titles.extend(row.title for row in arguments[-1]))
        run(capsys, tmp_path, "--rows", 20, "--out", tmp_path)
    assert len(titles) == 12  # as many as there are positions
    (substitute,) = [title for title in titles if "damaged" in title]
    assert substitute.endswith(", in place of damaged 000005")
    assert not any(title.startswith("000005") for title in titles)


def test_a_caption_of_a_megabyte_does_not_fill_the_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "0.tar", [{**member(0), "json": json.dumps({"raw_caption": ["word " * 200_000]}).encode()}])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    run(capsys, tmp_path, "--out", tmp_path)
    assert Image.open(tmp_path / "views.png").height < 4000  # eight captions of 1,000 characters each


@pytest.mark.filterwarnings("error:constrained_layout")
def test_captions_that_are_all_cut_leave_the_panels_their_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Chinese ones are, of two tokens a letter: the word at the cut stood far left of the panel, and needed room."""
    write_shard(tmp_path / "0.tar", [{**member(0), "json": json.dumps({"raw_caption": ["狗" * 200]}).encode()}])
    index_shards(str(tmp_path), None, workers=1, progress=False)
    assert "cut off at 77 tokens: 100.0% of global captions" in run(capsys, tmp_path, "--out", tmp_path)


@pytest.mark.parametrize("spread", [1, 30, 5000])
def test_quantiles_and_bins_of_counts(spread: int) -> None:
    values = np.random.default_rng(spread).gamma(3.0, spread, 2000).astype(np.int64)
    counts = Counter(values.tolist())
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        assert quantile(counts, share) == np.quantile(values, share, method="inverted_cdf")
    assert mean(counts) == pytest.approx(values.mean())
    bins = histogram(counts, most_bins=12)
    assert sum(bar.height for bar in bins) == 2000
    assert len(bins) <= 13  # one more if the first bin starts at a round value below the least
    for bar in bins:
        last = bar.last if bar.last is not None else values.max()
        assert bar.height == ((values >= bar.first) & (values <= last)).sum()


def test_one_huge_value_leaves_the_other_bins_as_they_are() -> None:
    counts = Counter(dict.fromkeys(range(10), 100))
    expected = histogram(counts)
    counts[10_000] = 1
    assert [bar.height for bar in histogram(counts)][:9] == [bar.height for bar in expected][:9]
    assert histogram(counts)[-1] == (9, None, 101)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--captions", "best"], "data.captions.sampling: \"best\" should be 'textcrop'"),
        (["{folder}", "--first", "150"], "--first 150: an epoch of this data has 150 positions, counted from 0"),
        (["{folder}/0.tar", "{folder}/1.tar"], "1.tar: one pattern of shards is expected, in quotes"),
        (["{folder}", "data.view.flip=1"], "data.view: no such key; did you mean data.views?"),
        (["{folder}/none"], "{folder}/none"),
        (["none.yaml"], "none.yaml: no such config file"),
        (["{folder}/run.yaml", "--index", "x"], "--index x: goes with a pattern"),
        (["{folder}", "--out", "{folder}/0.tar"], "{folder}/0.tar: cannot be made"),
    ],
)
def test_wrong_use_is_one_line(
    folder: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(folder=folder) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path)]
    assert cli.main(["data", "inspect", *given, *out, "--quiet", "--workers=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cosmos-scale data inspect: ")
    assert captured.err.count("\n") == 1
    assert message.format(folder=folder) in captured.err


@pytest.mark.parametrize("arguments", [[], ["a", "--samples=0"], ["a", "--epoch=-1"], ["a", "--samples=3", "--all"]])
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "inspect", *arguments])
    assert caught.value.code == 2
    assert "usage: cosmos-scale data inspect" in capsys.readouterr().err


def test_a_lost_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [3, 3])
    (folder / "00001.index.npy").write_bytes(b"nothing")
    assert cli.main(["data", "inspect", str(folder), "--out", str(tmp_path), "--quiet", "--workers", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "00001.tar" in line
    assert f"its index {folder / '00001.index.npy'} cannot be read: damaged; run `cosmos-scale data index`" in line


def test_a_long_tail_has_growing_bins() -> None:
    counts = Counter({1: 3, 4: 10, 12: 5, 40: 1, 900: 1})
    bins = histogram(counts)
    assert [(bar.first, bar.last) for bar in bins] == [
        (1, 1), (2, 4), (5, 9), (10, 19), (20, 49), (50, 99), (100, 199), (200, 499), (500, 999)
    ]  # fmt: skip
    assert [bar.height for bar in bins] == [3, 10, 0, 5, 1, 0, 0, 0, 1]
    huge = histogram(Counter({0: 500, 3: 400, 70: 100, 10**6: 1}))  # beyond the quantile that the bins reach
    assert (huge[0], huge[-1]) == ((0, 0, 500), (50, None, 101))
    assert sum(bar.height for bar in huge) == 1001


def test_tables_are_whole_on_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(
        samples=10,
        image_bytes=10**9,
        formats=Counter({"JPEG RGB": 10}),
        sizes=Counter({(500, 400): 9, (10000, 20000): 1}),
        sentences=Counter({3: 9, 12: 1}),
        global_tokens=Counter({20: 9, 30: 1}),
        local_tokens=Counter({10: 10}),
    )
    pattern = "/data/users/somebody/datasets/merged30m/cc12m/{000000..001242}.tar"
    sources = [SourceCounts(pattern, 1243, 10010225, 1234567890123), SourceCounts("b", 1, 2, 3)]
    print_survey(Survey(sources, 10, 10, tally), "textcrop", 77, 0, 0, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert f"source 1: {pattern}" in lines
    assert any(line.split() == ["source", "1", "1,243", "10,010,225", "1,234,567,890,123"] for line in lines)
    assert not any("\u2026" in line or len(line) > 80 for line in lines if not line.startswith("source 1: "))


@pytest.mark.parametrize("name", ["views.png", "statistics.png"])
def test_pictures_that_cannot_be_written_are_one_line(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    assert (
        cli.main(["data", "inspect", str(folder), "--samples=1", "--rows=1", "--workers=1", f"--out={tmp_path}"]) == 2
    )
    assert (
        capsys.readouterr().err == f"cosmos-scale data inspect: {tmp_path / name}: cannot be written: Is a directory\n"
    )
