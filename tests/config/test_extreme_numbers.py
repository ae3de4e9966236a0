"""Every number of the config at its extremes: refused in one line, or a value that fits what computes with it."""

import math
from typing import Any, get_args, get_origin

import numpy as np
import pytest

from cosmos_scale.config.keys import sections
from cosmos_scale.config.load import make_config
from cosmos_scale.errors import UserError

NEVER = [".nan", ".inf", "-.inf", "-1", "1e300", str(10**20)]

# Keys whose largest sensible value is 10**20 still: numbers of the optimizer, in float32.
UNBOUNDED = {"optimizer.lr", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_norm"}


def _numbers(annotation: Any) -> list[type]:
    """The types of number that a value, or an element of a pair, may have."""
    if annotation in (int, float):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [kind for part in get_args(annotation) for kind in _numbers(part)]


def _number_keys() -> list[tuple[str, bool]]:
    """All dotted keys that take a number, and whether each takes a pair."""
    found = []
    for section in sections():
        for name, field in section.type.model_fields.items():
            if _numbers(field.annotation):
                found.append((section.key(name), get_origin(field.annotation) is tuple))
    return found


def _tree() -> dict[str, Any]:
    source = {"name": "a", "shards": "a"}
    evaluator = {"kind": "retrieval", "name": "b", "shards": "b"}
    return {"data": {"sources": [source]}, "eval": [evaluator]}


@pytest.mark.parametrize("value", NEVER)
@pytest.mark.parametrize(("key", "is_pair"), _number_keys(), ids=lambda part: str(part))
def test_an_extreme_number_is_refused_in_one_line(key: str, is_pair: bool, value: str) -> None:
    if value == str(10**20) and key in UNBOUNDED:
        make_config(_tree(), [f"{key}={value}"])
        return
    dotted = key.replace(".N", ".0")
    with pytest.raises(UserError) as refusal:
        make_config(_tree(), [f"{dotted}={f'[{value}, {value}]' if is_pair else value}"])
    said = str(refusal.value)
    assert "\n" not in said
    assert dotted in said, "the line names the key"


def test_the_generic_test_sees_all_numbers() -> None:
    keys = {key for key, _ in _number_keys()}
    assert {"seed", "train.max_steps", "data.window", "data.sources.N.weight", "data.views.blur.radius"} <= keys
    assert len(keys) > 60


@pytest.mark.parametrize("key", sorted(UNBOUNDED))
def test_the_largest_number_of_the_optimizer_is_finite_in_float32(key: str) -> None:
    tree = make_config(_tree(), [f"{key}=1e30"]).model_dump()
    section, name = key.split(".")
    assert math.isfinite(np.float32(tree[section][name]))
    with pytest.raises(UserError, match=key):
        make_config(_tree(), [f"{key}=1e31"])


@pytest.mark.parametrize("override", ["data.workers=100000", "data.views.local_size=16000", f"data.window={10**14}"])
def test_what_no_launch_could_take_is_refused(override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=f"{key}: {value} should be less than or equal to"):
        make_config(_tree(), [override])
