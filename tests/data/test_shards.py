import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from tests.helpers.shards import jpeg, members_of, write_tar
from trainer.data.shards.index import ShardIndex, describe_index, list_shards, open_index
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.tar import walk_tar
from trainer.detection.leakage import fingerprints_of
from trainer.errors import ConfigError, DataError, SampleError

# Plain webdataset leaves files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def keys_of_plain_webdataset(paths: list[Path]) -> list[str]:
    return [sample["__key__"] for sample in wds.WebDataset([str(p) for p in paths], shardshuffle=False)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_index_holds_what_plain_webdataset_reads(tmp_path: Path, format: int) -> None:
    long = [("d" * 80 + "/" + "k" * 60 + ".jpg", jpeg(1))] if format != tarfile.USTAR_FORMAT else []
    path = write_tar(tmp_path / "a.tar", [*members_of(range(5)), *long], format=format)
    index = open_index([path])
    assert [index.sample(i).key for i in range(len(index))] == keys_of_plain_webdataset([path])
    reader = ShardReader()
    payloads = [sample["jpg"] for sample in wds.WebDataset(str(path), shardshuffle=False)]
    assert [reader.read(index.sample(i)) for i in range(len(index))] == payloads


def test_shards_that_the_tar_command_wrote_need_no_conversion(tmp_path: Path) -> None:
    tree = tmp_path / "tree" / "people"
    tree.mkdir(parents=True)
    for number in range(5):
        (tree / f"p{number}.jpg").write_bytes(jpeg(number))
        (tree / f"p{number}.json").write_text('{"label": 1, "source": "studio"}')
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "-C", str(tmp_path / "tree"), "--sort=name", "-cf", str(path), "."], check=True)
    index = open_index([path])
    assert [index.sample(i).key for i in range(5)] == [f"./people/p{i}" for i in range(5)]
    assert [ShardReader().read(index.sample(i)) for i in range(5)] == [jpeg(i) for i in range(5)]
    assert index.labels.tolist() == [1] * 5
    assert index.groups("source")[0] == ["studio"]


def test_img2dataset_output_needs_no_conversion(tmp_path: Path) -> None:
    members = []
    for number in (0, 1, 3):  # downloads that failed leave gaps
        meta = {"url": "https://host/x", "status": "success", "key": f"00000000{number}", "sha256": "0", "exif": "{}"}
        members += [
            (f"00000000{number}.jpg", jpeg(number)),
            (f"00000000{number}.json", json.dumps(meta).encode()),
            (f"00000000{number}.txt", b"a caption"),
        ]
    write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    index = open_index(list_shards(str(tmp_path), setting="--data"))
    assert [index.sample(i).key for i in range(3)] == ["000000000", "000000001", "000000003"]
    assert [ShardReader().read(index.sample(i)) for i in range(3)] == [jpeg(i) for i in (0, 1, 3)]
    assert index.group_fields == ()


def test_groups_keep_their_values_over_shards(tmp_path: Path) -> None:
    sets = [[("a", "opencv"), ("b", None), ("c", "gan")], [("d", "gan"), ("e", "dlib"), ("f", "opencv")]]
    paths = []
    for number, samples in enumerate(sets):
        members = []
        for key, attack in samples:
            members += [
                (f"{key}.jpg", jpeg(1)),
                (f"{key}.json", json.dumps({"attack": attack, "identity": 7}).encode()),
            ]
        paths.append(write_tar(tmp_path / f"{number}.tar", members))
    index = open_index(paths)
    names, codes = index.groups("attack")
    assert [names[code] if code >= 0 else None for code in codes] == [attack for each in sets for _, attack in each]
    assert index.groups("identity")[0] == ["7"]
    with pytest.raises(DataError, match="source"):
        index.groups("source")


def test_samples_and_labels_run_through_all_shards(shards: Path) -> None:
    index = open_index(list_shards(f"{shards}/s-{{000..002}}.tar", setting="--data"))
    assert [index.sample(i).key for i in range(64)] == [f"face{i:04d}" for i in range(64)]
    assert index.labels.tolist() == [i % 2 for i in range(64)]


def test_the_fingerprint_follows_the_bytes_and_not_the_place(shards: Path, tmp_path: Path) -> None:
    paths = list_shards(str(shards), setting="--data")
    before = open_index(paths).fingerprint
    moved = tmp_path / "elsewhere"
    shards.rename(moved)
    paths = list_shards(str(moved), setting="--data")
    assert open_index(paths).fingerprint == before
    write_tar(Path(paths[1]), members_of(range(20, 51)))
    assert open_index(paths).fingerprint != before


