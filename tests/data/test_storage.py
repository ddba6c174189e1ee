"""Remote shards against real servers: an S3 object store (moto) and a web server with Range; the block cache."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import boto3
import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from RangeHTTPServer import RangeRequestHandler

from tests.helpers.shards import jpeg, members_of, write_tar
from trainer.data.byte_ranges import ByteRangeReader
from trainer.data.loader import Loader
from trainer.data.order.plan import Plan
from trainer.data.shards import contents
from trainer.data.shards.index import ShardIndex, list_shards, open_index
from trainer.data.shards.reader import ShardReader
from trainer.data.storage import Span
from trainer.data.stream import Slice, train_stream
from trainer.data.transforms.views import CenterView
from trainer.errors import ConfigError, DataError, without_secrets

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class Quiet(RangeRequestHandler):
    """Counts requests and can be told to fail."""

    requests: list[str] = []  # noqa: RUF012  one server a test, which empties it
    failures = 0

    paths: list[str] = []  # noqa: RUF012  likewise, with what stands behind the question mark
    failing = ""
    status = 503

    def do_GET(self) -> None:  # noqa: N802  the name that http.server calls
        Quiet.paths.append(self.path)
        if "Range" in self.headers:
            Quiet.requests.append(self.headers["Range"])
        if Quiet.failures > 0 and "Range" in self.headers and Quiet.failing in self.path:
            Quiet.failures -= 1
            self.send_error(Quiet.status)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def web(shards: Path) -> Iterator[str]:
    Quiet.requests, Quiet.paths, Quiet.failures, Quiet.failing, Quiet.status = [], [], 0, "", 503
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    fsspec.filesystem("http").clear_instance_cache()


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = boto3.client("s3")
    store.create_bucket(Bucket="faces")
    for path in shards.glob("*.tar"):
        store.upload_file(str(path), "faces", f"train/{path.name}")
    yield "s3://faces/train"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def keys_and_bytes(index: ShardIndex, reader: ShardReader) -> list[tuple[str, bytes]]:
    refs = [index.sample(i) for i in range(len(index))]
    payloads = reader.read_all(refs)
    return [(ref.key, reader.check(ref, payload)) for ref, payload in zip(refs, payloads, strict=True)]


def local(shards: Path) -> list[tuple[str, bytes]]:
    return keys_and_bytes(open_index(list_shards(str(shards), setting="--data")), ShardReader())


def test_an_object_store_gives_what_the_files_hold(bucket: str, shards: Path, tmp_path: Path) -> None:
    found = list_shards(f"{bucket}/*.tar", setting="--data")
    assert found == [f"{bucket}/s-00{i}.tar" for i in range(3)]
    index = open_index(found, index_dir=tmp_path / "index")
    assert index.fingerprint == open_index(list_shards(str(shards), setting="--data")).fingerprint
    assert keys_and_bytes(index, ShardReader()) == local(shards)
    before = (index.folder / "index.json").stat().st_mtime_ns
    open_index(found, index_dir=tmp_path / "index")
    assert (index.folder / "index.json").stat().st_mtime_ns == before  # not built again
    boto3.client("s3").put_object(Bucket="faces", Key="train/s-001.tar", Body=(shards / "s-000.tar").read_bytes())
    fsspec.filesystem("s3").invalidate_cache()
    with pytest.raises(DataError, match=r"differs|shorter|cannot be read|not neighbours") as caught:
        keys_and_bytes(index, ShardReader(num_retries=0))
    assert "s-001.tar" in str(caught.value)


def test_a_web_server_gives_what_the_files_hold(web: str, shards: Path, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{web}/s-{{000..002}}.tar", setting="--data"), index_dir=tmp_path)
    assert keys_and_bytes(index, ShardReader()) == local(shards)


def test_blocks_are_brought_once_and_shared(web: str, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{web}/s-{{000..002}}.tar", setting="--data"), index_dir=tmp_path)
    Quiet.requests.clear()
    plan = Plan(len(index), 0, num_lanes=2, block_samples=8, window_blocks=2)
    for _ in range(2):  # two workers with a reader each, one cache
        spans = ByteRangeReader(cache_dir=tmp_path / "cache", cache_bytes=10**9)
        stream = train_stream(
            index, plan, Slice(8, 8), CenterView(size=16), first_step=0, noise_per_sample=4, spans=spans
        )
        batches = iter(stream)
        keys = [key for _ in range(8) for key in next(batches).keys]
        assert len(set(keys)) == 64
    assert len(Quiet.requests) == len(set(Quiet.requests))
    assert len(Quiet.requests) < 20  # 64 samples, 128 reads


def test_the_cache_keeps_its_bound_and_survives_it(web: str, shards: Path, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{web}/s-{{000..002}}.tar", setting="--data"), index_dir=tmp_path)
    longest = max((shards / f"s-00{i}.tar").stat().st_size for i in range(3))
    reader = ShardReader(ByteRangeReader(cache_dir=tmp_path / "cache", cache_bytes=longest))
    for _ in range(2):
        for i in range(0, 64, 5):
            ref = index.sample(i)
            size = (shards / Path(ref.shard).name).stat().st_size
            payload = reader.read_all([ref], [Span(ref.shard, 0, size)])[0]
            assert reader.check(ref, payload) == jpeg(i)
            assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= longest


def test_passing_failures_are_retried_and_lasting_ones_named(web: str, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{web}/s-000.tar", setting="--data"), index_dir=tmp_path)
    reader = ShardReader(num_retries=3, first_wait_s=0.01)
    Quiet.failures = 2
    assert reader.read(index.sample(3)) == jpeg(3)
    Quiet.failures = 10**6
    with pytest.raises(DataError, match=r"s-000.tar.*after 4 attempts: check the storage"):
        reader.read(index.sample(3))


def test_a_local_disk_that_stutters_is_asked_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(list_shards(str(shards), setting="--data"))
    real, failures = os.pread, [errno.EIO, errno.ESTALE]

    def pread(*words: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "stutter")
        return real(*words)

    monkeypatch.setattr(os, "pread", pread)
    assert ShardReader(first_wait_s=0.01).read(index.sample(0)) == jpeg(0)
    failures += [errno.EIO] * 10
    with pytest.raises(DataError, match="after 3 attempts"):
        ShardReader(num_retries=2, first_wait_s=0.01).read(index.sample(0))


def first_image_of(url: str, index_dir: Path) -> bytes:
    return ShardReader(num_retries=0).read(open_index([url], index_dir=index_dir).sample(0))


def test_a_server_without_ranges_is_refused(shards: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_NoRange, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/s-000.tar"
    _NoRange.sent.clear()
    with pytest.raises(DataError, match=r"s-000.tar cannot be read in parts.*Range"):
        open_index([url], index_dir=tmp_path / "index")
    assert not (tmp_path / "index").exists()
    server.shutdown()
    server.server_close()


class _NoRange(SimpleHTTPRequestHandler):
    sent: list[str] = []  # noqa: RUF012  one server a test, which empties it

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:
        super().copyfile(source, outputfile)
        _NoRange.sent.append(self.path)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


SIGNED = "X-Amz-Signature=SECRET&X-Amz-Expires=60"


def test_a_signed_address_is_read_and_its_signature_shown_nowhere(
    web: str, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    locations = list_shards(",".join(f"{web}/s-00{i}.tar?{SIGNED}" for i in range(3)), setting="--data")
    assert [location.endswith(SIGNED) for location in locations] == [True] * 3
    with caplog.at_level("INFO"):
        Quiet.failures = 1  # something to log
        index = open_index(locations, index_dir=tmp_path / "index")
        assert keys_and_bytes(index, ShardReader()) == local(shards)
        assert any(SIGNED in path for path in Quiet.paths)
        Quiet.failures, Quiet.status = 10**6, 403
        with pytest.raises(
            DataError, match=r"s-000.tar\?\.\.\.: face0000 cannot be read .* after 1 attempts"
        ) as caught:
            ShardReader(first_wait_s=0.01).read(index.sample(0))
    assert "trying again" in caplog.text
    written = [path.read_bytes() for path in tmp_path.rglob("*.json")]
    for text in (caplog.text.encode(), str(caught.value).encode(), str(tmp_path).encode(), *written):
        assert b"SECRET" not in text
    assert not [path for path in tmp_path.rglob("*") if "SECRET" in path.name]


def test_a_new_signature_opens_the_same_index_and_another_file_does_not(web: str, tmp_path: Path) -> None:
    first, again, other = (
        open_index([f"{web}/s-000.tar?{query}"], index_dir=tmp_path)
        for query in (f"file=1&{SIGNED}", "file=1&X-Amz-Signature=NEW&X-Amz-Expires=60", f"file=2&{SIGNED}")
    )
    assert first.folder == again.folder != other.folder


@pytest.mark.parametrize("query", ["X-Signature=abc", "download=true", "sig=a%2Bb%3D&se=2030-01-01"])
def test_a_question_mark_is_no_pattern_in_a_web_address(web: str, query: str) -> None:
    assert list_shards(f"{web}/s-000.tar?{query}", setting="--data") == [f"{web}/s-000.tar?{query}"]
    with pytest.raises(ConfigError, match="web servers list no files") as caught:
        list_shards(f"{web}/*.tar?{query}", setting="--data")
    assert query not in str(caught.value)


def test_one_file_under_two_names_is_one_shard_too_many(web: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link.tar").symlink_to(shards / "s-000.tar")
    for both in (f"{shards}/s-000.tar,{tmp_path}/link.tar", f"{web}/s-000.tar?sig=a,{web}/s-000.tar?sig=b"):
        with pytest.raises(ConfigError, match="more than once"):
            list_shards(both, setting="--data")


def test_addresses_without_their_secrets_keep_the_rest_of_the_text() -> None:
    text = "--data 'http://u:p@h/a.tar?sig=x,https://h/b.tar?download=true@0.5,c/?.tar': look at http://h/d.tar?s=1."
    assert without_secrets(text) == (
        "--data 'http://h/a.tar?...,https://h/b.tar?...,c/?.tar': look at http://h/d.tar?...."
    )
    record = {"data": "http://h/a.tar?sig=x", "said": 'of "http://h/b?x=1"', "plain": "s3://b/shard-00?.tar"}
    assert json.loads(without_secrets(json.dumps(record))) == {
        "data": "http://h/a.tar?...",
        "said": 'of "http://h/b?..."',
        "plain": "s3://b/shard-00?.tar",
    }


# ---------------------------------------------------------------------------------------------- a start that fails


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_failure_while_indexing_is_retried(
    web: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(contents, "FIRST_WAIT_S", 0.01)
    Quiet.failures, Quiet.status = 3, status
    index = open_index(list_shards(f"{web}/s-{{000..002}}.tar", setting="--data"), index_dir=tmp_path)
    assert keys_and_bytes(index, ShardReader()) == local(shards)
    assert Quiet.failures == 0


def test_a_start_that_failed_keeps_what_it_read(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "FIRST_WAIT_S", 0.01)
    found = list_shards(f"{web}/s-{{000..002}}.tar", setting="--data")
    Quiet.failing, Quiet.failures = "s-001", 10**6
    with pytest.raises(DataError, match=r"s-001.tar cannot be read .*503.* after 5 attempts.*is kept"):
        open_index(found, index_dir=tmp_path)
    Quiet.failures, Quiet.paths = 0, []
    index = open_index(found, index_dir=tmp_path)
    assert len(index) == 64
    assert sorted(set(Quiet.paths)) == ["/s-000.tar", "/s-001.tar"]
    assert Quiet.paths.count("/s-000.tar") == 1  # whether the server sends parts
    assert [path.name for path in tmp_path.glob(".*")] == [index.folder.name]


def test_a_damaged_part_is_read_again(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "FIRST_WAIT_S", 0.01)
    found = list_shards(f"{web}/s-{{000..002}}.tar", setting="--data")
    Quiet.failing, Quiet.failures = "s-002", 10**6
    with pytest.raises(DataError):
        open_index(found, index_dir=tmp_path)
    for part in tmp_path.rglob("*.npz"):
        raw = bytearray(part.read_bytes())
        raw[len(raw) // 2] ^= 1
        part.write_bytes(raw)
    Quiet.failures = 0
    assert len(open_index(found, index_dir=tmp_path)) == 64


def test_a_failure_to_look_at_a_shard_does_not_rebuild_its_index(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "FIRST_WAIT_S", 0.01)
    found = list_shards(f"{web}/s-000.tar", setting="--data")
    folder = open_index(found, index_dir=tmp_path).folder
    before = folder.stat().st_ino

    def stamp(location: str) -> dict[str, object]:
        raise OSError(errno.EIO, "503", location)

    monkeypatch.setattr(contents, "stamp", stamp)
    with pytest.raises(DataError, match=r"s-000\.tar cannot be read"):
        open_index(found, index_dir=tmp_path)
    assert folder.stat().st_ino == before


def test_a_full_cache_disk_is_named_and_read_past(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_index(list_shards(f"{web}/s-000.tar", setting="--data"), index_dir=tmp_path)
    reader = ShardReader(ByteRangeReader(cache_dir=tmp_path / "cache", cache_bytes=10**9))

    def full(path: Path, payload: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for i in (0, 7):
            ref = index.sample(i)
            assert reader.read_all([ref], [Span(ref.shard, 0, 10**5)]) == [jpeg(i)]
    assert caplog.text.count(f"cache_dir {tmp_path / 'cache'} cannot be used (No space left on device)") == 1
    assert not list((tmp_path / "cache").iterdir())


def test_blocks_of_a_shard_that_was_replaced_are_not_taken_from_the_cache(
    web: str, shards: Path, tmp_path: Path
) -> None:
    def images() -> list[bytes]:
        index = open_index([f"{web}/s-000.tar"], index_dir=tmp_path)
        reader = ShardReader(ByteRangeReader(cache_dir=tmp_path / "cache", cache_bytes=10**9))
        refs = index.samples(np.arange(len(index)))
        first, last = np.zeros(len(index), dtype=np.int64), np.full(len(index), len(index) - 1)
        return reader.read_all(refs, index.blocks(np.arange(len(index)), first, last))

    assert images() == [jpeg(i) for i in range(20)]
    raw = bytearray((shards / "s-000.tar").read_bytes())
    at = raw.index(jpeg(3)) + 300
    raw[at] ^= 1  # as long as before, one image differs
    (shards / "s-000.tar").write_bytes(raw)
    os.utime(shards / "s-000.tar", (0, 0))  # the server tells dates in whole seconds
    changed = images()
    assert [i for i in range(20) if changed[i] != jpeg(i)] == [3]


def test_remote_shards_feed_worker_processes(bucket: str, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{bucket}/*.tar", setting="--data"), index_dir=tmp_path)
    plan = Plan(len(index), 0, num_lanes=2, block_samples=8, window_blocks=2)
    spans = ByteRangeReader(cache_dir=tmp_path / "cache", cache_bytes=10**9)
    stream = train_stream(index, plan, Slice(8, 8), CenterView(size=16), first_step=0, noise_per_sample=4, spans=spans)
    batches = iter(Loader(stream, num_workers=2))
    assert len({key for _ in range(8) for key in next(batches).keys}) == 64


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ftp://host/x.tar", "only paths and"),
        ("file:///x.tar", "only paths and"),
        ("pipe:curl x", "only paths and"),
        ("s3://bucket/x::y.tar", "only paths and"),
        ("http://host/${SECRET}.tar", "only paths and"),
        ("http://host/*.tar", "web servers list no files"),
        ("gs://bucket/*.tar", "cannot be listed|gcsfs"),
    ],
)
def test_other_schemes_and_commands_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_shards(pattern, setting="--data")


def test_remote_shards_need_a_place_for_their_index() -> None:
    with pytest.raises(ConfigError, match="--index_dir"):
        open_index(["s3://bucket/x.tar"])


def test_local_shards_next_to_remote_ones(web: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", members_of(range(100, 104)))
    index = open_index([f"{web}/s-000.tar", str(path)], index_dir=tmp_path)
    found = keys_and_bytes(index, ShardReader())
    assert [key for key, _ in found] == [f"face{i:04d}" for i in [*range(20), *range(100, 104)]]
