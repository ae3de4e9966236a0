"""Compare this project's evaluation with numbers of the published one, case by case: `check_golden.py --evaluation`.

The form of the files is told in tests/golden/README.md. A case is what the names of its tensors begin with, such as
`retrieval.ties`. A part of the file, such as `retrieval`, has one function that checks each of its cases: see CHECKS.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cosmos_scale.data.decode.torch_cpu import evaluation_crop
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.attention_maps import AttentionMaps, attention_maps, encode_pairs
from cosmos_scale.evaluation.classification import LOGIT_SCALE, ranks_of
from cosmos_scale.evaluation.evaluator import one_process
from cosmos_scale.evaluation.prompts.texts import filled_in
from cosmos_scale.evaluation.ranking import RECALL_AT, best_ranks
from cosmos_scale.evaluation.text_weights import text_weights
from cosmos_scale.kernels.unit_length import normalise
from tools.golden_numbers import (
    EQUAL,
    Compared,
    EvaluationGolden,
    compare,
    compare_number,
    compare_rounding,
    compare_softmax,
)
from tools.golden_segmentation import check_dense, check_overlap, check_refinement, check_segmentation


def check_preprocess(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare the evaluation's preprocessing of a picture."""
    output = golden.shaped(f"{case}.output", 3, None, None)
    picture = golden.shaped(f"{case}.image", None, None, 3)
    four_channels = torch.cat([picture, picture[:, :, :1]], dim=2).contiguous().numpy()
    yield compare(golden, f"{case}.output", evaluation_crop(four_channels, output.shape[1]), 1e-6)


