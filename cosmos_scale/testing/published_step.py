"""The published training step restated plainly: the trainer's own step is measured against it.

Weights, losses and updates are the same; none of the savings are made. Captions keep their padding to the full context.
The backbone runs once for each resolution. Position tables are interpolated under autograd. The poolers' tokens are
repeated and projected for every view. Token mappings run on tokens that are never read. Each pair of views has two
matrix products and two cross-entropies. The average is a loop over tensors, and the optimizer is torch's.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, OptimizerConfig
from cosmos_scale.model.cosmos import parameter_decays

GLOBAL_VIEWS = 2  # image views of the clip loss, and views of the teacher: the published number
MOST_LOG_SCALE = math.log(100.0)


class Losses(NamedTuple):
    """Both losses of a step and their sum."""

    total: float
    clip: float
    distill: float


class PublishedBlock(nn.Module):
    """A pre-norm residual block on [L, B, D], the layout that torch's attention has by default."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x_LBD: Tensor, mask_LL: Tensor | None) -> Tensor:
        """Return [L, B, D]."""
        normed = self.ln_1(x_LBD)
        attended, _ = self.attn(normed, normed, normed, need_weights=False, attn_mask=mask_LL)
        x_LBD = x_LBD + attended
        output: Tensor = x_LBD + self.mlp(self.ln_2(x_LBD))
        return output


