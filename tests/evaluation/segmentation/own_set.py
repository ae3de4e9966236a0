"""A small set of one's own: random pictures with masks, and a file of names."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cosmos_scale.config import SegmentationConfig

LINES = ["sky, wall, tree", "aeroplane", "bird", "person, person in shirt", "cat"]
SIZES = [(40, 56), (48, 72), (33, 64), (64, 33), (45, 45)]


class OwnSet:
    """A folder of five random pictures with masks, and a file of names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(7)
        self.pictures: list[npt.NDArray[np.uint8]] = []
        self.true: list[npt.NDArray[np.uint8]] = []
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        for place, (height, width) in enumerate(SIZES):
            coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
            labels = generator.integers(0, len(LINES), (height, width), dtype=np.uint8)
            labels[generator.random((height, width)) < 0.1] = 255
            Image.fromarray(picture).save(folder / "images" / f"{place}.png")
            Image.fromarray(labels).save(folder / "masks" / f"{place}.png")
            self.pictures.append(picture)
            self.true.append(labels)
        (folder / "names.txt").write_text("\n".join(LINES) + "\n")

    def section(self, **keys: Any) -> SegmentationConfig:
        places = {
            "images": self.folder / "images",
            "masks": self.folder / "masks",
            "classes": self.folder / "names.txt",
        }
        own = {key: str(path) for key, path in places.items()} | {"background": True}
        return SegmentationConfig.model_validate({"kind": "segmentation", **own, **keys})
