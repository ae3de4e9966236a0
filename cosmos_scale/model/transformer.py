"""The pre-norm transformer that both towers share, and layers that are NaN until their tower initialises them.

NaN makes a forgotten initialisation visible at once, and needs no random draws, which torch's own layers make. Modules
have OpenCLIP's names, since these stand in checkpoints.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cosmos_scale.kernels.attention import Backend, attention
from cosmos_scale.kernels.gelu_in_pieces import gelu_in_pieces
from cosmos_scale.kernels.linear import linear
from cosmos_scale.kernels.pointwise import add_norm, gelu, split_stacked
from cosmos_scale.kernels.quick_gelu import quick_gelu
from cosmos_scale.kernels.segments import Segments
from cosmos_scale.kernels.serving import like_gpu, serves


def empty_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter of NaN, on the default device."""
    return nn.Parameter(torch.full(shape, torch.nan))


def uniform_(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with draws from -bound .. bound.

    The draws are float32, on the generator's device, so that one seed gives the same model on any device and in any
    dtype.
    """
    draws = torch.empty(parameter.shape, device=generator.device).uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        parameter.copy_(draws)


def normal_(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with draws from an untruncated normal of mean 0; drawn as in `uniform_`."""
    draws = torch.empty(parameter.shape, device=generator.device).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        parameter.copy_(draws)


class Linear(nn.Linear):
    """nn.Linear without its initialisation, on [T, D]. steady: whether T is the same at every step."""

    steady = False

    def reset_parameters(self) -> None:
        """Leave NaN until the owner initialises."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, torch.nan)

    def init_uniform(self, bound: float, generator: torch.Generator) -> None:
        """Draw weight and bias from -bound .. bound."""
        uniform_(self.weight, bound, generator)
        uniform_(self.bias, bound, generator)

    def forward(self, x_TD: Tensor, *, sum_bias: bool = True) -> Any:
        """Return [T, E]; without sum_bias (see `linear`) also a view of the bias, to which its gradient may flow.

        The view is made here, where ZeRO stage 3 has gathered the bias. It is None where nobody wants gradients.
        """
        output = linear(x_TD, self.weight, self.bias, steady=self.steady, sum_bias=sum_bias)
        if sum_bias:
            return output
        return output, self.bias.view_as(self.bias) if torch.is_grad_enabled() else None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (eps 1e-5) without its initialisation. triton: whether the Triton kernels may serve.

    values: float32 gain and offset [D] that the forward reads in place of weight and bias, where these are the same
    rounded to a lower precision. Gradients still go to weight and bias. torch's norm on GPUs takes gains of its input's
    dtype only, and reads weight and bias. They are no buffers: who changes a module's dtype must leave them.
    """

    triton = True
    values: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        """Leave NaN until the owner initialises."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, torch.nan)

    def init_weights(self) -> None:
        """Set weight 1 and bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, update: Tensor | None = None, bias_D: Tensor | None = None, *, with_sum: bool = False
    ) -> Any:
        """Return x, or x + update, normalised over the last dimension; with_sum: x + update first, then that.

        update and with_sum are only for tensors that the Triton kernels serve; bias: see `add_norm`.
        """
        if self.served(x):
            total, normed = add_norm(x, update, bias_D, self.weight, self.bias, self.eps, self.values)
            return (total, normed) if with_sum else normed
        if self.values is None or like_gpu(x.device):
            return super().forward(x)
        gain_D, offset_D = map(_ReadInstead.apply, (self.weight, self.bias), self.values)
        return functional.layer_norm(x, self.normalized_shape, gain_D, offset_D, self.eps)

    def served(self, x: Tensor) -> bool:
        """Tell whether the Triton kernels serve for x."""
        return self.triton and serves(x)


