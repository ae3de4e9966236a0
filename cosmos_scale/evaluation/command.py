"""`cosmos-scale eval retrieval`: the retrieval numbers of a checkpoint, in one process."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from cosmos_scale.checkpoint import find_checkpoint, load_model, read_run_config
from cosmos_scale.config import SourceConfig
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.gallery import gallery_batches
from cosmos_scale.evaluation.retrieval import RetrievalResult, evaluate, results_table
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer


def run(
    checkpoint: Path,
    data: str,
    *,
    which: Literal["student", "teacher"],
    captions_key: str,
    batch: int,
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Print the retrieval numbers of a checkpoint as a table, or as one JSON line; see `evaluate_checkpoint`."""
    folder = find_checkpoint(checkpoint)
    result = evaluate_checkpoint(folder, data, which=which, captions_key=captions_key, batch=batch, device=device)
    if as_json:
        named = {"checkpoint": str(folder), "weights": which, "data": data, "captions": captions_key}
        print(json.dumps({**named, **result.as_dict()}))
    else:
        Console().print(results_table({which: result}, str(folder)))


def evaluate_checkpoint(
    folder: Path,
    data: str,
    *,
    which: Literal["student", "teacher"],
    captions_key: str,
    batch: int,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_samples: int | None = None,
) -> RetrievalResult:
    """Measure retrieval with a checkpoint's float32 weights over indexed shards.

    data: folder or pattern of the shards. captions_key: json key of the correct texts. batch: images at a time.
    Raises UserError where the checkpoint, the shards or the captions are missing or wrong.
    """
    config = read_run_config(folder)
    # How the run computed is of no concern here: another machine may not be able to.
    model = CosmosModel(config.model.model_copy(update={"attention": "auto", "compile": False}))
    load_model(model, folder, which)
    place = _device(device)
    model = model.to(place).eval()
    tokenizer = Tokenizer(config.model.text.context_length)

    def encode_texts(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(place))

    index = open_sources([SourceConfig(name="retrieval", shards=data)])
    image_size, max_pixels = config.model.vision.image_size, config.data.max_pixels
    batches = gallery_batches(index, captions_key, image_size, 0, 1, batch, max_samples, max_pixels)
    try:
        return evaluate(lambda images: model.encode_image(images.to(place)), encode_texts, batches, device=place)
    except ValueError as error:
        raise UserError(f"{data}: {error}") from error


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch finds no CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
