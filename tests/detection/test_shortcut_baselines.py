from pathlib import Path

import pytest

from tests.helpers.shards import jpeg, members_of, write_tar
from tools.shortcut_baselines import Settings, read_set
from trainer.errors import DataError


def test_a_damaged_image_is_left_out_and_the_others_keep_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = members_of(range(6))
    members[4] = (members[4][0], jpeg(2, 200, 200)[:900])
    write_tar(tmp_path / "a.tar", members)
    images, truth, _ = read_set(str(tmp_path / "a.tar"), "--data", Settings(image_size=32))
    assert truth.label_N.tolist() == [0, 1, 1, 0, 1]
    assert len(images) == 5
    assert min(image.std() for image in images) > 1, "none is black, none stands in for another"
    assert "--data: 5 of 6 images; damaged: face0002 (corrupt)" in capsys.readouterr().out


def test_a_set_whose_class_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*members_of(range(1)), ("x.jpg", jpeg(1, 200, 200)[:900]), ("x.cls", b"1")])
    with pytest.raises(DataError, match="no image of one of the two classes can be read"):
        read_set(str(tmp_path / "a.tar"), "--data", Settings(image_size=32))
