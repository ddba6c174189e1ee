"""Images, profiles, shards and manifests for the tests: small, and the same in every run."""

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpeg(number: int, height: int = 40, width: int = 36) -> bytes:
    """A smooth picture that differs for every number."""
    y, x = np.mgrid[:height, :width]
    image_HWC = np.stack([(y * (number % 7 + 1)) % 256, (x * (number % 5 + 1)) % 256, (x + y + number) % 256], axis=2)
    file = io.BytesIO()
    Image.fromarray(image_HWC.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def _icc_profile(name: bytes, space: bytes, tags: dict[bytes, bytes], gamma: float) -> bytes:
    """A small ICC profile, version 2.1; the given tags, and a curve for each that has no content."""
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78) + b"\0",
        b"cprt": b"text\0\0\0\0free" + bytes(4),
        b"wtpt": _xyz(0.9642, 1.0, 0.8249),
        **{tag: content or curve for tag, content in tags.items()},
    }
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acspAPPL" + bytes(24)
    head += struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def display_p3() -> bytes:
    """The ICC profile of a phone: Display P3's colourants (adapted to D50) with a plain gamma of 2.2."""
    colourants = {
        b"rXYZ": _xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": _xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": _xyz(0.15710, 0.06657, 0.78407),
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), b"")
    return _icc_profile(b"Display P3", b"RGB ", colourants | curves, 2.2)


def grey_profile(gamma: float) -> bytes:
    """The ICC profile of a grey scanner."""
    return _icc_profile(b"Scanner", b"GRAY", {b"kTRC": b""}, gamma)


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def members_of(numbers: range) -> list[tuple[str, bytes]]:
    """A jpg and a json for each number."""
    found = []
    for number in numbers:
        found += [
            (f"face{number:04d}.jpg", jpeg(number)),
            (f"face{number:04d}.json", json.dumps({"label": number % 2}).encode()),
        ]
    return found


def picture(number: int, label: int) -> bytes:
    """A bona fide is smooth, a morph carries stripes."""
    generator = np.random.default_rng(number)
    small = generator.integers(60, 200, (4, 4, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((36, 36), Image.Resampling.BICUBIC)).astype(int)
    image[::2] += 30 * label
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def faces(path: Path, numbers: range, *, labels: tuple[int, ...] = (0, 1), **fields: Any) -> Path:
    members = []
    for number in numbers:
        label = labels[number % len(labels)]
        values = {"label": label, "identity": f"p{number // 4}"} | fields
        values |= {"attack": ("stripes", "lines")[number % 4 // 2]} if label == 1 else {}
        members += [
            (f"f{number:04d}.png", picture(number, label)),
            (f"f{number:04d}.json", json.dumps(values).encode()),
        ]
    return write_tar(path, members)
