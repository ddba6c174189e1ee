"""A decoder block in which hidden patches attend to the seen ones, but not to each other.

The result for a hidden patch then depends on no other hidden patch. Any subset of them may be predicted, at a
proportional cost, with the same result for each.

Shapes: B images, S hidden patches, K seen tokens, E width, h heads, d = E/h.
Source: Fu et al. 2024, arXiv 2401.14391, section 3.2 (without its weighting of the encoder's blocks).
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class CrossBlock(nn.Module):
    """Cross-attention and an MLP, pre-norm, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_seen = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden_BSE: Tensor, seen_BKE: Tensor) -> Tensor:
        """Return the hidden tokens after attending to the seen ones, (B, S, E)."""
        q_BhSd = rearrange(self.query(self.norm1(hidden_BSE)), "b s (h d) -> b h s d", h=self.num_heads)
        k_BhKd, v_BhKd = rearrange(
            self.key_value(self.norm_seen(seen_BKE)), "b k (two h d) -> two b h k d", two=2, h=self.num_heads
        )
        found_BhSd = F.scaled_dot_product_attention(q_BhSd, k_BhKd, v_BhKd)
        hidden_BSE = hidden_BSE + self.proj(rearrange(found_BhSd, "b h s d -> b s (h d)"))
        painted_BSE: Tensor = hidden_BSE + self.mlp(self.norm2(hidden_BSE))
        return painted_BSE

    def flops(self, num_hidden: int, num_seen: int) -> int:
        """Count the FLOPs (multiply-adds times two) of one forward pass of one image."""
        width = self.query.in_features
        # Matrices of E x E that a hidden patch passes: query 1, projection 1, MLP 8; a seen token: key and value, 2.
        # Attention multiplies S x K x E twice, for the weights and for the values.
        return 2 * width**2 * (10 * num_hidden + 2 * num_seen) + 4 * width * num_hidden * num_seen
