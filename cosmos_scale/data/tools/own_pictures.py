"""The mark of the pictures that `data inspect` writes, so that it replaces its own pictures and nobody else's."""

from pathlib import Path

from PIL import Image

from cosmos_scale.errors import UserError

# A text field of the PNG.
MARK_FIELD, MARK = "Software", "cosmos-scale data inspect"


def refuse_foreign_picture(path: Path) -> None:
    """Raise UserError where a file is there that `data inspect` did not write."""
    if not path.is_file():
        return
    try:
        with Image.open(path) as image:
            if image.info.get(MARK_FIELD) == MARK:
                return
    except Exception:  # of any type on broken bytes
        pass
    raise UserError(f"{path}: is not a picture of `data inspect`; move it away, or name another folder with --out")
