"""The detector of face morphs: building, training, judging, reporting; and `Detector`, which scores photographs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.detection.detector import Detector

__all__ = ["Detector"]


def __getattr__(name: str) -> Any:
    """Load the detector at its first use: it imports torch and the model library, which takes seconds."""
    if name != "Detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.detection.detector import Detector

    return Detector
