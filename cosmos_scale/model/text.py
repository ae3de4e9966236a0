"""The text tower: a causal transformer whose pooled feature is read at the end of the text."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_scale.config import TextConfig
from cosmos_scale.model.packing import pack_captions, token_multiple
from cosmos_scale.model.transformer import Embedding, LayerNorm, Transformer, empty_parameter, normal_, uniform_


class TextTower(nn.Module):
    """Causal text transformer.

    In OpenCLIP's state dicts the text tower's parameters have no prefix. So CosmosModel derives from this class and
    adds the image tower and the heads. token_multiple: see `packing.token_multiple`.
    """

    token_multiple: int | None = None

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.positional_embedding = empty_parameter(config.context_length, config.width)
        self.transformer = Transformer(config.width, config.layers, config.heads)
        self.ln_final = LayerNorm(config.width)
        self.text_projection = empty_parameter(config.width, embed_dim)

    def init_text_tower(self, generator: torch.Generator) -> None:
        """Initialise as OpenCLIP's text tower does."""
        width, blocks = self.text_projection.shape[0], self.transformer.blocks()
        normal_(self.token_embedding.weight, 0.02, generator)
        normal_(self.positional_embedding, 0.01, generator)
        residual_std = width**-0.5 * (2 * len(blocks)) ** -0.5  # 2 additions a block to the residual stream
        for block in blocks:
            block.ln_1.init_weights()
            block.ln_2.init_weights()
            normal_(block.attn.in_proj_weight, width**-0.5, generator)
            normal_(block.attn.out_proj.weight, residual_std, generator)
            block.attn.init_biases()
            normal_(block.mlp.c_fc.weight, (2 * width) ** -0.5, generator)
            uniform_(block.mlp.c_fc.bias, width**-0.5, generator)
            normal_(block.mlp.c_proj.weight, residual_std, generator)
            uniform_(block.mlp.c_proj.bias, (4 * width) ** -0.5, generator)
        self.ln_final.init_weights()
        normal_(self.text_projection, width**-0.5, generator)

    def pool_text(
        self, ids_BL: Tensor, lengths_B: Tensor, tokens_of: int = 0, keep_padding: bool = False
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Encode captions, cut at their EOT: under the causal mask no token sees what follows it.

        ids: [B, L] integers; L at most the context length. lengths: [B] int64 on the CPU, see `caption_lengths`.
        Returns the pooled features [B, E], not normalised; the tokens after ln_final of the first `tokens_of` captions,
        one after the other, [T, D]; and how many tokens each of these captions has: L with keep_padding, else its
        length.
        """
        samples, context = ids_BL.shape
        multiple = token_multiple(self.token_multiple, ids_BL.device)
        layout = pack_captions(lengths_B, context, ids_BL.device, tokens_of, keep_padding, multiple)
        ids_T = ids_BL.flatten().index_select(0, layout.ids)
        x_TD = self.token_embedding(ids_T) + functional.embedding(layout.places, self.positional_embedding)
        x_RD = self.transformer(x_TD, layout.segments, layout.read, self.ln_final, causal=True)
        ends_BD, tokens_TD = x_RD.split([samples, x_RD.shape[0] - samples])
        return ends_BD @ self.text_projection, tokens_TD, layout.read_lengths
