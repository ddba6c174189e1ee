"""launch/pretrain.py with faults: FAULTS maps data positions to a factor of their loss, kill or weight."""

import dataclasses
import json
import math
import os
import signal
import sys
from typing import Any

import torch

from launch import pretrain
from launch.command_line import run
from launch.training import Training
from trainer.data.stream import Batch
from trainer.models.mae import MaskedAutoencoder

FAULTS: dict[int, str] = {int(position): fault for position, fault in json.loads(os.environ["FAULTS"]).items()}
honest_training, honest_forward = pretrain.training_of, MaskedAutoencoder.forward


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


def forward(self: MaskedAutoencoder, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = honest_forward(self, *inputs, **options)
    return result * Faulty.factor if self.training else result


pretrain.training_of, MaskedAutoencoder.forward = training_of, forward
run(lambda: pretrain.main(sys.argv[1:]))
