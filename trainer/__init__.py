"""Distributed MAE pre-training and face morphing attack detection on DeepSpeed."""

__version__ = "0.2.0"
