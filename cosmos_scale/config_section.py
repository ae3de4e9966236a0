"""What every section of the config is built from: strict keys, value types, and rules between keys."""

from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

RESUME_MAY_CHANGE: dict[str, Any] = {"resume_may_change": True}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class RuleBroken(ValueError):
    """Keys that do not go together: the dotted key below the section that found it, its value, and the rule."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key}: {value} {rule}")
        self.key, self.value, self.rule = key, value, rule


class Section(BaseModel):
    """A block of keys; unknown keys are refused and values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def _check_rules(self) -> None:
        """Raise RuleBroken where keys of this section, or of sections inside it, do not go together."""

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        self._check_rules()
        return self


def refuse(key: str, value: object, rule: str) -> NoReturn:
    """Raise RuleBroken."""
    raise RuleBroken(key, value, rule)


def check_range(key: str, value: Range, above: float, most: float = float("inf")) -> None:
    """Raise RuleBroken unless above < low <= high <= most."""
    low, high = value
    if not above < low <= high <= most:
        limits = f"{above:g} < low <= high" + (f" <= {most:g}" if most < float("inf") else "")
        refuse(key, list(value), f"must be a range [low, high] with {limits}")
