"""One rank of tests/detection/test_error_rates.py: uneven and padded shares of 25 scores; then a rank that has none.

At last the joined scores of both ranks, as hexadecimal texts, one of them of an unreadable image.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from trainer.detection.scoring import SUCCESS, Scores, over_ranks
from trainer.detection.torch_metrics import DEER
from trainer.distributed.world import World

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
generator = np.random.default_rng(7)
scores, labels = generator.random(25), np.arange(25) % 2
found = []
for shares in (([*range(10), 24, 3], list(range(8, 25))), (list(range(25)), [])):
    metric, mine = DEER(), shares[rank]
    metric.update(torch.tensor(scores[mine]), torch.tensor(labels[mine]), torch.tensor(mine, dtype=torch.int64))
    found.append(metric.compute().item())
logits = np.where(np.arange(25) == 6, np.nan, scores)
mine = np.array([[*range(10), 24], [*range(10, 25), 3]][rank])
codes = ["corrupt" if i == 6 else SUCCESS for i in mine.tolist()]
joined = over_ranks(Scores(mine, logits[mine] + rank * (mine == 3), codes), World(rank, 2))
found.append([joined.sample_N.tolist(), [x.hex() for x in joined.logit_N.tolist()], joined.code_N])
Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
