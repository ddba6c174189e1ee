"""Each published data set is packed as it lies on disk; a wrong tree is refused with what was expected and found."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.shards import jpeg
from tools.make_shards import Settings, make_shards
from tools.splits import Settings as SplitSettings
from tools.splits import make_splits
from trainer.data.shards.index import list_shards, open_index
from trainer.data.writing.layouts import People, people_of, read_layout
from trainer.data.writing.source_images import read_manifest
from trainer.detection.scoring import truth_of
from trainer.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def grow(root: Path, *files: str) -> Path:
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number) if path.suffix in (".jpg", ".png") else b"")
    return root


def packed(source: Path, layout: str, **changes: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Pack; return json of each sample by its published path, and the report, whose sums must agree."""
    output = source.parent / f"out-{layout}-{changes.get('split')}"
    same = {"num_processes": 1, "progress_bar": False, "source": str(source), "output_dir": str(output)}
    make_shards(Settings(**(same | {"layout": layout} | changes)))
    report = json.loads((output / "make_shards.json").read_text())["report"]
    assert report["found"] == report["used"] + sum(report["left_out"].values())
    assert report["used"] == report["samples"] + report["damaged"]
    index = open_index(list_shards(str(output), setting="--data"))
    entries = read_layout(layout, str(source), **changes).entries
    truth, keys = truth_of(index, np.arange(len(index))), [ref.key for ref in index.samples(np.arange(len(index)))]
    stored = {key: (truth.label_N[i], truth.tool_N[i], set(truth.people_N[i])) for i, key in enumerate(keys)}
    found = {}
    for entry in entries:
        about = {"label": entry.label} | entry.metadata
        label, tool, people = stored[entry.key]
        named = {about.get("identity", ""), about.get("identity_2", "")} - {""}
        assert (label, tool or "", people) == (about["label"], about.get("attack", ""), named)  # what evaluate.py reads
        found[about.pop("path")] = about
    assert len(found) == len(index)
    return found, report


def test_smdd_is_packed_with_its_boxes_and_both_parents(tmp_path: Path) -> None:
    root = grow(
        tmp_path / "SMDD",
        "os25k_bf_t/img000001.png",
        "os25k_bf_t/img000002.png",
        "m15k_t/morphed_img000184_img282038.png",
        "os25k_m_t/img000184.png",
        "readme.pdf",
    )
    (root / "boxes_m15k_t.txt").write_text(
        "./m15k_t/morphed_img000184_img282038.png 43 197 41 240 97 123 161 123 133 156 95 182 158 183\n"
    )
    found, report = packed(root, "smdd")
    assert found["m15k_t/morphed_img000184_img282038.png"] == {
        "label": 1,
        "source": "smdd",
        "attack": "opencv",
        "identity": "smdd/img000184",
        "identity_2": "smdd/img282038",
        "published_box": [43.0, 41.0, 197.0, 240.0],  # x1 y1 x2 y2, of x1 x2 y1 y2
        "published_points": [[97.0, 123.0], [161.0, 123.0], [133.0, 156.0], [95.0, 182.0], [158.0, 183.0]],
    }
    assert found["os25k_bf_t/img000001.png"] == {"label": 0, "source": "smdd", "identity": "smdd/img000001"}
    assert report["left_out"] == {
        "images in folder os25k_m_t, which layout smdd does not use": 1, ".pdf": 1, ".txt": 1
    }  # fmt: skip


def test_a_box_in_another_order_is_refused(tmp_path: Path) -> None:
    root = grow(tmp_path / "SMDD", "os25k_bf_t/img1.png", "m15k_t/morphed_img1_img2.png")
    (root / "boxes.txt").write_text("./m15k_t/a.png 43 41 197 240" + " 1" * 10)
    with pytest.raises(ConfigError, match="x1 x2 y1 y2"):
        read_layout("smdd", str(root))


def test_a_csv_of_smdd_keeps_its_classes_behind_a_space(tmp_path: Path) -> None:
    grow(tmp_path, "SMDD/os25k_bf_t/img000001.png", "SMDD/m15k_t/morphed_img000184_img282038.png")
    table = tmp_path / "train.csv"
    table.write_text(
        "image_path,label\nSMDD/os25k_bf_t/img000001.png, bonafide\n"
        "SMDD/m15k_t/morphed_img000184_img282038.png, attack\n"
    )
    found, _ = packed(table, "smdd")
    assert {path: about["label"] for path, about in found.items()} == {
        "os25k_bf_t/img000001.png": 0, "m15k_t/morphed_img000184_img282038.png": 1
    }  # fmt: skip


def test_numbers_in_a_published_csv_need_the_user_to_say_which_is_which(tmp_path: Path) -> None:
    grow(tmp_path, "a/001_03.jpg", "a/001_002.jpg")
    table = tmp_path / "OpenCV.csv"
    table.write_text("image_path,label\na/001_03.jpg,1\na/001_002.jpg,0\n")  # as MADation writes them
    with pytest.raises(ConfigError, match="label_map '0=0,1=1' where 1 is the morph"):
        read_layout("smdd", str(table))
    labels = {e.path.name: e.label for e in read_layout("smdd", str(table), label_map="0=1,1=0").entries}
    assert labels == {"001_03.jpg": 0, "001_002.jpg": 1}


