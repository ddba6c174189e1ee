"""`deepspeed --hostfile` over two hosts with sshd: what fails is named in the stated time, and one host goes on."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.cluster import Lab, consumed, flags_of, num_steps, wait_for
from tests.helpers.runs import ROOT, argv_of, metrics

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.hosts]
TIMEOUT_S = 15


class Run:
    """One folder to train from, with a hostfile and .deepspeed_env as a user would have them."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder, self.output, self.log = lab, folder, folder / "out", folder / "log"
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("hosta slots=1\nhostb slots=1\n")
        self._port = 29500
        sent = {
            name: lab.environment[name] for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "NO_ALBUMENTATIONS_UPDATE")
        }
        sent["GLOO_SOCKET_IFNAME"] = "eth0"
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in sent.items()))

    def launch(self, script: str, flags: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
        self._port += 1
        self.log.write_text("")
        start = ["python", "-c", "from deepspeed.launcher.runner import main; main()", "--hostfile", str(self.hostfile)]
        start += ["--master_port", str(self._port), *words, str(ROOT / "launch" / script), *argv_of(flags)]
        return self.lab.start("head", ["-C", str(self.folder), *start], self.log)

    def wait(self, process: subprocess.Popen[bytes], timeout_s: float) -> int:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s:\n{self.log.read_text()[-5000:]}")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def run(hosts: Lab, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(hosts, tmp_path_factory.mktemp("run"))


def test_the_doctor_names_hosts_that_are_not_ready(hosts: Lab, run: Run, shards: Path) -> None:
    flags = flags_of(shards, run.output, 2)

    def ask(hostfile: str, code: int) -> str:
        (run.folder / "asked").write_text(hostfile)
        words = ["python", str(ROOT / "launch" / "doctor.py"), "--hostfile", "asked", *argv_of(flags)]
        return hosts.on("head", "-C", str(run.folder), *words, code=code)

    told = ask("hosta slots=1\nhostb slots=1\n", 0)
    assert "warn" not in told
    assert "FAIL" not in told
    hosts("cut", "hostb")
    try:
        told = ask("hosta slots=64\nhostb slots=1\n", 2)
    finally:
        hosts("heal", "hostb")
    assert "FAIL  slots         hosta has slots=64" in told
    assert "FAIL  ssh           hostb: cannot be reached by ssh" in told
    process = run.launch("doctor.py", flags)
    assert run.wait(process, 120) == 0, run.log.read_text()[-3000:]
    assert "2 ranks on 2 hosts" in run.log.read_text()


@pytest.mark.parametrize(
    ("fault", "message", "limit_s"),
    [
        ("kill", r"rank 1 on hostb \(pid \d+\) died", 30),
        ("stop", r"rank 1 on hostb .* stopped \(SIGSTOP\)", TIMEOUT_S + 45),
        ("cut", r"no rank is behind: .* on hosta, hostb: check what they share, the network", TIMEOUT_S + 60),
        ("crash", r"rank 1 on hostb", 45),
    ],
)
def test_a_fault_on_one_host_is_named_and_ends_the_job_in_time(
    hosts: Lab, run: Run, shards: Path, fault: str, message: str, limit_s: float
) -> None:
    # A fault may fall into a save, which comes every 10 steps and has its own limit.
    limits = {"timeout_s": str(TIMEOUT_S), "save_timeout_s": str(2 * TIMEOUT_S)}
    process = run.launch("pretrain.py", flags_of(shards, run.output, 100_000, **limits, max_restarts="0"))
    done = num_steps(run.output)
    wait_for(lambda: num_steps(run.output) >= done + 12, lambda: run.log.read_text()[-5000:])
    began = time.monotonic()
    if fault in ("cut", "crash"):
        hosts(fault, "hostb")
    else:
        name = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault].name.removeprefix("SIG")
        hosts.on("hostb", "pkill", f"-{name}", "-f", "^[^ ]*python[^ ]* -u [^ ]*launch/pretrain.py")
    code = run.wait(process, limit_s)
    print(f"{fault}: over after {time.monotonic() - began:.1f} s, exit code {code}")
    if fault == "cut":
        hosts("heal", "hostb")
    assert code != 0
    assert re.search(message, run.log.read_text()), run.log.read_text()[-5000:]
    left = hosts.on("hosta", "pgrep", "-f", "launch/pretrain.py", code=None)
    assert not left, left


def test_the_host_that_is_left_goes_on_alone(run: Run, shards: Path) -> None:
    done = num_steps(run.output)
    process = run.launch(
        "pretrain.py", flags_of(shards, run.output, 100_000, stop_at_step=str(done + 4)), "--include", "hosta"
    )
    assert run.wait(process, 120) == 0, run.log.read_text()[-3000:]
    assert "written by 2 ranks" in run.log.read_text()
    rows = [row["step"] for row in metrics(run.output) if "loss" in row]
    assert rows == list(range(1, rows[-1] + 1))
    assert consumed(run.output) == list(range(8 * rows[-1]))