def test_a_changed_or_damaged_index_is_rebuilt(shards: Path) -> None:
    paths = list_shards(str(shards), setting="--data")
    index = open_index(paths)
    (index.folder / "offset.i64").write_bytes(b"\0" * 8)
    assert len(open_index(paths)) == 64
    (index.folder / "index.json").write_text("{")
    assert len(open_index(paths)) == 64


def test_of_two_jobs_that_build_one_index_the_slower_takes_the_fasters(shards: Path) -> None:
    paths, faster = list_shards(str(shards), setting="--data"), []
    slower = open_index(paths, on_shard=lambda done, _: faster.append(open_index(paths)) if done == 1 else None)
    assert slower.folder == faster[0].folder
    seen = slower.folder.stat().st_ino
    faster.clear()
    (slower.folder / "index.json").write_text("{")
    open_index(
        paths, on_shard=lambda done, _: faster.append(open_index(paths).folder.stat().st_ino) if done == 1 else None
    )
    assert slower.folder.stat().st_ino == faster[0] != seen
    assert [path.name for path in shards.iterdir() if path.name.startswith(".index")] == [slower.folder.name]


@pytest.mark.parametrize("beside", [False, True])
def test_two_sets_with_the_same_names_share_an_index_dir_and_never_mix(tmp_path: Path, beside: bool) -> None:
    index_dir, sets = None if beside else tmp_path / "index", {}
    for name, numbers in (("train", range(8)), ("val", range(20, 31))):
        members = []
        for number in numbers:
            text = json.dumps({"identity": f"{name}-{number}", "label": number % 2}).encode()
            members += [(f"{number}.jpg", jpeg(number)), (f"{number}.json", text)]
        sets[name] = [write_tar(tmp_path / name / "shard-000000.tar", members)]
    first = {name: open_index(paths, index_dir=index_dir) for name, paths in sets.items()}
    again = {name: open_index(paths, index_dir=index_dir) for name, paths in reversed(sets.items())}
    for indices in (first, again):
        for name, count in (("train", 8), ("val", 11)):
            index = indices[name]
            assert len(index) == count
            assert all(value.startswith(f"{name}-") for value in index.groups("identity")[0])
            assert len(fingerprints_of(index).people_N) == count
            assert index.folder == first[name].folder
    assert fingerprints_of(first["train"]).shared_with(fingerprints_of(again["val"])) == ""
    before = first["val"].folder.stat().st_ino
    assert open_index(sets["val"], index_dir=index_dir).folder.stat().st_ino == before  # neither is built again


def test_a_link_that_points_elsewhere_has_another_index(tmp_path: Path) -> None:
    for name, numbers in (("a", range(4)), ("b", range(4, 8))):
        write_tar(tmp_path / name / "s.tar", members_of(numbers))
    (tmp_path / "now").symlink_to("a")
    first = open_index([tmp_path / "now" / "s.tar"], index_dir=tmp_path / "index")
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("b")
    second = open_index([tmp_path / "now" / "s.tar"], index_dir=tmp_path / "index")
    assert (first.sample(0).key, second.sample(0).key) == ("face0000", "face0004")


def test_a_shard_that_was_replaced_with_all_its_dates_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(1)), ("a.cls", b"0")])
    assert open_index([path]).labels.tolist() == [0]
    status = path.stat()
    write_tar(path, [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert open_index([path]).labels.tolist() == [1]


def test_an_open_index_stays_what_it_was_when_another_job_rebuilds_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(1)), ("a.json", b'{"identity": "ann"}')])
    index = open_index([path])
    write_tar(path, [("b.jpg", jpeg(2)), ("b.json", b'{"identity": "bob"}')])
    assert open_index([path]).groups("identity")[0] == ["bob"]
    assert (index.sample(0).key, index.groups("identity")[0]) == ("a", ["ann"])
    with pytest.raises(DataError, match="was rebuilt for changed shards while"):
        pickle.loads(pickle.dumps(index))


def test_a_folder_that_moved_with_its_index_is_indexed_again(shards: Path, tmp_path: Path) -> None:
    paths = list_shards(str(shards), setting="--data")
    open_index(paths)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    write_tar(copy / "s-001.tar", members_of(range(70, 100)))
    assert open_index(list_shards(str(copy), setting="--data")).sample(20).key == "face0070"
    assert open_index(paths).sample(20).key == "face0020"


