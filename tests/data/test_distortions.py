"""Distortions are functions of image and draws; Pillow is the oracle where it has the operation."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import RandAugment as RandAugmentOfTorchvision

from tests.helpers.shards import jpeg
from tools.demo.orl_faces import find_faces
from trainer.data.transforms.passport import PassportChain, jpeg2000, jpeg_to_budget, print_scan
from trainer.data.transforms.randaugment import _RANGES, BasicAugment, RandAugment, rand_augment_ops
from trainer.data.transforms.selfmorph import NUM_DRAWS, self_morph
from trainer.data.transforms.views import DetectorView, Photo
from trainer.errors import ConfigError

ALL = ("jpeg_budget", "jpeg2000", "resize", "print_scan")


def photo(height: int = 64, width: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (large + generator.integers(-6, 7, large.shape)).clip(0, 255).astype(np.uint8)


def draws(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count, dtype=np.float32)


@settings(max_examples=40)
@given(st.integers(8, 150), st.integers(8, 150), st.integers(0, 10**6))
def test_a_distortion_depends_on_image_and_draws_alone(height: int, width: int, seed: int) -> None:
    image = photo(height, width, seed)
    before = image.copy()
    makers = (BasicAugment, RandAugment, lambda: PassportChain(ALL, 0.7))
    for make in makers:
        used, fresh = make(), make()
        mine = draws(used.num_draws, seed)
        first = used(image, mine)
        used(photo(20, 20), draws(used.num_draws, seed + 1))
        np.random.seed(seed % 1000)  # noqa: NPY002  (the global generators must not matter)
        random.seed(seed)
        np.testing.assert_array_equal(first, fresh(image, mine))
        assert first.shape == image.shape
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(image, before)


ORACLES = {
    "identity": lambda image, sign: image,
    "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
    "solarize": lambda image, sign: ImageOps.solarize(image, round(255 * 0.1)),
    "posterize": lambda image, sign: ImageOps.posterize(image, 4),
    "color": lambda image, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.81),
    "contrast": lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.81),
    "brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.81),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.81),
}


@pytest.mark.parametrize("name", sorted(ORACLES))
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_on_colours_are_pillows(name: str, sign: int) -> None:
    image = photo(seed=3)
    ours = rand_augment_ops(9)[name][sign > 0](image).astype(int)
    theirs = np.asarray(ORACLES[name](Image.fromarray(image), sign)).astype(int)
    assert np.abs(ours - theirs).mean() < 1.5


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
def test_translation_moves_by_its_share_and_mirrors_the_border(name: str, axis: int) -> None:
    image = photo(60, 60)
    minus, plus = (op(image) for op in rand_augment_ops(10)[name])
    shift = 27
    inner = slice(shift, None)
    picked = (slice(None), inner) if axis else (inner, slice(None))
    source = (slice(None), slice(None, -shift)) if axis else (slice(None, -shift), slice(None))
    np.testing.assert_array_equal(plus[picked], image[source])
    np.testing.assert_array_equal(minus[source], image[picked])
    assert plus.min() > 0 or image.min() == 0


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_turns_and_shears_have_two_opposite_signs_and_no_black_corners(name: str) -> None:
    image = np.maximum(photo(61, 61), 40)
    minus, plus = rand_augment_ops(9)[name]
    mirrored = plus(np.ascontiguousarray(image[:, ::-1]))[:, ::-1]
    assert np.abs(minus(image).astype(int) - mirrored).mean() < 2
    assert np.abs(minus(image).astype(int) - plus(image)).mean() > 5
    assert min(minus(image).min(), plus(image).min()) > 15
    rows, columns = np.mgrid[:61, :61].astype(np.uint8)
    for ramp, still in ((rows, "shear_x"), (columns, "shear_y")):  # the axis along which nothing moves
        moved = plus(np.repeat(ramp[..., None], 3, 2))[20:41, 20:41, 0].astype(int)
        assert (np.abs(moved - ramp[20:41, 20:41]).max() <= 1) == (name == still)


@pytest.mark.parametrize("magnitude", range(1, 11))
def test_magnitude_m_is_step_3m_of_torchvisions_31(magnitude: int) -> None:
    space = RandAugmentOfTorchvision()._augmentation_space(31, (60, 60))
    step = {name: float(values[3 * magnitude]) for name, (values, _) in space.items() if values.ndim}
    for ours, theirs in {"rotate": "Rotate", "shear": "ShearX", "enhance": "Contrast"}.items():
        assert _RANGES[ours] * magnitude / 10 == pytest.approx(step[theirs])
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    ops = rand_augment_ops(magnitude)
    bits = int(step["Posterize"])
    np.testing.assert_array_equal(ops["posterize"][1](ramp), ramp >> (8 - bits) << (8 - bits))
    turned = (ops["solarize"][1](ramp) != ramp)[0, :, 0]
    assert abs(int(turned.argmax()) - step["Solarize"]) <= 1


def test_basic_augmentation_keeps_the_middle_scales_the_mean_and_sometimes_compresses() -> None:
    image, augment = np.clip(photo(), 60, 180), BasicAugment()
    np.testing.assert_array_equal(augment(image, np.array([0.5, 0.5, 0.9, 0], np.float32)), image)
    low, high = (augment(image, np.array([c, 0.5, 0.9, 0], np.float32)) for c in (0.0, 0.999))
    assert low.std() == pytest.approx(0.9 * image.std(), rel=0.02)
    assert high.std() == pytest.approx(1.1 * image.std(), rel=0.02)
    for brightness in (0.0, 0.999):
        for contrast in (0.0, 0.999):
            changed = augment(image, np.array([contrast, brightness, 0.9, 0], np.float32))
            assert changed.mean() == pytest.approx((0.9 + 0.2 * brightness) * image.mean(), rel=0.01)
    assert (augment(image, np.array([0.5, 0.5, 0.2, 0], np.float32)) != image).any()


def test_both_signs_and_all_operations_occur_equally_often() -> None:
    augment, seen = RandAugment(num_ops=1, magnitude=5), []

    def noting(name: str, sign: int):
        return lambda image: (seen.append((name, sign)), image)[1]

    augment.ops = {name: (noting(name, 0), noting(name, 1)) for name in augment.ops}
    for mine in draws(2 * 14_000).reshape(-1, 2):
        augment(photo(8, 8), mine)
    counts = [seen.count((name, sign)) for name in augment.ops for sign in (0, 1)]
    assert min(counts) > 400
    assert max(counts) < 600


@pytest.mark.parametrize("budget", [700, 1500, 4000])
def test_a_jpeg_fits_its_budget_with_the_best_quality(budget: int) -> None:
    image = photo(160, 120)
    decoded, num_bytes = jpeg_to_budget(image, budget)
    assert num_bytes <= budget
    assert decoded.shape == image.shape
    error = [np.square(image.astype(float) - jpeg_to_budget(image, b)[0]).mean() for b in (budget, 2 * budget)]
    assert error[1] <= error[0]


def test_jpeg2000_loses_more_at_a_higher_ratio() -> None:
    image = photo(96, 96)
    errors = [np.square(image.astype(float) - jpeg2000(image, ratio)).mean() for ratio in (2, 10, 40)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_printing_follows_the_published_tone_curve() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    ours = print_scan(ramp, blur=0.05, noise=0.0, tone=1.0, key=1)[4, :, 0]
    expected = (8.3 * np.maximum(np.arange(256) - 35.0, 0) ** 0.6 + 20).clip(0, 255)
    np.testing.assert_allclose(ours, expected, atol=1.0)
    noisy = print_scan(np.full((64, 64, 3), 90, np.uint8), blur=0.1, noise=4.0, tone=0.0, key=2)
    assert 4 < noisy.std() < 9


def test_print_noise_is_stronger_in_the_dark_and_other_draws_give_other_noise() -> None:
    dark, bright = (np.full((64, 64, 3), grey, np.uint8) for grey in (60, 200))
    spread = [print_scan(flat, blur=0.1, noise=4.0, tone=0.0, key=2).std() for flat in (dark, bright)]
    assert spread[0] / spread[1] == pytest.approx((1 + 195 / 255) / (1 + 55 / 255), rel=0.05)
    chain, one, two = PassportChain(("print_scan",), 1.0), draws(6), draws(6)
    two[-1] = 1 - one[-1]  # the last draws only key the noise
    assert (chain(dark, one) != chain(dark, two)).mean() > 0.5


def test_a_passport_is_compressed_once() -> None:
    both, first = PassportChain(("jpeg_budget", "jpeg2000"), 1.0), PassportChain(("jpeg2000",), 1.0)
    mine = draws(both.num_draws)
    np.testing.assert_array_equal(both(photo(), mine), first(photo(), mine[:6]))


@pytest.mark.parametrize("kind", ["jpeg_budget", "jpeg2000"])
@pytest.mark.parametrize("person", [1, 22, 36])
def test_the_hardest_compression_leaves_a_small_face_legible(kind: str, person: int) -> None:
    with Image.open(find_faces() / f"s{person}" / "6.pgm") as image:
        face = np.asarray(image.convert("RGB"))
    error = PassportChain((kind,), 1.0)(face, np.zeros(6, dtype=np.float32)).astype(float) - face
    assert 3 < np.sqrt(np.square(error).mean()) < 13.5


def test_probability_zero_changes_nothing_and_one_always_does() -> None:
    image = photo()
    for kind in ALL:
        never, always = PassportChain((kind,), 0.0), PassportChain((kind,), 1.0)
        np.testing.assert_array_equal(never(image, draws(never.num_draws)), image)
        assert (always(image, draws(always.num_draws)) != image).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(magnitude=11), "advanced_aug_magnitude is 11"),
        (lambda: RandAugment(num_ops=0), "advanced_aug_num_ops is 0"),
        (lambda: PassportChain(("print", "resize"), 0.5), "passport_aug is .* 'print' is none of"),
    ],
)
def test_wrong_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- self-morphs


@pytest.mark.parametrize("landmarks", [None, "face", "line"])
@pytest.mark.parametrize("size", [(32, 32), (112, 92), (300, 260)])
def test_a_self_morph_changes_a_region_and_nothing_else(size: tuple[int, int], landmarks: str | None) -> None:
    image, changed = photo(*size), []
    angle = np.linspace(0, 2 * np.pi, 40, dtype=np.float32)
    circle = np.stack([size[1] * (0.5 + 0.3 * np.cos(angle)), size[0] * (0.5 + 0.35 * np.sin(angle))], 1)
    points = {None: None, "face": circle, "line": np.stack([angle, angle], 1)}[landmarks]
    for seed in range(40):
        mine = draws(NUM_DRAWS, seed)
        morph = self_morph(image, mine, points)
        assert morph.shape == image.shape
        assert morph.dtype == np.uint8
        np.testing.assert_array_equal(morph, self_morph(image, mine, points))
        differs = (morph != image).any(axis=2)
        changed.append(differs.mean())
        assert not differs[[0, -1]].any(), "the image's border is no part of any region"
        assert not differs[:, [0, -1]].any()
    assert 0.03 < np.mean(changed) < 0.75
    assert min(changed) > 0


@pytest.mark.parametrize(("band", "top", "bottom"), [(0, 0.0, 1.0), (1, 0.12, 0.5), (2, 0.3, 0.68), (3, 0.62, 0.92)])
def test_a_self_morph_changes_the_landmarks_band_and_fades_towards_its_edge(band, top, bottom) -> None:
    angle = np.linspace(0, 2 * np.pi, 200, dtype=np.float32)
    points = np.concatenate([np.stack([60 + r * np.cos(angle), 70 + 1.3 * r * np.sin(angle)], 1) for r in (15, 30, 40)])
    image, mine = np.full((140, 120, 3), 200, np.uint8), np.full(NUM_DRAWS, 0.5, np.float32)
    mine[0], mine[4:7], mine[11] = (band + 0.5) / 4, 0.99, 0.99  # the band, not grown, wholly a brighter copy
    difference = np.abs(self_morph(image, mine, points).astype(int) - image).max(axis=2)
    rows, columns = np.nonzero(difference)
    y = points[:, 1]
    assert rows.min() >= y.min() + top * np.ptp(y) - 2
    assert rows.max() <= y.min() + bottom * np.ptp(y) + 2
    assert np.abs(columns - 60).max() <= 42
    assert difference.max() == 12
    assert difference[[rows.min(), rows.max()]].max() <= 4, "the region has a hard edge"


def test_a_self_morph_without_displacement_is_an_altered_copy_and_the_field_moves_both_axes() -> None:
    image, still = np.clip(photo(140, 120), 60, 180), np.full(NUM_DRAWS, 0.5, np.float32)
    still[0], still[6], still[11] = 0.0, 0.9, 0.99  # the face, as sharp as it was, wholly the copy
    np.testing.assert_array_equal(self_morph(image, still), image)
    brighter = still.copy()
    brighter[5] = 0.99
    assert (self_morph(image, brighter).astype(int) - image).max() == 4
    ramp = np.arange(120)[None] + np.zeros((140, 1), int), np.arange(140)[:, None] + np.zeros((1, 120), int)
    for half, one in ((slice(12, 37), 0), (slice(37, 62), 1)):
        moving = still.copy()
        moving[half] = 1.0
        along, across = (np.repeat(r[..., None], 3, 2).astype(np.uint8) for r in (ramp[one], ramp[1 - one]))
        assert (self_morph(along, moving) != along).any()
        np.testing.assert_array_equal(self_morph(across, moving), across)


def test_the_view_turns_the_given_share_of_bona_fides_into_attacks() -> None:
    view = DetectorView(size=32, crop_scale=(0.8, 1.0), flip_probability=0.5, seed=0, self_morph_share=0.3)
    out, payload = np.empty((32, 32, 3), np.uint8), jpeg(3, 60, 50)
    labels = [view(Photo(payload, 0), mine[None], out[None]).labels[0] for mine in view.draw(range(400))]
    assert 0.22 < np.mean(labels) < 0.38
    assert {view(Photo(payload, 1), mine[None], out[None]).labels[0] for mine in view.draw(range(20))} == {1}
    wanting = [view.wants_landmarks(0, mine) for mine in view.draw(range(400))]
    assert wanting == [bool(label) for label in labels]


def test_the_view_is_a_function_of_the_position() -> None:
    chain = [PassportChain(ALL, 0.5)]
    options = {"size": 32, "crop_scale": (0.5, 1.0), "flip_probability": 0.5, "seed": 4, "self_morph_share": 0.5}
    views = [DetectorView(**options, before=chain, after=[BasicAugment(), RandAugment()]) for _ in range(2)]
    first, second = np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
    seen = set()
    for position in range(30):
        views[0](Photo(jpeg(1, 70, 50), 0), views[0].draw([position]), first[None])
        views[1](Photo(jpeg(1, 70, 50), 0), views[1].draw(range(40))[[position]], second[None])
        np.testing.assert_array_equal(first, second)
        seen.add(first.tobytes())
    assert len(seen) == 30
