import os
from pathlib import Path

import pytest

from tests.helpers.shards import jpeg, write_tar
from trainer.data.writing.class_labels import SORTED, class_numbers
from trainer.data.writing.source_images import read_manifest, read_source, read_tars, walk_folder
from trainer.errors import ConfigError, DataError


def labels_of(names: list[str], label_map: str | None = None, *, may_sort: bool = True) -> dict[str, int]:
    return class_numbers(names, label_map, where="source x", may_sort=may_sort)


@pytest.mark.parametrize(
    ("names", "label_map", "numbers"),
    [
        (["attack", "bonafide"], None, {"attack": 1, "bonafide": 0}),
        (["Morphs", "bona_fide"], None, {"Morphs": 1, "bona_fide": 0}),
        (["1", "0"], None, {"0": 0, "1": 1}),
        (["morph"], None, {"morph": 1}),
        (["c", "a", "b"], None, {"a": 0, "b": 1, "c": 2}),
        (["fake", "real"], "real=0,fake=1", {"fake": 1, "real": 0}),
        (["a", "b"], SORTED, {"a": 0, "b": 1}),
        (["0", "1"], "0=1,1=0", {"0": 1, "1": 0}),
        (["bonafide", "print"], "print=1", {"bonafide": 0, "print": 1}),
    ],
)
def test_known_names_mean_their_class_and_others_what_the_user_says(
    names: list[str], label_map: str | None, numbers: dict[str, int]
) -> None:
    assert labels_of(names, label_map) == numbers


@pytest.mark.parametrize(
    ("names", "label_map", "message"),
    [
        (["fake", "real"], None, "'fake' is no known class: map the names with --label_map 'fake=N,real=N'"),
        (["faces"], None, "'faces' is no known class"),
        (["bonafide", "print", "scan"], None, "'print' is no known class"),
        (["fake", "real"], "real=0", "does not name 'fake'"),
        (["fake", "real"], "real=0,fake=1,other=2", "names 'other', which is not there"),
        (["fake", "real"], "real:0", "must be names with numbers"),
        (["fake", "real"], "real=0,real=1", "must be names with numbers"),
        (["fake", "real"], ",", "names no class"),
        (["attack", "bonafide"], "attack=0,bonafide=1", "'attack' would be 0 and means 1"),
        (["attack", "bonafide"], SORTED, "'attack' would be 0 and means 1"),
    ],
)
def test_no_class_is_ever_guessed(names: list[str], label_map: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels_of(names, label_map)


def test_unknown_labels_of_a_table_are_not_numbered_by_their_order(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("path,label\na.jpg,real\nb.jpg,fake\nc.jpg,mask\n")
    with pytest.raises(ConfigError, match=r"'fake' is no known class.*first in line 3"):
        read_manifest(path)
    assert [entry.label for entry in read_manifest(path, label_map="real=0,fake=1,mask=1").entries] == [0, 1, 1]
    path.write_text("path,label\na.jpg,Bona fide\nb.jpg,attack\nc.jpg,1.0\nd.jpg,\n")
    source = read_manifest(path)
    assert [entry.label for entry in source.entries] == [0, 1, 1, None]
    assert source.classes == {"Bona fide": 0, "attack": 1, "1.0": 1}


def test_every_file_below_a_folder_is_read_or_counted_by_kind(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for folder in (root / "a", root / ".cache", elsewhere):
        folder.mkdir(parents=True)
    for name in ("a.jpg", "b.JPG", "c.jfif", "d.jpe", "e.mpo", "f.gif", "a/g.avif", "h.bmp", "i.tiff", "j.webp"):
        (root / name).write_bytes(b"x")
    for name in ("n.txt", "a/m.TXT", "k.heic", "LICENSE", ".hidden.jpg", ".cache/z.jpg", "a/scan.pdf"):
        (root / name).write_bytes(b"x")
    (elsewhere / "linked.png").write_bytes(b"x")
    (root / "link").symlink_to(elsewhere)
    (root / "single.png").symlink_to(elsewhere / "linked.png")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "a" / "circle").symlink_to(root)
    os.mkfifo(root / "pipe.jpg")
    source = walk_folder(root, folder_labels=False)
    tally = source.tally
    assert [entry.key for entry in source.entries if entry.key in ("link/linked", "single", "a/g")] == [
        *("a/g", "link/linked", "single"),
    ]
    assert len(source.entries) == 12
    assert dict(tally.left_out) == {
        **{".txt": 2, ".heic (pip install pillow_heif to read them)": 1, "without a suffix": 1, ".pdf": 1},
        **{"hidden files": 2, "broken links": 1, "links that lead in a circle": 1, "no regular files": 1},
    }
    assert tally.num_members == tally.num_used + tally.left_out.total() == 22
    assert "1 broken links (such as gone.jpg)" in " ".join(tally.notes())


def test_a_folder_that_cannot_be_read_is_an_error_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path: Path) -> object:  # root may read everything, and tests may run as root
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"locked cannot be read \(Permission denied\)"):
        walk_folder(tmp_path, folder_labels=False)