def test_the_description_of_a_set_names_classes_people_and_what_is_left_out(tmp_path: Path) -> None:
    members = [("__key__", b"x"), ("README", b"x"), ("._0.jpg", b"x")]
    for number, label in enumerate((b"0", b"1", b"1", b"23.5")):
        text = json.dumps({"identity": "ann", "identity_2": f"p{number}"}).encode()
        members += [(f"{number}.jpg", jpeg(number)), (f"{number}.cls", label), (f"{number}.json", text)]
    members += [("4.jpg", jpeg(4)), ("4.txt", b"a caption")]
    index = open_index([write_tar(tmp_path / "s.tar", members)])
    text = describe_index(index)
    assert "5 samples in 1 shard (0.0 MB of images)" in text
    assert "labels: 0: 1, 1: 2, 2 without" in text
    assert "5 people are named" in text
    for said in ("names of the container (__x__) (such as __key__)", "hidden files (such as ._0.jpg)", "1 .txt"):
        assert said in text
    assert "1 samples have an unusable label (such as 3: cls '23.5')" in text
    tally = index.tally
    assert tally.num_members == len(members) == tally.num_used + sum(tally.left_out.values())
    assert sum(tally.labels.values()) == tally.num_samples == len(index)


def test_index_and_reader_travel_to_workers(shards: Path) -> None:
    index = open_index(list_shards(str(shards), setting="--data"))
    reader = ShardReader()
    reader.read(index.sample(0))
    again: ShardIndex
    again, reader = pickle.loads(pickle.dumps((index, reader)))
    assert reader.read(again.sample(63))[:2] == b"\xff\xd8"


def whole(tmp_path: Path) -> bytes:
    return write_tar(tmp_path / "whole.tar", members_of(range(3))).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda raw: b"", "empty"),
        (lambda raw: gzip.compress(raw), "gzip"),
        (lambda raw: bz2.compress(raw), "bzip2"),
        (lambda raw: lzma.compress(raw), "xz"),
        (lambda raw: b"<html>404</html>", "web page"),
        (lambda raw: b"nothing of the kind" * 100, "not a tar"),
        (lambda raw: raw[:3000], "cut"),
        (lambda raw: raw[: -9 * 1024], "cut"),
        (lambda raw: raw[:1024] + b"#" * 20 + raw[1044:], "not a tar|damaged|cut"),
        (lambda raw: raw + raw, "end mark"),
        (lambda raw: bytes(10240), "no sample"),
    ],
)
def test_what_is_no_whole_plain_tar_is_refused(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(make(whole(tmp_path)))
    if b"#####" in path.read_bytes():  # damage inside an image is for the decoder; damage a header
        raw = bytearray(whole(tmp_path))
        second = next(i for i in range(512, len(raw), 512) if raw[i : i + 4] == b"face")
        raw[second : second + 4] = b"####"
        path.write_bytes(raw)
        message = "damaged"
    with pytest.raises(DataError, match=message) as caught:
        open_index([path])
    assert str(path) in str(caught.value)
    assert not list(tmp_path.glob(".index*"))


@pytest.mark.parametrize("length", range(0, 10240, 512))
def test_no_cut_goes_unnoticed(tmp_path: Path, length: int) -> None:
    raw = write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y")]).read_bytes()
    content_end = len(raw.rstrip(b"\0")) + (-len(raw.rstrip(b"\0"))) % 512
    (tmp_path / "cut.tar").write_bytes(raw[:length])
    if length > content_end:  # only zeros of the end mark are missing
        assert [m.name for m in walk_tar(tmp_path / "cut.tar")] == ["a.txt", "b.txt"]
    else:
        with pytest.raises(DataError):
            list(walk_tar(tmp_path / "cut.tar"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", b"{}")], "no image member"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "2 images"),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}")], "not neighbours"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "two members"),
    ],
)
def test_samples_that_webdataset_would_mix_up_are_refused(tmp_path: Path, members, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_index([write_tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize(
    "options",
    [
        *("-b 2048", "-b 1024", "-b 256", "-b 1", "-V faces-of-2024", "-h", "--listed-incremental=STATE"),
        *(f"--format={name}" for name in ("v7", "oldgnu", "gnu", "ustar", "posix")),
        *("--posix -V faces", "--posix --pax-option=globexthdr.name=g,comment:=of-all", "--posix -b 2048"),
    ],
)
def test_what_tar_writes_with_any_options_is_read(tmp_path: Path, options: str) -> None:
    folder = tmp_path / "tree" / "people"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"p{number}.jpg").write_bytes(jpeg(number))
        (folder / f"p{number}.cls").write_bytes(b"1")
    path = tmp_path / "a.tar"
    chosen = options.replace("STATE", str(tmp_path / "state")).split()
    words = ["tar", "-C", str(tmp_path / "tree"), *chosen, "--sort=name", "-cf", str(path), "./people"]
    subprocess.run(words, check=True, capture_output=True)
    index = open_index([path])
    assert [index.sample(i).key for i in range(len(index))] == [f"./people/p{i}" for i in range(4)]
    assert [ShardReader().read(index.sample(i)) for i in range(4)] == [jpeg(i) for i in range(4)]


def test_zeros_that_no_record_explains_are_an_interrupted_copy(tmp_path: Path) -> None:
    raw = write_tar(tmp_path / "a.tar", members_of(range(3))).read_bytes().rstrip(b"\0")
    raw += bytes(-len(raw) % 512)
    whole = raw + bytes(-len(raw) % (2048 * 512))
    (tmp_path / "a.tar").write_bytes(whole)
    assert len(open_index([tmp_path / "a.tar"])) == 3
    for more in (512, 10240, len(whole)):
        (tmp_path / "a.tar").write_bytes(whole + bytes(more))
        with pytest.raises(DataError, match="interrupted copy"):
            open_index([tmp_path / "a.tar"])


def test_files_of_a_mac_beside_the_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    members = [(f"./{kind}{name}", payload) for name, payload in members_of(range(3)) for kind in ("._", "")]
    index = open_index([write_tar(tmp_path / "a.tar", [("./._.", b"x"), ("./.DS_Store", b"x"), *members])])
    assert len(index) == 3
    assert dict(index.tally.left_out) == {"hidden files": 8}


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match=r"link.*--dereference"):
        open_index([tmp_path / "a.tar"])


def test_sparse_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    for options in (["-S"], ["-S", "--format=posix"]):
        subprocess.run(["tar", "-C", str(tmp_path), *options, "-cf", str(tmp_path / "a.tar"), "a.jpg"], check=True)
        with pytest.raises(DataError, match="sparse file: write the tar without --sparse"):
            open_index([tmp_path / "a.tar"])


def test_a_readme_at_the_top_names_the_repair_and_a_compressed_tar_its_tool(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("README.md", b"x"), *members_of(range(3))])
    with pytest.raises(DataError, match=r"'README' has no image.*check_shards.py --repair"):
        open_index([path])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="gunzip"):
        open_index([path])


