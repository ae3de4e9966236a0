"""The image tower: a vision transformer that takes crops of any size."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_scale.batch import MEAN, STD
from cosmos_scale.config import VisionConfig
from cosmos_scale.kernels.linear import linear
from cosmos_scale.kernels.patches import cut_patches, level_values, normalised_patches
from cosmos_scale.model.cross_modal import AttentionPooler
from cosmos_scale.model.packing import lay_out_crops, pack_crops
from cosmos_scale.model.transformer import Attention, LayerNorm, Linear, Transformer, empty_parameter, normal_, uniform_

# Of the widest activations of a pass without backward on a CPU. Larger ones leave its caches, and glibc takes memory of
# more than 32 MiB from the kernel anew for each of them, page by page.
_PASS_BYTES = 20 * 2**20


class PatchEmbedding(nn.Module):
    """A convolution without bias whose stride is its kernel's size: one matrix product over flattened patches."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.triton = True  # whether the Triton kernel may serve
        self.weight = empty_parameter(width, 3, patch_size, patch_size)

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Embed crops, one tensor [B, 3, H, W] for each resolution: a token for each whole patch, row by row.

        crops: uint8 levels, or of a floating dtype and normalised. Returns [B, rows x columns, D] for each resolution;
        pixels past the last whole patch are unused.
        """
        size, dtype = self.patch_size, self.weight.dtype
        if crops[0].dtype == torch.uint8:
            patches_TI = normalised_patches(crops, size, pixel_values(dtype, crops[0].device), triton=self.triton)
        else:
            patches_TI = torch.cat([cut_patches(images.to(dtype), size).flatten(0, 1) for images in crops])
        tokens_TD = linear(patches_TI, self.weight.flatten(1), steady=True)
        counts = [(len(images), images.shape[2] // size * (images.shape[3] // size)) for images in crops]
        split = tokens_TD.split([count * patches for count, patches in counts])
        return [tokens.unflatten(0, sizes) for tokens, sizes in zip(split, counts, strict=True)]


class VisionTower(nn.Module):
    """ViT with a class token, learned positions and a norm before and after the blocks."""

    def __init__(self, config: VisionConfig, embed_dim: int, pooler_heads: int) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        self.conv1 = PatchEmbedding(config.width, config.patch_size)
        self.class_embedding = empty_parameter(config.width)
        self.positional_embedding = empty_parameter(1 + side * side, config.width)
        self.ln_pre = LayerNorm(config.width)
        self.transformer = Transformer(config.width, config.layers, config.width // config.head_width)
        self.ln_post = LayerNorm(config.width)
        self.proj = empty_parameter(config.width, embed_dim)
        # The pooler is here for its name in state dicts. Its queries are captions, so CosmosModel calls it.
        self.attn_cross_pool = AttentionPooler(embed_dim, pooler_heads)
        for module in self.modules():
            if isinstance(module, Linear | Attention):
                module.steady = True  # all steps have equally many crops of the same sizes, but not of captions' tokens

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise as OpenCLIP's image tower does."""
        width = self.class_embedding.shape[0]
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            normal_(parameter, width**-0.5, generator)
        uniform_(self.conv1.weight, self.conv1.weight[0].numel() ** -0.5, generator)
        for block in self.transformer.blocks():
            block.ln_1.init_weights()
            block.ln_2.init_weights()
            block.attn.init_uniform(generator)
            block.mlp.c_fc.init_uniform(width**-0.5, generator)
            block.mlp.c_proj.init_uniform((4 * width) ** -0.5, generator)
        self.ln_pre.init_weights()
        self.ln_post.init_weights()
        self.attn_cross_pool.init_weights(generator)

    def forward(self, crops: Sequence[Tensor], tokens_of: int = 0) -> tuple[Tensor, Tensor]:
        """Encode crops of one or several resolutions, all of them in one pass.

        crops: a tensor [B, 3, H, W] for each resolution, as in PatchEmbedding. Returns the pooled features [sum of B,
        E], not normalised, and the patch tokens after ln_post, without the class token, of the first `tokens_of` crops,
        one after the other: [tokens_of x patches, D].
        """
        embedded = self.conv1(crops)
        views = []
        for images_BCHW, patches_BLD in zip(crops, embedded, strict=True):
            positions_LD = self._positions(images_BCHW.shape[2], images_BCHW.shape[3])
            views.append(self._view(patches_BLD, positions_LD))
        tokens = [view_BLD.flatten(0, 1) for view_BLD in views]
        x_TD = self.ln_pre(torch.cat(tokens) if len(tokens) > 1 else tokens[0])
        layout = pack_crops(tuple((view.shape[0], view.shape[1]) for view in views), tokens_of, x_TD.device)
        x_RD = self.transformer(x_TD, layout.segments, layout.read, self.ln_post)
        count = len(layout.segments.queries)
        class_BD, patches_TD = x_RD.split([count, x_RD.shape[0] - count])
        return class_BD @ self.proj, patches_TD

    def patch_features(self, images_BCHW: Tensor, *, correlative: bool = False) -> tuple[Tensor, Tensor]:
        """Return the pooled features [B, E] and one feature for each patch [B, rows x columns, E]; none is normalised.

        images: [B, 3, H, W] of any size, as in PatchEmbedding. correlative: the last block weighs tokens by
        correlative self-attention (`Block.forward_correlative`), which changes the pooled features too. Keeps nothing
        for the next call: pictures have many sizes.
        """
        (patches_BLD,) = self.conv1([images_BCHW])
        view_BLD = self._view(patches_BLD, self._positions(*images_BCHW.shape[2:], keep=False))
        x_TD = self.ln_pre(view_BLD.flatten(0, 1))
        count, length = view_BLD.shape[:2]
        segments, read = lay_out_crops(((count, length),), count, x_TD.device)
        run = self.transformer.forward_correlative if correlative else self.transformer
        features_RE = run(x_TD, segments, read, self.ln_post) @ self.proj
        pooled_BE, patches_TE = features_RE.split([count, count * (length - 1)])
        return pooled_BE, patches_TE.unflatten(0, (count, length - 1))

    def crops_a_pass(self, images_BCHW: Tensor) -> int:
        """Return how many of some crops [B, 3, H, W] a pass without backward takes at a time, where speed counts.

        On a CPU at most as many as its caches hold, in passes of about one size; else all of them. A crop's features
        depend on it in their last bits only.
        """
        count = max(1, len(images_BCHW))
        if images_BCHW.device.type != "cpu":
            return count
        rows, columns = (side // self.conv1.patch_size for side in images_BCHW.shape[2:])
        widest = 4 * self.class_embedding.nbytes  # of a token: inside the MLP
        most = max(1, _PASS_BYTES // (widest * (1 + rows * columns)))
        passes = -(-count // most)
        return -(-count // passes)

    def _view(self, patches_BLD: Tensor, positions_LD: Tensor) -> Tensor:
        """Put the class token before the patches, and add the positions: [B, 1 + rows x columns, D]."""
        class_B1D = self.class_embedding.expand(patches_BLD.shape[0], 1, -1)
        return torch.cat([class_B1D, patches_BLD], dim=1) + positions_LD

    def _positions(self, height: int, width: int, *, keep: bool = True) -> Tensor:
        """Return the position table for crops of height x width pixels: [1 + rows x columns, D].

        keep: whether the interpolation is kept for the next crops of that size.
        """
        table, size = self.positional_embedding, self.conv1.patch_size
        rows, columns = height // size, width // size
        if height == width and rows * columns == table.shape[0] - 1:
            return table
        # Interpolated in float32 at least: a low-precision sum would add noise to every token.
        dtype = torch.promote_types(table.dtype, torch.float32)
        matrix_of = interpolation_matrix if keep else interpolate_table
        matrix = matrix_of(table.shape[0] - 1, rows, columns, dtype, table.device)
        class_1D, patches_PD = table.split([1, table.shape[0] - 1])
        return torch.cat([class_1D, (matrix @ patches_PD.to(dtype)).to(table.dtype)])


@cache  # kept for good: a CUDA graph reads them, and there are few
def pixel_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the normalised value of each 8-bit level of red, green and blue: [3, 256]."""
    with torch.inference_mode(False):  # see interpolation_matrix
        return level_values(MEAN, STD, dtype).to(device)


@cache  # as above
def interpolation_matrix(patches: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix of `interpolate_table` for a training step's crops, computed once."""
    return interpolate_table(patches, rows, columns, dtype, device)


def interpolate_table(patches: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the bicubic interpolation of a square position table as a matrix: [rows x columns, patches].

    Bicubic, corners not aligned, no antialias, scale factor (rows + 0.1) / sqrt(patches) as in DINO: the offset 0.1
    keeps the output size from being rounded down. The backward through the matrix is a plain product (torch's bicubic
    backward is not deterministic on CUDA).
    """
    side = round(patches**0.5)
    # Outside inference mode, even where the first caller is inside it: the cached tensor serves later backward passes.
    with torch.inference_mode(False), torch.no_grad():
        impulses = torch.eye(patches, dtype=torch.float64).reshape(1, patches, side, side)
        scale = ((rows + 0.1) / patches**0.5, (columns + 0.1) / patches**0.5)
        responses = functional.interpolate(impulses, scale_factor=scale, mode="bicubic", align_corners=False)
        return responses.flatten(2)[0].T.to(device, dtype).contiguous()
