"""The cross-modality head: features of one modality attend to the tokens of the other modality."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cosmos_scale.kernels.segments import Segments
from cosmos_scale.model.transformer import Attention, LayerNorm


class AttentionPooler(nn.Module):
    """Cross-attention with its own norms: out_proj(MHA(LN_q(queries), LN_k(tokens)))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_q = LayerNorm(width)
        self.ln_k = LayerNorm(width)
        self.attn = Attention(width, heads)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise: uniform projections, biases 0."""
        self.ln_q.init_weights()
        self.ln_k.init_weights()
        self.attn.init_uniform(generator)

    def weights(self, query_E: Tensor, tokens_LE: Tensor) -> Tensor:
        """Return the weights [H, L] with which `forward` pools a sample's tokens for one of its views."""
        return self.attn.weights(self.ln_q(query_E[None]), self.ln_k(tokens_LE))[:, 0]

    def forward(self, queries_VBE: Tensor, tokens_TE: Tensor, lengths: Sequence[int]) -> Tensor:
        """Pool a sample's tokens once for each of its views; returns [V, B, E].

        queries: [V, B, E] pooled features, not normalised. tokens: [T, E], mapped to the embedding width, sample after
        sample; keys and values are projected once for all V queries. lengths: how many tokens each sample has.
        """
        views, samples = queries_VBE.shape[:2]
        queries_BVE = self.ln_q(queries_VBE).transpose(0, 1)
        segments = Segments([views] * samples, lengths)
        pooled_TE: Tensor = self.attn(queries_BVE.flatten(0, 1), segments, self.ln_k(tokens_TE))
        return pooled_TE.view(samples, views, -1).transpose(0, 1)
