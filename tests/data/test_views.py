"""Views: the crops have torchvision's distribution, decoding small changes little, and coins fall apart."""

import io
import itertools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from tests.helpers.shards import display_p3, jpeg
from trainer.config.record import from_dict
from trainer.config.settings import DetectorRecipe
from trainer.data.transforms.decode import decode_image
from trainer.data.transforms.views import CenterView, DetectorView, Photo, Pixels, PretrainView, View, crop_box
from trainer.data.writing.image_files import Storing, stored_image
from trainer.detection.build import preprocessing_of
from trainer.errors import SampleError


def view_of(payload: bytes, position: int, **changes: object) -> np.ndarray:
    settings = {"size": 32, "crop_scale": (0.2, 1.0), "flip_probability": 0.5, "seed": 3, "fast": True} | changes
    view = PretrainView(**settings)
    out = np.zeros((view.size, view.size, 3), dtype=np.uint8)
    view(Photo(payload), view.draw([position]), out[None])
    return out


def smooth(height: int, width: int) -> bytes:
    y, x = np.mgrid[:height, :width]
    image = np.stack([y * 255 / height, x * 255 / width, (x + y) * 255 / (height + width)], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=98, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize("size", [(300, 200), (100, 900)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    view = PretrainView(size=32, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=1, fast=True)
    ours = np.array([crop_box(*size, draws, scale=(0.2, 1.0)) for draws in view.draw(range(3000)).tolist()])
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("side", [100, 130, 270, 600])
def test_decoding_small_shows_the_same_view(side: int) -> None:
    payload = smooth(side, side + 17)
    for position in range(20):
        fast, full = (view_of(payload, position, fast=fast).astype(int) for fast in (True, False))
        assert np.abs(fast - full).mean() < 255 * 12 / side  # half a source pixel beside each other, at most


def test_full_quality_is_the_plain_decoders_pixels() -> None:
    payload = jpeg(4, 90, 80)
    view = PretrainView(size=32, crop_scale=(0.2, 1.0), flip_probability=0.0, seed=3, fast=False)
    draws = view.draw([7])[0]
    top, left, height, width = crop_box(90, 80, draws.tolist(), scale=(0.2, 1.0))
    pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))[top : top + height, left : left + width]
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(view_of(payload, 7, flip_probability=0.0, fast=False) - expected).max() <= 2


def textured(side: int, kind: str, number: int = 0) -> bytes:
    """Grain at every scale, as skin and hair have, which an interpolation without antialiasing folds back."""
    rng = np.random.default_rng(number)
    image = np.zeros((side, side, 3))
    for cells in (8, 32, 128, side):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)).astype(float) - 128) / 3
    file = io.BytesIO()
    options = {"quality": 92} if kind == "JPEG" else {"compress_level": 1}
    Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def detail(image: np.ndarray) -> float:
    """Energy of high frequencies: the variance of the Laplacian."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [256, 512, 1024])
def test_views_have_the_detail_of_pillows_antialiased_bicubic(side: int, kind: str) -> None:
    payload, ratios = textured(side, kind), {"antialias": [], "former": []}
    whole = Image.open(io.BytesIO(payload)).convert("RGB")
    views = {
        how: PretrainView(size=224, crop_scale=(0.2, 1), flip_probability=0, seed=1, fast=True, pixels=Pixels(how))
        for how in ratios
    }
    for draws in views["former"].draw(range(10)):
        top, left, height, width = crop_box(side, side, draws.tolist(), scale=(0.2, 1.0))
        cut = whole.crop((left, top, left + width, top + height))
        expected = np.asarray(cut.resize((224, 224), Image.Resampling.BICUBIC))
        for how, view in views.items():
            out = np.empty((1, 224, 224, 3), np.uint8)
            view(Photo(payload), draws[None], out)
            ratios[how].append(detail(out[0]) / detail(expected))
    assert min(ratios["antialias"]) > 0.8
    assert max(ratios["antialias"]) < 1.05
    assert np.median(ratios["former"]) > (1.05 if side == 256 else 1.3), "the old view is no longer what it was"
    if kind == "PNG":
        assert min(ratios["antialias"]) > 0.999


@pytest.mark.parametrize(("height", "width"), [(112, 112), (112, 92), (90, 400), (300, 250), (1024, 700)])
def test_the_centre_is_pillows_bicubic_whether_it_enlarges_or_shrinks(height: int, width: int) -> None:
    image = Image.open(io.BytesIO(textured(max(height, width), "PNG"))).crop((0, 0, width, height))
    file, out = io.BytesIO(), np.empty((1, 224, 224, 3), np.uint8)
    image.save(file, "PNG")
    view = CenterView(size=224)
    view(Photo(file.getvalue()), view.draw([0]), out)
    scaled = [round(side * 224 / min(width, height)) for side in (width, height)]
    whole = np.asarray(image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)).astype(int)
    top, left = (scaled[1] - 224) // 2, (scaled[0] - 224) // 2
    difference = np.abs(out[0] - whole[top : top + 224, left : left + 224])
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_a_detectors_training_and_test_views_scale_alike() -> None:
    payload = textured(112, "PNG")
    whole = {"size": 224, "crop_scale": (1.0, 1.0), "flip_probability": 0.0, "seed": 0}
    train, test = DetectorView(**whole), CenterView(size=224)
    out = np.empty((2, 224, 224, 3), np.uint8)
    square = np.full((1, 2 * 10 + 3), 0.5, np.float32)  # ratio 1
    train(Photo(payload), np.concatenate([square, train.draw([0])[:, square.size :]], axis=1), out[:1])
    test(Photo(payload), test.draw([0]), out[1:])
    assert (out[0] == out[1]).all()


def test_a_detector_of_release_0_1_keeps_its_view_and_records_of_both_differ() -> None:
    old, new = from_dict(DetectorRecipe, {"image_size": 96}), DetectorRecipe(image_size=96)
    assert preprocessing_of(old)["view"] == (
        "shorter side to the size with area interpolation, then the centre; RGB; decoded in full"
    )
    assert preprocessing_of(new)["view"] != preprocessing_of(old)["view"]
    payload, out = textured(48, "PNG"), np.empty((2, 96, 96, 3), np.uint8)
    for row, recipe in zip(out, (old, new), strict=True):
        CenterView(size=96, pixels=Pixels(recipe.view_resize))(Photo(payload), np.empty((1, 0), np.float32), row[None])
    assert (out[0, ::2, ::2] == out[0, 1::2, 1::2]).all(), "area interpolation enlarges to blocks"
    assert detail(out[0]) > 3 * detail(out[1])


def test_a_view_depends_on_seed_and_position_alone() -> None:
    payload = jpeg(1)
    assert (view_of(payload, 5) == view_of(payload, 5)).all()
    assert (view_of(payload, 5) != view_of(payload, 6)).any()
    assert (view_of(payload, 5) != view_of(payload, 5, seed=4)).any()


def test_crops_and_mirrors_are_drawn_apart() -> None:
    payload = smooth(64, 64)
    options = {"size": 8, "crop_scale": (0.99, 1.0)}
    views = [view_of(payload, position, **options) for position in range(400)]
    mirrored = [bool(view[4, 0, 1] > view[4, -1, 1]) for view in views]
    assert 150 < sum(mirrored) < 250
    assert 150 < sum(a != b for a, b in itertools.pairwise(mirrored)) < 250


def test_exif_turned_and_png_images_take_the_same_way(tmp_path: object) -> None:
    image = Image.open(io.BytesIO(smooth(200, 300)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    image.save(turned, "JPEG", quality=98, subsampling=0, exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    upright.save(plain, "JPEG", quality=98, subsampling=0)
    upright.save(png, "PNG")
    views = [view_of(file.getvalue(), 2, fast=False).astype(int) for file in (turned, plain, png)]
    assert np.abs(views[0] - views[1]).max() < 12
    assert np.abs(views[2] - views[1]).max() < 12


def test_several_views_of_one_decoding_are_those_of_several_decodings() -> None:
    view = PretrainView(size=32, crop_scale=(0.2, 1.0), flip_probability=0.5, seed=3, fast=False)
    out = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    assert view(Photo(smooth(150, 120), 1), view.draw(range(4)), out).labels == [1] * 4
    assert all((out[i] == view_of(smooth(150, 120), i, fast=False)).all() for i in range(4))


def test_a_decoding_for_several_views_is_as_large_as_the_smallest_crop_asks() -> None:
    view = PretrainView(size=32, crop_scale=(0.02, 1.0), flip_probability=0.0, seed=3, fast=True)
    payload, out = smooth(600, 600), np.zeros((12, 32, 32, 3), dtype=np.uint8)
    view(Photo(payload), view.draw(range(12)), out)
    exact = [view_of(payload, i, crop_scale=(0.02, 1.0), flip_probability=0.0, fast=False) for i in range(12)]
    assert np.abs(out.astype(int) - exact).mean() < 2


def test_the_centre_is_always_the_same_and_what_is_no_image_is_refused() -> None:
    out = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    view = CenterView(size=16)
    for row, draws in zip(out, view.draw([3, 9]), strict=True):
        view(Photo(jpeg(2)), draws[None], row[None])
    assert (out[0] == out[1]).all()
    assert out[0].std() > 10
    with pytest.raises(SampleError):
        view(Photo(b"nothing"), view.draw([0]), out[:1])
    with pytest.raises(SampleError):
        view_of(jpeg(2)[:200], 0)


WHOLE = {"size": 16, "crop_scale": (1.0, 1.0), "flip_probability": 0.0, "seed": 0}
VIEWS = {
    "pretrain": lambda pixels: PretrainView(**WHOLE, fast=True, pixels=pixels),
    "detector": lambda pixels: DetectorView(**WHOLE, pixels=pixels),
    "test": lambda pixels: CenterView(size=16, pixels=pixels),
}


def seen(view: View, payload: bytes) -> np.ndarray:
    out_RSSC = np.empty((1, 16, 16, 3), np.uint8)
    view(Photo(payload), view.draw([0]), out_RSSC)
    return out_RSSC[0].astype(int)


def coloured(kind: str, size: tuple[int, int] = (64, 64), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 120, 90)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_training_and_tests_see_the_same_colours_of_a_phones_photograph(name: str, kind: str) -> None:
    stored, converted = VIEWS[name](Pixels()), VIEWS[name](Pixels(srgb=True))
    exact = {"lossless": True} if kind == "WEBP" else {}
    plain, phone = coloured(kind, **exact), coloured(kind, icc_profile=display_p3(), **exact)
    for payload in (plain, phone):
        assert np.abs(seen(stored, payload) - (200, 120, 90)).max() <= 4
    np.testing.assert_array_equal(seen(converted, plain), seen(stored, plain))
    expected = decode_image(phone, srgb=True)[0, 0]
    assert np.abs(seen(converted, phone) - expected).max() <= 3
    assert np.abs(expected.astype(int) - (200, 120, 90)).max() > 8


@pytest.mark.parametrize("name", VIEWS)
def test_turned_transparent_and_animated_images_look_the_same_packed_or_not_in_training_and_tests(name: str) -> None:
    view = VIEWS[name](Pixels())
    turned = Image.Exif()
    turned[0x0112] = 3
    half = Image.new("RGB", (64, 64), (200, 0, 0))
    half.paste((0, 0, 200), (0, 0, 64, 32))
    clear = half.convert("RGBA")
    clear.putalpha(0)
    cases = {
        "turned": [(half, kind, {"exif": turned.tobytes()}) for kind in ("JPEG", "PNG", "WEBP", "TIFF")],
        "clear": [(clear, kind, {}) for kind in ("PNG", "WEBP", "TIFF")],
        "animated": [
            (half, kind, {"save_all": True, "append_images": [clear.convert("RGB")]}) for kind in ("PNG", "GIF")
        ],
    }
    for case, files in cases.items():
        for image, kind, options in files:
            file = io.BytesIO()
            image.save(file, kind, **options)
            _, packed = stored_image(file.getvalue(), Storing())
            _, shrunk = stored_image(file.getvalue(), Storing(max_side=32))
            top = {"turned": (200, 0, 0), "clear": (0, 0, 0), "animated": (0, 0, 200)}[case]
            for payload in (packed, shrunk):
                assert np.abs(seen(view, payload)[2] - top).max() <= 24, (case, kind)


@pytest.mark.parametrize("name", VIEWS)
def test_a_tiny_image_is_refused_everywhere_for_the_same_reason(name: str) -> None:
    for act in (
        lambda payload: seen(VIEWS[name](Pixels()), payload),
        lambda payload: stored_image(payload, Storing()),
        lambda payload: stored_image(payload, Storing(max_side=8)),
    ):
        with pytest.raises(SampleError, match="too_small"):
            act(coloured("PNG", (7, 40)))


def test_a_detector_records_whether_colours_are_converted() -> None:
    stored, converted = (preprocessing_of(DetectorRecipe(colours=how)) for how in ("stored", "srgb"))
    assert set(converted) - set(stored) == {"colours"}, "detectors of before are compared with what they recorded"
    assert {name: converted[name] for name in stored} == stored


def test_native_views_hold_the_images_own_pixels_and_enlarge_only_what_is_smaller() -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    payload = cv2.imencode(".png", image_HWC[..., ::-1])[1].tobytes()
    native = Pixels(resize="native")
    view = DetectorView(size=40, crop_scale=(0.2, 1.0), flip_probability=0.0, seed=3, pixels=native)
    out_RSSC, places = np.empty((200, 40, 40, 3), dtype=np.uint8), set()
    view(Photo(payload, 1), view.draw(np.arange(200)), out_RSSC)
    for crop_SSC in out_RSSC:
        tops, lefts = np.nonzero((image_HWC[:21, :11] == crop_SSC[0, 0]).all(axis=2))
        top, left = next(
            (y, x)
            for y, x in zip(tops, lefts, strict=True)
            if np.array_equal(image_HWC[y : y + 40, x : x + 40], crop_SSC)
        )
        places.add((int(top), int(left)))
    assert {y for y, _ in places} == set(range(21))
    assert {x for _, x in places} == set(range(11))

    centre = CenterView(size=40, pixels=native)
    centre(Photo(payload, 1), centre.draw([0]), out_RSSC[:1])
    np.testing.assert_array_equal(out_RSSC[0], image_HWC[10:50, 5:45])
    draws_RK, (big_RSSC, usual_RSSC) = centre.draw([0]), np.empty((2, 1, 64, 64, 3), dtype=np.uint8)
    CenterView(size=64, pixels=native)(Photo(payload, 1), draws_RK, big_RSSC)
    CenterView(size=64)(Photo(payload, 1), draws_RK, usual_RSSC)
    np.testing.assert_array_equal(big_RSSC, usual_RSSC)
    recipes = (DetectorRecipe(view_resize="native"), DetectorRecipe())
    assert preprocessing_of(recipes[0]) != preprocessing_of(recipes[1])
