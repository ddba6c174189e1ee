"""A refusal that all ranks share is shown once: rank 0 shows it, the others wait for that and leave with it.

Without torch, so that a command can report a mistake before it has loaded anything. Ranks that have not met yet have
no store: they wait for the time limit, or until the launcher ends them.
"""

import contextlib
import time
from datetime import timedelta
from typing import Any

_HEARD_WITHIN_S, _POLL_S = 2.0, 0.1
_ranks: "tuple[Any, int, int] | None" = None
"""The store of the rendezvous, this rank, and how many ranks there are."""


def know_ranks(store: Any, rank: int, size: int) -> None:
    """Keep the store (`torch.distributed.Store`) through which the ranks know each other."""
    global _ranks
    _ranks = (store, rank, size)


def report_to_ranks() -> None:
    """On rank 0, let the others leave. The store ends with this process, so wait shortly until they have heard."""
    if _ranks is None:
        return
    store, _, size = _ranks
    with contextlib.suppress(RuntimeError):  # a rank is busy elsewhere, or gone
        store.set("refused", "")
        store.wait([f"refusal_heard/{rank}" for rank in range(1, size)], timedelta(seconds=_HEARD_WITHIN_S))


def wait_for_main(timeout_s: float) -> bool:
    """On another rank, return whether rank 0 has shown the refusal. False as soon as rank 0 is found dead."""
    if _ranks is None:
        time.sleep(timeout_s)
        return False
    store, rank, _ = _ranks
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(RuntimeError):  # the store has gone with rank 0
        while time.monotonic() < deadline:
            if store.check(["refused"]):
                store.set(f"refusal_heard/{rank}", "")
                return True
            time.sleep(_POLL_S)  # not `store.wait`: a signal must end this rank at once
    return False
