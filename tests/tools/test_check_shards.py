"""tools/check_shards.py finds every damage that the trainer would meet, and saves the rest."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.shards import display_p3, jpeg, members_of, write_tar
from tools.check_shards import CLI, main
from trainer.config.command_line import call
from trainer.data.shards.index import ShardIndex, open_index
from trainer.data.shards.reader import ShardReader
from trainer.errors import ConfigError, DataError


def check(*words: str) -> int:
    return call(main, CLI, [*words, "--num_processes", "1", "--progress_bar", "false"])


def test_sound_shards_are_described(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(shards / "t.tar", [("again.jpg", jpeg(3)), ("again.json", b'{"source": "web", "attack": "opencv"}')])
    assert check("--data", str(shards)) == 0
    text = capsys.readouterr().out
    assert "65 samples" in text
    assert "label  0: 32, 1: 32, none: 1" in text
    assert "source  web: 1" in text
    assert "the same image twice: face0003 and again" in text
    assert "0 problems in 0 of 4 shards" in text


def damaged(folder: Path, kind: str) -> tuple[Path, int]:
    """A shard of 20 samples with one damage, and how many of them are whole."""
    path = write_tar(folder / "bad" / "s.tar", members_of(range(20)))
    raw = bytearray(path.read_bytes())
    headers = [i for i in range(0, len(raw), 512) if raw[i : i + 4] == b"face"]
    whole = 19
    if kind == "header":
        raw[headers[10]] ^= 1  # the image of the sixth sample
    elif kind == "cut":
        del raw[headers[20] + 700 :]  # inside the image of the eleventh sample
        whole = 10
    elif kind == "pixels":
        raw[headers[6] + 512 : headers[6] + 1024] = bytes(512)
    elif kind == "size":
        raw[headers[4] + 124 : headers[4] + 135] = b"77777777777"  # a member of 8 GiB
    path.write_bytes(raw)
    return path, whole


@pytest.mark.parametrize("kind", ["header", "cut", "pixels", "size"])
def test_damage_is_named_and_the_rest_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path, whole = damaged(tmp_path, kind)
    before = path.read_bytes()
    assert check("--data", str(path), "--repair", str(tmp_path / "new")) == 1
    assert str(path) in capsys.readouterr().out
    assert path.read_bytes() == before
    index, reader = open_index([tmp_path / "new" / "s.tar"]), ShardReader()
    assert len(index) == whole
    for i in range(whole):
        ref = index.sample(i)
        assert reader.read(ref) == jpeg(int(ref.key.removeprefix("face")))
    assert check("--data", f"{tmp_path}/new") == 0


def repaired(folder: Path, members: list[tuple[str, bytes]], *words: str) -> tuple[int, ShardIndex]:
    path = write_tar(folder / "bad" / "s.tar", members)
    code = check("--data", str(path), "--repair", str(folder / "new"), *words)
    return code, open_index([folder / "new" / "s.tar"])


def test_a_repair_joins_members_that_stand_apart_and_keeps_every_label(tmp_path: Path) -> None:
    images = [(f"{i:02}.jpg", jpeg(i)) for i in range(48)]
    labels = [(f"{i:02}.cls", str(i % 2).encode()) for i in range(48)]
    _, index = repaired(tmp_path, images + labels)
    assert index.labels.tolist() == [i % 2 for i in range(48)]
    assert [ShardReader().read(index.sample(i)) for i in range(48)] == [jpeg(i) for i in range(48)]


def test_a_repair_never_puts_a_label_beside_another_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two samples of one key, one without its label: joining them would label the wrong face."""
    first, second = [("0.jpg", jpeg(1))], [("0.jpg", jpeg(2)), ("0.cls", b"1")]
    code, index = repaired(tmp_path, [*first, ("1.jpg", jpeg(3)), ("1.cls", b"0"), *second])
    assert code == 1
    assert [index.sample(i).key for i in range(len(index))] == ["1"]
    text = capsys.readouterr().out
    assert "'0' (3 members): it has several members .jpg" in text
    assert "5 members were found: 2 were written as 1 whole samples" in text
    assert "3 were lost, 0 left out" in text


