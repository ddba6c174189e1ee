"""What the last checkpoint of a run holds, to the bit."""

from pathlib import Path
from typing import Any

import torch

from trainer.distributed.zero_state import load_safely


def last_state(output: Path) -> list[tuple[str, str, Any]]:
    """Every tensor of the last checkpoint: weights and moments."""
    root = max((output / "checkpoints").glob("step-*"))
    found = []

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((name, str(value.dtype), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()))
        elif isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{name}/{key}", entry)
        elif isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                walk(f"{name}/{i}", entry)

    for path in sorted(root.rglob("*.pt")):
        walk(f"{root.name}/{path.name}", load_safely(str(path)))
    assert len(found) > 20
    return found
