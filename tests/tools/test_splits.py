import csv
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tools.splits import CLI, PATTERNS, SPLITS, Photo, Settings, assign, components, main, make_splits, place
from trainer.config.command_line import call
from trainer.data.writing.source_images import Entry, read_manifest
from trainer.errors import ConfigError

SHARES = (0.7, 0.1, 0.2)


def photo(number: int, *identities: str) -> Photo:
    return Photo(Entry(Path(f"{number:03d}.jpg"), f"{number:03d}", None, {}), identities)


@st.composite
def photo_sets(draw: st.DrawFn) -> list[Photo]:
    """Up to 30 people; portraits of one of them and morphs of two."""
    people = [f"p{n}" for n in range(draw(st.integers(1, 30)))]
    pairs = draw(st.lists(st.tuples(st.sampled_from(people), st.sampled_from(people)), max_size=60))
    return [photo(n, *sorted(set(pair))) for n, pair in enumerate([(p, p) for p in people] + pairs)]


def people_in(photos: list[Photo]) -> set[str]:
    return {person for each in photos for person in each.identities}


@given(photo_sets(), st.booleans(), st.integers(0, 5))
def test_nobody_is_in_two_splits_and_every_image_is_in_one_or_dropped(
    photos: list[Photo], linked: bool, seed: int
) -> None:
    groups = components(photos) if linked else [[person] for person in sorted(people_in(photos))]
    split_of = assign(groups, SHARES, seed)
    placed, dropped = place(photos, split_of)
    seen = Counter(person for split in SPLITS for person in people_in(placed[split]))
    assert set(seen.values()) <= {1}
    assert Counter(each.entry.key for part in (*placed.values(), dropped) for each in part) == Counter(
        each.entry.key for each in photos
    )
    assert all(len({split_of[person] for person in each.identities}) == 2 for each in dropped)
    assert not (linked and dropped), "components lose no image"


@given(st.integers(0, 200), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(0, 5))
def test_shares_of_people_are_met_within_two(num_people: int, parts: list[int], seed: int) -> None:
    shares = [part / sum(parts) for part in parts]
    counts = Counter(assign([[str(n)] for n in range(num_people)], shares, seed).values())
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(counts[split] - share * num_people) < 2
        assert share > 0 or counts[split] == 0


@given(photo_sets(), st.randoms())
def test_the_order_of_images_does_not_matter(photos: list[Photo], shuffler: random.Random) -> None:
    shuffled = shuffler.sample(photos, len(photos))
    assert components(photos) == components(shuffled)
    groups = components(photos)
    assert assign(groups, SHARES, 0) == assign(shuffler.sample(groups, len(groups)), SHARES, 0)


def test_a_seed_gives_the_same_splits_in_every_process_and_version() -> None:
    names = ("ann", "bob", "cai", "dan", "eve", "fay")
    split_of = assign([[name] for name in names], (0.5, 0.2, 0.3), 0)
    assert [split_of[name] for name in names] == ["train", "train", "dev", "train", "test", "test"]
    split_of = assign([[name] for name in names], (0.5, 0.2, 0.3), 1)
    assert [split_of[name] for name in names] == ["test", "train", "train", "test", "dev", "train"]


def test_components_count_with_all_their_people() -> None:
    groups = [[f"{n}a", f"{n}b"] for n in range(5)]
    assert Counter(assign(groups, (0.6, 0.2, 0.2), 0).values()) == {"train": 6, "dev": 2, "test": 2}


@given(photo_sets())
def test_components_are_the_finest_groups_that_no_morph_crosses(photos: list[Photo]) -> None:
    """The oracle is the naive closure: merge groups as long as an image touches two."""
    naive = [{person} for person in sorted(people_in(photos))]
    for each in photos:
        touched = [group for group in naive if group & set(each.identities)]
        naive = [group for group in naive if group not in touched] + [set().union(*touched)]
    assert components(photos) == sorted(map(sorted, naive))


