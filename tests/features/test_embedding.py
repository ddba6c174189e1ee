"""Features: equal to timm's, complete and in order on any number of ranks and after a kill; refusals."""

import dataclasses
import io
import json
import os
import re
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.runs import ROOT, TINY, argv_of, forks, launch
from tests.helpers.shards import faces
from tools.export import CLI, main
from trainer.config.command_line import call
from trainer.config.feature_settings import EmbeddingSettings
from trainer.config.record import to_dict
from trainer.config.settings import DetectorRecipe, PretrainRecipe
from trainer.data.transforms.views import CenterView
from trainer.detection.build import build_detector, preprocessing_of
from trainer.detection.error_rates import Calibration
from trainer.detection.saved_detector import save_detector
from trainer.detection.scoring import Decision
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.fault_tolerance.attempts import acquire
from trainer.features import read_features
from trainer.features.embedding import embed
from trainer.training.pretraining import build_model
from trainer.weights.load import read_init

NAME = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {"model": NAME, "image_size": 32, "patch_size": 8, "encoder_depth": 3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faces(tmp_path_factory.mktemp("shards") / "a.tar", range(30), source="studio")


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, with one that cannot be read behind them in the order of names."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shards) as archive:
        archive.extractall(folder, filter="data")
    (folder / "z.png").write_bytes((folder / "f0000.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as timm names its weights, away from the values at which norms and biases begin."""
    vit = build_model(PretrainRecipe(**SHAPE, seed=3)).encoder.vit
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    save_file(dict(vit.state_dict()), path)
    path.with_name("config.json").write_text(json.dumps({"architecture": NAME}))
    return path.parent


def settings_of(model: Path | str, images: Path | str, output: Path, **changes: Any) -> EmbeddingSettings:
    options = {"num_workers": 0, "progress_bar": False, "micro_batch": 4, "part_batches": 2} | changes
    return EmbeddingSettings(model=str(model), images=str(images), output_dir=str(output), **options)


def views_of(shards: Path, size: int) -> NDArray[np.uint8]:
    """Every image of the shards, decoded by Pillow, and its centre."""
    view = CenterView(size=size)
    with tarfile.open(shards) as archive:
        files = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".png")]
        payloads = [file.read() for file in files if file]
    return np.stack([view.of_pixels(np.asarray(Image.open(io.BytesIO(payload))))[0] for payload in payloads])


def seen_by_timm(shards: Path) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.from_numpy(views_of(shards, 32)).permute(0, 3, 1, 2).float() / 255 - mean) / std


def close(found: NDArray[Any], expected: torch.Tensor) -> bool:
    return bool(np.allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5 * float(expected.abs().max())))


@torch.no_grad()
def test_features_are_those_of_timm_on_the_same_pixels(encoder: Path, shards: Path, tmp_path: Path) -> None:
    embed(settings_of(encoder, shards, tmp_path / "out", features=("cls", "mean"), blocks=(0, 2)))
    model = timm.create_model(NAME, img_size=32, patch_size=8, depth=3, num_classes=0).eval()
    model.load_state_dict(load_file(encoder / "model.safetensors"))
    pixels = seen_by_timm(shards)
    tokens = model.forward_features(pixels)
    expected = {"cls": model.forward_head(tokens, pre_logits=True), "mean": tokens[:, 1:].mean(dim=1)}
    inner = model.forward_intermediates(
        pixels, indices=[0, 2], norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
    )
    for block, (patches, prefix) in zip((0, 2), inner, strict=True):
        expected |= {f"block_{block}_cls": prefix[:, 0], f"block_{block}_mean": patches.mean(dim=1)}
    about = json.loads((tmp_path / "out" / "features.json").read_text())
    assert about["features"] == dict.fromkeys(expected, 192)
    for name, value in expected.items():
        assert close(read_features(tmp_path / "out", name).values_ND, value), name


