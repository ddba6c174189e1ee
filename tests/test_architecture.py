"""The reading order of DESIGN: a module imports only modules above it, and one module owns each library."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READING_ORDER = (
    *("errors", "files", "parallel", "progress", "world", "seeds", "foreign_names", "config", "data.labels"),
    *("data.storage", "data.tar", "data.members", "data.contents", "data.shards"),
    *("data.plan", "data.sampler", "data.mixture", "data.overlap"),
    *(
        "data.icc",
        "data.decode",
        "data.resize",
        "data.selfmorph",
        "data.augment",
        "data.distort",
        "data.stream",
        "data.loader",
    ),
    *("losses", "models.mask_utils", "models.encoder", "models.cross_block", "models.mae", "models.vitmae"),
    *("models.heads", "models.classifier", "models.mixstyle", "models.dropout", "models.lora", "models.detector"),
    *("optim", "zero_files", "ds_config", "engine", "lease", "checkpoint", "monitor"),
    *("guardian", "watchdog", "numerics", "heldout", "loop"),
    *("metrics", "evaluate", "selection", "saved_detector", "report", "export"),
)
OWNERS = {
    "deepspeed": {"trainer/distributed/engine.py", "trainer/distributed/zero_state.py"},
    "webdataset": {"trainer/data/stream.py", "tools/make_shards.py", "tools/bench/loader.py"},
    "timm": {"trainer/models/encoder.py", "trainer/weights/export.py"},
    "albumentations": {"trainer/data/transforms/views.py", "trainer/data/transforms/randaugment.py"},
    "fsspec": {"trainer/data/storage.py"},
    "peft": {"trainer/models/lora.py", "trainer/weights/export.py"},
    "transformers": {"trainer/weights/export.py", "tools/bench/step.py"},
    "onnxruntime": {"trainer/weights/export.py"},
    "tqdm": {"trainer/progress.py", "trainer/training/monitor.py"},
    "fire": {"trainer/config/command_line.py"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):  # also imports hidden in functions
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_is_listed_in_the_reading_order() -> None:
    modules = {
        ".".join(path.relative_to(ROOT / "trainer").with_suffix("").parts)
        for path in (ROOT / "trainer").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules == set(READING_ORDER)


def test_a_module_imports_only_modules_above_it() -> None:
    for place, module in enumerate(READING_ORDER):
        path = ROOT / "trainer" / Path(*module.split(".")).with_suffix(".py")
        ours = {name.removeprefix("trainer.") for name in imports_of(path) if name.startswith("trainer.")}
        below = ours & set(READING_ORDER[place:])
        assert not below, f"{module} imports {below}, which stand below it"


def test_data_and_models_never_import_each_other() -> None:
    for one, other in (("data", "trainer.models"), ("models", "trainer.data")):
        for path in (ROOT / "trainer" / one).glob("*.py"):
            assert not any(name.startswith(other) for name in imports_of(path)), path


def test_each_library_has_one_owner() -> None:
    for path in [p for folder in ("trainer", "launch", "tools") for p in (ROOT / folder).rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for library, owners in OWNERS.items():
            used = any(found == library or found.startswith(library + ".") for found in imports_of(path))
            assert not used or name in owners, f"{name} imports {library}"


def test_random_numbers_come_from_seeds_and_never_from_a_generator_of_numpys_or_pythons() -> None:
    for path in [p for folder in ("trainer", "launch") for p in (ROOT / folder).rglob("*.py")]:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        drawn = {name for name in names if name.startswith(("np.random", "numpy.random", "random."))}
        drawn |= imports_of(path) & {"random", "numpy.random"}
        assert not drawn, f"{path} draws from {drawn}: see trainer/seeds.py"
