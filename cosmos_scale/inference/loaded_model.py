"""The model of a checkpoint in Python, over the evaluation's own functions."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from cosmos_scale.checkpoint.interchange.reading import of_newest
from cosmos_scale.checkpoint.interchange.weights import Activation, Which
from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.ahead import prepared_blocks
from cosmos_scale.evaluation.attention_maps import (
    attention_maps,
    encode_pairs,
    levels_of,
    require_heads,
    word_weights,
)
from cosmos_scale.evaluation.evaluator import Encoder, one_process
from cosmos_scale.evaluation.loading import load_encoder, models_of
from cosmos_scale.evaluation.prompts.texts import DEFAULT_TEMPLATES, Names, imagenet_templates
from cosmos_scale.evaluation.segmentation.segmenter import encode_queries, segment, usual_recipe
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.files import reason_of
from cosmos_scale.inference.inputs import (
    ClassNames,
    PictureLike,
    checked_templates,
    checked_texts,
    class_names,
    expanded,
    listed_pictures,
    pixels_of,
    title_of,
    upright_pixels_of,
)
from cosmos_scale.inference.results import CaptionAttention, ClassifiedPictures, SegmentedPicture
from cosmos_scale.inference.torch_state import usual_torch
from cosmos_scale.inference.users_encoder import UsersEncoder
from cosmos_scale.words import with_article

_ACTIVATIONS = 2**29  # bytes that the activations of a batch may take on the CPU; on CUDA an eighth of what is free
_LARGEST_BATCH = 256
_KEPT_ALIVE = 24  # tensors of a block's width that the process grows by for each input, as measured on a CPU
_REMEMBERED = 16  # lists of classes whose text features are kept


class LoadedModel:
    """A student or a teacher, with float32 weights, that encodes, classifies, segments and explains.

    Every tensor that a method returns is on the CPU, without a graph. The batch size is chosen by the model's size and
    the memory. Wrong arguments raise UserError, one line. encoder: for what the methods do not give, such as pictures
    that are prepared already. which: student or teacher, or `model`, the one model of a public checkpoint.
    """

    def __init__(self, encoder: Encoder, checkpoint: Path, which: str) -> None:
        self.encoder, self.checkpoint, self.which = UsersEncoder.of(encoder), checkpoint, which
        # Of the encoder alone: bound methods would tie a knot that keeps the weights until garbage is collected.
        remember = lru_cache(maxsize=_REMEMBERED)
        self._class_features: Callable[[Names, tuple[str, ...]], Tensor] = remember(
            partial(text_weights, encoder, gather=one_process)
        )
        self._queries = remember(partial(encode_queries, encoder, gather=one_process))

    def __reduce__(self) -> tuple[type["LoadedModel"], tuple[Encoder, Path, str]]:
        """What pickle and copy take: all but the remembered features, so that other processes can be given a model."""
        return LoadedModel, (self.encoder, self.checkpoint, self.which)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.encoder.setting.device

    @property
    def image_size(self) -> int:
        """The side in pixels of the square that the model sees of a picture."""
        return self.encoder.setting.image_size

    @property
    def embed_dim(self) -> int:
        """The width E of the features."""
        return self.encoder.model.visual.proj.shape[1]

    @property
    def logit_scale(self) -> float:
        """The factor of cosines that the model was trained with."""
        return float(self.encoder.model.logit_scale.detach().exp())

    @property
    def has_heads(self) -> bool:
        """Whether there are cross-modality heads, which attention maps need."""
        return self.encoder.has_heads

    @property
    def notes(self) -> tuple[str, ...]:
        """What a public checkpoint is, and what was assumed of it; each on one line."""
        return self.encoder.notes

    def __repr__(self) -> str:
        """What was loaded, from where, its sizes, and what was assumed."""
        patch = self.encoder.model.visual.conv1.patch_size
        sizes = f"pictures of {self.image_size} pixels in patches of {patch}, features of {self.embed_dim}"
        return "\n  ".join([f"{self.which} of {self.checkpoint}", f"on {self.device}; {sizes}", *self.notes])

    @usual_torch()
    @torch.no_grad()
    def encode_image(self, images: Iterable[PictureLike] | Tensor) -> Tensor:
        """Return the features of N pictures, of length 1: [N, E] float32.

        images: paths, PIL pictures, or uint8 tensors [3, H, W] of RGB, mixed or not; or one tensor [N, 3, H, W]. The
        shorter side is resized to image_size (bicubic, antialiased), and the centre is cut out. EXIF is ignored.
        """
        pictures = listed_pictures(images)
        patch, size = self.encoder.model.visual.conv1.patch_size, self.image_size
        batch = self._batch_size((size // patch) ** 2 + 1, self.encoder.model.visual.proj.shape[0])
        features = []
        blocks = prepared_blocks(partial(self._begin, pictures), range(len(pictures)), batch, world_size=1)
        for block in blocks:
            images_BCHW = torch.stack([image for _, image in block if isinstance(image, Tensor)])
            features.append(self.encoder.images(images_BCHW).float().cpu())
        return torch.cat(features)

    def _begin(self, pictures: Sequence[PictureLike], place: int) -> Callable[[], Tensor]:
        """Return what prepares a picture in a thread; PIL pictures are read here: one may be in a list twice."""
        picture, where = pictures[place], _where("images", pictures[place], place)
        if isinstance(picture, (str, os.PathLike)):
            return lambda: self._crop(picture, where)
        image = self._crop(picture, where)
        return lambda: image

    def _crop(self, picture: PictureLike, where: str) -> Tensor:
        return evaluation_crop(pixels_of(picture, where, self.encoder.setting), self.image_size)

    @usual_torch()
    @torch.no_grad()
    def encode_text(self, texts: Iterable[str]) -> Tensor:
        """Return the features of N texts, of length 1: [N, E] float32; of a long text the first tokens count."""
        listed = checked_texts("texts", texts)
        model = self.encoder.model
        batch = self._batch_size(self.encoder.setting.tokenizer.context_length, model.text_projection.shape[0])
        parts = [listed[first : first + batch] for first in range(0, len(listed), batch)]
        return torch.cat([self.encoder.texts(part).float().cpu() for part in parts])

    @usual_torch()
    @torch.no_grad()
    def classify(
        self,
        images: Iterable[PictureLike] | Tensor,
        classes: Iterable[ClassNames],
        *,
        templates: Iterable[str] = DEFAULT_TEMPLATES,
    ) -> ClassifiedPictures:
        """Return how like each picture is to each class, zero-shot, as `cosmos-scale eval classification` measures.

        images: as in `encode_image`. classes: a name each, or names. templates: sentences with {} for the name; a class
        is the mean of the features of all its sentences.
        """
        names, filled = class_names(classes), checked_templates(templates)
        pictures = listed_pictures(images)
        features_CE = self._class_features(names, filled).cpu()
        cosines_NC = self.encode_image(pictures) @ features_CE.T
        titles = tuple(title_of(picture, place) for place, picture in enumerate(pictures))
        probabilities_NC = (self.logit_scale * cosines_NC).softmax(1)
        return ClassifiedPictures(titles, tuple(title for title, *_ in names), cosines_NC, probabilities_NC)

    @usual_torch()
    @torch.no_grad()
    def segment(
        self,
        image: PictureLike,
        classes: Iterable[ClassNames],
        *,
        templates: Iterable[str] | None = None,
        csa: bool = False,
        prob_threshold: float = 0.0,
    ) -> SegmentedPicture:
        """Return the class of each pixel, zero-shot, as `cosmos-scale eval segmentation` does with own pictures.

        image: as in `encode_image`; a file is turned as its EXIF says. classes: a name each, or names, the likest of
        which counts. templates: None: ImageNet's 80. csa: correlative self-attention in the last block.
        prob_threshold: a pixel whose best class is less probable gets class 0, which should then be the background.
        """
        names = class_names(classes)
        filled = checked_templates(imagenet_templates() if templates is None else templates)
        if not isinstance(prob_threshold, (int, float)) or not 0 <= prob_threshold <= 1:
            raise UserError(f"prob_threshold: {prob_threshold}; rule: from 0 to 1")
        where = _where("image", image, None)
        pixels = upright_pixels_of(image, where, self.encoder.setting)
        tower, size = self.encoder.model.visual, self.image_size
        windows = self._batch_size((size // tower.conv1.patch_size) ** 2 + 1, tower.proj.shape[0])
        recipe = usual_recipe(size)._replace(csa=csa, prob_threshold=prob_threshold, batch=windows)
        try:
            labels_HW = segment(tower, pixels, self._queries(names, filled), recipe)
        except DamagedSample as damage:
            raise UserError(f"{where}: {damage}") from damage
        return SegmentedPicture(title_of(image, None), tuple(title for title, *_ in names), labels_HW.cpu())

    @usual_torch()
    @torch.no_grad()
    def attention_maps(self, image: PictureLike, caption: str) -> CaptionAttention:
        """Return where the caption looks in the picture, and which of its words the picture looks at.

        image: as in `encode_image`. Raises UserError too where the model has no cross-modality heads.
        """
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"caption: {caption!r}; rule: a text")
        model, setting = self.encoder.model, self.encoder.setting
        require_heads(model, str(self.checkpoint))
        crop_CHW = self._crop(image, _where("image", image, None))
        ids = setting.tokenizer([caption])
        (pair,) = encode_pairs(model, crop_CHW[None].to(self.device), ids.to(self.device))
        maps = attention_maps(model, pair, self.image_size // model.visual.conv1.patch_size)
        words = tuple(word_weights(caption, maps, setting.tokenizer))
        return CaptionAttention(title_of(image, None), caption, levels_of(crop_CHW), maps, words)

    def _batch_size(self, tokens: int, width: int) -> int:
        """Return how many inputs of some tokens a batch may have, by the memory of a block's activations."""
        memory = _ACTIVATIONS
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0] // 8
        of_one = _KEPT_ALIVE * tokens * width * torch.float32.itemsize
        return max(1, min(_LARGEST_BATCH, memory // of_one))


@usual_torch()
def load(
    checkpoint: str | os.PathLike[str],
    which: Which = "teacher",
    device: str | torch.device = "auto",
    *,
    activation: Activation | None = None,
) -> LoadedModel:
    """Load one model of a checkpoint.

    checkpoint: a run's folder (its newest checkpoint counts) or one of its step-N folders; or a public checkpoint: a
    COSMOS .pt, weights or a folder of OpenCLIP, a folder of Hugging Face's CLIPModel. which: the teacher, which is the
    one to use after training, or the student, which is the default of `convert` and `eval`; without meaning where there
    is one model. device: auto (CUDA where there is a device), cpu, cuda or cuda:N. activation: of public weights that
    do not tell theirs; warns of what is assumed, and where the run deletes its newest checkpoint while it is read: then
    the next one is taken.
    Raises UserError where there is no such checkpoint or device.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise UserError(
            f"checkpoint: {with_article(type(checkpoint).__name__)}; rule: the path of a run or a checkpoint"
        )
    choices_of = {"which": (which, get_args(Which)), "activation": (activation, (*get_args(Activation), None))}
    for argument, (value, choices) in choices_of.items():
        if value not in choices:
            raise UserError(f"{argument}: {value!r}; rule: {' or '.join(map(str, choices))}")
    place = _found_device(device)

    def read(found: Path) -> tuple[Path, str, Encoder]:
        ((name, of_file),) = models_of(found, which).items()
        return found, name, load_encoder(found, of_file, place, activation)

    said: list[str] = []
    found, name, encoder = of_newest(_possible_path(checkpoint), read, said.append)
    for line in said:
        warnings.warn(line, stacklevel=3)  # the caller of the function in its context
    encoder.model.requires_grad_(requires_grad=False)
    if encoder.notes[1:]:  # the first says what the file is
        warnings.warn(f"{found}: {'; '.join(encoder.notes)}", stacklevel=3)  # the caller of the function in its context
    return LoadedModel(encoder, found, name)


def _possible_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the path of a checkpoint, which may be absent; raises UserError where no file can have it."""
    try:
        path = expanded(checkpoint, "checkpoint")
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what is no UTF-8
        said = reason_of(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"checkpoint: {os.fspath(checkpoint)!a}: {said}") from error
    return path


def _found_device(device: str | torch.device) -> torch.device | Literal["auto"]:
    """Return a device that is there, or auto; raises UserError."""
    rule = "rule: auto, cpu, cuda or cuda:N"
    if device == "auto":
        return "auto"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device: {device!r}; {rule}") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"device: {device!r}; {rule}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device!r}: torch finds {torch.cuda.device_count()} CUDA devices; {rule}")
    return found


def _where(argument: str, picture: PictureLike, place: int | None) -> str:
    """Return how an error names a picture: its argument, its place in a list, and its path."""
    named = argument if place is None else f"{argument}: number {place}"
    return f"{named}: {os.fspath(picture)}" if isinstance(picture, (str, os.PathLike)) else named
