import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import jpeg
from PIL import Image

from tools.make_shards import Settings, main, make_shards
from trainer.data.decode import decode_image
from trainer.data.shards import list_shards, open_index
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
        main([])
    with pytest.raises(ConfigError, match="did you mean --max_shard_bytes"):
        main(["--max_shard_byte", "3"])
    with pytest.raises(ConfigError, match="no such folder"):
        main(["--source", "/nowhere", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(ConfigError, match="max_shard_samples is 0"):
        main(["--max_shard_samples", "0"])
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
        main([f"--{flag}", value])


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
    assert decode_image(stored(sizes, tmp_path / "out")["other"]["png"]).shape == (100, 60, 3)


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
