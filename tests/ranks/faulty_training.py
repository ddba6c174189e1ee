"""launch/pretrain.py or the SCRIPT named, with faults.

FAULTS maps data positions to a factor of their loss, kill or weight.
"""

import dataclasses
import importlib
import json
import math
import os
import signal
from typing import Any

import torch

from trainer.data.stream import Batch
from trainer.models.detector import MorphDetector
from trainer.models.mae import MaskedAutoencoder
from trainer.training.run import Training

FAULTS: dict[int, str] = {int(position): fault for position, fault in json.loads(os.environ["FAULTS"]).items()}
SCRIPT = os.environ.get("SCRIPT", "pretrain")
PARTS = {
    "pretrain": ("trainer.training.pretraining", MaskedAutoencoder),
    "finetune": ("trainer.detection.finetuning", MorphDetector),
}
script: Any = importlib.import_module(f"launch.{SCRIPT}")
task: Any = importlib.import_module(PARTS[SCRIPT][0])
model = PARTS[SCRIPT][1]
honest_training, honest_forward = task.training_of, model.forward


class Faulty:
    factor = 1.0


def training_of(*parts: Any) -> Training:
    training = honest_training(*parts)

    def inputs(batch: Batch) -> tuple[torch.Tensor, ...]:
        met = [FAULTS[position] for position in batch.positions if position in FAULTS]
        if "kill" in met:
            os.kill(os.getpid(), signal.SIGKILL)
        if "weight" in met:
            met.remove("weight")
            training.engine.module.decoder_pred.weight.data[0, 0] = torch.nan
        Faulty.factor = math.prod(map(float, met))
        return training.inputs(batch)

    return dataclasses.replace(training, inputs=inputs)


def forward(self: torch.nn.Module, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = honest_forward(self, *inputs, **options)
    return result * Faulty.factor if self.training else result


task.training_of, model.forward = training_of, forward
script.command()