class Blocks(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(PublishedBlock(width, heads) for _ in range(layers))

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        """Return [B, L, D]."""
        x_LBD = x_BLD.transpose(0, 1).contiguous()
        for block in self.resblocks:
            x_LBD = block(x_LBD, mask_LL)
        return x_LBD.transpose(0, 1)


class Pooler(nn.Module):
    """Cross-attention in which each row has one query."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)

    def forward(self, queries_NE: Tensor, tokens_NLE: Tensor) -> Tensor:
        """Return [N, E]."""
        tokens_LNE = self.ln_k(tokens_NLE).transpose(0, 1)
        pooled_1NE, _ = self.attn(self.ln_q(queries_NE)[None], tokens_LNE, tokens_LNE, need_weights=False)
        pooled: Tensor = pooled_1NE[0]
        return pooled


class ImageTower(nn.Module):
    """A vision transformer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        vision = model.vision
        self.side = vision.image_size // vision.patch_size
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(vision.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + self.side**2, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width)
        self.transformer = Blocks(vision.width, vision.layers, vision.width // vision.head_width)
        self.ln_post = nn.LayerNorm(vision.width)
        self.proj = nn.Parameter(torch.empty(vision.width, model.embed_dim))
        self.attn_cross_pool = Pooler(model.embed_dim, model.pooler_heads)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode crops of one size: pooled features [B, E] and patch tokens [B, L, D]."""
        grid_BDHW = self.conv1(images_BCHW)
        patches_BLD = grid_BDHW.flatten(2).transpose(1, 2)
        class_B1D = self.class_embedding.expand(len(images_BCHW), 1, -1)
        x_BLD = torch.cat([class_B1D, patches_BLD], dim=1) + self.positions(*grid_BDHW.shape[2:])
        x_BLD = self.ln_post(self.transformer(self.ln_pre(x_BLD)))
        return x_BLD[:, 0] @ self.proj, x_BLD[:, 1:]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the position table of rows x columns patches; the offset of 0.1 is DINO's."""
        if rows == columns == self.side:
            return self.positional_embedding
        table_1DHW = self.positional_embedding[1:].T.unflatten(1, (self.side, self.side))[None]
        scale = ((rows + 0.1) / self.side, (columns + 0.1) / self.side)
        resized_1DHW = functional.interpolate(table_1DHW, scale_factor=scale, mode="bicubic")
        return torch.cat([self.positional_embedding[:1], resized_1DHW[0].flatten(1).T])


class PublishedModel(nn.Module):
    """Both towers and the cross-modality heads; state dicts of CosmosModel fit, so that weights can be taken over."""

    causal_mask: Tensor

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        text, width = model.text, model.embed_dim
        self.visual = ImageTower(model)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Blocks(text.width, text.layers, text.heads)
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, width))
        self.text_attn_cross_pool = Pooler(width, model.pooler_heads)
        self.image_token_mapping = nn.Linear(model.vision.width, width)
        self.text_token_mapping = nn.Linear(text.width, width)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.distill_logit_scale = nn.Parameter(torch.empty(()))
        ones = torch.ones(text.context_length, text.context_length, dtype=torch.bool)
        mask = torch.zeros(ones.shape).masked_fill(ones.triu(1), -torch.inf)
        self.register_buffer("causal_mask", mask, persistent=False)

    def images(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encode crops, one tensor [B, 3, H, W] a resolution: pooled features, and the first tensor's mapped tokens."""
        encoded = [self.visual(images_BCHW) for images_BCHW in crops]
        return torch.cat([pooled for pooled, _ in encoded]), self.image_token_mapping(encoded[0][1])

    def texts(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Encode captions with their padding: pooled features [B, E] and mapped tokens [B, L, E]."""
        x_BLD = self.token_embedding(ids_BL) + self.positional_embedding
        x_BLD = self.ln_final(self.transformer(x_BLD, self.causal_mask))
        ends_BD = x_BLD[torch.arange(len(ids_BL)), ids_BL.argmax(dim=-1)]
        return ends_BD @ self.text_projection, self.text_token_mapping(x_BLD)


class PublishedStep:
    """Trains a student and its teacher, one batch a call."""

    def __init__(
        self, model: ModelConfig, student: dict[str, Tensor], teacher: dict[str, Tensor], optimizer: OptimizerConfig
    ) -> None:
        """Start from two state dicts of CosmosModel."""
        self.student, self.teacher = PublishedModel(model), PublishedModel(model).requires_grad_(False)
        self.student.load_state_dict(student)
        self.teacher.load_state_dict(teacher)
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.student, optimizer.weight_decay), betas=optimizer.betas, eps=optimizer.eps
        )

    def __call__(self, batch: Batch, lr: float, momentum: float) -> Losses:
        """Train on a batch and return its losses."""
        self.optimizer.zero_grad()
        clip, distill = self.losses(batch)
        total = clip + distill
        total.backward()
        with torch.no_grad():
            for average, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.mul_(momentum).add_((1 - momentum) * weight)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for model in (self.student, self.teacher):
                model.logit_scale.clamp_(0, MOST_LOG_SCALE)
                model.distill_logit_scale.clamp_(0, MOST_LOG_SCALE)
        return Losses(total.item(), clip.item(), distill.item())

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the clip and the distillation loss, [] each, with their graph."""
        samples = batch.captions.shape[1]
        crops = [views.flatten(0, 1) for views in (batch.global_crops, batch.local_crops) if len(views)]
        image_NE, patches = self.student.images(crops)
        text_NE, words = self.student.texts(batch.captions.flatten(0, 1))
        # The first view's tokens, repeated for each view that attends to them.
        from_text = self.student.text_attn_cross_pool(image_NE, _repeat(words[:samples], len(image_NE)))
        from_image = self.student.visual.attn_cross_pool(text_NE, _repeat(patches[:samples], len(text_NE)))
        image, text = _views(image_NE, samples), _views(text_NE, samples)
        crossmodal = [_views(image_NE + from_text, samples), _views(text_NE + from_image, samples)]

        taught = [
            _views(self.teacher.images(crops[:1])[0], samples),
            _views(self.teacher.texts(batch.captions[:GLOBAL_VIEWS].flatten(0, 1))[0], samples),
        ]
        clip = all_pairs(image[:GLOBAL_VIEWS], text, self.student.logit_scale.exp())
        scale = self.student.distill_logit_scale.exp()
        groups = [all_pairs(views, targets, scale) for views in crossmodal for targets in taught]
        return clip, torch.stack(groups).mean()


def all_pairs(views: Sequence[Tensor], targets: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Return the mean of both directions' cross-entropies over all pairs of a view and a target."""
    labels = torch.arange(len(views[0]))
    losses = []
    for view in views:
        for target in targets:
            forward, backward = scale * view @ target.T, scale * target @ view.T
            losses.append((functional.cross_entropy(forward, labels) + functional.cross_entropy(backward, labels)) / 2)
    return torch.stack(losses).mean()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's two groups: parameters without weight decay, then with it."""
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        groups[parameter_decays(name, parameter)]["params"].append(parameter)
    return groups


def _repeat(tokens_BLE: Tensor, rows: int) -> Tensor:
    return tokens_BLE.repeat(rows // len(tokens_BLE), 1, 1)


def _views(features_NE: Tensor, samples: int) -> Sequence[Tensor]:
    """Normalise, and cut into one [B, E] for each view."""
    views: Sequence[Tensor] = functional.normalize(features_NE, dim=-1).split(samples)
    return views
