"""Retrieval against a second implementation (sorting in NumPy) and over ranks played by threads."""

import itertools
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_scale.evaluation.evaluator import Gather
from cosmos_scale.evaluation.gallery import GalleryBatch
from cosmos_scale.evaluation.retrieval import RECALL_AT, RetrievalResult, evaluate

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

    def expected(self) -> tuple[list[float], list[float]]:
        """Recall by sorting every row, in float64; features are random, so there are no ties."""
        score = self.image.double().numpy() @ self.text.double().numpy().T
        owner = self.owner.numpy()
        found_texts = [owner[np.argsort(-row)] == i for i, row in enumerate(score)]
        found_images = [np.argsort(-column) == owner[t] for t, column in enumerate(score.T)]
        return (
            [float(np.mean([hits[:k].any() for hits in found_texts])) for k in RECALL_AT],
            [float(np.mean([hits[:k].any() for hits in found_images])) for k in RECALL_AT],
        )


def in_ranks(gallery: RandomGallery, slices: Sequence[Sequence[int]]) -> list[RetrievalResult]:
    """Run every rank in a thread of its own; their gathers meet at a barrier and refuse unequal shapes."""
    world = len(slices)
    barrier = threading.Barrier(world, timeout=20)
    parts: list[Tensor] = [torch.empty(0)] * world
    results: dict[int, RetrievalResult] = {}

    def gather_of(rank: int) -> Gather:
        def gather(tensor: Tensor) -> Tensor:
            parts[rank] = tensor
            barrier.wait()
            assert len({(part.shape, part.dtype) for part in parts}) == 1
            joined = torch.cat(parts)
            barrier.wait()
            return joined

        return gather

    def run(rank: int) -> None:
        results[rank] = evaluate(
            gallery.encode_images, gallery.encode_texts, gallery.batches(slices[rank]), gather=gather_of(rank)
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


@pytest.mark.parametrize("counts", [[1] * 40, [5] * 12, [1, 3, 2, 7, 1, 4] * 5])
def test_recall_equals_sorting(counts: list[int]) -> None:
    gallery = RandomGallery(counts, seed=len(counts))
    result = evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(len(counts))))
    image_to_text, text_to_image = gallery.expected()
    assert 0.1 < image_to_text[0] < 0.9  # neither a perfect nor a hopeless gallery would tell much
    # Counts are integers: only their division in float32 differs.
    assert list(result.image_to_text.values()) == pytest.approx(image_to_text, abs=1e-6)
    assert list(result.text_to_image.values()) == pytest.approx(text_to_image, abs=1e-6)
    assert (result.images, result.texts) == (len(counts), sum(counts))


@pytest.mark.parametrize("bounds", [[0, 9, 18], [0, 5, 5, 18], [0, 18, 18], [0, 1, 2, 18]])
def test_ranks_with_uneven_slices_agree_with_one_process(bounds: list[int]) -> None:
    gallery = RandomGallery([2, 1, 3] * 6, seed=5)
    alone = evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(18)))
    slices = [range(first, last) for first, last in itertools.pairwise(bounds)]
    assert in_ranks(gallery, slices) == [alone] * len(slices)


def test_rows_are_ranked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = RandomGallery([2] * 30, seed=6)
    whole = evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(30)))
    monkeypatch.setattr("cosmos_scale.evaluation.retrieval._ROWS", 7)
    assert evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(30))) == whole


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_or_broken_model_finds_nothing(value: float) -> None:
    gallery = RandomGallery([1] * 30, seed=7)
    gallery.image.fill_(value)
    gallery.text.fill_(value)
    result = evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(30)))
    assert set(result.image_to_text.values()) | set(result.text_to_image.values()) == {0.0}


def test_an_image_without_text_is_never_found() -> None:
    gallery = RandomGallery([1, 0, 1], seed=8, noise=0.0)
    result = evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(3)))
    assert result.image_to_text[10] == pytest.approx(2 / 3)
    assert result.text_to_image[1] == 1.0


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_an_empty_gallery_is_refused(counts: list[int]) -> None:
    gallery = RandomGallery(counts, seed=9) if counts else RandomGallery([1], seed=9)
    with pytest.raises(ValueError, match="at least one image with a text"):
        evaluate(gallery.encode_images, gallery.encode_texts, gallery.batches(range(len(counts))))


def test_result_as_numbers() -> None:
    result = RetrievalResult(4, 8, {1: 0.25, 5: 0.5, 10: 1.0}, {1: 0.125, 5: 0.5, 10: 0.75})
    assert result.as_dict() == {
        "images": 4,
        "texts": 8,
        "chance_R@1": 0.25,
        "image_to_text_R@1": 0.25,
        "image_to_text_R@5": 0.5,
        "image_to_text_R@10": 1.0,
        "text_to_image_R@1": 0.125,
        "text_to_image_R@5": 0.5,
        "text_to_image_R@10": 0.75,
    }
