"""Zero-shot segmentation of a set of pictures, shared by all ranks: mIoU and accuracy from exact counts of pixels."""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from cosmos_scale.config import SegmentationConfig
from cosmos_scale.data.decode.picture import Pixels
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, Setting, digest_of
from cosmos_scale.evaluation.left_out import LeftOutWords
from cosmos_scale.evaluation.prompts.class_pairs import (
    ClassPairs,
    DataNames,
    alike_names,
    pair_names,
    shown_pairs,
)
from cosmos_scale.evaluation.prompts.texts import Names, imagenet_templates, read_names
from cosmos_scale.evaluation.segmentation.layouts import (
    PUBLIC_LAYOUTS,
    MaskedPicture,
    find_pictures,
    lone_masks,
    pictures_of_one_mask,
)
from cosmos_scale.evaluation.segmentation.masks import Labels, checked_labels, greatest_label
from cosmos_scale.evaluation.segmentation.names import public_names
from cosmos_scale.evaluation.segmentation.overlap import IGNORED, Scores, constant_counts, count_overlap
from cosmos_scale.evaluation.segmentation.overlays import draw_overlay, overlay_file
from cosmos_scale.evaluation.segmentation.pixels import decode_upright
from cosmos_scale.evaluation.segmentation.segmenter import (
    OWN_SHORT_SIDE,
    Queries,
    Recipe,
    encode_queries,
    segment,
    usual_recipe,
)
from cosmos_scale.files import read_regular, reason_of
from cosmos_scale.host import ranks_of_this_host, usable_cores
from cosmos_scale.words import counted

_LOOKED_AT = 16  # masks, spread over the set, that tell whether the classes are theirs
_AHEAD = 4  # pictures in memory that are read before their turn


