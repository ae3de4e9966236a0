"""Retrieval against a second implementation (sorting in NumPy) and over ranks played by threads."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from cosmos_scale.evaluation import ranking
from cosmos_scale.evaluation.captioned import GalleryBatch
from cosmos_scale.evaluation.evaluator import Gather, one_process
from cosmos_scale.evaluation.ranking import NEVER, RECALL_AT, RankFigures, best_ranks, rank_figures
from cosmos_scale.evaluation.retrieval import LEFT_OUT, Retrieval, RetrievalResult, encoded_together, ranked
from cosmos_scale.testing.allocation import peak_bytes
from tests.evaluation.thread_ranks import in_threads

WIDTH = 8


class RandomGallery:
    """Random features: an image is a picture whose first pixels are its feature, a text is the name of its feature."""

    def __init__(self, counts: Sequence[int], seed: int, noise: float = 0.5) -> None:
        """Image i has counts[i] texts, whose features resemble the image's."""
        generator = torch.Generator().manual_seed(seed)
        self.image = torch.nn.functional.normalize(torch.randn(len(counts), WIDTH, generator=generator), dim=1)
        self.owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        texts = self.image[self.owner] + noise * torch.randn(len(self.owner), WIDTH, generator=generator)
        self.text = torch.nn.functional.normalize(texts, dim=1)

    def encode_images(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :WIDTH]

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return self.text[[int(text) for text in texts]]

    def batches(self, images: Sequence[int], size: int = 3) -> list[GalleryBatch]:
        picture = self.image[:, None, None, :].expand(-1, 3, 1, -1)
        parts = [list(images[i : i + size]) for i in range(0, len(images), size)]
        # Sample ids are not positions: ids of a gallery may start anywhere.
        return [
            GalleryBatch(
                picture[part],
                [[str(int(t)) for t in torch.nonzero(self.owner == image)] for image in part],
                torch.tensor(part) + 1000,
            )
            for part in parts
        ]

    def evaluate(
        self, images: Sequence[int], gather: Gather = one_process, rank: int = 0, ranks: int = 1
    ) -> RetrievalResult:
        """What a rank returns whose slice holds some images."""
        features = encoded_together(self.encode_images, self.encode_texts, self.batches(images), gather)
        return ranked(features, rank, ranks, gather)

    def expected(self) -> tuple[list[float], list[float]]:
        """Recalls, mean and median rank by sorting every row, in float64; features are random: there are no ties."""
        score = self.image.double().numpy() @ self.text.double().numpy().T
        owner = self.owner.numpy()
        found_texts = [int(np.argmax(owner[np.argsort(-row)] == i)) for i, row in enumerate(score)]
        found_images = [int(np.argmax(np.argsort(-column) == owner[t])) for t, column in enumerate(score.T)]
        return figures_of(found_texts), figures_of(found_images)


def figures_of(ranks: list[int]) -> list[float]:
    """The published definitions of recalls, mean rank and median rank, for ranks that count from 0."""
    recalls = [float(np.mean([rank < k for rank in ranks])) for k in RECALL_AT]
    return [*recalls, float(np.mean(ranks)) + 1, math.floor(np.median(ranks)) + 1]


def flat(figures: RankFigures) -> list[float]:
    return [*figures.recalls.values(), figures.mean_rank, figures.median_rank]


def in_ranks(gallery: RandomGallery, slices: Sequence[Sequence[int]]) -> list[RetrievalResult]:
    world = len(slices)
    return in_threads(world, lambda rank, gather: gallery.evaluate(slices[rank], gather, rank, world))


@pytest.mark.parametrize("counts", [[1] * 40, [5] * 12, [1, 3, 2, 7, 1, 4] * 5])
def test_recall_equals_sorting(counts: list[int]) -> None:
    gallery = RandomGallery(counts, seed=len(counts))
    result = gallery.evaluate(range(len(counts)))
    image_to_text, text_to_image = gallery.expected()
    assert 0.1 < image_to_text[0] < 0.9  # neither a perfect nor a hopeless gallery would tell much
    # Counts are integers: only the rounding of their division differs.
    assert flat(result.image_to_text) == pytest.approx(image_to_text, abs=1e-12)
    assert flat(result.text_to_image) == pytest.approx(text_to_image, abs=1e-12)
    assert (result.images, result.texts) == (len(counts), sum(counts))