def check_classification(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare tokens, classifier, features and logits, and the shares of right answers."""
    said, encoder = golden.parameters(case), golden.encoder()
    names, templates = said["class_names"], said["templates"]
    texts = [text for name in names for text in filled_in([name], templates)]
    yield compare(golden, f"{case}.tokens", encoder.setting.tokenizer(texts), EQUAL)
    with torch.no_grad():
        weights_CE = text_weights(encoder, [(name,) for name in names], templates, one_process)
        weights_CE = weights_CE.to(golden.dtype)
        features_NE = encoder.images(golden.tensor(f"{case}.images"))
    logits_NC = LOGIT_SCALE * features_NE @ weights_CE.T
    yield compare(golden, f"{case}.classifier", weights_CE.T, 1e-5)
    yield compare(golden, f"{case}.image_features", features_NE, 1e-5)
    yield compare(golden, f"{case}.logits", logits_NC, 5e-4)
    theirs_NE, theirs_EC = golden.tensor(f"{case}.image_features"), golden.tensor(f"{case}.classifier")
    yield compare(golden, f"{case}.logits", LOGIT_SCALE * theirs_NE @ theirs_EC, 5e-4)
    rank_N = ranks_of(logits_NC.cpu(), golden.tensor(f"{case}.target").long())
    for key, first in (("top1", 1), ("top3", 3)):
        yield compare_number(f"{case}: {key}", (rank_N < first).double().mean().item(), said.get(key), 1e-12)


def check_retrieval(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare scores, ranks and the figures made of them.

    Where scores are equal this project's ranks are the worst ones, and what the published code gave lies between.
    """
    image = golden.shaped(f"{case}.image_features", None, None).to(golden.device)
    text = golden.shaped(f"{case}.text_features", None, image.shape[1]).to(golden.device)
    of_text = golden.shaped(f"{case}.image_of_text", len(text)).to(golden.device)
    of_image = torch.arange(len(image), device=golden.device)
    said = golden.parameters(case)
    yield compare(golden, f"{case}.scores", said["logit_scale"] * image @ text.T, 1e-5)
    correct_IN = of_image[:, None] == of_text
    scores_IN = image @ text.T
    directions = {
        "image_to_text": (best_ranks(image, of_image, text, of_text).cpu(), scores_IN, correct_IN),
        "text_to_image": (best_ranks(text, of_text, image, of_image).cpu(), scores_IN.T, correct_IN.T),
    }
    for direction, (rank, scores_QC, correct_QC) in directions.items():
        best, stable = (ranks.cpu() for ranks in _other_ranks(scores_QC, correct_QC))
        name = f"{case}.{direction}_rank"
        figures = {"best_tie": best, "worst_tie": rank}
        if f"{name}_worst" in golden.names():
            yield compare(golden, f"{name}_worst", rank, EQUAL)
            yield compare(golden, f"{name}_best", best, EQUAL)
            yield compare(golden, f"{name}_stable", stable, EQUAL)
            published = golden.shaped(f"{name}_published", len(rank))
            legitimate = bool(((best <= published) & (published <= rank)).all())
            yield Compared(f"{name}_published", 0.0 if legitimate else math.inf, EQUAL)
        else:
            yield compare(golden, name, rank, EQUAL)
            figures["published"] = rank
        for key, ranks in figures.items():
            for figure, value in _recalls(direction, ranks).items():
                yield compare_number(f"{case}: {key} {figure}", value, said[key].get(figure), 1e-5)


def _other_ranks(scores_QC: Tensor, correct_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks by two other rules for equal scores: correct candidates first, and candidates of smaller numbers first."""
    own_Q1 = scores_QC.masked_fill(~correct_QC, -math.inf).amax(1, keepdim=True)
    best_Q = ((scores_QC > own_Q1) & ~correct_QC).sum(1)
    order_QC = scores_QC.argsort(dim=1, descending=True, stable=True)
    stable_Q = correct_QC.gather(1, order_QC).long().argmax(1)
    return best_Q, stable_Q


def _recalls(direction: str, rank: Tensor) -> dict[str, float]:
    """The published figures of a direction, from ranks that count from 0."""
    shares = {f"{direction}_R@{k}": (rank < k).double().mean().item() for k in RECALL_AT}
    median = math.floor(rank.double().quantile(0.5).item()) + 1
    return {
        **shares,
        f"{direction}_mean_rank": rank.double().mean().item() + 1,
        f"{direction}_median_rank": float(median),
    }


def check_attention(golden: EvaluationGolden, case: str) -> Iterator[Compared]:
    """Compare both heads' weights, what they read and what they give, and the maps made of them."""
    encoder = golden.encoder()
    model = encoder.model
    images, captions = golden.tensor(f"{case}.images").to(golden.device), golden.parameters(case)["captions"]
    ids_BL = encoder.setting.tokenizer(captions)
    yield compare(golden, f"{case}.tokens", ids_BL, EQUAL)
    pairs = encode_pairs(model, images, ids_BL.to(golden.device))
    maps = [attention_maps(model, pair, images.shape[2] // model.visual.conv1.patch_size) for pair in pairs]
    image, text = torch.stack([pair.image for pair in pairs]), torch.stack([pair.text for pair in pairs])
    with torch.no_grad():
        patches, words = torch.cat([pair.patches for pair in pairs]), torch.cat([pair.words for pair in pairs])
        from_text = model.text_attn_cross_pool(image[None], words, [len(pair.words) for pair in pairs])[0]
        from_image = model.visual.attn_cross_pool(text[None], patches, [len(pair.patches) for pair in pairs])[0]
    image_BHP = torch.stack([one.image_weights.flatten(1) for one in maps])
    text_BHL = torch.stack([one.text_weights for one in maps])
    for name, ours in (
        ("image_weights_per_head", image_BHP),
        ("image_weights", image_BHP.mean(1)),
        ("text_weights_per_head", text_BHL),
        ("text_weights", text_BHL.mean(1)),
    ):
        yield compare_softmax(golden, f"{case}.{name}", ours, 2e-5)
    for name, ours, tolerance in (
        ("image_features_raw", image, 2e-5),
        ("text_features_raw", text, 2e-5),
        ("img_crossmodal_features", normalise(image + from_text), 2e-5),
        ("txt_crossmodal_features", normalise(text + from_image), 2e-5),
    ):
        yield compare(golden, f"{case}.{name}", ours, tolerance)
    for name, spread in (
        ("image_map_unit", [one.image_map.flatten() for one in maps]),
        ("text_map_unit", [one.text_map for one in maps]),
    ):
        yield compare(golden, f"{case}.{name}", torch.stack(spread), 5e-5)._replace(ours=None)
    yield from _check_spread(golden, case, [pair.length for pair in pairs])


def _check_spread(golden: EvaluationGolden, case: str, lengths: Sequence[int]) -> Iterator[Compared]:
    """Compare the maps with the file's own weights, spread over 0..1: rounding alone is between them.

    A weight's rounding counts for as much more as the weights lie close together.
    """
    image_BP, text_BL = (golden.tensor(f"{case}.{name}") for name in ("image_weights", "text_weights"))
    rows = zip(image_BP[:, None, None], text_BL[:, None], lengths, strict=True)
    maps = [AttentionMaps(image_11P, text_1L, length) for image_11P, text_1L, length in rows]
    words = [text_L[one.words] for text_L, one in zip(text_BL, maps, strict=True)]
    for name, weights, spread in (
        ("image_map_unit", image_BP, [one.image_map.flatten() for one in maps]),
        ("text_map_unit", words, [one.text_map for one in maps]),
    ):
        closest = max(
            (float(row.max() / (row.max() - row.min())) for row in weights if len(row) and row.max() > row.min()),
            default=1.0,
        )
        allowed = min(2e-6 + 4 * torch.finfo(torch.float32).eps * closest, 5e-5)
        yield compare(golden, f"{case}.{name}", torch.stack(spread), allowed)._replace(ours=None)


Check = Callable[[EvaluationGolden, str], Iterator[Compared]]
CHECKS: Mapping[str, Check] = {
    "preprocess": check_preprocess,
    "cls": check_classification,
    "retrieval": check_retrieval,
    "dense": check_dense,
    "seg": check_segmentation,
    "pamr": check_refinement,
    "iou": check_overlap,
    "attention": check_attention,
}
"""What compares the cases of each part of a file."""


def compared_in(golden: EvaluationGolden, part: str, case: str) -> Iterator[Compared]:
    """Compare a case: within the absolute tolerances, and as closely as float32 rounds beside float64."""
    single = list(CHECKS[part](golden, case))
    yield from single
    # Labels are the last of their case, and have no exact numbers.
    for one, exact in zip(single, CHECKS[part](golden.exact(), case), strict=False):
        if (rounded := compare_rounding(golden, one, exact)) is not None:
            yield rounded


def check_evaluation_file(path: Path, device: str) -> bool:
    """Compare every case of a file, print a line for each, and tell whether all are within tolerance."""
    golden = EvaluationGolden(path, "cuda" if device == "cuda" else "cpu")
    print(path)
    cases = [(part, case) for part in CHECKS for case in golden.cases(part)]
    if not cases:
        raise UserError(f"{path}: has no tensors of {', '.join(CHECKS)}: not a file of evaluation numbers")
    within = True
    for part, case in cases:
        try:
            compared = list(compared_in(golden, part, case))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path}: {case}: cannot be used: {type(error).__name__}: {error}") from error
        past = [one for one in compared if not one.good]
        within &= not past
        worst = max(past or compared, key=lambda one: one.part_of_tolerance)
        verdict = "PAST TOLERANCE" if past else "ok"
        print(f"  {case:24} {worst.difference:9.2e} (at most {worst.tolerance:.0e})  {verdict}", end="")
        print(f"  worst of {len(compared)}: {worst.name}")
    return within
