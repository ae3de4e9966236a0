"""What a build of shards made, in lines for a terminal."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.shards.index_report import REJECTED
from cosmos_scale.data.tools.packed_picture import JPEG_QUALITY, PictureRules
from cosmos_scale.words import counted, first_frame


class BuildReport(NamedTuple):
    """What `build_shards` made; `rejected` counts rows by reason.

    transparent, turned: pictures with transparent pixels, and those whose EXIF tag says to turn them. rules: what
    became of both. animated: pictures of several frames, of which the first is packed. converted: PNG and WebP
    pictures, which became JPEG. repeated: rows whose picture an earlier row named. joined: whether their captions are
    in the sample of the earlier row. unread: rows by a column called as captions are called, whose text is not read.
    before: whether the build was finished before, so that shards and samples alone are known.
    """

    folder: Path
    shards: int
    samples: int
    rejected: Counter[str]
    transparent: int
    turned: int
    rules: PictureRules
    repeated: int
    joined: bool
    unread: Counter[str]
    animated: int
    converted: int
    before: bool = False

    def describe(self) -> str:
        """Return the report as lines for a terminal."""
        lines = [f"{counted(self.samples, 'sample')} in {counted(self.shards, 'indexed shard')} in {self.folder}"]
        if self.before:
            return f"{lines[0]}: built before, of the same files with the same options"
        if self.converted:
            pictures = counted(self.converted, "PNG or WebP picture")
            lines.append(f"{pictures} encoded as JPEG of quality {JPEG_QUALITY}")
        if self.transparent:
            background = self.rules.background
            how = "hidden colours shown" if background == KEEP else f"put on {background}"
            lines.append(f"{counted(self.transparent, 'transparent picture')}: {how} (--background)")
        if self.turned:
            them = "it" if self.turned == 1 else "them"
            upright = "turned upright (--orientation keep leaves them)"
            kept = f"with a tag that says to turn {them}, which training ignores (--orientation upright does it)"
            how = upright if self.rules.orientation == "upright" else kept
            lines.append(f"{counted(self.turned, 'picture')} {how}")
        if self.animated:
            lines.append(f"{counted(self.animated, 'animated picture')}: {first_frame(self.animated)} packed")
        if self.repeated and self.joined:
            lines.append(f"{counted(self.repeated, 'row')} joined to an earlier row's sample of the same picture")
        elif self.repeated:
            rows = counted(self.repeated, "row names", "rows name")
            lines.append(
                f"{rows} a picture that an earlier row named: each row is a sample, and retrieval counts the picture's "
                "other captions as misses (--join-rows makes one sample a picture)"
            )
        for name, times in self.unread.items():
            rows = counted(times, "row has", "rows have")
            lines.append(f"{rows} text under {name}, which is not read (--caption-column {name} reads it alone)")
        lines += [f"{counted(times, 'row')} rejected: {reason}" for reason, times in self.rejected.most_common()]
        if self.rejected:
            lines.append(f"each is named in {self.folder / REJECTED}")
        return "\n".join(lines)