def test_frll_morphs_tell_raw_from_the_five_tools(tmp_path: Path) -> None:
    tools = ("amsl", "facemorpher", "opencv", "stylegan", "webmorph")
    root = grow(
        tmp_path / "facelab_london",
        *(f"raw/{person:03d}_{shot}.jpg" for person in (1, 2) for shot in ("03", "08")),
        *(f"morph_{tool}/001_002.jpg" for tool in tools),
        "morph_amsl/001_03_002_03.jpg",
    )
    found, report = packed(root, "frll")
    assert report["samples"] == 10
    assert Counter(about.get("attack") for about in found.values()) == {None: 4, **dict.fromkeys(tools, 1), "amsl": 2}
    both = {"identity": "frll/001", "identity_2": "frll/002"}
    assert found["morph_amsl/001_002.jpg"] == {"label": 1, "source": "frll", "attack": "amsl"} | both
    assert found["morph_amsl/001_03_002_03.jpg"].items() >= both.items()
    assert found["raw/002_08.jpg"] == {"label": 0, "source": "frll", "identity": "frll/002"}


def test_frgc_and_feret_name_their_people_each_in_its_way(tmp_path: Path) -> None:
    root = grow(
        tmp_path / "both",
        "raw/04202d345.jpg",
        "raw/00002_930831_fa.jpg",
        "morph_opencv/04202d345_04203d12.jpg",
        "morph_stylegan/00002_930831_fa_00029_930831_fa.jpg",
        "morph_opencv/unnamed.jpg",
    )
    found, report = packed(root, "frgc_feret")
    assert found["raw/04202d345.jpg"] == {"label": 0, "source": "frgc", "identity": "frgc/04202"}
    assert found["raw/00002_930831_fa.jpg"] == {"label": 0, "source": "feret", "identity": "feret/00002"}
    assert found["morph_opencv/04202d345_04203d12.jpg"]["identity_2"] == "frgc/04203"
    assert found["morph_stylegan/00002_930831_fa_00029_930831_fa.jpg"]["identity_2"] == "feret/00029"
    assert report["unusable"] == {"identity": 1}
    assert found["morph_opencv/unnamed.jpg"] == {"label": 1, "source": "frgc_feret", "attack": "opencv"}


