"""Remote shards against real servers: an S3 object store (moto) and a web server with Range; the block cache."""

import errno
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
from conftest import jpeg, members_of, write_tar
from moto.server import ThreadedMotoServer
from RangeHTTPServer import RangeRequestHandler

from trainer.data.augment import CenterView
from trainer.data.loader import Loader
from trainer.data.plan import Plan
from trainer.data.shards import ShardIndex, ShardReader, list_shards, open_index
from trainer.data.storage import Span, SpanReader
from trainer.data.stream import Slice, train_stream
from trainer.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class Quiet(RangeRequestHandler):
    """Counts requests and can be told to fail."""

    requests: list[str] = []  # noqa: RUF012  one server a test, which empties it
    failures = 0

    def do_GET(self) -> None:  # noqa: N802  the name that http.server calls
        if "Range" in self.headers:
            Quiet.requests.append(self.headers["Range"])
        if Quiet.failures > 0 and "Range" in self.headers:
            Quiet.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def web(shards: Path) -> Iterator[str]:
    Quiet.requests, Quiet.failures = [], 0
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
        spans = SpanReader(cache_dir=tmp_path / "cache", cache_bytes=10**9)
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
    reader = ShardReader(SpanReader(cache_dir=tmp_path / "cache", cache_bytes=longest))
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
    with pytest.raises(DataError, match="Range"):
        first_image_of(url, tmp_path)
    server.shutdown()
    server.server_close()


class _NoRange(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_remote_shards_feed_worker_processes(bucket: str, tmp_path: Path) -> None:
    index = open_index(list_shards(f"{bucket}/*.tar", setting="--data"), index_dir=tmp_path)
    plan = Plan(len(index), 0, num_lanes=2, block_samples=8, window_blocks=2)
    spans = SpanReader(cache_dir=tmp_path / "cache", cache_bytes=10**9)
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
