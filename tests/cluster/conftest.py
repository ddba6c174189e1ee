"""Hosts with their own network, and SLURM on them: `hosts.sh`. Skipped where the programs are missing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import Lab

PROGRAMS = ("ip", "nsenter", "sshd", "ssh", "pdsh")
SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def _require(programs: tuple[str, ...]) -> None:
    missing = [name for name in programs if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    problem = f"not installed: {', '.join(missing)}" if missing else ""
    problem = problem or ("" if os.geteuid() == 0 else "needs root")
    if problem and os.environ.get("TRAINER_CLUSTER") == "1":
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)


def _lab(folder: Path, hosts: str, programs: tuple[str, ...]) -> Iterator[Lab]:
    _require(programs)
    lab = Lab(folder, hosts)
    lab("up")
    try:
        yield lab
    finally:
        lab("down")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts with sshd, and one to sit at."""
    yield from _lab(tmp_path_factory.mktemp("hosts"), "hosta hostb head", PROGRAMS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """SLURM with two nodes."""
    for lab in _lab(tmp_path_factory.mktemp("slurm"), "hosta hostb head", PROGRAMS + SLURM_PROGRAMS):
        lab("slurm")
        yield lab
        lab.slurm("scancel", "--user", "root", code=None)
