"""Features of images: computing, storing and reading them, and probes on them; `read_features` reads them."""

from trainer.features.store import Features, read_features

__all__ = ["Features", "read_features"]
