"""What a row of a captions file may have meant, where no picture has its name: for the reason of its reject."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from cosmos_scale.files import kind_of_file

_NUMBER = re.compile(r"(?P<folders>(?:.*/)?)(?P<digits>[0-9]+)(?:\.0)?(?P<extension>(?:\.[A-Za-z]+)?)")
_EXTENSION = re.compile(r"\.[A-Za-z]{1,5}$")
_MOST_DIGITS = 12  # of a number with zeros before it, as in 000000391895.jpg of COCO


def near_names(name: str) -> Iterator[str]:
    """Yield other spellings of a picture's path, the likeliest first.

    Blanks at the ends are left out (`a.csv, b`), backslashes are those of Windows, %20 is a URL's blank, a URL may be
    of a downloaded file, and a path may start from a folder above the folder of pictures. A number's zeros are lost to
    programs that read it as one, such as a spreadsheet; such a program may also have written 1 as 1.0. A picture may
    have been converted, or its extension's capitals may be lost.
    """
    seen = {name, ""}
    plain = name.strip().replace("\\", "/")
    for spelling in (plain, unquote(plain)):
        folders = spelling.split("/")
        for first in range(len(folders)):
            whole = "/".join(folders[first:])
            for other in (whole, _EXTENSION.sub("", whole)):
                if other not in seen:
                    seen.add(other)
                    yield other
    if number := _NUMBER.fullmatch(plain):
        padded = (f"{number['folders']}{int(number['digits']):0{width}}" for width in range(1, _MOST_DIGITS + 1))
        endings = [number["extension"]] if number["extension"] else [".jpg", ".png"]
        yield from (f"{one}{ending}" for one in dict.fromkeys(padded) for ending in endings)


def other_kind(path: Path) -> str:
    """Return what lies at a path where no regular file does, such as "a folder"; empty where there is nothing."""
    return (kind_of_file(path) or "a link to what is not there") if os.path.lexists(path) else ""
