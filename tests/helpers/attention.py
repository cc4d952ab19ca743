"""Attention as its definition has it, for comparison."""

import torch.nn.functional as F
from torch import Tensor

from owl.nn.attention import tokens_of


class DenseAttention:
    """PyTorch's attention with the whole mask.

    Args:
        seen: bool[1 or B, Q, K], which frames see which.
        tokens: Tokens per frame.
    """

    def __init__(self, seen: Tensor, tokens: int) -> None:
        self.mask = tokens_of(seen, tokens)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
