"""What a loaded model takes: pictures in three forms, classes by their names, templates; all else is refused."""

import os
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosmos_scale.config.paths import expand_path
from cosmos_scale.data.decode.picture import Pixels, rgbx_of
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.pictures import PlacedFile, placed_pixels
from cosmos_scale.evaluation.evaluator import Setting
from cosmos_scale.evaluation.prompts.texts import Names
from cosmos_scale.evaluation.segmentation.pixels import decode_upright
from cosmos_scale.files import read_regular, reason_of
from cosmos_scale.words import with_article

PictureLike = str | os.PathLike[str] | Image.Image | Tensor
"""The path of a JPEG, PNG or WebP; a PIL picture; or RGB as a uint8 tensor [3, H, W] on any device. Of any size."""

ClassNames = str | Sequence[str]
"""A class: its name, or its names, of which the first stands for it in results."""

_FORMS = "rule: a path, a PIL picture, or a uint8 tensor [3, H, W] of RGB"


def listed_pictures(images: object) -> list[PictureLike]:
    """Return pictures as a list; raises UserError for one picture alone, for none, and for what is no list.

    images: any iterable, or a tensor [N, 3, H, W]. What is in it is looked at when it is read. So an iterator that
    gives one object again and again, with other pixels each time, is refused: all its pictures would be the last one.
    """
    batch = isinstance(images, Tensor) and images.ndim == 4
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or (isinstance(images, Tensor) and not batch):
        raise UserError(f"images: {_kind(images)} alone; rule: a list of pictures, or a tensor [N, 3, H, W]")
    pictures = _listed("images", images, "pictures")
    if not pictures:
        raise UserError("images: an empty list; rule: one picture or more")
    if not isinstance(images, Sized):
        _refuse_one_object(pictures)
    return pictures


def _refuse_one_object(pictures: Sequence[PictureLike]) -> None:
    """Raise UserError where two pictures have the same pixels in memory, as the frames of ImageSequence.Iterator."""
    first_places: dict[tuple[type, int], int] = {}
    for place, picture in enumerate(pictures):
        if isinstance(picture, (Image.Image, Tensor)):
            where = picture.data_ptr() if isinstance(picture, Tensor) else id(picture)
            first = first_places.setdefault((type(picture), where), place)
            if first != place:
                copies = "a list, or copies: (frame.copy() for frame in frames), a tensor's clone()"
                raise UserError(f"images: pictures {first} and {place} are one object, which changes; rule: {copies}")


def require_prepared(images: object, patch: int) -> None:
    """Raise UserError where pictures that a user's own code has prepared are none that an image tower takes whole.

    patch: the side of a patch. The tower would leave out, without a word, what of a picture is no whole patch.
    """
    given = _kind(images) if isinstance(images, Tensor) else with_article(type(images).__name__)
    if isinstance(images, Tensor) and (images.is_floating_point() or images.dtype == torch.uint8):
        whole = images.ndim == 4 and all(side and not side % patch for side in images.shape[2:])
        if whole and images.shape[1] == 3:
            return
    rule = f"rule: a float32 tensor [N, 3, H, W], H and W multiples of the patch's {patch} pixels"
    raise UserError(f"images: {given}; {rule}")


def expanded(path: str | os.PathLike[str], where: str) -> Path:
    """Return a path with the home folder and variables filled in, as in every path of a config or a command.

    where: names the path in the UserError that is raised where they are not known, or where it is no path at all.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(text, str):
        raise UserError(f"{where}: {with_article(type(text).__name__)}; rule: a path, as a text or a Path")
    try:
        return Path(expand_path(text))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def title_of(picture: PictureLike, place: int | None) -> str:
    """Return what a picture is called: its path, its place in a list, or its kind."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    return _kind(picture) if place is None else f"picture {place}"


def pixels_of(picture: PictureLike, where: str, setting: Setting) -> Pixels:
    """Return a picture as evaluation sees it: [H, W, 4] uint8, RGB and a channel without meaning; EXIF is ignored.

    where: names the picture in the UserError that is raised where it cannot be used.
    """
    try:
        if isinstance(picture, (str, os.PathLike)):
            return placed_pixels(PlacedFile(str(expanded(picture, where)), os.fspath(picture)), setting)
        return _levels(picture, setting.background)
    except (DamagedSample, ValueError) as damage:  # ValueError: a path with a NUL in it
        raise UserError(f"{where}: {damage}") from damage


def upright_pixels_of(picture: PictureLike, where: str, setting: Setting) -> Pixels:
    """Return a picture as segmentation sees it: [H, W, 3] uint8; a file is turned as its EXIF orientation says.

    PIL pictures and tensors stay as they are, so that labels fit them. Raises UserError, as `pixels_of`.
    """
    if not isinstance(picture, (str, os.PathLike)):
        return np.ascontiguousarray(pixels_of(picture, where, setting)[..., :3])
    try:
        return decode_upright(read_regular(expanded(picture, where)), setting.max_pixels, setting.background)
    except OSError as error:
        raise UserError(f"{where}: the picture cannot be read: {reason_of(error)}") from error
    except (DamagedSample, ValueError) as damage:
        raise UserError(f"{where}: {damage}") from damage


