import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from trainer.files import atomic_draft, checkout, data_file


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_finished_file_has_the_mode_of_the_umask_whoever_wrote_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_draft(tmp_path / "a") as draft:
            handle, private = tempfile.mkstemp(dir=tmp_path)
            os.write(handle, b"text")
            os.close(handle)
            Path(private).replace(draft)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"text"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with contextlib.suppress(ValueError), atomic_draft(tmp_path / "a") as draft:
        draft.write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_of_the_project_are_found_in_a_checkout() -> None:
    """tests/test_wheel.py asks the same of an installed wheel."""
    assert checkout() == ROOT
    for name in ("ds_configs/cpu_fp32.json", "launch/slurm/common.sh", "tools/demo/data/orl_landmarks_468.npz"):
        assert data_file(name) == ROOT / name
        assert data_file(name).is_file()


def test_another_system_than_linux_is_refused_by_name() -> None:
    code = "import sys; sys.platform = 'darwin'; import trainer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("needs Linux (fork, /proc, POSIX signals), but this is darwin\n")