class _ReadInstead(torch.autograd.Function):
    """Return values in place of a parameter, which takes the gradient, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


class Embedding(nn.Embedding):
    """nn.Embedding without its initialisation."""

    def reset_parameters(self) -> None:
        """Leave NaN until the owner initialises."""
        nn.init.constant_(self.weight, torch.nan)


class Attention(nn.Module):
    """Multi-head attention with one stacked [3D, D] projection for queries, keys and values. steady: as in Linear."""

    steady = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend: Backend = "auto"
        self.in_proj_weight = empty_parameter(3 * width, width)
        self.in_proj_bias = empty_parameter(3 * width)
        self.out_proj = Linear(width, width)

    def init_biases(self) -> None:
        """Set both biases to 0, as both towers' and both poolers' attention starts."""
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def init_uniform(self, generator: torch.Generator) -> None:
        """Draw in_proj_weight Xavier-uniform over the stacked matrix, out_proj.weight from +-D^-1/2; biases 0."""
        width = self.out_proj.in_features
        uniform_(self.in_proj_weight, (6 / (4 * width)) ** 0.5, generator)
        uniform_(self.out_proj.weight, width**-0.5, generator)
        self.init_biases()

    def forward(self, queries_TD: Tensor, segments: Segments, tokens_SD: Tensor) -> Tensor:
        """Attend from queries [T, D] to tokens [S, D] of the same segment; returns [T, D]."""
        width = queries_TD.shape[-1]
        # Split, not sliced: the backward then joins both parts' gradients, instead of adding two padded with zeros.
        weight, token_weight = self.in_proj_weight.split([width, 2 * width])
        bias, token_bias = self.in_proj_bias.split([width, 2 * width])
        (q,) = self._split_heads(linear(queries_TD, weight, bias, steady=self.steady), 1)
        k, v = self._split_heads(linear(tokens_SD, token_weight, token_bias, steady=self.steady), 2)
        output: Tensor = self.out_proj(self.attend(q, k, v, segments))
        return output

    def weights(self, queries_TD: Tensor, tokens_SD: Tensor) -> Tensor:
        """Return the weights with which `forward` attends inside one segment: [H, T, S]; rows sum to 1.

        They are for people to look at: `forward` never stores them.
        """
        width = queries_TD.shape[-1]
        weight, token_weight, _ = self.in_proj_weight.split(width)
        bias, token_bias, _ = self.in_proj_bias.split(width)
        (q_THD,) = self._split_heads(linear(queries_TD, weight, bias), 1)
        (k_SHD,) = self._split_heads(linear(tokens_SD, token_weight, token_bias), 1)
        logits_HTS = torch.einsum("thd,shd->hts", q_THD, k_SHD) * q_THD.shape[-1] ** -0.5
        weights_HTS: Tensor = logits_HTS.softmax(-1)
        return weights_HTS

    def project(self, x_TD: Tensor, *, served: bool = False) -> tuple[Tensor, ...]:
        """Return queries, keys and values of tokens that attend to one another: [T, H, D / H] each.

        served: whether the Triton kernels serve.
        """
        weight, bias = self.in_proj_weight, self.in_proj_bias
        stacked_TW = linear(x_TD, weight, bias, steady=self.steady, sum_bias=not served)
        return split_stacked(stacked_TW, bias, self.heads) if served else self._split_heads(stacked_TW, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool = False) -> Tensor:
        """Attend in all heads; returns [T, D], before the output projection."""
        return attention(q, k, v, segments, causal, self.backend).flatten(1)

    def _split_heads(self, stacked: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Cut [T, parts D] into `parts` of [T, H, D / H]."""
        return tuple(stacked.unflatten(-1, (parts, self.heads, -1)).unbind(1))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, four times as wide inside; activation: as in the config."""

    activation: Literal["gelu", "quick_gelu"] = "gelu"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x_TD: Tensor, *, served: bool = False, sum_bias: bool = True) -> Any:
        """Return [T, D]. served: whether the Triton kernels serve. Without sum_bias: as `Linear`, of c_proj."""
        return self.c_proj(self._activate(x_TD, served), sum_bias=sum_bias)

    def _activate(self, x_TD: Tensor, served: bool) -> Tensor:
        """Return the activation of the first layer [T, 4 D]. Only the exact GELU has a Triton kernel."""
        if self.activation == "quick_gelu":
            return quick_gelu(self.c_fc(x_TD))
        if served:
            return gelu(*self.c_fc(x_TD, sum_bias=False))
        return gelu_in_pieces(self.c_fc(x_TD), steady=self.c_fc.steady)


class Block(nn.Module):
    """A pre-norm residual block.

    Where the Triton kernels serve, a block may leave its last addition to the norm that follows it, in the next block
    or after the last: one pass adds and normalises. The pass also sums the gradient of c_proj's bias.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(width)
        self.compiled = False

    def forward(
        self,
        x_TD: Tensor,
        segments: Segments,
        causal: bool,
        read: Tensor | None = None,
        update_TD: Tensor | None = None,
        update_bias_D: Tensor | None = None,
        leave_open: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """Return the tokens `read` ([R] int64; None: all of them): [R, D].

        The other arguments are for tensors that the Triton kernels serve. update: [T, D], is to be added to x first;
        update_bias: the bias in it. leave_open: return this block's x, update and bias, without their addition.
        """
        if self.served(x_TD):
            return self._forward_served(x_TD, segments, causal, read, update_TD, update_bias_D, leave_open)
        enter, leave = _compiled_parts() if self.compiled else (Block._enter, Block._leave)
        q, k, v = enter(self, x_TD)
        attended_RD = _rows(self.attn.attend(q, k, v, segments, causal), read)
        # The projection is not compiled with the rest: attention's output is a view at times, which would make torch
        # compile the rest twice.
        return leave(self, _rows(x_TD, read), self.attn.out_proj(attended_RD))

    def forward_correlative(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """Return all tokens [T, D], with correlative self-attention; for evaluation alone.

        A token weighs the others by how its query is like theirs, and by how its key is like theirs: softmax(q q^T) +
        softmax(k k^T), a sum, whose rows add to 2. Source: SCLIP (ECCV 2024), section 3.2.
        """
        q, k, v = self.attn.project(self.ln_1(x_TD))
        # The sum of both weights times v is the sum of two attentions, which the usual back ends compute.
        attended_TD = self.attn.attend(q, q, v, segments) + self.attn.attend(k, k, v, segments)
        return self._leave(x_TD, self.attn.out_proj(attended_TD))

    def served(self, x_TD: Tensor) -> bool:
        """Tell whether the Triton kernels serve for x."""
        return not self.compiled and self.ln_1.served(x_TD)

    def _forward_served(
        self,
        x_TD: Tensor,
        segments: Segments,
        causal: bool,
        read: Tensor | None,
        update_TD: Tensor | None,
        update_bias_D: Tensor | None,
        leave_open: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        x_TD, normed_TD = self.ln_1(x_TD, update_TD, update_bias_D, with_sum=True)
        q, k, v = self.attn.project(normed_TD, served=True)
        attended_RD = _rows(self.attn.attend(q, k, v, segments, causal), read)
        update_RD, bias_D = self.attn.out_proj(attended_RD, sum_bias=False)
        x_RD, normed_RD = self.ln_2(_rows(x_TD, read), update_RD, bias_D, with_sum=True)
        if leave_open:
            return x_RD, *self.mlp(normed_RD, served=True, sum_bias=False)
        closed_RD: Tensor = x_RD + self.mlp(normed_RD, served=True)
        return closed_RD

    def compile_parts(self) -> None:
        """Compile the parts before and after attention, for any number of tokens.

        Attention itself is not compiled: its segments change at every step, and its back ends are fused already.
        """
        self.compiled = True

    def _enter(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        return self.attn.project(self.ln_1(x_TD))

    def _leave(self, x_RD: Tensor, update_RD: Tensor) -> Tensor:
        x_RD = x_RD + update_RD
        output: Tensor = x_RD + self.mlp(self.ln_2(x_RD))
        return output


@lru_cache(maxsize=1)
def _compiled_parts() -> tuple[
    Callable[[Block, Tensor], tuple[Tensor, ...]], Callable[[Block, Tensor, Tensor], Tensor]
]:
    """Return both parts of a block, compiled.

    The compiled functions belong to the class and not to a block. If a block held its own, a copy of the block would
    still compute with the original's weights.
    """
    return torch.compile(Block._enter, dynamic=True), torch.compile(Block._leave, dynamic=True)


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.recompute = 0  # every n-th block keeps only its input for the backward

    def blocks(self) -> list[Block]:
        """Return the blocks, typed."""
        return [block for block in self.resblocks if isinstance(block, Block)]

    def forward(self, x_TD: Tensor, segments: Segments, read: Tensor, norm: LayerNorm, causal: bool = False) -> Tensor:
        """Run all views' tokens [T, D] through each block once; returns the tokens `read`, after `norm`: [R, D].

        In the last block a token that is not read serves as key and value only: its output projection and MLP are left
        out.
        """
        blocks = self.blocks()
        recomputed = [self._recomputes(number) for number in range(len(blocks))]
        update_TD = bias_D = None
        for number, block in enumerate(blocks):
            arguments = (x_TD, segments, causal, read if block is blocks[-1] else None)
            if recomputed[number]:
                # The reentrant form: the other form compares the shapes of weights, and ZeRO stage 3 takes weights away
                # before the backward.
                x_TD = checkpoint(block, *arguments, use_reentrant=True, preserve_rng_state=False)
            elif block.served(x_TD) and not any(recomputed[number + 1 : number + 2]):
                x_TD, update_TD, bias_D = block(*arguments, update_TD, bias_D, leave_open=True)
                continue
            else:
                x_TD = block(*arguments, update_TD, bias_D)
            update_TD = bias_D = None
        normed_RD: Tensor = norm(x_TD, update_TD, bias_D)
        return normed_RD

    def forward_correlative(self, x_TD: Tensor, segments: Segments, read: Tensor, norm: LayerNorm) -> Tensor:
        """Do what `forward` does, with correlative self-attention in the last block; for evaluation alone."""
        *blocks, last = self.blocks()
        for block in blocks:
            x_TD = block(x_TD, segments, False)
        normed_RD: Tensor = norm(_rows(last.forward_correlative(x_TD, segments), read))
        return normed_RD

    def _recomputes(self, number: int) -> bool:
        """Tell whether a block keeps only its input, one tensor: nothing is left open before it, nor by it."""
        return self.recompute > 0 and number % self.recompute == 0 and torch.is_grad_enabled()


def _rows(x_TD: Tensor, read: Tensor | None) -> Tensor:
    return x_TD if read is None else x_TD.index_select(0, read)
