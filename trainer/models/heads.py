"""Layers between the pooled tokens and the logits.

Shapes: B images, D width of the input, E width of the projection, C = 2 classes [bonafide, morph].
"""

from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """Linear, ReLU, linear: a separate space for the decision, so that the encoder's space changes less.

    SimCLR's batch norms are left out: their statistics would depend on the micro batch and the number of ranks.

    Source: Chen et al. 2020, arXiv 2002.05709, section 2.1.
    """

    def __init__(self, width: int, *, proj_dim: int = 256, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden_dim or width)
        self.out = nn.Linear(hidden_dim or width, proj_dim)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the projection (B, E)."""
        projected_BE: Tensor = self.out(F.relu(self.hidden(pooled_BD)))
        return projected_BE


class CosineLayer(nn.Module):
    """Cosines between an embedding and one learned prototype a class; the last layer with the margin loss.

    Source: Wang et al. 2018 (CosFace), arXiv 1801.09414, section 3.1.
    """

    def __init__(self, width: int, num_classes: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(nn.Linear(width, num_classes).weight.detach().clone()))

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Return cosines (B, C), each in [-1, 1]."""
        return F.linear(F.normalize(embedding_BD, dim=-1), F.normalize(self.weight, dim=-1))
