"""MorphClassifier: a small perceptron with two classes, [bonafide, morph] = [0, 1].

Shapes: B images, D width of the input, H hidden width, C = 2 classes.
"""

from torch import Tensor, nn

from trainer.models.heads import CosineLayer


class MorphClassifier(nn.Module):
    """Layer norm, linear, GELU, dropout, and a last layer: linear, or cosines to prototypes for the margin loss."""

    def __init__(
        self, width: int, *, hidden_dim: int | None = None, cosine: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        hidden = hidden_dim or width
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.out: nn.Module = CosineLayer(hidden) if cosine else nn.Linear(hidden, 2)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Return logits, or cosines, of shape (B, C)."""
        hidden_BH = self.dropout(self.activation(self.hidden(self.norm(embedding_BD))))
        result_BC: Tensor = self.out(hidden_BH)
        return result_BC
