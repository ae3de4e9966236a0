"""The files of an export: what each holds, and how it is written, with its progress told."""

import io
import json
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

Advance = Callable[[int], None]
"""Told of each piece of work how many bytes it was."""

_PIECE = 1 << 24  # bytes written at once, between two steps of a progress bar


class ExportedFile(NamedTuple):
    """A file of an export that is not written yet. size: its bytes; of a .pt file those of its tensors."""

    name: str
    size: int
    write: Callable[[IO[bytes]], object]


def text_file(name: str, text: str) -> ExportedFile:
    """Return a text file in UTF-8. Bytes of a path that are none become codes: the card names paths."""
    data = text.encode(errors="backslashreplace")
    return ExportedFile(name, len(data), lambda file: file.write(data))


def json_file(name: str, content: Mapping[str, Any]) -> ExportedFile:
    """Return a JSON file, one key a line."""
    return text_file(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def safetensors_file(name: str, tensors: Mapping[str, Tensor]) -> ExportedFile:
    """Return a safetensors file of float32 CPU tensors of any shapes.

    Its metadata says that the tensors come from torch: transformers asks for that.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        entries[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            # The format is little-endian, and so is every machine that torch runs on.
            data = tensor.detach().contiguous().reshape(-1).numpy().data.cast("B")
            for start in range(0, len(data), _PIECE):
                file.write(data[start : start + _PIECE])

    return ExportedFile(name, 8 + len(header) + end, write)


def torch_file(name: str, content: Mapping[str, Any]) -> ExportedFile:
    """Return a file of torch.save; content: plain data, and dicts of tensors."""
    dicts = [value for value in content.values() if isinstance(value, dict)]
    size = sum(tensor.nbytes for tensors in dicts for tensor in tensors.values())
    return ExportedFile(name, size, lambda file: torch.save(content, file))


class ToldFile(io.RawIOBase):
    """A file to write to that tells how many bytes it has taken."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        super().__init__()
        self._file, self._advance = file, advance

    def writable(self) -> bool:
        """Whether it can be written to: yes."""
        return True

    def write(self, data: Any) -> int:
        """Write bytes, all of them; raises OSError."""
        written = self._file.write(data)
        self._advance(written)
        return written
