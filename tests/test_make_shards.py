import csv
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import jpeg
from PIL import Image

from tools.make_shards import Settings, main, make_shards
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
    common = {"source": str(tree), "output_dir": str(output), "num_processes": 2, "progress_bar": False}
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
    one = make_shards(settings(tree, tmp_path / "one", num_processes=1))
    two = make_shards(settings(tree, tmp_path / "two"))
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
