"""Runs Python scripts in a second instead of ten: imports what they need once, then forks a process for each.

Reads one JSON object a line, and answers each with one:

    {"start": [script, word, ...], "env": {...}, "out": PATH, "err": PATH, "group": PID}   -> {"pid": PID}
    {"poll": PID}                                                                          -> {"status": STATUS or null}

The processes are real: own memory, own process group, real signals. Only their command line is this one's.
"""

import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn

import fire
from deepspeed.runtime.zero.muon import muon_optimizer

from trainer.detection import evaluation, finetuning, torch_metrics
from trainer.features import embedding
from trainer.training import pretraining, readiness

IMPORTED = (fire, muon_optimizer, embedding, evaluation, finetuning, pretraining, readiness, torch_metrics)
"""Commands import these after they have read their command line; DeepSpeed imports Muon when it starts."""


def become(order: dict[str, Any]) -> NoReturn:
    """Turn this fork into a run of the script."""
    code = 1
    try:
        os.setpgid(0, order["group"])  # 0: a new group, which it leads
        for descriptor, name, flags in (
            (0, "/dev/null", os.O_RDONLY),
            (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            os.dup2(os.open(name, flags, 0o644), descriptor)
        os.environ.clear()
        os.environ.update(order["env"])
        sys.argv = order["start"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps({"status": status if pid else None}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(order)
        os.setpgid(pid, order["group"] or pid)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
