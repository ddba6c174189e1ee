"""A rank of test_watchdog.py that only sets phases: ``watched.py LOGS RANK NUM_RANKS LIMIT_S PHASE[:STEP]...``.

It enters the phases one after the other and stays in the last; LEAVING ends it.
"""

import sys
import time
from pathlib import Path

from trainer.fault_tolerance.watchdog import Limits, set_phase, start
from trainer.fault_tolerance.watchdog_process import Phase

logs, rank, num_ranks, limit_s, *phases = sys.argv[1:]
start(Path(logs), "attempt", rank=int(rank), num_ranks=int(num_ranks), limits=Limits(*3 * (int(limit_s),)))
for word in phases:
    name, _, step = word.partition(":")
    set_phase(Phase[name], int(step or 1))
print("ready", flush=True)
time.sleep(0 if name == "LEAVING" else 60)