def test_rows_say_what_the_samples_json_says_and_stand_in_the_order_of_the_shards(
    encoder: Path, shards: Path, tmp_path: Path
) -> None:
    embed(settings_of(encoder, shards, tmp_path / "out"))
    found = read_features(tmp_path / "out")
    assert found.keys == [f"f{i:04d}" for i in range(30)]
    assert found.field("identity") == [f"p{i // 4}" for i in range(30)]
    assert found.field("label") == [i % 2 for i in range(30)]
    assert set(found.field("source")) == {"studio"}
    assert found.field("attack")[:2] == [None, "stripes"]
    assert set(found.field("shard")) == {str(shards)}
    assert found.is_readable.all()


def test_a_bad_image_is_a_row_with_its_reason_and_files_have_the_features_of_shards(
    encoder: Path, shards: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(settings_of(encoder, shards, tmp_path / "shards"))
    capsys.readouterr()
    embed(settings_of(encoder, folder, tmp_path / "files"))
    assert "features of 30 of 31 images; 1 without features: corrupt" in capsys.readouterr().out
    files, expected = read_features(tmp_path / "files"), read_features(tmp_path / "shards").values_ND
    assert files.keys == [str(folder / f"f{i:04d}.png") for i in range(30)] + [str(folder / "z.png")]
    assert np.array_equal(files.values_ND[:28], expected[:28])
    assert np.allclose(files.values_ND[28:30], expected[28:], rtol=1e-4, atol=1e-5)  # a batch of another size
    assert np.isnan(files.values_ND[30]).all()
    assert files.is_readable.tolist() == [True] * 30 + [False]
    assert (files.rows[30]["reason"], files.about["unreadable"]) == ("corrupt", {"corrupt": 1})


def test_a_list_gives_its_columns_to_the_rows_and_keeps_its_order_and_repeats(
    encoder: Path, folder: Path, tmp_path: Path
) -> None:
    names = ["f0007.png", "gone.png", "f0003.png", "f0007.png"]
    lines = [f"{name},{label},p{i}" for i, (name, label) in enumerate(zip(names, ("morph", "", "0", "1"), strict=True))]
    (folder / "list.csv").write_text("\n".join(["path,label,identity", *lines]) + "\n")
    embed(settings_of(encoder, folder / "list.csv", tmp_path / "out"))
    found = read_features(tmp_path / "out")
    assert found.keys == names
    assert found.field("label") == [1, None, 0, 1]
    assert found.field("identity") == ["p0", "p1", "p2", "p3"]
    assert found.field("reason") == [None, "no_file", None, None]
    assert np.array_equal(found.values_ND[0], found.values_ND[3])
    assert not np.array_equal(found.values_ND[0], found.values_ND[2])


def test_fp16_and_npy_hold_the_rounded_numbers_of_fp32(encoder: Path, shards: Path, tmp_path: Path) -> None:
    embed(settings_of(encoder, shards, tmp_path / "whole"))
    embed(settings_of(encoder, shards, tmp_path / "half", dtype="fp16", format="npy"))
    whole, half = (read_features(tmp_path / name).values_ND for name in ("whole", "half"))
    assert (whole.dtype, half.dtype) == (np.float32, np.float16)
    assert np.array_equal(half, whole.astype(np.float16))
    assert len(list((tmp_path / "half").glob("part-*.mean.npy"))) == 4


def test_pixels_are_the_view_in_its_order(shards: Path, tmp_path: Path) -> None:
    embed(settings_of("pixels", shards, tmp_path / "out", image_size=8))
    found = read_features(tmp_path / "out", "pixels").values_ND
    assert np.array_equal(found, views_of(shards, 8).reshape(30, -1).astype(np.float32) / 255)


def test_random_weights_have_the_architecture_of_the_model_and_come_from_the_seed(
    encoder: Path, shards: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        embed(settings_of(encoder, shards, tmp_path / name, weights="random", seed=seed))
    embed(settings_of(encoder, shards, tmp_path / "trained"))
    a, b, c, trained = (read_features(tmp_path / name) for name in ("a", "b", "c", "trained"))
    assert np.array_equal(a.values_ND, b.values_ND)
    assert a.values_ND.shape == c.values_ND.shape == trained.values_ND.shape
    assert not np.allclose(a.values_ND, c.values_ND)
    assert not np.allclose(a.values_ND, trained.values_ND)
    assert a.about["model"]["origin"].startswith("random weights of the architecture of ")
    assert a.about["model"]["preprocessing"] == trained.about["model"]["preprocessing"]


@torch.no_grad()
def test_a_timm_name_gives_timms_own_random_model(shards: Path, tmp_path: Path) -> None:
    embed(settings_of(f"timm:{NAME}", shards, tmp_path / "out", weights="random", image_size=32, seed=5))
    torch.manual_seed(5)
    model = timm.create_model(NAME, img_size=32, num_classes=0).eval()
    expected = model.forward_features(seen_by_timm(shards))[:, 1:].mean(dim=1)
    assert close(read_features(tmp_path / "out").values_ND, expected)


def lora_detector(place: Path, init: Path) -> Path:
    """A detector whose adapters are not zero."""
    recipe = DetectorRecipe(**SHAPE, use_lora=True)
    model, sha256 = build_detector(recipe, read_init(str(init), pretrained=False))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    place.mkdir()
    description = {
        "recipe": to_dict(recipe), "preprocessing": preprocessing_of(recipe), "step": 1, "data": "a.tar",
        "init": {"source": str(init), "path": str(init), "pretrained": False, "sha256": sha256},
        "selection": {"figures": None},
    }  # fmt: skip
    weights = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    decision = Decision(Calibration(1.0, 0.0), {"d_eer": 0.5})
    save_detector(place / "detector", description, weights, decision, {}, lease=acquire(place, num_ranks=1))
    return place


def exported(source: Path, output: Path) -> Path:
    assert call(main, CLI, argv_of({"source": str(source), "format": "timm", "output": str(output)})) == 0
    return output


@pytest.mark.filterwarnings("ignore")  # the export's other libraries
def test_a_lora_detector_gives_the_features_of_its_adapted_encoder_as_its_export_does(
    encoder: Path, shards: Path, tmp_path: Path
) -> None:
    run = lora_detector(tmp_path / "run", encoder)
    models = {"adapted": run, "exported": exported(run, tmp_path / "export"), "plain": encoder}
    found = {}
    for name, model in models.items():
        embed(settings_of(model, shards, tmp_path / name))
        found[name] = read_features(tmp_path / name).values_ND
    assert np.allclose(found["adapted"], found["exported"], rtol=1e-3, atol=1e-4)
    assert not np.allclose(found["adapted"], found["plain"], rtol=1e-2, atol=1e-2)


def test_a_finished_output_is_left_and_one_of_another_job_is_refused(
    encoder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(encoder, shards, tmp_path / "out")
    stamp = (embed(settings) / "features.json").stat().st_mtime_ns
    embed(settings)
    assert (tmp_path / "out" / "features.json").stat().st_mtime_ns == stamp
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"features\.json exists and is of dtype 'fp32' instead of 'fp16'"):
        embed(dataclasses.replace(settings, dtype="fp16"))
    with pytest.raises(ConfigError, match="is of another model"):
        embed(dataclasses.replace(settings, weights="random"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"it holds other files \(notes\.txt\)"):
        embed(dataclasses.replace(settings, output_dir=str(tmp_path / "used")))


def test_unfinished_cut_or_missing_features_are_not_read(encoder: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no features"):
        read_features(tmp_path)
    output = embed(settings_of(encoder, shards, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"has no feature 'cls': choose mean"):
        read_features(output, "cls")
    part = output / "part-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"part-00001\.safetensors is missing or was changed"):
        read_features(output)
    part.write_bytes(whole)
    (output / "features.json").rename(output / "features.partial.json")
    with pytest.raises(ConfigError, match="holds unfinished features"):
        read_features(output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": f"timm:{NAME}"}, "names an architecture without weights: add --weights pretrained"),
        ({"model": "timm:vit_tiny_patch17", "weights": "random"}, "model is 'vit_tiny_patch17', which timm"),
        ({"weights": "pretrained"}, "weights is 'pretrained', but model is"),
        ({"model": "nowhere"}, "no such file or folder: name a run, a detector, an export, pixels"),
        ({"model": "pixels", "weights": "random"}, "model is pixels, which has neither weights nor blocks"),
        ({"images": "nowhere"}, "images is 'nowhere', but no such file or folder exists"),
        ({"features": ("mean", "max")}, "features is 'mean,max', but must name mean, cls or both"),
        ({"blocks": (3,)}, "blocks names 3, but this model has blocks 0 to 2"),
        ({"blocks": (1, 1)}, "blocks is '1,1', but must name blocks once each"),
        ({"image_size": 30}, "image_size is 30, but must be divisible by the patch size 8"),
        ({"part_batches": 0}, "part_batches is 0, but must be at least 1"),
        ({"output_dir": "/dev/null/x"}, "cannot be written"),
    ],
)
def test_wrong_input_is_refused_by_name(
    changes: dict[str, Any], message: str, encoder: Path, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError, match=re.escape(message)):
        embed(dataclasses.replace(settings_of(encoder, shards, tmp_path / "out"), **changes))
    assert not (tmp_path / "out" / "features.json").exists()


def test_two_commands_do_not_write_one_output(encoder: Path, shards: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "features.partial.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another command writes it now"):
            embed(settings_of(encoder, shards, tmp_path / "out"))


def test_the_lines_of_python_in_the_guide_read_the_features(
    encoder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (ROOT / "launch" / "README.md").read_text().replace("\n  ", "\n")
    code = re.search(r"```\n(from trainer\.features import read_features\n.*?)```", guide, re.DOTALL)
    assert code is not None
    assert len(code[1].strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    embed(settings_of(encoder, shards, Path("features/base")))
    known: dict[str, Any] = {}
    exec(code[1], known)
    assert known["found"].values_ND.shape == (30, 192)


def files_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name.startswith("part-")}


@pytest.mark.slow
@pytest.mark.law
@pytest.mark.ranks
def test_a_killed_embedding_goes_on_on_two_ranks_and_writes_the_files_of_one_process(
    encoder: Path, folder: Path, tmp_path: Path
) -> None:
    names = [f"f{i % 30:04d}.png" for i in range(1501)] + ["z.png"]
    (folder / "long.csv").write_text("path\n" + "\n".join(names) + "\n")
    flags = {"model": str(encoder), "images": str(folder / "long.csv"), "micro_batch": "4", "part_batches": "2"}
    flags |= {"num_workers": "0", "progress_bar": "false", "num_threads": "1", "features": "mean,cls"}
    whole = launch(flags | {"output_dir": str(tmp_path / "whole")}, script="embed.py")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "parts"
    words = argv_of(flags | {"output_dir": str(output)})
    run = forks().start(ROOT / "launch" / "embed.py", words, tmp_path / "log", ranks=2)
    run.until(lambda: len(list(output.glob("part-*.jsonl"))) >= 20)
    for pid in run.pids:
        os.kill(pid, signal.SIGKILL)
    run.wait()
    assert not (output / "features.json").exists()
    for name in (".part-00003.jsonl.tmp-00000000", ".mode.tmp-00000000"):
        (output / name).write_text("what a kill leaves")
    again = launch(flags | {"output_dir": str(output)}, ranks=2, script="embed.py")
    assert again.returncode == 0, again.stderr
    assert "files are written already" in again.stdout
    assert files_of(output) == files_of(tmp_path / "whole")
    assert sorted(path.name for path in output.iterdir()) == sorted([*files_of(output), "features.json"])
    found = read_features(output)
    assert found.keys == names
    assert found.about["files"] == read_features(tmp_path / "whole").about["files"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_pretraining_and_its_checkpoint_give_the_features_of_its_export(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(TINY | {"data": str(shards), "output_dir": str(run), "stop_at_step": "2"})
    assert done.returncode == 0, done.stderr
    checkpoint = next(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    models = {"run": run, "checkpoint": checkpoint, "export": exported(run, tmp_path / "export")}
    found = {}
    for name, model in models.items():
        embed(settings_of(model, shards, tmp_path / f"of_{name}"))
        found[name] = read_features(tmp_path / f"of_{name}").values_ND
    assert np.array_equal(found["run"], found["checkpoint"])
    assert np.allclose(found["run"], found["export"], rtol=1e-4, atol=1e-5)
