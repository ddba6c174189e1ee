import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from tests.helpers.shards import display_p3, jpeg, write_tar
from tools import make_shards as make_shards_module
from tools.make_shards import CLI, Settings, main, make_shards
from trainer.config.command_line import call
from trainer.data.shards.index import list_shards, open_index
from trainer.data.transforms.decode import colour_profile, decode_image
from trainer.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of JPEGs, one PNG, one PGM, and things that are no images."""
    root = tmp_path / "tree"
    for number in range(14):
        path = root / ("bonafide" if number % 2 else "morph") / f"p.{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    grey = Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20))
    grey.save(root / "bonafide" / "x.png")
    grey.save(root / "morph" / "y.pgm")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "h.jpg").write_bytes(jpeg(99))
    return root


def settings(tree: Path, output: Path, **changes: object) -> Settings:
    common = {"source": str(tree), "output_dir": str(output), "num_processes": 1, "progress_bar": False}
    return Settings(**(common | {"max_shard_samples": 5, "folder_labels": True} | changes))


def contents(paths: list[Path]) -> dict[str, dict[str, bytes]]:
    return {sample["__key__"]: sample for sample in wds.WebDataset([str(p) for p in paths], shardshuffle=False)}


def test_plain_webdataset_reads_the_original_bytes_labels_and_metadata(tree: Path, tmp_path: Path) -> None:
    paths = make_shards(settings(tree, tmp_path / "out"))
    found = contents(paths)
    assert len(found) == 16
    for number in range(14):
        name = "bonafide" if number % 2 else "morph"
        sample = found[f"{name}/p_{number:02d}"]
        assert sample["jpg"] == jpeg(number)
        assert int(sample["cls"]) == 1 - number % 2
        assert json.loads(sample["json"]) == {
            "class": name, "label": 1 - number % 2, "path": f"{name}/p.{number:02d}.jpg",
        }  # fmt: skip
    assert found["bonafide/x"]["png"] == (tree / "bonafide" / "x.png").read_bytes()
    assert found["morph/y"]["png"].startswith(b"\x89PNG")
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in paths)
    assert len(open_index(list_shards(str(tmp_path / "out"), setting="--data"))) == 16


def test_the_same_source_gives_the_same_bytes_with_any_number_of_processes(tree: Path, tmp_path: Path) -> None:
    one = make_shards(settings(tree, tmp_path / "one", max_side=30))
    two = make_shards(settings(tree, tmp_path / "two", max_side=30, num_processes=2))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert [p.name for p in one] == [f"shard-{n:06d}.tar" for n in range(4)]


def test_a_rerun_writes_only_what_is_missing(tree: Path, tmp_path: Path) -> None:
    paths = make_shards(settings(tree, tmp_path / "out"))
    whole = paths[1].read_bytes()
    paths[1].unlink()
    (tmp_path / "out" / ".shard-000001.tar.tmp-0123").write_bytes(b"half")
    times = {p: p.stat().st_mtime_ns for p in paths if p.exists()}
    make_shards(settings(tree, tmp_path / "out"))
    assert paths[1].read_bytes() == whole
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert not list((tmp_path / "out").glob(".shard*"))


@pytest.mark.parametrize("limit", [15000, 40000])
def test_no_shard_is_larger_than_asked(tree: Path, tmp_path: Path, limit: int) -> None:
    paths = make_shards(settings(tree, tmp_path / "out", max_shard_bytes=limit, max_shard_samples=1000))
    assert max(path.stat().st_size for path in paths) <= limit
    assert len(contents(paths)) == 16


def test_a_manifest_keeps_its_order_keys_and_columns(tree: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("path", "key", "label", "person"),
                ("tree/morph/y.pgm", "b", "1", "Zoë"),
                ("tree/bonafide/x.png", "a", "", "2"),
            ]
        )
    found = contents(make_shards(settings(manifest, tmp_path / "out", folder_labels=False)))
    assert list(found) == ["b", "a"]
    assert json.loads(found["b"]["json"]) == {"label": 1, "path": "morph/y.pgm", "person": "Zoë"}
    assert "cls" not in found["a"]


def test_a_damaged_image_keeps_its_shard_away_and_is_listed(tree: Path, tmp_path: Path) -> None:
    (tree / "bonafide" / "p.01.jpg").write_bytes(jpeg(1, 200, 200)[:900])
    with pytest.raises(DataError, match=r"p\.01\.jpg"):
        make_shards(settings(tree, tmp_path / "out"))
    assert "p.01.jpg" in (tmp_path / "out" / "bad_images.csv").read_text()
    assert [p.name for p in sorted((tmp_path / "out").glob("*.tar"))] == [f"shard-00000{n}.tar" for n in (1, 2, 3)]


def test_two_images_of_one_name_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    for name in ("a.jpg", "a.jpeg", "b.jpg"):
        (tmp_path / "t" / name).write_bytes(jpeg(1))
    found = contents(make_shards(settings(tmp_path / "t", tmp_path / "out", folder_labels=False)))
    assert sorted(found) == ["a_jpeg", "a_jpg", "b"]


def test_wrong_input_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--source"):
        call(main, CLI, [])
    with pytest.raises(ConfigError, match="did you mean --max_shard_bytes"):
        call(main, CLI, ["--max_shard_byte", "3"])
    with pytest.raises(ConfigError, match="no such folder"):
        call(main, CLI, ["--source", "/nowhere", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(ConfigError, match="max_shard_samples is 0"):
        call(main, CLI, ["--max_shard_samples", "0"])
    make_shards(settings(tree, tmp_path / "out"))
    with pytest.raises(ConfigError, match="another source"):
        make_shards(settings(tree, tmp_path / "out", max_shard_samples=6))
    make_shards(settings(tree, tmp_path / "small", max_side=16))
    for change in ({}, {"max_side": 17}, {"max_side": 16, "encode": "png"}, {"max_side": 16, "jpeg_quality": 94}):
        with pytest.raises(ConfigError, match="other settings"):
            make_shards(settings(tree, tmp_path / "small", **change))


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("max_side", "7", "max_side is 7, but must be at least 8"),
        ("jpeg_quality", "0", "jpeg_quality is 0, but must be from 1 to 100"),
        ("jpeg_quality", "101", "jpeg_quality is 101, but must be from 1 to 100"),
        ("encode", "webp", "encode is 'webp', but must be one of keep, jpeg, png"),
    ],
)
def test_a_wrong_way_of_writing_anew_is_refused(flag: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        call(main, CLI, [f"--{flag}", value])


def encoded(image_HWC: np.ndarray, suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, suffix, **options)
    return file.getvalue()


def stored(tree: Path, output: Path, **changes: object) -> dict[str, dict[str, bytes]]:
    return contents(make_shards(settings(tree, output, folder_labels=False, **changes)))


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """A large JPEG that its EXIF turns, one at the limit of 24 pixels, a large PNG and a large grey WebP."""
    root = tmp_path / "sizes"
    root.mkdir()
    smooth_HWC = decode_image(jpeg(3, 60, 100))
    turned = Image.Exif()
    turned[0x0112] = 6
    (root / "turned.jpg").write_bytes(encoded(smooth_HWC, "JPEG", exif=turned, quality=95))
    (root / "limit.jpg").write_bytes(jpeg(4, 24, 50))
    (root / "large.png").write_bytes(encoded(smooth_HWC, "PNG"))
    (root / "other.webp").write_bytes(encoded(smooth_HWC, "WEBP", exif=turned))
    (root / "photo.avif").write_bytes(encoded(smooth_HWC, "AVIF", exif=turned))
    return root


def test_shrinking_makes_the_shorter_side_fit_and_leaves_smaller_images_untouched(sizes: Path, tmp_path: Path) -> None:
    found = stored(sizes, tmp_path / "out", max_side=24)
    assert found["limit"]["jpg"] == (sizes / "limit.jpg").read_bytes()
    assert decode_image(found["turned"]["jpg"]).shape == (40, 24, 3)
    assert decode_image(found["large"]["png"]).shape == (24, 40, 3)
    assert decode_image(found["other"]["png"]).shape == (40, 24, 3)
    original_HWC = decode_image((sizes / "large.png").read_bytes()).astype(float)
    assert abs(decode_image(found["large"]["png"]).mean() - original_HWC.mean()) < 1


@pytest.mark.parametrize(("encode", "suffix"), [("jpeg", "jpg"), ("png", "png")])
def test_encoding_anew_gives_every_image_the_same_format_and_no_metadata(
    sizes: Path, tmp_path: Path, encode: str, suffix: str
) -> None:
    for key, sample in stored(sizes, tmp_path / "out", encode=encode, jpeg_quality=90).items():
        with Image.open(io.BytesIO(sample[suffix])) as image:
            assert image.format == encode.upper()
            assert not image.getexif()
            assert encode == "png" or [part[1:3] for part in image.layer] == [(1, 1)] * 3, "colours at full resolution"
        original = (sizes / key).with_suffix(".jpg")
        if encode == "png" and original.exists():
            np.testing.assert_array_equal(decode_image(sample["png"]), decode_image(original.read_bytes()))


def test_another_format_keeps_its_orientation(sizes: Path, tmp_path: Path) -> None:
    found = stored(sizes, tmp_path / "out")
    assert found["other"]["webp"] == (sizes / "other.webp").read_bytes()
    assert decode_image(found["other"]["webp"]).shape == (100, 60, 3)
    assert decode_image(found["photo"]["png"]).shape == (100, 60, 3)


def test_no_shard_is_larger_than_asked_when_noise_is_written_anew(tmp_path: Path) -> None:
    root = tmp_path / "noise"
    root.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        noise_HWC = random.integers(0, 256, (90, 90, 3), dtype=np.uint8)
        (root / f"{number}.png").write_bytes(encoded(noise_HWC, "PNG"))
    (root / "alpha.webp").write_bytes(encoded(random.integers(0, 256, (90, 90, 4), dtype=np.uint8), "WEBP", lossless=1))
    for number, changes in enumerate(({"encode": "jpeg", "jpeg_quality": 100}, {"encode": "png", "max_side": 80}, {})):
        out = tmp_path / str(number)
        assert len(stored(root, out, max_shard_bytes=75_000, max_shard_samples=1000, **changes)) == 13
        assert max(path.stat().st_size for path in out.glob("*.tar")) <= 75_000


def test_a_damaged_image_is_listed_also_when_it_would_be_shrunk(sizes: Path, tmp_path: Path) -> None:
    (sizes / "turned.jpg").write_bytes((sizes / "turned.jpg").read_bytes()[:500])
    (sizes / "limit.jpg").write_bytes(b"\xff\xd8\xff but no image")
    (sizes / "other.webp").write_bytes(b"RIFF no image either")
    with pytest.raises(DataError, match="3 images are damaged"):
        stored(sizes, tmp_path / "out", max_side=24)
    report = (tmp_path / "out" / "bad_images.csv").read_text()
    assert all(name in report for name in ("turned.jpg", "limit.jpg", "other.webp"))


# ---------------------------------------------------------------------------------------------- nothing is lost


def report_of(output: Path) -> dict[str, object]:
    return json.loads((output / "make_shards.json").read_text())["report"]


def test_what_came_in_is_what_went_out_and_what_was_left_out(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(settings(tree, tmp_path / "out"))
    report = report_of(tmp_path / "out")
    assert report["found"] == 18
    assert report["found"] == report["used"] + sum(report["left_out"].values())
    assert report["used"] == report["images"] == report["samples"] + report["damaged"] == 16
    assert report["labels"] == {"0": 8, "1": 8}
    assert report["classes"] == {"bonafide": 0, "morph": 1}
    said = capsys.readouterr().out
    assert (
        "16 images among 18 files; left out: 1 hidden files (such as .hidden/h.jpg), 1 .txt (such as notes.txt)" in said
    )
    assert "classes: bonafide -> 0, morph -> 1" in said
    assert "labels: 0: 8, 1: 8; formats: 14 jpg, 2 png" in said


@pytest.mark.parametrize("names", [("__new/0.jpg", "__new/1.jpg"), ("__x__/0.jpg", "__y/0.jpg", "z/0.jpg")])
def test_names_that_begin_with_underscores_arrive_in_every_reader(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_bytes(jpeg(len(name)))
    paths = make_shards(settings(tmp_path / "t", tmp_path / "out", folder_labels=False))
    assert len(contents(paths)) == len(open_index([str(path) for path in paths])) == len(names)


def test_a_shard_that_the_trainer_would_read_otherwise_is_not_published(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_shards_module._members_of

    def losing(entry: object, *how: object) -> dict[str, bytes]:
        members = whole(entry, *how)
        return members if entry.key != "morph/p_02" else members | {"cls": b"0"}

    monkeypatch.setattr(make_shards_module, "_members_of", losing)
    with pytest.raises(DataError, match=r"sample 'morph/p_02' is not what the source holds"):
        make_shards(settings(tree, tmp_path / "out", max_shard_samples=100))
    assert not list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".shard*"))


def test_a_shard_of_an_earlier_run_is_compared_too(tree: Path, tmp_path: Path) -> None:
    paths = make_shards(settings(tree, tmp_path / "out"))
    paths[0].write_bytes(paths[1].read_bytes())
    paths[2].unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: sample .* is not what the source holds"):
        make_shards(settings(tree, tmp_path / "out", num_processes=2))
    assert not list((tmp_path / "out").glob(".shard*")), "a shard that was written meanwhile leaves no draft"


def test_damaged_images_are_left_out_and_listed_when_asked(tree: Path, tmp_path: Path) -> None:
    damaged = ("p.01.jpg", "p.03.jpg")
    for name in damaged:
        (tree / "bonafide" / name).write_bytes(jpeg(1, 200, 200)[:900])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"2 images are damaged.*--skip_bad true"):
        make_shards(settings(tree, out))
    for _ in range(2):  # a second time nothing is written, and the list stays
        paths = make_shards(settings(tree, out, skip_bad=True))
        assert len(contents(paths)) == 14
        with (out / "bad_images.csv").open() as file:
            assert [Path(row["path"]).name for row in csv.DictReader(file)] == list(damaged)
        report = report_of(out)
        assert (report["images"], report["samples"], report["damaged"]) == (16, 14, 2)


def test_files_that_are_missing_are_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "m.csv").write_text("path\na.jpg\nsub\\b.jpg\n")
    common = settings(tmp_path / "m.csv", tmp_path / "out", folder_labels=False)
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read.*No such file.*write / in paths"):
        make_shards(common)
    assert not (tmp_path / "out").exists()
    assert len(contents(make_shards(replace(common, skip_bad=True)))) == 1
    assert report_of(tmp_path / "out")["damaged"] == 1


def test_tars_are_packed_again_with_all_members_and_labels(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(file, "BMP")
    images = [("0.jpg", jpeg(0)), ("1.webp", encoded(decode_image(jpeg(1)), "WEBP")), ("2.bmp", file.getvalue())]
    texts = [("0.cls", b"1"), ("1.json", json.dumps({"label": 0, "identity": "Zoë"}).encode()), ("2.txt", b"red")]
    write_tar(tmp_path / "in" / "a.tar", images + texts)
    paths = make_shards(settings(tmp_path / "in" / "*.tar", tmp_path / "out", folder_labels=False))
    found = contents(paths)
    assert (found["0"]["jpg"], found["0"]["cls"]) == (images[0][1], b"1")
    assert (found["1"]["webp"], found["1"]["json"]) == (images[1][1], texts[1][1])
    assert found["2"]["txt"] == b"red"
    assert (decode_image(found["2"]["png"]) == (200, 30, 30)).all()
    index = open_index([str(path) for path in paths])
    assert index.labels.tolist() == [1, 0, -1]
    assert report_of(tmp_path / "out")["labels"] == {"none": 1, "0": 1, "1": 1}


def test_shards_follow_the_umask(tree: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_shards(settings(tree, tmp_path / "out"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


# ---------------------------------------------------------------------------------------------- photographs


def test_a_photograph_beyond_the_limit_is_shrunk_and_refused_otherwise(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (8000, 6500), (90, 120, 200)).save(tmp_path / "t" / "phone.jpg", quality=50, exif=turned)
    with pytest.raises(DataError, match=r"8000x6500 has more than 50000000 pixels \(--max_side shrinks it\)"):
        stored(tmp_path / "t", tmp_path / "out")
    image_HWC = decode_image(stored(tmp_path / "t", tmp_path / "small", max_side=512)["phone"]["jpg"])
    assert image_HWC.shape == (630, 512, 3)
    assert np.abs(image_HWC.astype(int) - (90, 120, 200)).max() <= 4


def test_what_is_written_again_is_srgb_and_what_stays_keeps_its_profile(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    image = Image.new("RGB", (40, 40), (200, 120, 90))
    for kind in ("jpg", "png", "webp", "tiff"):
        options = {} if kind in ("png", "tiff") else {"quality": 100}
        image.save(tmp_path / "t" / f"{kind}.{kind}", icc_profile=display_p3(), **options)
    kept = stored(tmp_path / "t", tmp_path / "kept")
    assert report_of(tmp_path / "kept")["colour_profiles"] == {"Display P3": 4}
    for changes in ({"encode": "png"}, {"max_side": 20}):
        out = tmp_path / next(iter(changes))
        for key, sample in stored(tmp_path / "t", out, **changes).items():
            payload, before = (next(s[x] for x in ("png", "jpg", "webp") if x in s) for s in (sample, kept[key]))
            assert (colour_profile(payload), colour_profile(before)) == (None, "Display P3")
            expected = decode_image(before, srgb=True)[:1, :1].astype(int)
            assert np.abs(decode_image(payload).astype(int) - expected).max() <= 6, key
            assert np.abs(expected - (200, 120, 90)).max() > 8
