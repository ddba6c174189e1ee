"""Distributed MAE pre-training and face morphing attack detection on DeepSpeed."""

__version__ = "0.1.0"
