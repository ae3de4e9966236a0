"""Names that look alike and differ: Unicode writes a letter with an accent as one sign (NFC) or as two (NFD)."""

from typing import Literal, get_args
from unicodedata import normalize

OTHER_FORM = "one that differs by its Unicode form alone"
Form = Literal["NFC", "NFD"]


def other_forms(text: str) -> dict[str, Form]:
    """Return the normal forms of a text that differ from it, with their names; most texts have none."""
    forms: tuple[Form, ...] = () if text.isascii() else get_args(Form)
    return {other: form for form in forms if (other := normalize(form, text)) != text}
