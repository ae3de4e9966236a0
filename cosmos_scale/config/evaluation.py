"""The section `eval`: a list of evaluators, and the old form of that section.

The old form is `{every: N, retrieval: {shards: ...}}`. Files, overrides and checkpoints that have it are still read: it
means a list with one evaluator of the kind `retrieval`.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from cosmos_scale.config.classification import ClassificationConfig
from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.retrieval import RetrievalConfig
from cosmos_scale.config.section import refuse
from cosmos_scale.config.segmentation import SegmentationConfig

AnyEvaluatorConfig = RetrievalConfig | ClassificationConfig | SegmentationConfig
"""The keys of an evaluator; `kind` says which of the kinds. A new kind is added here, and in `config/__init__.py`."""


def check_names(evaluators: Sequence[EvaluatorConfig]) -> None:
    """Raise RuleBroken where two evaluators of a run have one name."""
    first: dict[str, int] = {}
    for place, evaluator in enumerate(evaluators):
        if evaluator.name in first:
            other = f"eval.{first[evaluator.name]}"
            rule = f"must differ from the name of {other}, since numbers are told apart by it"
            refuse(f"eval.{place}.name", evaluator.name, rule, [f"{other}.name", f"eval.{place}"])
        first[evaluator.name] = place


_EVERY, _RETRIEVAL = OLD_KEYS = ("every", "retrieval")


def in_new_form(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's keys with `eval` as a list, whichever form it has.

    Raises RuleBroken, its keys below `eval`, where the old form holds an unknown key, or `every` without pairs.
    """
    old = tree.get("eval")
    if not isinstance(old, dict):
        return dict(tree)
    if "kind" in old:
        refuse(
            "kind", old["kind"], "stands in a mapping, but eval is a list of evaluations: put `- ` before the mapping"
        )
    for key, value in old.items():
        if key not in OLD_KEYS:
            (nearest,) = difflib.get_close_matches(key, OLD_KEYS, n=1, cutoff=0.0)
            rule = "stands under an unknown key: eval is a list, or in its old form has every and retrieval"
            refuse(key, value, f"{rule}; did you mean eval.{nearest}?")
    retrieval = old.get(_RETRIEVAL)
    if retrieval is None:
        if old.get(_EVERY):
            refuse(_EVERY, old[_EVERY], "needs eval.retrieval, the pairs to evaluate on", [_RETRIEVAL])
        return {**tree, "eval": []}
    if not isinstance(retrieval, dict):
        return {**tree, "eval": [retrieval]}  # validation refuses its type
    every = {_EVERY: old[_EVERY]} if _EVERY in old else {}
    return {**tree, "eval": [{"kind": _RETRIEVAL, **retrieval, **every}]}


def settings_of(tree: dict[str, Any], origins: dict[str, str], key: str, value: Any) -> list[tuple[str, Any]]:
    """Return the (dotted key, value) pairs that are to be set where the user sets a dotted key of a run.

    The given pair is returned, except where the key belongs to one form of `eval` and the tree has the other form.
    Keys of the old form become keys of the list. For a key of the list the old form becomes a list, in the tree and in
    origins (who set which dotted key).
    Raises RuleBroken as `in_new_form` does.
    """
    section, _, below = key.partition(".")
    evaluators = tree.get("eval")
    of_the_list = below.partition(".")[0].isdecimal()
    if section != "eval" or of_the_list == isinstance(evaluators, list):
        return [(key, value)]
    if of_the_list:
        tree["eval"] = in_new_form({"eval": evaluators or {}})["eval"]
        for old_key in [old_key for old_key in origins if old_key.startswith("eval.")]:
            origins[new_key(old_key)] = origins.pop(old_key)
        return [(key, value)]
    old = value
    for name in reversed(below.split(".") if below else []):
        old = {name: old}
    if not isinstance(old, dict):
        return [(key, value)]
    if evaluators:
        return _settings_in_list(evaluators, old)
    tree["eval"] = {}
    return [(key, value)]


def new_key(key: str) -> str:
    """Return the dotted key that an old form's dotted key becomes in the list that `in_new_form` makes; others stay."""
    return f"eval.0.{_EVERY}" if key == f"eval.{_EVERY}" else key.replace(f"eval.{_RETRIEVAL}", "eval.0", 1)


def written_key(key: str, section: object) -> str:
    """Return the dotted key that the user wrote for a key of the list; section: the value of `eval` as it was written.

    The reverse of `new_key` where the section has the old form; the key itself where the section is a list.
    """
    if not isinstance(section, dict) or not f"{key}.".startswith("eval.0."):
        return key
    return f"eval.{_EVERY}" if key == f"eval.0.{_EVERY}" else key.replace("eval.0", f"eval.{_RETRIEVAL}", 1)


def _settings_in_list(evaluators: list[Any], old: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what the old form's keys set in a list of evaluators: a dotted key and a value for each.

    `every` means all evaluators. `retrieval` means the evaluator of that name, else the first of that kind, else a new
    one, which this function appends; null takes the evaluator out of the list.
    """
    settings = [(f"eval.{key}", value) for key, value in old.items() if key not in OLD_KEYS]
    if _RETRIEVAL in old:
        place = _place_of_retrieval(evaluators)
        if old[_RETRIEVAL] is None:
            del evaluators[place : place + 1]
        elif isinstance(old[_RETRIEVAL], dict):
            if place == len(evaluators):
                evaluators.append({"kind": _RETRIEVAL})
            settings += [(f"eval.{place}.{key}", value) for key, value in old[_RETRIEVAL].items()]
        else:
            evaluators[place : place + 1] = [old[_RETRIEVAL]]  # validation refuses its type
    if _EVERY in old:
        settings += [(f"eval.{place}.{_EVERY}", old[_EVERY]) for place in range(len(evaluators))]
    return settings


def _place_of_retrieval(evaluators: list[Any]) -> int:
    """Where the evaluator stands that the old form calls `retrieval`; behind the last one where there is none."""
    items = [item if isinstance(item, dict) else {} for item in evaluators]
    kinds = [item.get("kind") for item in items]
    names = [item.get("name", item.get("kind")) for item in items]
    found = next((values for values in (names, kinds) if _RETRIEVAL in values), None)
    return len(evaluators) if found is None else found.index(_RETRIEVAL)
