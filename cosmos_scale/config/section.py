"""What every section of the config is built from: strict keys, value types, and rules between keys."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import Self

# The marks of a key, given to its Field as json_schema_extra. A key without a mark belongs to the run's identity.
# A run that is resumed from a checkpoint may have another value of the key than the checkpoint's run had.
RESUME_MAY_CHANGE: dict[str, Any] = {"resume_may_change": True}
# The hosts of one run may have different values of the key: each host uses the key for its own work only, such as the
# path of a folder on its own disk. Such a key may also change on resume.
MAY_DIFFER_BY_HOST: dict[str, Any] = RESUME_MAY_CHANGE | {"may_differ_by_host": True}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]

# The largest numbers of any key; many keys have a smaller limit of their own. Larger whole numbers do not fit the 64
# bits that numpy and torch count in, and larger numbers are infinite in float32.
MOST_WHOLE = (1 << 63) - 1
MOST = 1e30

PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,199}")  # one path component, not hidden

_USER = re.compile(r"(://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*\?)[^\s'\"]+", re.IGNORECASE)


def redact_urls(text: str) -> str:
    """Leave user names, passwords and queries out of the URLs in a text."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))


# A path, URL or command; its secrets are left out where a configuration is written (run folder, checkpoints, trackers).
Place = Annotated[str, PlainSerializer(redact_urls, when_used="json")]


def whole_number(value: Any) -> Any:
    """Return a value, but refuse true, false and 1.0, which equal a whole number among the words of a Literal."""
    if isinstance(value, (bool, float)):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def has_mark(field: FieldInfo, mark: dict[str, Any]) -> bool:
    """Tell whether a key's field has a mark: RESUME_MAY_CHANGE or MAY_DIFFER_BY_HOST."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and mark.items() <= extra.items()


class RuleBroken(ValueError):
    """A broken rule: the dotted key below the section that checks it, the key's value, the rule, and its other keys."""

    def __init__(self, key: str, value: object, rule: str, others: Sequence[str]) -> None:
        super().__init__(f"{key}: {value} {rule}")
        self.key, self.value, self.rule, self.others = key, value, rule, tuple(others)


class Section(BaseModel):
    """A block of keys; unknown keys are refused and values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        for number in value if isinstance(value, tuple) else (value,):
            most = MOST_WHOLE if isinstance(number, int) else MOST
            if isinstance(number, (int, float)) and number > most:
                raise PydanticCustomError("less_than_equal", "Input should be less than or equal to {le}", {"le": most})
        return value

    def _check_rules(self) -> None:
        """Raise RuleBroken where keys of this section, or of sections inside it, do not go together."""

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        self._check_rules()
        return self


def refuse(key: str, value: object, rule: str, others: Sequence[str] = ()) -> NoReturn:
    """Raise RuleBroken; `others` are the other keys that the rule compares, any of which may be the wrong one."""
    raise RuleBroken(key, value, rule, others)


def check_range(key: str, value: Range, above: float, most: float = float("inf")) -> None:
    """Raise RuleBroken unless above < low <= high <= most."""
    low, high = value
    if not above < low <= high <= most:
        limits = f"{above:g} < low <= high" + (f" <= {most:g}" if most < float("inf") else "")
        refuse(key, list(value), f"must be a range [low, high] with {limits}")
