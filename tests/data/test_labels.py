"""A label is taken where it has one meaning, whatever a data set writes for it."""

import pytest

from trainer.data.labels import CLASS_NAMES, class_of


@pytest.mark.parametrize(
    "value", [0, 0.0, False, "0", " 0\n", "0.0", '"0"', "false", "bonafide", "Bona fide", "BONA_FIDE"]
)
def test_every_way_to_write_bona_fide_is_class_0(value: object) -> None:
    assert class_of(value) == 0


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "1.", "1.0", "'1'", "True", "morph", "Attack", "MORPHED"])
def test_every_way_to_write_an_attack_is_class_1(value: object) -> None:
    assert class_of(value) == 1


@pytest.mark.parametrize(
    "value", [23.5, "23.5", -1, "-1", "", "fake", "person_07", float("nan"), 1e12, "1e0", None, [1], "٣"]
)
def test_what_has_no_single_meaning_is_no_class(value: object) -> None:
    assert class_of(value) is None


def test_other_class_numbers_stay_what_they_are() -> None:
    assert [class_of(7), class_of("7"), class_of(7.0)] == [7, 7, 7]
    assert set(CLASS_NAMES.values()) == {0, 1}
