"""launch/pretrain.py whose loader workers never deliver anything on rank 1."""

import os
import sys
import time

from launch.pretrain import main
from trainer.data import loader
from trainer.fault_tolerance.exit_codes import run

if os.environ["RANK"] == "1":
    loader._prepare_worker = lambda worker: time.sleep(3600)
run(lambda: main(sys.argv[1:]))