def test_mad22_and_mordiff_share_their_people_with_frll(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = ("FaceMorpher", "MIPGAN_I", "MIPGAN_II", "OpenCV", "Webmorph")
    mad22 = grow(tmp_path / "MAD22", "BonaFide/009_08.jpg", *(f"{tool}/009_08-vs-144_08.jpg" for tool in tools))
    mordiff = grow(tmp_path / "MorDIFF", "morphs_neutral/009_03-vs-144_03.png", "morphs_smiling/009_08-vs-144_08.png")
    found, _ = packed(mad22, "mad22")
    assert {a.get("attack") for a in found.values()} == {
        None, "facemorpher", "mipgan_i", "mipgan_ii", "opencv", "webmorph"
    }  # fmt: skip
    assert found["MIPGAN_II/009_08-vs-144_08.jpg"]["identity_2"] == "frll/144"
    others, _ = packed(mordiff, "mordiff")
    assert {a["attack"] for a in others.values()} == {"mordiff"}
    assert {a["identity"] for a in others.values()} == {"frll/009"}
    assert "no bona fides: add those of FRLL" in capsys.readouterr().out


def test_lma_packs_one_split_of_its_csv_and_counts_the_others(tmp_path: Path) -> None:
    grow(tmp_path, "lma/04424d82-vs-04559d102.jpg", "lma/04424d80.jpg", "lma/04600d1.jpg")
    table = tmp_path / "lma.csv"
    table.write_text(
        "image_path,label,split\nlma/04424d82-vs-04559d102.jpg,morph,train\nlma/04424d80.jpg,bonafide,train\n"
        "lma/04600d1.jpg,bonafide,test\n"
    )
    found, report = packed(table, "lma", split="train")
    assert found["lma/04424d82-vs-04559d102.jpg"] == {
        "label": 1, "source": "lma", "attack": "lma", "identity": "frgc/04424", "identity_2": "frgc/04559",
    }  # fmt: skip
    assert report["left_out"] == {"rows of split test": 1}
    with pytest.raises(ConfigError, match="has the splits test, train, but split is not set"):
        read_layout("lma", str(table))
    with pytest.raises(ConfigError, match=r"lma is a CSV with columns image_path, label and split.*lma\.csv"):
        read_layout("lma", str(tmp_path))


def test_folders_take_the_tool_from_the_folder_and_morphs_from_the_name_of_the_set(tmp_path: Path) -> None:
    greedy = grow(tmp_path / "DiMGreedy", "raw/001_03.jpg", "dim_a/001_002.jpg", "greedy_dim/001_002.jpg", "loose.jpg")
    found, report = packed(greedy, "folders")
    assert {path: about.get("attack") for path, about in found.items()} == {
        "raw/001_03.jpg": None, "dim_a/001_002.jpg": "dim_a", "greedy_dim/001_002.jpg": "greedy_dim"
    }  # fmt: skip
    assert report["left_out"] == {"images in no folder, which layout folders does not use": 1}
    code = grow(tmp_path / "MorCode", "raw/04202d345.jpg", "morphs/04202d345_04203d12.jpg")
    assert read_layout("folders", str(code)).entries[0].metadata["attack"] == "morcode"


@pytest.mark.parametrize(
    ("layout", "files", "message"),
    [
        ("frll", ["raw/001_03.jpg"], "no folder of morphs: expected amsl or facemorpher .* found raw"),
        ("frll", ["morph_amsl/001_002.jpg"], "no folder of bona fides: expected raw or bonafide .* found morph_amsl"),
        ("smdd", ["os25k_m_t/img1.png", "m15k_t/a.png"], "expected os25k_bf_t, found m15k_t, os25k_m_t"),
        ("mad22", ["x.jpg"], "found no folder: check the path"),
        ("frll", ["facelab/raw/001_03.jpg", "facelab/morph_amsl/001_002.jpg"], "name the folder .*/facelab"),
        ("folders", ["raw/a.jpg"], "no folder of morphs: expected one for each tool, found raw"),
    ],
)
def test_a_wrong_tree_is_refused_with_what_was_expected_and_found(
    layout: str, files: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"layout is {layout}, .*{message}"):
        read_layout(layout, str(grow(tmp_path / "tree", *files)))


@pytest.mark.parametrize(
    "changes",
    [{"layout": "frll", "folder_labels": True}, {"layout": "frll", "image_member": "jpg"}, {"split": "train"}],
)
def test_settings_that_say_the_same_twice_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="layout"):
        Settings(source="faces", output_dir="out", **changes)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("001_03", People("frll", "frll/001")),
        ("009_08-vs-144_08", People("frll", "frll/009", "frll/144")),
        ("morphed_img000184_img282038", People("smdd", "smdd/img000184", "smdd/img282038")),
        ("04424d82-vs-04559d102", People("frgc", "frgc/04424", "frgc/04559")),
        ("00002_930831_fa_00029_930831_fb", People("feret", "feret/00002", "feret/00029")),
        ("portrait", None),
        ("001_0", None),
        ("001_03_morph_045_02", People("frll", "frll/001", "frll/045")),
        ("02463d252.png_vs_04494d50", People("frgc", "frgc/02463", "frgc/04494")),
    ],
)
def test_people_are_read_from_file_names(stem: str, expected: People | None) -> None:
    assert people_of(stem) == expected


def test_only_bona_fides_are_packed_and_the_morphs_are_counted(tmp_path: Path) -> None:
    root = grow(tmp_path / "SMDD", "os25k_bf_t/img1.png", "os25k_bf_t/img2.png", "m15k_t/morphed_img1_img2.png")
    same = {"num_processes": 1, "progress_bar": False, "output_dir": str(tmp_path / "out")}
    make_shards(Settings(**same | {"source": str(root), "layout": "smdd", "only": "bonafide"}))
    report = json.loads((tmp_path / "out" / "make_shards.json").read_text())["report"]
    assert report["labels"] == {"0": 2}
    assert report["left_out"] == {"files of other classes than bonafide": 1}
    assert report["found"] == report["used"] + 1 == 3
    again = same | {"source": str(tmp_path / "out" / "*.tar"), "output_dir": str(tmp_path / "again"), "only": "morph"}
    with pytest.raises(ConfigError, match=r"only is 'morph', but .* no image of that class"):
        make_shards(Settings(**again))


def test_a_layout_is_split_by_people_and_its_parts_are_packed_with_their_tools(tmp_path: Path) -> None:
    bona_fides = [f"os25k_bf_t/img{n:06d}.png" for n in range(40)]
    morphs = [f"m15k_t/morphed_img{n:06d}_img{n + 1:06d}.png" for n in range(39)]
    root = grow(tmp_path / "SMDD", *bona_fides, *morphs)
    make_splits(SplitSettings(source=str(root), layout="smdd", shares="0.5,0.5,0", output_dir=str(tmp_path / "parts")))
    people = {}
    for part in ("train", "dev"):
        entries = read_manifest(tmp_path / "parts" / f"{part}.csv").entries
        assert {entry.metadata["attack"] for entry in entries if entry.label == 1} == {"opencv"}
        people[part] = {entry.metadata[name] for entry in entries for name in ("identity", "identity_2")} - {""}
    assert len(people["train"] | people["dev"]) == 40
    assert not people["train"] & people["dev"]
