"""The rules between keys, each broken once, and the arithmetic of batches and steps."""

from typing import Any

import pytest
from pydantic import ValidationError

from cosmos_scale.config import ModelConfig, RunConfig
from cosmos_scale.config.section import RuleBroken
from cosmos_scale.errors import UserError

SOURCE = {"name": "a", "shards": "a"}
GALLERY = {"kind": "retrieval", "shards": "a"}

BROKEN = [
    # (keys, the section that notices, the key it names, part of the rule)
    ({"model": {"vision": {"width": 100}}}, "model.vision", "width", "multiple of head_width (64)"),
    ({"model": {"vision": {"image_size": 225}}}, "model.vision", "image_size", "multiple of patch_size (16)"),
    ({"model": {"text": {"heads": 7}}}, "model.text", "width", "multiple of heads (7)"),
    ({"model": {"text": {"width": 256}}}, "model", "text.width", "equal model.embed_dim (512)"),
    ({"model": {"pooler_heads": 3}}, "model", "embed_dim", "multiple of pooler_heads (3)"),
    ({"data": {"views": {"local_size": 90}}}, "", "data.views.local_size", "model.vision.patch_size (16)"),
    ({"data": {"views": {"global_scale": [0.9, 0.4]}}}, "data.views", "global_scale", "low <= high"),
    ({"data": {"views": {"local_scale": [0.0, 0.4]}}}, "data.views", "local_scale", "0 < low"),
    ({"data": {"views": {"global_scale": [0.4, 1.5]}}}, "data.views", "global_scale", "high <= 1"),
    ({"data": {"views": {"ratio": [2.0, 1.0]}}}, "data.views", "ratio", "low <= high"),
    ({"data": {"views": {"ratio": [1e-300, 1e-299]}}}, "data.views", "ratio", "0.001 < low <= high <= 1000"),
    ({"data": {"views": {"blur": {"radius": [2.0, 0.1]}}}}, "data.views.blur", "radius", "low <= high"),
    ({"data": {"captions": {"count": 1}}}, "data.captions", "global_count", "at most count (1)"),
    ({"data": {"sources": [SOURCE, SOURCE]}}, "data", "sources.1.name", "differ"),
    ({"data": {"sources": [SOURCE]}, "model": {"text": {"vocab_size": 99}}}, "", "model.text.vocab_size", "49408"),
    ({"train": {"epoch_steps_multiple": 16}}, "", "data.last_batch", "must be pad"),
    ({"train": {"schedule_steps": 2000}}, "", "optimizer.warmup_steps", "less than the steps of the schedule, 2000"),
    ({"zero": {"stage": 0, "offload": True}}, "zero", "offload", "needs stage 1, 2 or 3"),
    ({"zero": {"stage": 3}, "model": {"compile": True}}, "", "model.compile", "must be false at zero.stage 3"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer", "betas.1", "less than 1"),
    ({"eval": [GALLERY, GALLERY]}, "", "eval.1.name", "differ from the name of eval.0"),
    ({"eval": [GALLERY | {"name": "a/b"}]}, "eval.0.retrieval", "name", "must be a folder's plain name"),
    ({"init_from": "a", "resume": "b"}, "", "resume", "auto or never beside init_from"),
    ({"init_heads": "new"}, "", "init_heads", "must be from without init_from"),
]


@pytest.mark.parametrize(("keys", "section", "key", "rule"), BROKEN, ids=[f"{row[1]}:{row[2]}" for row in BROKEN])
def test_a_broken_rule_names_key_value_and_rule(keys: dict[str, Any], section: str, key: str, rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(keys)
    (error,) = caught.value.errors()
    broken = error["ctx"]["error"]
    assert isinstance(broken, RuleBroken)
    assert ".".join(map(str, error["loc"])) == section
    assert broken.key == key
    assert rule in broken.rule


def test_defaults_and_edges_of_the_rules_pass() -> None:
    RunConfig.model_validate({})
    RunConfig.model_validate({"data": {"views": {"local_crops": 0, "local_size": 90}}})
    RunConfig.model_validate({"data": {"captions": {"count": 1, "global_count": 1}}})
    RunConfig.model_validate({"train": {"schedule_steps": 2001}})
    RunConfig.model_validate({"data": {"views": {"ratio": [1.0, 1.0]}}})
    ModelConfig.model_validate({"text": {"vocab_size": 99}})  # without data no tokenizer meets it


def test_sections_are_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_gradient_scale_accepts_a_yaml_boolean() -> None:
    config = RunConfig.model_validate({"optimizer": {"gradient_scale": True}})
    assert config.optimizer.gradient_scale == "true"
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"optimizer": {"gradient_scale": False}})


def test_micro_batch_divides_or_is_refused_by_name() -> None:
    config = RunConfig.model_validate({"train": {"global_batch": 96}})
    assert [config.samples_per_rank(world_size) for world_size in (1, 2, 32, 96)] == [96, 48, 3, 1]
    for world_size in (5, 97):
        with pytest.raises(UserError, match=rf"train\.global_batch: 96 must be a multiple of the {world_size} ranks"):
            config.samples_per_rank(world_size)


def test_total_and_last_step() -> None:
    train = {"epochs": 3}
    config = RunConfig.model_validate({"train": train})
    assert config.total_steps(1000) == config.last_step(1000) == 3000
    config = RunConfig.model_validate({"train": {**train, "max_steps": 500}})
    assert (config.total_steps(1000), config.last_step(1000)) == (3000, 500)
    config = RunConfig.model_validate({"train": {**train, "schedule_steps": 2500, "max_steps": 9999}})
    assert (config.total_steps(1000), config.last_step(1000)) == (2500, 2500)


def test_a_warm_up_longer_than_the_data_is_refused() -> None:
    config = RunConfig.model_validate({"train": {"epochs": 2}})
    with pytest.raises(
        UserError, match=r"optimizer\.warmup_steps: 2000 must be less than the steps of the schedule, 2000"
    ):
        config.total_steps(1000)
