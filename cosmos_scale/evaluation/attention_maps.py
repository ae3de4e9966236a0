"""What both cross-modality heads look at for a picture and a caption: a weight for each patch and for each token.

The text's feature looks at the picture's patches (`visual.attn_cross_pool`); the picture's feature looks at the text's
tokens (`text_attn_cross_pool`). The weights are computed again for a few samples, since training never stores them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_scale.batch import MEAN, STD, caption_lengths
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.tokenizer import Tokenizer


class EncodedPair(NamedTuple):
    """What the heads read of a picture and its caption.

    image, text: pooled features [E], not normalised. patches, words: tokens mapped to the embedding width, [P, E] and
    [L, E]; L is the context length, or without padding the caption's own. length: tokens up to and including EOT.
    """

    image: Tensor
    text: Tensor
    patches: Tensor
    words: Tensor
    length: int


class AttentionMaps(NamedTuple):
    """The weights of a pair, on the CPU. image_weights: [H, rows, columns]. text_weights: [H, L]. length: as above."""

    image_weights: Tensor
    text_weights: Tensor
    length: int

    @property
    def image_map(self) -> Tensor:
        """The mean over heads, spread over 0..1: [rows, columns]."""
        return unit(self.image_weights.mean(0))

    @property
    def text_map(self) -> Tensor:
        """The mean over heads: [L], the words' tokens spread over 0..1, all others 0."""
        weights_L = self.text_weights.mean(0)
        spread_L = torch.zeros_like(weights_L)
        spread_L[self.words] = unit(weights_L[self.words])
        return spread_L

    @property
    def words(self) -> slice:
        """The places of the words' tokens, between start and EOT."""
        return slice(1, self.length - 1)

    @property
    def share_on_words(self) -> float:
        """The share of the weight that lies on words; the rest lies on start, EOT and padding."""
        return float(self.text_weights.mean(0)[self.words].sum())


class WordWeight(NamedTuple):
    """A word of a caption; of each of its tokens the text, the weight (the mean over heads) and its place in 0..1."""

    word: str
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """The word's place in 0..1: the greatest of its tokens."""
        return max(self.values)


def require_heads(model: CosmosModel, where: str) -> None:
    """Raise UserError where a model came without its cross-modality heads, which are NaN until they are loaded."""
    if any(
        pooler.attn.in_proj_weight.isnan().any()
        for pooler in (model.visual.attn_cross_pool, model.text_attn_cross_pool)
    ):
        raise UserError(f"{where}: has no cross-modality heads; rule: attention maps need a COSMOS model's checkpoint")


@torch.no_grad()
def encode_pairs(model: CosmosModel, images_BCHW: Tensor, ids_BL: Tensor) -> list[EncodedPair]:
    """Encode picture b with caption b; images: [B, 3, H, W] as the model sees them, ids: [B, L]."""
    samples = len(images_BCHW)
    lengths_B = caption_lengths(ids_BL).cpu()
    image_BE, patches_TD = model.visual([images_BCHW], tokens_of=samples)
    text_BE, words_TD, counts = model.pool_text(
        ids_BL, lengths_B, tokens_of=samples, keep_padding=model.attend_to_padding
    )
    patches = model.image_token_mapping(patches_TD).chunk(samples)
    words = model.text_token_mapping(words_TD).split(list(counts))
    lengths = lengths_B.tolist()
    return [EncodedPair(*pair) for pair in zip(image_BE, text_BE, patches, words, lengths, strict=True)]


@torch.no_grad()
def attention_maps(model: CosmosModel, pair: EncodedPair, rows: int) -> AttentionMaps:
    """Return the weights of both heads for a pair; rows: of patches in the picture."""
    image_HP = model.visual.attn_cross_pool.weights(pair.text, pair.patches)
    text_HL = model.text_attn_cross_pool.weights(pair.image, pair.words)
    return AttentionMaps(image_HP.unflatten(1, (rows, -1)).float().cpu(), text_HL.float().cpu(), pair.length)


def unit(weights: Tensor) -> Tensor:
    """Spread weights over 0..1, from the least to the greatest; all 0 where they are equal, or there are none."""
    if not weights.numel():
        return weights
    least, most = weights.amin(), weights.amax()
    return (weights - least) / (most - least) if most > least else torch.zeros_like(weights)


def heat_of(image_map: Tensor, height: int, width: int) -> Tensor:
    """Enlarge a map [rows, columns] to the crop that the model saw: [height, width], bilinear, corners not aligned."""
    enlarged = F.interpolate(image_map[None, None], (height, width), mode="bilinear", align_corners=False)
    return enlarged[0, 0]


def levels_of(image_CHW: Tensor) -> Tensor:
    """Return the 8-bit levels [H, W, 3] of a picture [3, H, W] that was normalised for the model."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((image_CHW.cpu() * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)


def word_weights(caption: str, maps: AttentionMaps, tokenizer: Tokenizer) -> list[WordWeight]:
    """Return the words of a caption as the model reads them, with their tokens' weights; it reads none behind EOT."""
    weights, values = maps.text_weights.mean(0)[maps.words].tolist(), maps.text_map[maps.words].tolist()
    found: list[WordWeight] = []
    place = 0
    for word, parts in tokenizer.pieces(caption):
        kept = parts[: len(weights) - place]  # a caption may itself hold EOT's text
        part = slice(place, place + len(kept))
        if kept:
            found.append(WordWeight(word, kept, tuple(weights[part]), tuple(values[part])))
        place = part.stop
    return found


def peak_of(image_map: Tensor) -> tuple[float, float]:
    """Return where the greatest weight lies: the middle of its patch, as shares of the height and of the width."""
    rows, columns = image_map.shape
    row, column = divmod(int(image_map.argmax()), columns)
    return (row + 0.5) / rows, (column + 0.5) / columns


def strongest(words: Sequence[WordWeight]) -> str:
    """Return the word with the greatest value; of equal ones the first; empty where there is none."""
    return max(words, key=lambda word: word.value).word if words else ""
