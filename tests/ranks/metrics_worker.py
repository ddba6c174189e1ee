"""One rank of tests/detection/test_error_rates.py: uneven and padded shares of 25 scores; then a rank that has none."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer.detection.torch_metrics import DEER

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
generator = np.random.default_rng(7)
scores, labels = generator.random(25), np.arange(25) % 2
found = []
for shares in (([*range(10), 24, 3], list(range(8, 25))), (list(range(25)), [])):
    metric, mine = DEER(), shares[rank]
    metric.update(torch.tensor(scores[mine]), torch.tensor(labels[mine]), torch.tensor(mine, dtype=torch.int64))
    found.append(metric.compute().item())
Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
