"""The text tower: a causal transformer whose pooled feature is read at the end of the text."""

import torch
from torch import Tensor, nn

from cosmos_scale.config import TextConfig
from cosmos_scale.model.transformer import Embedding, LayerNorm, Transformer, empty_parameter, normal_, uniform_


def end_of_text(ids_BL: Tensor) -> Tensor:
    """Return the position of EOT, the largest id, in every row: [B] int64."""
    return ids_BL.argmax(dim=-1)


class TextTower(nn.Module):
    """Causal text transformer.

    In OpenCLIP's state-dict names its parameters have no prefix of their own: the whole model is this tower with the
    image tower and the heads beside it, so CosmosModel derives from it.
    """

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

    def pool_text(self, ids_BL: Tensor, tokens_of: int = 0) -> tuple[Tensor, Tensor]:
        """Encode captions.

        ids: [B, L] integers; L at most the context length; padding is an ordinary token, and the causal mask keeps it
        from everything before it. Returns the pooled features [B, E], not normalised, and the tokens after ln_final of
        the first `tokens_of` captions, padding included: [tokens_of, L, D]. Tokens are normed only where asked for.
        """
        x_BLD = self.token_embedding(ids_BL) + self.positional_embedding[: ids_BL.shape[1]]
        x_BLD = self.transformer(x_BLD, causal=True)
        rows = torch.arange(x_BLD.shape[0], device=x_BLD.device)
        pooled_BE = self.ln_final(x_BLD[rows, end_of_text(ids_BL)]) @ self.text_projection
        return pooled_BE, self.ln_final(x_BLD[:tokens_of])
