"""From members to samples: nothing that a sample holds vanishes without being counted or refused."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.shards import jpeg, write_tar
from trainer.config.record import to_dict
from trainer.config.settings import PretrainRecipe, PretrainRuntime
from trainer.data.order.mixture import Source
from trainer.data.shards.index import list_shards, open_index
from trainer.data.shards.members import MAX_JSON_BYTES, Tally, samples_of
from trainer.data.shards.reader import ShardReader
from trainer.data.shards.tar import Member
from trainer.data.sources import open_sets, order_of
from trainer.detection.scoring import check_labels
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError


def index_of(folder: Path, *members: tuple[str, bytes], image_member: str | None = None):
    return open_index([write_tar(folder / "s.tar", list(members))], image_member=image_member)


def described(**values: object) -> bytes:
    return json.dumps(values).encode()


# ---------------------------------------------------------------------------------------------- json


def test_a_json_with_an_embedding_keeps_its_label_identity_and_landmarks(tmp_path: Path) -> None:
    mesh = [[x * 1.2345678, x * 2.3456789] for x in range(5023)]
    text = described(label=1, identity="ann", landmarks=mesh)
    assert len(text) > 64 << 10
    index = index_of(tmp_path, ("a.jpg", jpeg(1)), ("a.json", text))
    assert index.labels.tolist() == [1]
    assert index.groups("identity")[0] == ["ann"]
    found = ShardReader().read_landmarks([index.sample(0)])[0]
    assert found is not None
    assert found.shape == (5023, 2)


def test_a_json_above_the_limit_is_refused_with_its_key(tmp_path: Path) -> None:
    text = b'{"label": 1, "x": "' + b"x" * MAX_JSON_BYTES + b'"}'
    with pytest.raises(DataError, match=f"json of sample 'a/b' has {len(text)} bytes, more than the limit"):
        index_of(tmp_path, ("a/b.jpg", jpeg(1)), ("a/b.json", text))


def test_a_json_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    index = index_of(tmp_path, ("a.jpg", jpeg(1)), ("a.json", b"{'label': 1}"), ("b.jpg", jpeg(2)), ("b.json", b"[1]"))
    assert index.tally.unusable == {"json": 2}
    assert "a.json" in index.tally.examples["unusable json"]


def test_identities_that_a_table_program_made_floats_are_the_same_people(tmp_path: Path) -> None:
    index = index_of(
        tmp_path,
        *(("a.jpg", jpeg(1)), ("a.json", described(identity=7.0))),
        *(("b.jpg", jpeg(2)), ("b.json", described(identity=7, source=float("nan")))),
        *(("c.jpg", jpeg(3)), ("c.json", described(identity=["ann", "bob"]))),
    )
    assert index.groups("identity")[0] == ["7"]
    assert index.group_fields == ("identity",)
    assert index.tally.unusable == {"identity": 1}


# ---------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("key", ["a/__new/1", "__/im/0", "__init", "_x_", "__a__b", "x/__b__"])
def test_a_key_that_begins_with_underscores_is_a_sample(tmp_path: Path, key: str) -> None:
    index = index_of(tmp_path, (f"{key}.jpg", jpeg(1)), (f"{key}.cls", b"1"))
    assert (index.sample(0).key, index.labels.tolist()) == (key, [1])
    assert not index.tally.left_out


def test_names_of_the_container_are_left_out_and_counted(tmp_path: Path) -> None:
    own = [("__key__", b"x"), ("__url__", b"x"), ("__meta__/0.jpg", b"x")]
    index = index_of(tmp_path, ("a.jpg", jpeg(1)), *own)
    assert len(index) == 1
    assert dict(index.tally.left_out) == {"names of the container (__x__)": 3}


_NAME = st.from_regex(r"(__[ab]{0,2}(__)?/)?[._ab]{1,3}(\.(left|x))?(\.(jpg|cls|json|txt|png))?", fullmatch=True)


@given(st.lists(_NAME, max_size=12, unique=True), st.sampled_from([None, "jpg", "left"]))
def test_every_member_is_used_or_counted(names: list[str], image_member: str | None) -> None:
    tally, members = Tally(), [Member(name, 0, 1, 0, b"1") for name in sorted(names)]
    try:
        samples = list(samples_of("a.tar", iter(members), image_member=image_member, tally=tally))
    except DataError:
        return
    assert tally.num_members == len(names) == tally.num_used + sum(tally.left_out.values())
    assert tally.num_samples == len(samples) == sum(tally.labels.values())
    assert Tally.from_dict(json.loads(json.dumps(tally.to_dict()))) == tally


# ---------------------------------------------------------------------------------------------- several images


def webp(number: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(file, "WEBP")
    return file.getvalue()


def test_the_plain_suffix_is_the_image_beside_a_mask(tmp_path: Path) -> None:
    index = index_of(tmp_path, ("0.jpg", jpeg(1)), ("0.seg.png", b"mask"), ("0.cls", b"1"))
    assert ShardReader().read(index.sample(0)) == jpeg(1)
    assert index.tally.left_out == {"other images": 1}


@pytest.mark.parametrize("chosen", ["left.jpg", ".left.jpg", "left", "LEFT.JPG"])
def test_image_member_chooses_among_two_images_and_their_labels(tmp_path: Path, chosen: str) -> None:
    both = [("0.left.jpg", jpeg(1)), ("0.left.cls", b"1"), ("0.right.jpg", jpeg(2)), ("0.right.cls", b"0")]
    with pytest.raises(DataError, match=r"2 images \(.left.jpg, .right.jpg\): choose one with --image_member left.jpg"):
        index_of(tmp_path, *both)
    left = index_of(tmp_path, *both, image_member=chosen)
    right = index_of(tmp_path, *both, image_member="right.jpg")
    assert (ShardReader().read(left.sample(0)), left.labels.tolist()) == (jpeg(1), [1])
    assert (ShardReader().read(right.sample(0)), right.labels.tolist()) == (jpeg(2), [0])
    assert left.fingerprint != right.fingerprint
    with pytest.raises(DataError, match=r"no image .mid.jpg, only .left.cls, .left.jpg.*--image_member"):
        index_of(tmp_path, *both, image_member="mid.jpg")


def test_names_with_dots_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample '2024' has 2 images.*a key ends at the first dot.*make_shards"):
        index_of(tmp_path, ("2024.05.07.jpg", jpeg(1)), ("2024.05.08.jpg", jpeg(2)))


def test_a_label_beside_a_name_with_dots_is_not_lost(tmp_path: Path) -> None:
    index = index_of(tmp_path, ("ann.v2.jpg", jpeg(1)), ("ann.v2.json", described(label=1, identity="ann")))
    assert index.labels.tolist() == [1]
    assert index.groups("identity")[0] == ["ann"]


def test_every_suffix_that_the_decoder_reads_is_an_image(tmp_path: Path) -> None:
    index = index_of(tmp_path, ("a.webp", webp(1)), ("b.JPEG", jpeg(2)), ("c.jfif", jpeg(3)))
    assert [ref.key for ref in index.samples(np.arange(3))] == ["a", "b", "c"]


# ---------------------------------------------------------------------------------------------- labels


def test_cls_and_json_that_contradict_each_other_are_no_label(tmp_path: Path) -> None:
    index = index_of(tmp_path, ("a.jpg", jpeg(1)), ("a.cls", b"1"), ("a.json", described(label=0)))
    assert index.labels.tolist() == [-1]
    assert index.tally.examples["unusable label"] == "a: cls '1' and json '0'"


@pytest.mark.parametrize("text", ["23.5", "-1", "\x93NUMPY", "anna"])
def test_pretraining_does_not_look_at_labels_and_detection_says_what_it_found(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        (f"{i}.{kind}", payload) for i in range(8) for kind, payload in (("jpg", jpeg(i)), ("cls", text.encode()))
    ]
    path, recipe = write_tar(tmp_path / "s.tar", members), PretrainRecipe(global_batch=8, num_lanes=4)
    sources = {"data": [Source([str(path)], None)]}
    with caplog.at_level("INFO"):
        index = open_sets(sources, recipe, PretrainRuntime(progress_bar=False), World())["data"]
    assert "--data: 8 samples in 1 shard" in caplog.text
    assert "8 samples have an unusable label" in caplog.text
    assert sorted(order_of(recipe, index, sources["data"]).locate(np.arange(8)).sample_N.tolist()) == list(range(8))
    for change, setting in ({"balance_by": "label"}, "balance_by"), ({"use_balanced_sampler": True}, "use_balanced"):
        with pytest.raises(DataError, match=f"{setting}.*8 of 8 samples have no label; 8 of them.*no class"):
            order_of(dataclasses.replace(recipe, **change), index, sources["data"])
    with pytest.raises(DataError, match=r"8 of them have one that is no class \(0: cls '.*write 0 or 1"):
        check_labels(index, setting="--data")


def test_the_choice_of_the_image_member_reaches_the_index_and_the_identity_of_a_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("0.left.jpg", jpeg(1)), ("0.right.jpg", jpeg(2))])
    sources, runtime = {"data": [Source([str(path)], None)]}, PretrainRuntime(progress_bar=False)
    for chosen, number in (("left", 1), ("right.jpg", 2)):
        recipe = PretrainRecipe(image_member=chosen)
        index = open_sets(sources, recipe, runtime, World())["data"]
        assert ShardReader().read(index.sample(0)) == jpeg(number)
        assert to_dict(recipe)["image_member"] == chosen
    with pytest.raises(ConfigError, match="image_member is 'a/b', but must be a suffix"):
        open_sets(sources, PretrainRecipe(image_member="a/b"), runtime, World())


def test_what_reads_the_same_bytes_as_other_samples_has_another_fingerprint(tmp_path: Path) -> None:
    """Runs that began before these labels were read must not go on as if nothing had changed."""
    plain = index_of(tmp_path / "plain", ("a.jpg", jpeg(1)), ("a.cls", b"1"))
    named = index_of(tmp_path / "named", ("a.jpg", jpeg(1)), ("a.cls", b"morph"))
    assert not plain.tally.by_new_rules
    assert named.tally.by_new_rules


def test_the_remedy_for_members_apart_is_the_repair(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / "s.tar", [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("a.cls", b"1"), ("b.cls", b"0")])]
    with pytest.raises(DataError, match=re.escape("check_shards.py --repair")):
        open_index(list_shards(str(paths[0]), setting="--data"))