def _levels(picture: object, background: str) -> Pixels:
    """Return the levels of a PIL picture or a tensor, as `pixels_of`; raises DamagedSample."""
    if isinstance(picture, Image.Image):
        if not (picture.width and picture.height):
            raise DamagedSample(f"{_kind(picture)} has no pixel; {_FORMS}")
        if picture.mode in ("F", "I"):
            raise DamagedSample(f"a PIL picture of mode {picture.mode}, whose range is not known; {_FORMS}")
        try:
            return rgbx_of(picture, background)
        except Exception as error:  # of any type, as Pillow reads its file only now
            said = str(error) or "its file is closed, or it cannot be read"  # Pillow asserts so, without a word
            raise DamagedSample(f"the picture does not decode: {said}") from error
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3 and len(picture) == 3:
        if not picture.numel():
            raise DamagedSample(f"{_kind(picture)} has no pixel; {_FORMS}")
        levels = picture.detach().cpu().permute(1, 2, 0)
        return np.ascontiguousarray(torch.cat([levels, levels[..., :1]], dim=2).numpy())
    raise DamagedSample(f"{_kind(picture)}; {_FORMS}")


def class_names(classes: object) -> Names:
    """Return the names of each class; raises UserError where there is none, an empty name, or one class twice."""
    rule = 'rule: a list such as ["cat", "dog"], of names or of lists of names'
    if isinstance(classes, (str, bytes)):
        raise UserError(f"classes: {classes!r} alone; {rule}")
    names: list[tuple[str, ...]] = []
    for place, given in enumerate(_listed("classes", classes, "names")):
        several = [given] if isinstance(given, str) else given
        if not isinstance(several, (list, tuple)) or not several:
            raise UserError(f"classes: number {place} is {given!r}; {rule}")
        for name in several:
            if not isinstance(name, str) or not name.strip() or "\0" in name:
                raise UserError(f"classes: number {place} has the name {name!r}; {rule}")
        names.append(tuple(several))
    if not names:
        raise UserError(f"classes: an empty list; {rule}")
    first_places: dict[str, int] = {}
    for place, (title, *_) in enumerate(names):
        first = first_places.setdefault(title, place)
        if first != place:
            raise UserError(f"classes: {title!r} twice, numbers {first} and {place}; rule: each class once")
    return tuple(names)


def checked_templates(templates: object) -> tuple[str, ...]:
    """Return templates with {} for the name, which may also be {c}; raises UserError where one has no such place."""
    rule = 'rule: a list such as ["a photo of a {}."]'
    if isinstance(templates, (str, bytes)):
        raise UserError(f"templates: {templates!r} alone; {rule}")
    checked = checked_texts("templates", templates)
    written = [template.replace("{c}", "{}") for template in checked]
    for place, template in enumerate(written):
        if "{}" not in template or "\0" in template:
            what = "holds a NUL" if "{}" in template else "has no place for the name"
            raise UserError(f"templates: number {place}, {template!r}, {what}; {rule}")
    return tuple(written)


def checked_texts(what: str, texts: object) -> list[str]:
    """Return a list of texts, one or more; raises UserError for anything else; what: their name in the error."""
    if isinstance(texts, (str, bytes)):
        raise UserError(f"{what}: {texts!r} alone; rule: a list of texts")
    checked = []
    for place, text in enumerate(_listed(what, texts, "texts")):
        if not isinstance(text, str):
            raise UserError(f"{what}: number {place} is {with_article(type(text).__name__)}; rule: a list of texts")
        checked.append(text)
    if not checked:
        raise UserError(f"{what}: an empty list; rule: one text or more")
    return checked


def _listed(what: str, given: object, of: str) -> list[Any]:
    # A table of pandas is an iterable of its columns' names.
    if isinstance(given, Mapping) or hasattr(given, "columns") or not isinstance(given, Iterable):
        raise UserError(f"{what}: {with_article(type(given).__name__)}; rule: a list of {of}")
    return list(given)


def _kind(picture: object) -> str:
    """Return in a few words what was given as a picture."""
    if isinstance(picture, Tensor):
        return f"{with_article(str(picture.dtype).removeprefix('torch.'))} tensor {list(picture.shape)}"
    if isinstance(picture, Image.Image):
        return f"a PIL picture of {picture.width} x {picture.height} pixels"
    if isinstance(picture, (str, os.PathLike)):
        return f"the path {str(picture)!r}"
    hint = " (Image.fromarray makes it a PIL picture)" if isinstance(picture, np.ndarray) else ""
    return f"{with_article(type(picture).__name__)}{hint}"
