"""Which keys may change on resume or differ by host: every key of the config, changed alone, is named or marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import changed_on_resume, different_between_hosts
from cosmos_scale.config.keys import valid_keys, with_positions_named
from cosmos_scale.config.load import load_config

# Every section is there, so that each key can be changed.
WHOLE = {
    "data": {"sources": [{"name": "a", "shards": "x"}, {"name": "b", "shards": "y"}]},
    "eval": [
        {"kind": "retrieval", "every": 5, "shards": "held"},
        {"kind": "classification", "every": 5, "data": "pictures"},
        {"kind": "segmentation", "every": 5, "dataset": "voc20", "data": "VOC2012"},
    ],
    "log": {"wandb": {}},
}
MAY_DIFFER_BY_HOST = {
    "data.sources.N.shards",
    "data.sources.N.index",
    "data.remote.fetch",
    "data.remote.cache",
    "data.remote.cache_gb",
    "data.remote.retries",
    "data.remote.backoff_s",
    "data.remote.timeout_s",
    "data.remote.lowest_speed",
    "data.dali.threads",
    "data.dali.prefetch",
    "data.dali.hw_decoder_load",
    "data.dali.preallocate_width",
    "data.dali.preallocate_height",
    "data.workers",
    "data.prefetch",
    "eval.N.shards",
    "eval.N.index",
    "eval.N.data",
    "eval.N.classes",
    "eval.N.templates",
    "eval.N.images",
    "eval.N.masks",
    "eval.N.split",
}
MAY_CHANGE_ON_RESUME = MAY_DIFFER_BY_HOST | {
    "output",
    "device",
    "kernels",
    "non_finite",
    "resume",
    "init_from",
    "init_heads",
    "model.attention",
    "model.compile",
    "model.token_multiple",
    "data.samples",
    "data.max_damaged",
    "data.max_pixels",
    "train.micro_batches",
    "train.recompute",
    "train.teacher_graph",
    "train.watchdog_seconds",
    "train.max_steps",
    "train.max_minutes",
    "zero.stage",
    "zero.offload",
    "zero.gradient_dtype",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.failures",
    "checkpoint.at_start",
    "eval",
    "eval.N.kind",
    "eval.N.name",
    "eval.N.every",
    "eval.N.captions",
    "eval.N.max_samples",
    "eval.N.dataset",
    "eval.N.names",
    "eval.N.confusions",
    "eval.N.batch",
    "eval.N.reduce_zero",
    "eval.N.background",
    "eval.N.csa",
    "eval.N.short_side",
    "eval.N.crop",
    "eval.N.stride",
    "eval.N.logit_scale",
    "eval.N.prob_threshold",
    "eval.N.area_threshold",
    "eval.N.pamr_steps",
    "eval.N.pamr_dilations",
    "eval.N.per_class",
    "eval.N.overlays",
    "log.every",
    "log.tensorboard",
    "log.wandb",
    "log.wandb.project",
    "log.wandb.mode",
    "log.level",
    "log.progress",
}


def keys_of(value: Any, key: str = "") -> list[str]:
    """All keys of a config that hold no keys themselves; positions in lists are numbers."""
    if isinstance(value, BaseModel):
        parts = {f"{key}.{name}" if key else name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        parts = {f"{key}.{position}": item for position, item in enumerate(value)}
    else:
        return [key]
    return [inner for name, part in parts.items() for inner in keys_of(part, name)]


def changed(value: Any, names: list[str], new: object) -> Any:
    """A copy of a section or list with another value of one key; no rule is checked, so any value will do."""
    if not names:
        return new
    if isinstance(value, tuple):
        position = int(names[0])
        return (*value[:position], changed(value[position], names[1:], new), *value[position + 1 :])
    return value.model_copy(update={names[0]: changed(getattr(value, names[0]), names[1:], new)})


def whole() -> RunConfig:
    return RunConfig.model_validate(WHOLE)


def test_the_whole_config_has_every_key() -> None:
    leaves = {with_positions_named(key) for key in keys_of(whole())}
    sections = {key for key in valid_keys() if any(leaf.startswith(f"{key}.") for leaf in leaves)}
    assert leaves | sections == set(valid_keys())


@pytest.mark.parametrize("key", keys_of(whole()))
def test_every_key_is_marked_or_named(key: str) -> None:
    config = whole()
    other = changed(config, key.split("."), object())
    name = with_positions_named(key)
    assert different_between_hosts(config, other) == ([] if name in MAY_DIFFER_BY_HOST else [key])
    assert [difference.key for difference in changed_on_resume(config, other)] == (
        [] if name in MAY_CHANGE_ON_RESUME else [key]
    )


def test_a_section_or_source_that_one_host_lacks_is_named() -> None:
    config = whole()
    for key, value in (("eval", ()), ("log.wandb", None), ("data.sources", config.data.sources[:1])):
        assert different_between_hosts(config, changed(config, key.split("."), value)) == [key]


def test_of_two_kinds_of_section_the_place_is_named() -> None:
    config = whole()
    other = changed(config, ["data", "sources", "1"], config.data.views)
    assert different_between_hosts(config, other) == ["data.sources.1"]
    assert different_between_hosts(other, config) == ["data.sources.1"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {epochs: 4, global_batch: 8}\n"
        "data: {sources: [{name: a, shards: x}, {name: b, shards: y}], views: {flip: 0.1}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ([], []),
        (["output=elsewhere", "data.workers=3", "log.every=1", "train.max_steps=7", "device=cpu"], []),
        (["data.sources.0.shards=moved", "data.sources.1.index=other"], []),
        (["eval.every=5", "eval.retrieval.shards=held"], []),
        (["non_finite=skip", "data.samples=640"], []),
        (["seed=1"], ["seed"]),
        (["optimizer.lr=1", "train.global_batch=16"], ["train.global_batch", "optimizer.lr"]),
        (["optimizer.betas=[0.5, 0.5]", "data.views.ratio=[1, 1]"], ["data.views.ratio", "optimizer.betas"]),
        (["data.sources.1.name=c"], ["data.sources.1.name"]),
        (["data.sources=[{name: a, shards: x}]"], ["data.sources"]),
        (["model.vision.layers=3"], ["model.vision.layers"]),
    ],
)
def test_only_marked_keys_may_change_on_resume(run: Path, overrides: list[str], changed: list[str]) -> None:
    found = changed_on_resume(load_config(run), load_config(run, overrides))
    assert [difference.key for difference in found] == changed


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.lr=0.002"], "optimizer.lr: 0.002, was 0.0005"),
        (["data.views.ratio=[1, 1]"], "data.views.ratio: [1.0, 1.0], was [0.75, 1.3333333333333333]"),
        (["train.schedule_steps=9000"], "train.schedule_steps: 9000, was null"),
        (["precision=fp32"], "precision: fp32, was bf16"),
    ],
)
def test_a_difference_shows_both_values(run: Path, overrides: list[str], said: str) -> None:
    (difference,) = changed_on_resume(load_config(run), load_config(run, overrides))
    assert str(difference) == said


def test_a_difference_shows_no_secret_and_no_long_value(run: Path) -> None:
    secret = "{name: c, shards: 'https://user:password@host/0.tar?token=secret'}"
    sources = f"data.sources=[{{name: a, shards: x}}, {{name: b, shards: y}}, {secret}]"
    (difference,) = changed_on_resume(load_config(run), load_config(run, [sources]))
    said = str(difference)
    shown = '{"name": "c", "shards": "https://***@host/0.tar?***", "index": null, "weight": 1.0}'
    assert said == f"data.sources: 3 entries, was 2; the first that is new is data.sources.2: {shown[:77]}..."
    assert len(said) < 200


def test_of_long_values_the_difference_is_shown_not_their_equal_beginnings(run: Path) -> None:
    """Lists of sources (their shards may change), lists of keys, and a long text: each side at most 80 characters."""

    def said(*overrides: Sequence[str]) -> str:
        (difference,) = changed_on_resume(*(load_config(run, list(given)) for given in overrides))
        return str(difference)

    def sources(*names: str) -> list[str]:
        return [f"data.sources=[{', '.join(f'{{name: {name}, shards: /data/{name}}}' for name in names)}]"]

    def keys(*names: str) -> list[str]:
        return [f"data.captions.keys=[{', '.join(names)}]"]

    def moved(given: list[str]) -> list[str]:
        return [given[0].replace("/data/", "/moved/")]

    names = [f"source_{number}" for number in range(40)]
    with_one_more = [*names[:3], "more", *names[3:]]
    first = "the first that differs is data.sources.3.name: more, was source_3"
    assert said(sources(*names), moved(sources(*with_one_more))) == f"data.sources: 41 entries, was 40; {first}"
    gone = '{"name": "source_39", "shards": "/data/source_39", "index": null, "weight": 1.0}'
    assert (
        said(sources(*names), sources(*names[:39]))
        == f"data.sources: 39 entries, was 40; the first that is gone is data.sources.39: {gone}"
    )
    other = [*names[:9], "other", *names[10:]]
    assert said(sources(*names), sources(*other)) == "data.sources.9.name: other, was source_9"
    assert said(keys(*names), keys(*other)) == "data.captions.keys.9: other, was source_9"
    assert said(keys(*names), keys(*names, "more")) == (
        "data.captions.keys: 41 entries, was 40; the first that is new is data.captions.keys.40: more"
    )
    first = "the first that differs is data.captions.keys.3: more, was source_3"
    assert said(keys(*names), keys(*with_one_more)) == f"data.captions.keys: 41 entries, was 40; {first}"
    beginning, end = "of_a_long_name_" * 10, "_and_on" * 20
    texts = [[f"data.sources.0.name={beginning}{text}"] for text in ("first", f"second{end}")]
    start = f"...{beginning[-20:]}"
    assert said(*texts) == f"data.sources.0.name: {f'{start}second{end}'[:77]}..., was {start}first"