class Segmentation(Evaluator):
    """IoU of each class over the pictures of a set, every rank on its share of the pictures."""

    def __init__(self, config: SegmentationConfig, setting: Setting) -> None:
        """Find pictures, masks and names; raises UserError where any of them are missing or do not fit together."""
        super().__init__(config, setting)
        self._config = config
        self._pictures = find_pictures(config)
        self._lone_masks = lone_masks(config)
        if setting.rank == 0:
            self._warn_of_shared_masks()
        self._names = _names(config)
        self._require_classes()
        self._class_pairs = _class_pairs(config, self._names)
        if setting.rank == 0:
            self._class_pairs.warn()
        self._titles = _titles(self._names, background=config.has_background)
        self._recipe = recipe_of(config, setting.image_size)
        self._constant = 0  # the label of the trivial answer, known once masks are read
        self._words = LeftOutWords()
        self._scores: Scores | None = None
        self._true_C = torch.zeros(len(self._names), dtype=torch.int64)

    def subject(self) -> dict[str, str]:
        """The set, where it lies, how its classes are spelt, and whether attention is correlative."""
        where = self._config.images if self._config.dataset is None else self._config.data
        return {
            "dataset": self._config.dataset or "own",
            "data": where or "",
            "names": self._config.names,
            "csa": "yes" if self._config.csa else "no",
        }

    def gallery(self) -> str:
        """How many pictures and classes there are, with a digest of the files' names and sizes, and of the names."""
        files = [(picture.name, _size(picture.image), _size(picture.mask)) for picture in self._pictures]
        classes = counted(len(self._names), "class", "classes")
        return f"{counted(len(self._pictures), 'picture')}, {classes}, digest {digest_of(repr((self._names, files)))}"

    def same_data(self) -> str:
        """The same pictures, masks and names of classes."""
        return "rule: every host has the same pictures and masks, and the same file of class names, so copy them whole"

    def measure(self, encoder: Encoder, gather: Gather, folder: Path | None) -> Iterator[tuple[str, float]]:
        """Yield pictures, mIoU, aAcc, mAcc, the trivial answer's mIoU, how many were left out, on request IoU by class.

        folder: takes the overlays that the section asks for.
        """
        patch = encoder.model.visual.conv1.patch_size
        if 0 < self._recipe.crop < patch:
            raise UserError(
                f"crop: {self._recipe.crop} is smaller than the model's patches of {patch} x {patch} pixels"
            )
        self.require_same_data(gather)
        queries = self.queries(encoder, gather)
        counts_3C, used, left_out = self._count(encoder, queries, folder)
        sums = torch.cat([counts_3C.flatten(), counts_3C.new_tensor([used, left_out])])
        totals = gather(sums[None]).sum(0).cpu()
        counts_3C, (used, left_out) = totals[:-2].unflatten(0, (3, -1)), totals[-2:].tolist()
        if not counts_3C[2].any():
            raise UserError(f"{self.subject()['data']}: no pixel of {counted(used, 'picture')} has a label that counts")
        self._scores, self._true_C = Scores.of(counts_3C), counts_3C[2]
        self._constant = 0 if self._config.has_background else int(counts_3C[2].argmax())
        yield "pictures", used
        yield "mIoU", self._scores.mean_iou
        yield "aAcc", self._scores.all_accuracy
        yield "mAcc", self._scores.mean_accuracy
        yield "trivial_mIoU", Scores.of(constant_counts(counts_3C, self._constant)).mean_iou
        yield "left_out", left_out
        if self._config.per_class:
            for title, iou in zip(self._titles, self._scores.iou.tolist(), strict=True):
                if iou == iou:  # no number for a class that is nowhere
                    yield f"IoU_{title}", iou

    def queries(self, encoder: Encoder, gather: Gather) -> Queries:
        """Encode every name of every class, by itself, in ImageNet's 80 templates; collective, under no_grad."""
        return encode_queries(encoder, self._names, imagenet_templates(), gather)

    def _count(self, encoder: Encoder, queries: Queries, folder: Path | None) -> tuple[Tensor, int, int]:
        """Segment this rank's pictures: counts [3, C], and how many pictures were used and left out."""
        counts_3C = torch.zeros(3, len(self._names), dtype=torch.int64, device=self.setting.device)
        rank, world_size = self.setting.rank, self.setting.world_size
        own = range(rank, len(self._pictures), world_size)
        left_out = 0
        for done, (place, read) in enumerate(self._read_ahead(own), start=1):
            picture = self._pictures[place]
            try:
                pixels, true = read()
                predicted = segment(encoder.model.visual, pixels, queries, self._recipe)
            except DamagedSample as damage:
                left_out += 1
                self._words.say(f"{picture.name} of {self.subject()['data']}: {damage}")
            else:
                on_device = torch.from_numpy(true).to(predicted.device)
                counts_3C += count_overlap(predicted, on_device, len(self._names))
                if folder is not None and place < self._config.overlays:
                    labels = predicted.cpu().numpy().astype(np.uint8)
                    draw_overlay(folder / overlay_file(place, picture.name), pixels, true, labels, self._titles)
            self.setting.report("pictures", done, len(own))
        return counts_3C, len(own) - left_out, left_out

    def _read_ahead(self, places: Sequence[int]) -> Iterator[tuple[int, Callable[[], tuple[Pixels, Labels]]]]:
        """Yield places in the list of pictures, each with what returns the picture or raises as `_read` does.

        Threads read and decode the next pictures while the model computes: decoders leave Python's lock.
        """
        threads = max(1, usable_cores() // ranks_of_this_host(unknown=self.setting.world_size))
        with ThreadPoolExecutor(min(threads, _AHEAD)) as pool:
            ahead: deque[Future[tuple[Pixels, Labels]]] = deque()
            try:
                for number, place in enumerate(places):
                    more = places[number + len(ahead) : number + _AHEAD]
                    ahead.extend(pool.submit(self._read, self._pictures[other]) for other in more)
                    yield place, ahead.popleft().result
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, picture: MaskedPicture) -> tuple[Pixels, Labels]:
        """Read a picture and its mask, which fit each other and the classes; raises DamagedSample."""
        setting = self.setting
        try:
            pixels = decode_upright(read_regular(picture.image), setting.max_pixels, setting.background)
            labels = picture.law(read_regular(picture.mask), setting.max_pixels)
        except OSError as error:
            raise DamagedSample(f"{error.filename or picture.name} cannot be read: {reason_of(error)}") from error
        return pixels, checked_labels(labels, pixels.shape[:2], len(self._names))

    def _require_classes(self) -> None:
        """Raise UserError where most of some masks hold labels that no class has; single ones cost their picture."""
        greatest: list[tuple[int, Path]] = []
        labels_found: set[int] = set()
        for place in sorted({len(self._pictures) * part // _LOOKED_AT for part in range(_LOOKED_AT)}):
            picture = self._pictures[place]
            with suppress(OSError, DamagedSample):  # which `measure` names
                labels = picture.law(read_regular(picture.mask), self.setting.max_pixels)
                greatest.append((greatest_label(labels), picture.mask))
                labels_found.update(np.unique(labels).tolist())
        self._warn_of_white(labels_found, len(greatest))
        classes = len(self._names)
        beyond = [found for found in greatest if found[0] >= classes]
        if 2 * len(beyond) > len(greatest):
            most, mask = max(beyond)
            hold = "holds" if len(beyond) == 1 else "hold"
            raise UserError(
                f"{self._config.classes or self._config.dataset}: has {counted(classes, 'class', 'classes')}, 0 to "
                f"{classes - 1}, but {len(beyond)} of {counted(len(greatest), 'mask')} looked at {hold} "
                f"greater labels, such as {most} in {mask}; rule: a class for each label, in the order of the labels"
            )

    def _warn_of_shared_masks(self) -> None:
        """Say it where several pictures have one mask: one may be a copy, and both count."""
        if shared := pictures_of_one_mask(self._pictures):
            first = " and ".join(picture.name for picture in shared[0])
            print(
                f"doubtful pictures: {self._config.images}: {counted(len(shared), 'mask')} with several pictures, such "
                f"as {shared[0][0].mask.name} with {first}, each of which counts; rule: a picture for each mask",
                file=sys.stderr,
            )

    def _warn_of_white(self, labels_found: Set[int], masks: int) -> None:
        """Say it where masks of one's own that are looked at seem to be in black and white.

        Programs that draw a thing so write 255 for it, and nothing of it would be measured.
        """
        own = self._config.dataset is None and not self._config.reduce_zero
        if own and self.setting.rank == 0 and labels_found == {0, IGNORED} and len(self._names) > 1:
            print(
                f"doubtful masks: {self._config.masks}: 0 and {IGNORED} alone in {counted(masks, 'mask')} looked at, "
                f"and pixels of {IGNORED} count nowhere; rule: 0 to {len(self._names) - 1} are the classes, such as 1 "
                f"for {self._names[1][0]!r}",
                file=sys.stderr,
            )

    def table(self, results: Mapping[str, Numbers], title: str) -> Table:
        """A table of percentages, a row a model, with the trivial answer's mIoU beside the model's."""
        first = next(iter(results.values()))
        left_out = f", {int(first['left_out']):,} left out" if first["left_out"] else ""
        caption = f"{counted(int(first['pictures']), 'picture')}{left_out}"
        if lone := self._lone_masks:
            caption += f"; {counted(len(lone), 'mask')} without a picture, such as {lone[0]}"
        if pairs := self._class_pairs.shown:
            caption += f"; {pairs}"
        columns = {"mIoU": "mIoU", f"mIoU of all {self._titles[self._constant]}": "trivial_mIoU"}
        columns |= {"aAcc": "aAcc", "mAcc": "mAcc"}
        table = Table("", *columns, title=title, caption=caption)
        for model, numbers in results.items():
            table.add_row(model, *(f"{100 * numbers[name]:.2f} %" for name in columns.values()))
        return table

    def details(self) -> Sequence[RenderableType]:
        """The IoU and accuracy of each class of the last model, where the section asks for them."""
        if self._scores is None or not self._config.per_class:
            return []
        table = Table("class", "IoU", "Acc", "share of pixels")
        rows = zip(
            self._titles, self._scores.iou.tolist(), self._scores.accuracy.tolist(), self._true_C.tolist(), strict=True
        )
        for class_title, iou, accuracy, pixels in rows:
            shares = (iou, accuracy, pixels / int(self._true_C.sum()))
            table.add_row(class_title, *(f"{100 * share:.2f} %" if share == share else "-" for share in shares))
        return [table]


def recipe_of(config: SegmentationConfig, image_size: int) -> Recipe:
    """Return how a section's pictures are segmented by a model of an image size: its keys, else those of its set."""
    public = None if config.dataset is None else PUBLIC_LAYOUTS[config.dataset]
    usual = usual_recipe(image_size, public.short_side if public else OWN_SHORT_SIDE)
    crop = usual.crop if config.crop is None else config.crop

    def chosen(value: float | None, of_set: float) -> float:
        return of_set if value is None else value

    return Recipe(
        short_side=config.short_side or usual.short_side,
        crop=crop,
        stride=config.stride or max(1, crop // 2),
        csa=config.csa,
        logit_scale=chosen(config.logit_scale, public.logit_scale if public else usual.logit_scale),
        prob_threshold=chosen(config.prob_threshold, public.prob_threshold if public else 0.0),
        area_threshold=chosen(config.area_threshold, public.area_threshold if public else 0.0),
        pamr_steps=config.pamr_steps,
        pamr_dilations=config.pamr_dilations,
        batch=config.batch,
    )


def _names(config: SegmentationConfig) -> Names:
    """Return the names of each class; raises UserError where a file of names does not fit the set."""
    if config.classes is None:
        assert config.dataset is not None, "which the config checks"
        return public_names(config.dataset, config.names)
    names = read_names(Path(config.classes))
    said = f"{config.classes}: names {counted(len(names), 'class', 'classes')}"
    if config.dataset is not None:
        expected = len(public_names(config.dataset, config.names))
        if len(names) != expected:
            raise UserError(f"{said}, but {config.dataset} has {expected}; rule: a line a class, in the masks' order")
    if len(names) > IGNORED:
        raise UserError(f"{said}; rule: at most {IGNORED}, since {IGNORED} in a mask means ignored")
    return names


def _class_pairs(config: SegmentationConfig, names: Names) -> ClassPairs:
    """Compare the names of a file with those of the public set; of other sets nothing but numbers is known."""
    if config.classes is None:
        return ClassPairs("", "")
    rule = "rule: a line a class, in the masks' order"
    alike = alike_names(f"{config.classes}: lines", names, range(1, len(names) + 1), rule)
    if config.dataset is None:
        shown = shown_pairs([f"{label} is {of_class[0]!r}" for label, of_class in enumerate(names)])
        return ClassPairs(shown, "", alike)
    known = dict(enumerate(public_names(config.dataset, "corrected")))
    pairs = pair_names(Path(config.classes), names, DataNames(f"{config.dataset}'s class", known, rule))
    return pairs._replace(alike=alike)


def _titles(names: Names, *, background: bool) -> list[str]:
    """Return what each class is called in tables and files; where first names are equal, with the label."""
    titles = ["background" if background and not label else of_class[0] for label, of_class in enumerate(names)]
    return [f"{title} (label {label})" if titles.count(title) > 1 else title for label, title in enumerate(titles)]


def _size(path: Path) -> int:
    """Return a file's size in bytes, -1 where it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
