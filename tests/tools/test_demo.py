"""The demo's own steps: the plain CNN gets the seconds of the slowest detector, the four photographs are not chosen."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.shards import write_tar
from tools import shortcut_baselines
from tools.demo import orl_morphs, peer
from trainer.config.command_line import call
from trainer.errors import DataError

BUSY = "import time\nwhile time.process_time() < 0.7: pass"


def labelled(path: Path, first: int) -> Path:
    """40 images as large as the demo's; morphs are noisier."""
    members = []
    for number in range(first, first + 40):
        rng, file = np.random.default_rng(number), io.BytesIO()
        pixels = rng.normal(128, 5 + 30 * (number % 2), (112, 92, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        fields = {"label": number % 2, "identity": f"p{number // 4}", "attack": "noise" if number % 2 else ""}
        members += [(f"f{number}.png", file.getvalue()), (f"f{number}.json", json.dumps(fields).encode())]
    return write_tar(path, members)


def test_the_seconds_are_those_that_the_shells_children_spent(tmp_path: Path) -> None:
    subprocess.run([f"'{sys.executable}' -c '{BUSY}' && times > finished"], shell=True, cwd=tmp_path, check=True)
    assert 0.6 <= peer.cpu_seconds(tmp_path / "finished") < 2.5  # the shell counts in hundredths
    (tmp_path / "bash").write_text("0m0.018s 0m0.013s\n2m10.250s 0m1.500s\n")
    assert peer.cpu_seconds(tmp_path / "bash") == 131.75


def test_a_detector_that_has_not_finished_is_named(tmp_path: Path) -> None:
    flags = {"data": "d", "test_sets": "t=t", "detectors": str(tmp_path), "baselines": "b", "output": "o"}
    for text in (None, "", "0m0.018s 0m0.013s\n"):
        if text is not None:
            (tmp_path / "finished").write_text(text)
        with pytest.raises(DataError, match="does not hold the CPU seconds of a detector: run 'make demo'"):
            call(peer.main, peer.CLI, [word for name, value in flags.items() for word in (f"--{name}", value)])


@pytest.mark.slow
def test_the_cnn_stands_behind_the_shortcuts_with_the_seconds_of_the_slowest_detector(tmp_path: Path) -> None:
    from trainer.config.scoring_settings import EvaluationSettings
    from trainer.detection.evaluation import open_test_set, read_baselines

    train, test = labelled(tmp_path / "train.tar", 0), labelled(tmp_path / "test.tar", 100)
    sets = ["--data", str(train), "--test_sets", f"t={test}"]
    shortcuts, beside = tmp_path / "shortcuts.json", tmp_path / "beside.json"
    assert call(shortcut_baselines.main, shortcut_baselines.CLI, [*sets, "--output", str(shortcuts)]) == 0
    for name, spent_s in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "finished").write_text(f"0m9s 0m9s\n0m{spent_s}s 0m0.0s\n")
    more = ["--detectors", f"{tmp_path / 'a'};{tmp_path / 'b'}", "--baselines", str(shortcuts), "--output", str(beside)]
    assert call(peer.main, peer.CLI, [*sets, *more]) == 0

    test_set = open_test_set("t", str(test), EvaluationSettings(models="-", test_sets="-"))
    *first, last = read_baselines(beside, [test_set])
    assert first == json.loads(shortcuts.read_text())
    assert 3.0 <= last["cpu_seconds"] < 6.0
    assert last["name"] == f"plain CNN (resnet10t, {last['cpu_seconds']:.0f} CPU s)"
    assert last["summary"]["pooled"]["d_eer"]["value"] < 0.2  # more noise is easy to see
    assert last["summary"]["pooled"]["d_eer"]["ci"]


def test_the_photographs_are_the_first_morph_of_each_kind_and_the_parents_of_the_first(tmp_path: Path) -> None:
    def row(number: int, attack: str, *people: str) -> dict[str, str]:
        path = tmp_path / f"{number}.pgm"
        Image.new("L", (4, 5), number).save(path)
        return {"path": str(path), "attack": attack, "identity": people[0], "identity_2": people[-1]}

    bona_fides = [row(number, "", person) for number, person in enumerate(["33", "33", "34", "35", "35"])]
    morphs = [
        row(number, f"landmark-{kind}", "33", other)
        for number, kind, other in ((10, "whole", "35"), (11, "splice", "34"), (12, "whole", "34"))
    ]
    orl_morphs.write_photographs(tmp_path / "out", bona_fides, morphs)
    found = {path.name: Image.open(path).getpixel((0, 0)) for path in (tmp_path / "out").iterdir()}
    expected = {"bona-fide-33": 0, "bona-fide-35": 3, "whole-morph-33-35": 10, "splice-morph-33-34": 11}
    assert found == {f"{name}.png": (grey,) * 3 for name, grey in expected.items()}
