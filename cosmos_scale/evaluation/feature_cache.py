"""Features kept on disk between evaluations of one checkpoint, by what they were made of."""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosmos_scale.errors import UserError
from cosmos_scale.files import reason_of, whole_file

_OF = "of"  # the header's key for the whole text that the features were made of


class FeatureCache:
    """A folder with a file of tensors for each text that says what they were made of: weights, data, texts.

    A file that cannot be read counts as missing. What cannot be written is told once, and nothing else happens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told = False

    def load(self, made_of: str) -> dict[str, Tensor] | None:
        """Return the tensors that were made of the same, None where there are none."""
        path = self._path(made_of)
        if not path.is_file():  # a pipe in its place would be waited for
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get(_OF) != made_of:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def save(self, made_of: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors, in place of those that were there."""
        path = self._path(made_of)
        try:
            with _told(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            with _told(path), whole_file(path) as part:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, {_OF: made_of})
                os.chmod(part, 0o644)
        except UserError as error:
            if not self._told:
                self._told = True
                print(f"features are not kept: {error}", file=sys.stderr)

    def _path(self, made_of: str) -> Path:
        return self._folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn an error of the block into a UserError that names the path; the library's errors name none."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = reason_of(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be written: {said}; rule: mend this place, or leave out --cache") from error
