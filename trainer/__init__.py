"""Distributed MAE pre-training and face morphing attack detection on DeepSpeed."""

import sys

__version__ = "0.3.0"

if sys.platform != "linux":
    raise ImportError(f"face-mae-trainer needs Linux (fork, /proc, POSIX signals), but this is {sys.platform}")
