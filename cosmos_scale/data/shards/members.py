"""Which members of a sample are used, and what is wrong with them: judged by headers and texts, not by pixels."""

import os
import sys
from collections.abc import Iterable
from operator import attrgetter
from typing import IO, Any, NamedTuple

from cosmos_scale.data.decode.picture import decode_rgbx, not_read, picture_format
from cosmos_scale.data.samples.caption_keys import KNOWN_KEYS, caption_fault, caption_keys, has_text, holds_caption
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.shards.reader import (
    CLOSE,
    IMAGE_EXTENSIONS,
    JSON_THEN_TXT,
    TEXT_EXTENSIONS,
    TXT_THEN_JSON,
    parse_text,
)

# Most trailing junk after a JPEG's end marker is shorter; past it the picture is decoded to find out.
JPEG_TAIL = 4096


class ScanRules(NamedTuple):
    """What the user says of shards that are scanned.

    captions: the only json keys that count as captions; none: the known ones. last_dot: all keys end at the last dot.
    """

    captions: tuple[str, ...] = ()
    last_dot: bool = False


DEFAULT_RULES = ScanRules()


class TarMember(NamedTuple):
    """A member of a shard's tar. offset, size: of its data, in bytes.

    extension: all from the first dot on, without this dot; what follows the last dot is in lower case.
    foreign: what the member is if it is no plain file, such as a link; then it has no data.
    """

    key: str
    extension: str
    offset: int
    size: int
    foreign: str | None = None

    @property
    def by_last_dot(self) -> "TarMember":
        """The member with a key that ends at the last dot."""
        more, _, extension = self.extension.rpartition(".")
        return self._replace(key=f"{self.key}.{more}", extension=extension) if more else self

    @property
    def is_used(self) -> bool:
        """Whether the member's extension is one of a sample's."""
        return self.extension in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)


def first_of(members: list[TarMember], extensions: tuple[str, ...]) -> TarMember | None:
    """The first member with one of some extensions, which are in order of preference; plain files come first."""
    ordered = [member for extension in extensions for member in members if member.extension == extension]
    return next((member for member in ordered if member.foreign is None), ordered[0] if ordered else None)


def foreign_fault(members: Iterable[TarMember | None]) -> str | None:
    """Return which of some members is no plain file; webdataset's reader passes such members over, and so do we."""
    foreign = next((member for member in members if member is not None and member.foreign is not None), None)
    return None if foreign is None else f"not a file: its .{foreign.extension} is {foreign.foreign}"


def picture_fault(file: IO[bytes], member: TarMember) -> str | None:
    """What is wrong with a picture, judged by its first and last bytes. Decoding shows damage between them."""
    descriptor = file.fileno()
    head = os.pread(descriptor, min(12, member.size), member.offset)
    kind = picture_format(head)
    if kind is None:
        return f"{not_read(head)} picture"
    tail = min(JPEG_TAIL, member.size)
    if kind == "jpeg" and b"\xff\xd9" not in os.pread(descriptor, tail, member.offset + member.size - tail):
        try:  # without an end marker the picture is cut off, or a camera's own data follows it
            decode_rgbx(os.pread(descriptor, member.size, member.offset), sys.maxsize)
        except DamagedSample as damage:
            return f"damaged JPEG: {damage}"
    return None


class FoundText(NamedTuple):
    """Where a sample's text lies. is_named: whether its caption stands under a known key, or a key of the user's."""

    offset: int
    size: int
    kind: str
    is_named: bool = True

    @property
    def fields(self) -> tuple[int, int, str]:
        """The fields of an Entry."""
        return self.offset, self.size, self.kind


def find_text(
    file: IO[bytes], members: list[TarMember], image: TarMember, rules: ScanRules, alone: bool
) -> FoundText | str | None:
    """Return the text to read of a sample with a json, a txt or both; or what is wrong with it.

    None: a json has no caption, and where members lie elsewhere (not `alone`) a txt may be among these.

    Of both, the json alone is read if it has a caption. Otherwise the txt has the caption, and both are read where they
    lie near each other: the json may say more.
    """
    json_member, txt_member = first_of(members, ("json",)), first_of(members, ("txt",))
    member = json_member or txt_member
    assert member is not None
    document = _parsed(file, member)
    fault = document if isinstance(document, str) else _text_fault(document, member, rules)
    keys = rules.captions or KNOWN_KEYS
    # A title or another such text of the json is no caption where there is a txt.
    if json_member and (isinstance(document, str) or not any(holds_caption(key, document.get(key)) for key in keys)):
        if txt_member is None and not alone:
            return None
        words = _parsed(file, txt_member) if txt_member else ""
        if txt_member and not isinstance(words, str) and has_text(words["caption"]) and "caption" in keys:
            if holds_caption("caption", words["caption"]):
                return _span(txt_member, None if isinstance(document, str) else json_member, image)
            fault = fault and "no caption: no sentence in its txt"
    if isinstance(document, str) or fault:
        return fault
    return FoundText(member.offset, member.size, member.extension, bool(rules.captions or caption_keys(document)))


def _parsed(file: IO[bytes], member: TarMember) -> dict[str, Any] | str:
    """The document of a json or txt, or what is wrong with the member."""
    try:
        return parse_text(os.pread(file.fileno(), member.size, member.offset), member.extension)
    except DamagedSample as damage:
        return str(damage)


def _text_fault(document: dict[str, Any], member: TarMember, rules: ScanRules) -> str | None:
    # Which keys hold captions depends on the run's sampling. Without any string no sampling finds a caption.
    if not rules.captions and not holds_string(document):
        return f"empty text: no string in its {member.extension}"
    return caption_fault(document, rules.captions)


def _span(txt: TarMember, json: TarMember | None, image: TarMember) -> FoundText:
    """Where to read a txt, and a json too that lies so near that one read takes both.

    The picture may lie between txt and json: it is read with them anyway.
    """
    if json is not None:
        first, last = sorted((txt, json), key=attrgetter("offset"))
        size = last.offset + last.size - first.offset
        between = image.size if first.offset < image.offset < last.offset else 0
        if size <= first.size + last.size + between + CLOSE:
            return FoundText(first.offset, size, TXT_THEN_JSON if first is txt else JSON_THEN_TXT)
    return FoundText(txt.offset, txt.size, txt.extension)


def holds_string(document: dict[str, Any]) -> bool:
    """Tell whether any value of a document, however deep in it, is a string that is not blank."""
    values: list[Any] = [document]
    while values:  # no recursion: json may be nested deeper than Python's stack
        value = values.pop()
        if isinstance(value, str) and value.strip():
            return True
        if isinstance(value, (dict, list)):
            values.extend(value.values() if isinstance(value, dict) else value)
    return False