@pytest.mark.parametrize(
    "pattern", ["pipe:cat x.tar", "ftp://host/x.tar", "-", "/nowhere/*.tar", "${HOME}/x.tar", "", "a{0..1", "{a,b}::c"]
)
def test_patterns_that_name_no_file_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        list_shards(pattern, setting="--data")


def test_what_a_folder_holds_beside_its_shards_is_said(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    list_shards(str(shards), setting="--data")
    assert not caplog.text
    (shards / "more").mkdir()
    shards.joinpath("s-002.tar").rename(shards / "more" / "s-002.tar")
    (shards / "s-003.tar.gz").write_bytes(b"x")
    assert len(list_shards(str(shards), setting="--data")) == 2
    assert "1 compressed archives such as s-003.tar.gz: decompress them" in caplog.text
    assert "sub-folders hold shards, such as more: write" in caplog.text
    assert len(list_shards(f"{shards}/**/*.tar", setting="--data")) == 3
    for path in shards.glob("*.tar"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"s-003\.tar\.gz: decompress"):
        list_shards(str(shards), setting="--data")


def test_a_shard_named_twice_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match="more than once"):
        list_shards(f"{shards}/s-000.tar,{shards}/*.tar", setting="--data")


def test_bytes_that_changed_since_the_index_are_noticed(shards: Path) -> None:
    index = open_index(list_shards(str(shards), setting="--data"))
    ref = index.sample(3)
    with Path(ref.shard).open("r+b") as file:
        file.seek(ref.offset + 100)
        file.write(b"\0\0\0\0")
    with pytest.raises(SampleError, match="checksum"):
        ShardReader().read(ref)
    Path(ref.shard).unlink()
    with pytest.raises(DataError, match="check the storage"):
        ShardReader().read(ref)