@pytest.mark.parametrize("bounds", [[0, 9, 18], [0, 5, 5, 18], [0, 18, 18], [0, 1, 2, 18]])
def test_ranks_with_uneven_slices_agree_with_one_process(bounds: list[int]) -> None:
    gallery = RandomGallery([2, 1, 3] * 6, seed=5)
    alone = gallery.evaluate(range(18))
    slices = [range(first, last) for first, last in itertools.pairwise(bounds)]
    assert in_ranks(gallery, slices) == [alone] * len(slices)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2])
def test_equal_texts_are_ties_however_rounding_differs_from_batch_to_batch(size: int, ranks: int) -> None:
    """Two pictures share a caption. Rounding as of other batch sizes never decides which of the two is found."""
    image = torch.nn.functional.normalize(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2)), dim=1)
    texts = ["a dog", "1", "2", "3", "4", "a dog", "6", "7"]

    def encode_texts(batch: Sequence[str]) -> Tensor:
        feature = torch.stack([image[0] if text == "a dog" else image[int(text)] for text in batch])
        return feature + 1e-7 * torch.randn(feature.shape, generator=torch.Generator().manual_seed(len(batch)))

    def evaluate(rank: int, gather: Gather) -> RetrievalResult:
        own = range(8 * rank // ranks, 8 * (rank + 1) // ranks)
        parts = [list(own[first : first + size]) for first in range(0, len(own), size)]
        batches = [
            GalleryBatch(
                image[part][:, None, None].expand(-1, 3, 1, -1), [[texts[at]] for at in part], torch.tensor(part)
            )
            for part in parts
        ]
        features = encoded_together(lambda pictures: pictures[:, 0, 0], encode_texts, batches, gather)
        assert torch.equal(features.text[0], features.text[5])
        return ranked(features, rank, ranks, gather)

    image[5] = image[0]
    for result in in_threads(ranks, evaluate):
        # The six others are found at once. Of the two, the wrong one that scores the same comes first.
        assert result.image_to_text.recalls[1] == result.text_to_image.recalls[1] == 6 / 8
        assert result.image_to_text.mean_rank == result.text_to_image.mean_rank == 1 + 2 / 8


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_scores_are_ranked_in_blocks_shared_by_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = RandomGallery([2] * 30, seed=6)
    whole = gallery.evaluate(range(30))
    monkeypatch.setattr(ranking, "ROWS", 7)
    monkeypatch.setattr("cosmos_scale.evaluation.retrieval.ROWS", 7)
    monkeypatch.setattr(ranking, "COLUMNS", 11)
    bounds = [30 * rank // ranks for rank in range(ranks + 1)]
    slices = [range(first, last) for first, last in itertools.pairwise(bounds)]
    assert in_ranks(gallery, slices) == [whole] * ranks


def test_blocks_change_no_rank_of_equal_scores_and_unsorted_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of few values, whose products are exact: many scores are equal, wherever their blocks begin."""
    generator = torch.Generator().manual_seed(1)
    query, candidate = (torch.randint(-1, 2, (rows, 4), generator=generator).float() for rows in (50, 90))
    of_query, of_candidate = (torch.randint(0, 30, (rows,), generator=generator) for rows in (50, 90))
    candidate[3, 0] = torch.nan
    score_QC, correct_QC = query @ candidate.T, of_query[:, None] == of_candidate
    best_Q1 = score_QC.masked_fill(~correct_QC, -torch.inf).amax(1, keepdim=True)
    expected = (~(score_QC < best_Q1) & ~correct_QC).sum(1).masked_fill(~correct_QC.any(1), NEVER)
    assert (expected == NEVER).any()
    for rows, columns in ((512, 2048), (1, 1), (7, 13), (50, 90)):
        monkeypatch.setattr(ranking, "ROWS", rows)
        monkeypatch.setattr(ranking, "COLUMNS", columns)
        assert torch.equal(best_ranks(query, of_query, candidate, of_candidate), expected)


def test_the_score_matrix_is_never_in_memory() -> None:
    """What ranking holds beside the features is a few blocks of 4 MiB, however many queries and candidates there are.

    Two sizes of galleries show it: the peaks differ by ranks of 8 bytes and a few lists, not by scores. For 30,000
    pictures and 150,000 captions all scores would be 18 GB.
    """

    def peak(images: int) -> int:
        samples = torch.arange(images)
        image, text = torch.ones(images, 4), torch.ones(5 * images, 4)
        return peak_bytes(lambda: best_ranks(image, samples, text, samples.repeat_interleave(5)))

    few, many = peak(2048), peak(4096)
    per_image = 8 + 8 * 2  # a rank, and temporary numbers of samples
    assert many - few <= per_image * 5 * 2048
    assert few + per_image * 5 * (30_000 - 2048) < 1 << 30
    assert many < 8 * 4 * ranking.ROWS * ranking.COLUMNS


@pytest.mark.parametrize("ranks", [[0], [3, 0], [0, 0, 7, 9], [1, 2, 2, 5, 11, 4, 0]])
def test_figures_of_ranks_follow_the_published_definitions(ranks: list[int]) -> None:
    assert flat(rank_figures(torch.tensor(ranks), 12)) == pytest.approx(figures_of(ranks), abs=1e-12)


def test_what_is_never_found_has_the_last_place_in_mean_and_median() -> None:
    figures = rank_figures(torch.tensor([0, NEVER, 1]), 8)
    assert figures == RankFigures({1: 1 / 3, 5: 2 / 3, 10: 2 / 3}, 9 / 3 + 1, 2)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_or_broken_model_finds_nothing(value: float) -> None:
    gallery = RandomGallery([1] * 30, seed=7)
    gallery.image.fill_(value)
    gallery.text.fill_(value)
    result = gallery.evaluate(range(30))
    assert set(result.image_to_text.recalls.values()) | set(result.text_to_image.recalls.values()) == {0.0}
    assert (result.image_to_text.mean_rank, result.text_to_image.median_rank) == (30.0, 30)


def test_an_image_without_text_is_never_found() -> None:
    gallery = RandomGallery([1, 0, 1], seed=8, noise=0.0)
    result = gallery.evaluate(range(3))
    assert result.image_to_text.recalls[10] == pytest.approx(2 / 3)
    assert result.text_to_image.recalls[1] == 1.0


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_an_empty_gallery_is_refused(counts: list[int]) -> None:
    gallery = RandomGallery(counts, seed=9) if counts else RandomGallery([1], seed=9)
    with pytest.raises(ValueError, match="at least one image with a text"):
        gallery.evaluate(range(len(counts)))


def test_result_as_numbers() -> None:
    image_to_text = RankFigures({1: 0.25, 5: 0.5, 10: 1.0}, 3.25, 2)
    result = RetrievalResult(4, 8, image_to_text, RankFigures({1: 0.125, 5: 0.5, 10: 0.75}, 5.5, 4))
    assert result.as_dict() == {
        "images": 4,
        "texts": 8,
        "chance_R@1": 0.25,
        "image_to_text_R@1": 0.25,
        "image_to_text_R@5": 0.5,
        "image_to_text_R@10": 1.0,
        "image_to_text_mean_rank": 3.25,
        "image_to_text_median_rank": 2,
        "text_to_image_R@1": 0.125,
        "text_to_image_R@5": 0.5,
        "text_to_image_R@10": 0.75,
        "text_to_image_mean_rank": 5.5,
        "text_to_image_median_rank": 4,
    }


def test_the_table_breaks_no_cell_at_80_columns_where_all_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    best = RankFigures({1: 1.0, 5: 1.0, 10: 1.0}, 1.0, 1)
    evaluator = object.__new__(Retrieval)
    evaluator._gallery = None  # type: ignore[assignment]  # only a gallery's keys are asked for
    numbers = RetrievalResult(4, 8, best, best).as_dict() | dict.fromkeys(LEFT_OUT, 0)
    Console(width=80).print(evaluator.table({"student": numbers}, ""))
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    assert [line.split("│")[2].strip() for line in printed if "│" in line] == ["image to text", "text to image"]