@pytest.mark.parametrize(
    ("naming", "name", "people"),
    [
        ("frll", "raw/001_03.jpg", ("001",)),
        ("frll", "morph_amsl/001_045.jpg", ("001", "045")),
        ("frll", "morph_opencv/001_03_vs_045_03.jpg", ("001", "045")),
        ("frll", "001_03_morph_045_02.png", ("001", "045")),
        ("frgc", "raw/04927d04.png", ("04927",)),
        ("frgc", "lma/04424d82-vs-04559d102.jpg", ("04424", "04559")),
        ("frgc", "02463d252.png_vs_04494d50.png", ("02463", "04494")),
        ("smdd", "os25k_bf_t/img000184.png", ("img000184",)),
        ("smdd", "m15k_t/morphed_img000184_img282038.png", ("img000184", "img282038")),
        (r"(?P<b>\w+)-(?P<a>\w+)/", "bob-ann/3.jpg", ("ann", "bob")),
        (r"(?P<a>\w+)/", "ann/3.jpg", ("ann",)),
    ],
)
def test_a_pattern_finds_both_parents_of_a_morph(tmp_path: Path, naming: str, name: str, people: tuple[str]) -> None:
    write(tmp_path / "m.csv", "path", [name])
    words = ["--source", str(tmp_path / "m.csv"), "--identity_pattern", naming, "--output_dir", str(tmp_path / "out")]
    call(main, CLI, [*words, "--shares", "1,0,0", "--keep_components", "true"])
    row = rows(tmp_path / "out" / "train.csv")[0]
    assert (row["identity"], *filter(None, [row["identity_2"]])) == people


@pytest.mark.parametrize("naming", PATTERNS)
def test_a_named_pattern_matches_no_foreign_name(tmp_path: Path, naming: str) -> None:
    write(tmp_path / "m.csv", "path", ["faces/holiday.jpg"])
    with pytest.raises(ConfigError, match=r"holiday\.jpg has no identity .*does not match its path"):
        make_splits(settings(tmp_path / "m.csv", identity_pattern=naming))


