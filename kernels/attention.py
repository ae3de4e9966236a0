"""Attention over segments of tokens: one function for both towers and both poolers."""

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, *, causal: bool = False, key_mask_BS: Tensor | None = None
) -> Tensor:
    """Attend from L queries to S keys in every head; returns [B, L, H, D].

    q: [B, L, H, D]; k, v: [B, S, H, D], D the width of one head; any floating dtype, one for all three.
    causal: position i sees keys 0..i; needs L = S. key_mask: [B, S] bool, True where a key may be seen; a row whose
    keys are all False has no defined result. Logits are scaled by D^-1/2.
    Raises ValueError for shapes that do not go together.
    """
    queries, keys = q_BLHD.shape[1], k_BSHD.shape[1]
    if causal and queries != keys:
        raise ValueError(f"causal attention needs as many queries as keys, not {queries} and {keys}")
    if key_mask_BS is not None and key_mask_BS.shape != k_BSHD.shape[:2]:
        raise ValueError(f"key_mask: shape {tuple(key_mask_BS.shape)} must be {tuple(k_BSHD.shape[:2])}")
    mask = None
    if key_mask_BS is not None:
        mask = key_mask_BS[:, None, None, :]
        if causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    output_BHLD = functional.scaled_dot_product_attention(
        q_BLHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,  # without a mask the back ends skip the upper triangle's work
    )
    return output_BHLD.transpose(1, 2)
