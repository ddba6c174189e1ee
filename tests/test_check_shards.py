"""tools/check_shards.py finds every damage that the trainer would meet, and saves the rest."""

from pathlib import Path

import pytest
from conftest import jpeg, members_of, write_tar

from tools.check_shards import main
from trainer.data.shards import ShardReader, open_index
from trainer.errors import ConfigError


def check(*words: str) -> int:
    return main([*words, "--num_processes", "1", "--progress_bar", "false"])


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


def test_a_repair_never_overwrites(tmp_path: Path) -> None:
    path, _ = damaged(tmp_path, "header")
    with pytest.raises(ConfigError, match="not empty"):
        check("--data", str(path), "--repair", str(path.parent))
    with pytest.raises(ConfigError, match="data is empty"):
        check()