@pytest.mark.parametrize(
    ("name", "key"),
    [("__new/0.jpg", "__new/0"), ("__new__/0.jpg", "new__/0"), ("a.b/c.d.jpg", "a_b/c_d"), ("x/__y__.jpg", "x/__y__")],
)
def test_names_with_underscores_and_dots_become_keys_that_every_reader_takes(
    tmp_path: Path, name: str, key: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(jpeg(1))
    assert [entry.key for entry in walk_folder(tmp_path, folder_labels=False).entries] == [key]


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"M\xfcller.jpg")).write_bytes(jpeg(1))
    (entry,) = walk_folder(tmp_path, folder_labels=False).entries
    assert entry.key == "M\\xfcller"
    assert entry.path.read_bytes() == jpeg(1)
    entry.json_text()


def test_paths_that_lead_upwards_become_plain_keys(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "m.csv").write_text("path\n../im/0.jpg\n../im/x/../1.jpg\n")
    assert [entry.key for entry in read_manifest(tmp_path / "csv" / "m.csv").entries] == ["0", "1"]


def test_members_of_a_sample_are_joined_wherever_they_stand(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", jpeg(n)) for n in range(3)] + [(f"{n}.cls", str(n % 2).encode()) for n in range(3)]
    write_tar(tmp_path / "a.tar", [*members, ("README", b"hello"), (".x.jpg", b"x")])
    source = read_tars(str(tmp_path / "*.tar"))
    assert [(entry.key, entry.label) for entry in source.entries] == [("0", 0), ("1", 1), ("2", 0)]
    assert dict(source.tally.left_out) == {"names without a suffix": 1, "hidden files": 1}
    assert source.tally.num_members == source.tally.num_used + source.tally.left_out.total() == 8


def test_of_several_images_the_plain_or_the_named_one_is_kept_with_its_own_texts(tmp_path: Path) -> None:
    plain = [("0.jpg", jpeg(0)), ("0.seg.png", jpeg(1)), ("0.cls", b"1")]
    write_tar(tmp_path / "plain.tar", plain)
    (entry,) = read_tars(str(tmp_path / "plain.tar")).entries
    assert (entry.label, [suffix for suffix, _ in entry.packed.others]) == (1, ["cls"])
    both = [
        ("0.left.jpg", jpeg(0)),
        ("0.right.jpg", jpeg(1)),
        ("0.left.cls", b"1"),
        ("0.right.cls", b"0"),
        ("0.txt", b""),
    ]
    write_tar(tmp_path / "both.tar", both)
    with pytest.raises(DataError, match=r"2 images to choose from .*--image_member left\.jpg"):
        read_tars(str(tmp_path / "both.tar"))
    source = read_tars(str(tmp_path / "both.tar"), "right.jpg")
    assert [(e.label, sorted(s for s, _ in e.packed.others)) for e in source.entries] == [
        (0, ["cls", "left.cls", "txt"])
    ]
    assert dict(source.tally.left_out) == {"other images of a sample": 1}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("x.tar.gz", {}, "is a compressed tar: unpack it"),
        ("nowhere", {}, "no such folder or CSV file exists: check the path"),
        ("faces/*.jpg", {}, "name the folder itself"),
        ("m.csv", {"folder_labels": True}, "is a file: write the labels into it"),
        ("m.csv", {"label_map": "a=0"}, "has no labels: add a column label"),
        ("m.csv", {"image_member": "left"}, "is no tar"),
        ("tree", {"label_map": "a=0"}, "folder_labels is false"),
        ("a.tar", {"folder_labels": True}, "have their own labels"),
        ("tars", {}, r"holds no image .*its tars are packed with --source '.*tars/\*.tar'"),
    ],
)
def test_a_source_or_setting_that_does_not_fit_is_refused(
    tmp_path: Path, source: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "m.csv").write_text("path\na.jpg\n")
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "b.jpg").write_bytes(jpeg(1))
    write_tar(tmp_path / "tars" / "a.tar", [("0.jpg", jpeg(0))])
    with pytest.raises(ConfigError, match=message):
        read_source(str(tmp_path / source), **options)