def write(path: Path, header: str, lines: list[str]) -> Path:
    path.write_text("\n".join([header, *lines, ""]))
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings(source: Path, **changes: object) -> Settings:
    return Settings(**({"source": str(source), "output_dir": str(source.parent / "out")} | changes))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two portraits of each of twenty people and forty morphs, in two folders."""
    portraits = [f"faces/{n:02d}_{k}.jpg,0,p{n},,cam{k}" for n in range(20) for k in range(2)]
    morphs = [f"morphs/{n}_{k}.png,1,p{n},p{(n + k) % 20},none" for n in range(20) for k in (1, 7)]
    return write(tmp_path / "all.csv", "path,label,identity,identity_2,camera", portraits + morphs)


def test_the_manifests_are_what_make_shards_reads(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_splits(settings(manifest))
    whole = {entry.path: entry for entry in read_manifest(manifest).entries}
    found, people = [], []
    for split in SPLITS:
        entries = read_manifest(manifest.parent / "out" / f"{split}.csv").entries
        for entry in entries:
            origin = whole[entry.path]
            assert (entry.key, entry.label) == (origin.key, origin.label)
            assert entry.metadata | {"path": ""} == origin.metadata | {"path": ""}
        found += [entry.path for entry in entries]
        people.append({entry.metadata[c] for entry in entries for c in ("identity", "identity_2")} - {""})
    assert [len(part) for part in people] == [14, 2, 4]
    assert not people[0] & people[1] | people[0] & people[2] | people[1] & people[2]
    dropped = rows(manifest.parent / "out" / "dropped.csv")
    assert all(row["split"] != row["split_2"] and "morphs" in row["path"] for row in dropped)
    assert Counter(found) + Counter(Path(row["path"]) for row in dropped) == Counter(list(whole))
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [line[0] for line in table] == [*SPLITS, "dropped"]
    assert sum(int(line[-2]) for line in table) == sum(int(line[-1]) for line in table) == 40
    assert table[3] == ["dropped", str(len(dropped)), "0", str(len(dropped))]


@hypothesis_settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms())
def test_the_order_of_rows_does_not_change_a_byte(
    manifest: Path, tmp_path_factory: pytest.TempPathFactory, shuffler: random.Random
) -> None:
    header, *lines = manifest.read_text().splitlines()
    outputs = [tmp_path_factory.mktemp("splits") for _ in range(2)]
    make_splits(settings(manifest, output_dir=str(outputs[0])))
    other = write(manifest.parent / "shuffled.csv", header, shuffler.sample(lines, len(lines)))
    make_splits(settings(other, output_dir=str(outputs[1])))
    one, two = ({path.name: path.read_bytes() for path in output.iterdir()} for output in outputs)
    assert one == two
    assert sorted(one) == ["dev.csv", "dropped.csv", "test.csv", "train.csv"]


def test_three_ways_to_say_who_is_in_an_image_give_the_same_splits(manifest: Path) -> None:
    names = [(row["path"], row["identity"], row["identity_2"]) for row in rows(manifest)]
    bare = write(manifest.parent / "bare.csv", "path", [name[0] for name in names])
    table = write(manifest.parent / "who.csv", "path,identity,identity_2", [", ".join(name) for name in names])
    pattern = write(manifest.parent / "named.csv", "path", [f"{a}-{b}-/{path}" for path, a, b in names])
    regex = r"^(?P<a>\w+)-(?P<b>\w*)-/"
    ways = [(manifest, {}), (bare, {"identities": str(table)}), (pattern, {"identity_pattern": regex})]
    found = []
    for number, (source, changes) in enumerate(ways):
        output = manifest.parent / f"out{number}"
        make_splits(settings(source, output_dir=str(output), **changes))
        found.append([{(row["identity"], row["identity_2"]) for row in rows(output / f"{s}.csv")} for s in SPLITS])
    assert found[0] == found[1] == found[2]


def test_a_folder_tree_is_split_with_its_folders_as_labels(tmp_path: Path) -> None:
    for name in ("bonafide/001_03.jpg", "bonafide/002_03.jpg", "bonafide/003_03.jpg", "morph/001_002.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(b"never opened")
    make_splits(settings(tmp_path / "tree", identity_pattern="frll", folder_labels=True, shares="1,0,0"))
    assert [(row["key"], row["label"], row["identity_2"]) for row in rows(tmp_path / "out" / "train.csv")] == [
        ("bonafide/001_03", "0", ""),
        ("bonafide/002_03", "0", ""),
        ("bonafide/003_03", "0", ""),
        ("morph/001_002", "1", "002"),
    ]
    assert rows(tmp_path / "out" / "test.csv") == []


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"shares": "0.7,0.1,0.1"}, "shares is '0.7,0.1,0.1', but must be three numbers from 0 that add up to 1"),
        ({"shares": "0.5,0.5"}, "shares is '0.5,0.5', but must be three numbers"),
        ({"shares": "1.5,-0.5,0"}, "shares is '1.5,-0.5,0', but must be three numbers"),
        ({"identity_pattern": "("}, r"identity_pattern is '\(', but must be one of frll, frgc, smdd"),
        ({"identity_pattern": "(.*)"}, "regular expression with a group"),
        ({"identity_pattern": "(?P<a>.)(?P<c>.)"}, "regular expression with a group"),
        ({"identity_pattern": "frll", "identities": "x.csv"}, "identity_pattern is set too"),
        ({"sharess": "1"}, "did you mean --shares"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(tmp_path: Path, flags: dict[str, str], rule: str) -> None:
    given_flags = {"source": "/nowhere", "output_dir": str(tmp_path / "out")} | flags
    with pytest.raises(ConfigError, match=rule):
        call(main, CLI, [word for name, value in given_flags.items() for word in (f"--{name}", value)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "lines", "changes", "rule"),
    [
        ("path,identity", ["a.jpg,p1", "b.jpg, "], {}, r"b\.jpg has no identity \(1 images in all\): fill its column"),
        ("path,identity,identity_2", ["a.jpg,,p1"], {}, r"a\.jpg has no identity"),
        ("path", ["a.jpg"], {}, "has no column identity: add it, or pass --identities or --identity_pattern"),
        ("path,identity", ["a.jpg,p"], {"identity_pattern": "frll"}, "identity_pattern is set, but source"),
        ("path,identity", ["a.jpg,p1", "./a.jpg,p2"], {}, r"lists .*a\.jpg more than once"),
        ("path,identity", ["a.jpg,p1", "b.jpg,p2"], {}, "shares gives 0.1 to dev, but no image of the 2 people"),
        ("path", ["a.jpg"], {"identities": "/nowhere.csv"}, "identities is '/nowhere.csv', but no such file"),
    ],
)
def test_a_source_without_clear_identities_is_refused(
    tmp_path: Path, header: str, lines: list[str], changes: dict[str, str], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        make_splits(settings(write(tmp_path / "m.csv", header, lines), **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("header", "lines", "rule"),
    [
        ("path,identity,person", ["a.jpg,p1,x"], r"has columns \['path', 'identity', 'person'\], but must have"),
        ("path,identity", ["a.jpg,p1", "a.jpg,p2"], r"names a\.jpg more than once"),
        ("path,identity", ["b.jpg,p1"], r"a\.jpg has no identity .*: add its path to .*who\.csv"),
    ],
)
def test_a_wrong_list_of_identities_is_refused(tmp_path: Path, header: str, lines: list[str], rule: str) -> None:
    source = write(tmp_path / "m.csv", "path", ["a.jpg"])
    with pytest.raises(ConfigError, match=rule):
        make_splits(settings(source, identities=str(write(tmp_path / "who.csv", header, lines))))


def test_components_larger_than_any_share_are_refused(manifest: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_components is True, but morphs link 20 of 20 people"):
        make_splits(settings(manifest, keep_components=True))


def test_an_output_that_holds_something_is_left_alone(manifest: Path) -> None:
    (manifest.parent / "out").mkdir()
    (manifest.parent / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: name a new folder"):
        make_splits(settings(manifest))
    assert [path.name for path in (manifest.parent / "out").iterdir()] == ["mine.txt"]


def test_what_does_not_match_is_said_and_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = [f"{number:03d}" for number in range(10)]
    for person in people:
        path = tmp_path / "faces" / "bonafide" / f"{person}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "faces" / "attack").mkdir()
    (tmp_path / "faces" / "attack" / "000_000.jpg").write_bytes(b"x")
    (tmp_path / "faces" / "list.txt").write_text("x")
    rows = [f"bonafide/{person}.jpg;{person}" for person in people] + ["attack/000_000.jpg;000", "bonafide/999.jpg;1"]
    (tmp_path / "ids.csv").write_text("\n".join(["path;identity", *rows]))
    options = {"source": str(tmp_path / "faces"), "identities": str(tmp_path / "ids.csv"), "folder_labels": True}
    make_splits(Settings(output_dir=str(tmp_path / "out"), **options))
    said = capsys.readouterr().out
    assert "11 images among 12 files; left out: 1 .txt (such as list.txt)" in said
    assert "classes: bonafide -> 0, attack -> 1" in said
    assert "1 rows name no image, such as bonafide/999.jpg" in said
    assert said.count("warning: ") == 2, "the one morph is in one of three splits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "x/*.tar"}, "tars cannot be split"),
        ({"folder_labels": True}, "'a' is no known class"),
        ({"identity_pattern": None, "identities": "ids.csv"}, "column 'Identity', which no command reads"),
    ],
)
def test_a_source_that_would_be_misread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/001.jpg", "b/002.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "ids.csv").write_text("path,Identity\na/001.jpg,1\n")
    common = {"source": ".", "output_dir": "out", "identity_pattern": "frll"}
    with pytest.raises(ConfigError, match=message):
        make_splits(Settings(**(common | options)))


def test_a_file_name_that_no_csv_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / os.fsdecode(b"M\xfcller_001.jpg")).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"M\\xfcller_001\.jpg: this name is no UTF-8"):
        make_splits(Settings(source=str(tmp_path / "f"), output_dir=str(tmp_path / "o"), identity_pattern="(?P<a>.)"))
