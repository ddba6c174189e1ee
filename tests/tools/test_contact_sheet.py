from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.shards import jpeg, members_of, write_tar
from tools.contact_sheet import (
    CLI,
    Contents,
    Tile,
    draw_sheet,
    main,
    names_of,
    read_images,
    readable,
    sheet_font,
    shorten,
    title_of,
)
from trainer.config.command_line import call
from trainer.errors import ConfigError

GREY = (160, 160, 160)


def tiles(num_images: int) -> list[Tile]:
    red_HWC = np.zeros((20, 30, 3), dtype=np.uint8) + np.array([200, 0, 0], dtype=np.uint8)
    return [Tile(f"k{n}", n % 2, red_HWC, "") for n in range(num_images)]


def count_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=2).sum())


def test_images_are_spread_evenly_over_all_shards(shards: Path) -> None:
    contents = read_images(str(shards), 16)
    assert [tile.key for tile in contents.tiles] == [f"face{n:04d}" for n in range(0, 64, 4)]
    assert (contents.num_shards, contents.num_images_by_label) == (3, {0: 32, 1: 32})
    assert len(read_images(str(shards), 1000).tiles) == 64, "never an image twice"


def test_a_damaged_image_is_a_grey_tile_with_its_reason(tmp_path: Path) -> None:
    members = [*members_of(range(3)), ("tiny.png", b"no image"), ("cut.jpg", jpeg(1, 200, 200)[:900])]
    shard = write_tar(tmp_path / "s.tar", members)
    contents = read_images(str(shard), 64)
    assert [tile.reason for tile in contents.tiles] == ["", "", "", "not_an_image", "corrupt"]
    assert title_of(contents) == "5 (2 damaged) of 5 images in 1 shards; no label: 2, 0 bonafide: 2, 1 morph: 1"
    side = 160
    assert side * side < count_of(draw_sheet(contents), GREY) <= 2 * side * side


@pytest.mark.parametrize("num_images", [1, 4, 5, 17])
def test_every_tile_is_inside_the_sheet_and_none_covers_another(num_images: int) -> None:
    sheet = draw_sheet(Contents(1, {0: num_images}, tiles(num_images)))
    shown = 160 * round(160 * 20 / 30)
    assert count_of(sheet, (200, 0, 0)) == pytest.approx(num_images * shown, rel=0.02)


def test_many_labels_are_counted_not_listed() -> None:
    assert title_of(Contents(2, dict.fromkeys(range(500), 3), tiles(4))) == "4 of 1500 images in 2 shards; 500 labels"


@given(st.text(max_size=80), st.integers(20, 200))
def test_a_key_keeps_its_end_and_fits(key: str, width: int) -> None:
    font = sheet_font()
    text = shorten(key, width, font)
    assert text.isprintable()
    assert font.getlength(text) <= width
    whole = readable(key)
    assert text == whole or (text.startswith("...") and whole.endswith(text[3:]))


def test_names_are_drawn_as_people_write_them_and_what_the_font_lacks_is_escaped() -> None:
    assert readable("faces/Müller-Åsa Łukasz Жук") == "faces/Müller-Åsa Łukasz Жук"
    assert readable("Mu\u0308ller") == "Müller"
    assert readable("a\n\\日\udcff") == "a\\n\\\\\\u65e5\\udcff"


def test_what_the_shards_leave_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [*members_of(range(2)), ("face0001.txt", b"x"), ("README", b"x")])
    assert call(main, CLI, ["--data", str(tmp_path / "a.tar"), "--output", str(tmp_path / "s.png")]) == 0
    said = capsys.readouterr().out
    assert "1 .txt (such as face0001.txt)" in said
    assert "1 names without a suffix (such as README)" in said


def test_labels_have_the_names_of_the_two_classes_unless_there_are_others() -> None:
    assert names_of([-1, 0, 1]) == {-1: "no label", 0: "0 bonafide", 1: "1 morph"}
    assert names_of([0, 1, 2]) == {0: "label 0", 1: "label 1", 2: "label 2"}


def test_a_long_title_is_broken_and_not_cut() -> None:
    counts = {label: 10**9 + label for label in range(6)}
    sheet = draw_sheet(Contents(10**6, counts, tiles(1)))
    assert (np.asarray(sheet)[:, -4:] == 255).all(), "nothing is written up to the edge"
    assert sheet.height > draw_sheet(Contents(1, {0: 1}, tiles(1))).height


def test_the_command_writes_a_png_and_replaces_an_older_one(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sheet.png"
    output.write_bytes(b"older")
    assert call(main, CLI, ["--data", f"{shards}/*.tar", "--output", str(output), "--num_images", "9"]) == 0
    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
    assert "9 of 64 images in 3 shards; 0 bonafide: 32, 1 morph: 32" in capsys.readouterr().out
    assert not list(tmp_path.glob(".sheet*"))


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--num_images", "0"], "num_images is 0, but must be at least 1"),
        (["--output", "x.jpg"], "output is 'x.jpg', but must end in .png"),
        (["--output", "/nowhere/x.png"], "its folder does not exist: create it"),
        (["--date", "x"], "did you mean --data"),
        ([], "--data"),
    ],
)
def test_a_wrong_setting_is_refused(flags: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        call(main, CLI, flags)
