"""The picture of a folder that a row of a captions file names."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cosmos_scale.data.samples.normal_forms import OTHER_FORM, other_forms
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.reader import IMAGE_EXTENSIONS
from cosmos_scale.data.tools.near_names import near_names, other_kind
from cosmos_scale.files import name_on_disk

_EXTENSIONS = (*IMAGE_EXTENSIONS, *map(str.upper, IMAGE_EXTENSIONS))


def picture_path(images: Path, name: str) -> Path:
    """Return the picture that a row names by its path in the folder, with or without its extension.

    Links in the folder are followed. A path that leads out of the folder is refused, since a foreign file of captions
    must not pull in any picture of this machine. Raises DamagedSample.
    """
    try:
        path = _named_picture(images, name)
    except _Outside as outside:
        meant = _meant(images, name)
        raise DamagedSample(f"{outside}{f', but {meant}; change the row or --images' if meant else ''}") from outside
    if path is not None:
        return path
    folder, slash, file = name.rpartition("/")
    for place in (folder, *other_forms(folder)):
        for other in (file, *other_forms(file)):
            if (near := f"{place}{slash}{other}") != name and _named_picture(images, near) is not None:
                form = (other_forms(file) | other_forms(folder))[other if other != file else place]
                raise DamagedSample(f"picture not found: {OTHER_FORM} ({form}) is there; rename it or change the row")
    if kind := other_kind(images / name_on_disk(name)):
        raise DamagedSample(f"picture is {kind}, not a file")
    meant = _meant(images, name)
    raise DamagedSample(f"picture not found{f': {meant} is there; change the row or --images' if meant else ''}")


class _Outside(DamagedSample):
    """A path leads out of the folder of pictures."""


def _meant(images: Path, name: str) -> str | None:
    """Return the picture, by its path in the folder, that the likeliest other spelling of a name leads to."""
    for other in near_names(name):
        # Millions of rows may have no picture: few looks at the disk for each.
        if not os.path.isdir(images / name_on_disk(os.path.dirname(other))):
            continue
        has_extension = other.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        with suppress(DamagedSample):
            if (found := _named_picture(images, other, () if has_extension else _EXTENSIONS)) is not None:
                return os.path.relpath(found, images)
    return None


def _named_picture(images: Path, name: str, extensions: Sequence[str] = _EXTENSIONS) -> Path | None:
    """Return the picture of exactly this name, or of one with an extension behind it; None where there is none."""
    root = os.path.abspath(images)
    found: list[Path] = []
    for candidate in (name, *(f"{name}.{extension}" for extension in extensions)):
        path = Path(os.path.abspath(images / name_on_disk(candidate)))
        if not path.is_relative_to(root):
            raise _Outside(f"picture outside the folder: {images} does not hold it")
        try:
            if path.is_file():
                if candidate == name:
                    return path
                if not any(path.samefile(other) for other in found):  # as on disks that ignore capitals
                    found.append(path)
        except (OSError, ValueError) as error:
            # No file can have this name; one with a shorter extension may be there.
            if candidate != name and isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                continue
            raise DamagedSample(f"picture cannot be read: {error}") from error
    if len(found) > 1:
        raise DamagedSample(f"picture unclear: the name is that of {', '.join(path.name for path in found)}")
    return found[0] if found else None