def test_a_repair_of_joined_tars_keeps_the_first_of_two_samples_with_one_key_and_names_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, index = repaired(tmp_path, [*members_of(range(3)), ("face0001.jpg", jpeg(9)), ("face0001.json", b"{}")])
    assert (code, len(index)) == (1, 3)
    assert ShardReader().read(index.sample(1)) == jpeg(1)
    assert "another sample of this key stands before it" in capsys.readouterr().out
    assert "face0001" in (tmp_path / "new" / "lost.csv").read_text()


def test_a_sample_that_lost_its_json_to_damage_is_not_saved_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "bad" / "s.tar", members_of(range(10)))
    raw = bytearray(path.read_bytes())
    headers = [i for i in range(0, len(raw), 512) if raw[i : i + 4] == b"face"]
    raw[headers[7]] ^= 1  # the json of the fourth sample
    path.write_bytes(raw)
    assert check("--data", str(path), "--repair", str(tmp_path / "new")) == 1
    index = open_index([tmp_path / "new" / "s.tar"])
    assert [index.sample(i).key for i in range(len(index))] == [f"face{i:04d}" for i in range(10) if i != 3]
    text = capsys.readouterr().out
    assert "'face0003' (1 members): it has no .json, as most others have" in text


@pytest.mark.parametrize("prefix", ["a/__new/", "__/im/"])
def test_keys_that_begin_with_underscores_are_checked_and_repaired(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{prefix}{i}.jpg", jpeg(i)) for i in range(5)]
    code, index = repaired(tmp_path, members)
    assert (code, len(index)) == (0, 5)
    assert "5 samples" in capsys.readouterr().out


def test_what_the_trainer_leaves_out_is_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = [("__key__", b""), ("README", b"x"), ("._face0000.jpg", b"x"), ("notes.md", b"x")]
    code, index = repaired(tmp_path, [*members_of(range(2)), ("face0001.txt", b"x"), *extra])
    assert (code, len(index)) == (1, 2)
    text = capsys.readouterr().out
    assert "9 members were found: 5 were written as 2 whole samples" in text
    assert "1 were lost, 3 left out" in text
    assert "'notes' (1 members): sample 'notes' has no image member" in text
    assert check("--data", f"{tmp_path}/new") == 0
    assert "members left out: 1 .txt (such as face0001.txt)" in capsys.readouterr().out


def test_hard_links_become_files_in_a_repair(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    os.link(folder / "a.jpg", folder / "b.jpg")
    path = tmp_path / "bad" / "s.tar"
    path.parent.mkdir()
    subprocess.run(["tar", "-C", str(folder), "-cf", str(path), "a.jpg", "b.jpg"], check=True)
    with pytest.raises(DataError, match="--hard-dereference"):
        open_index([path])
    assert check("--data", str(path), "--repair", str(tmp_path / "new")) == 1
    index = open_index([tmp_path / "new" / "s.tar"])
    assert [ShardReader().read(index.sample(i)) for i in range(2)] == [jpeg(1)] * 2


def test_a_repair_never_overwrites(tmp_path: Path) -> None:
    path, _ = damaged(tmp_path, "header")
    with pytest.raises(ConfigError, match="not empty"):
        check("--data", str(path), "--repair", str(path.parent))
    with pytest.raises(ConfigError, match="data is empty"):
        check()


def test_colour_profiles_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "JPEG", icc_profile=display_p3())
    write_tar(tmp_path / "a.tar", [*members_of(range(2)), ("phone.jpg", file.getvalue())])
    assert call(main, CLI, ["--data", str(tmp_path / "a.tar"), "--progress_bar", "false"]) == 0
    assert "colour profile  none: 2, Display P3: 1" in capsys.readouterr().out
