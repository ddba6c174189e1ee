"""launch/pretrain.py whose loader workers never deliver anything on rank 1."""

import os
import time

from launch.pretrain import command
from trainer.data import loader

if os.environ["RANK"] == "1":
    loader._prepare_worker = lambda worker: time.sleep(3600)
command()
