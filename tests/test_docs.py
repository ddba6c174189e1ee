"""The documents: links lead somewhere, named files exist, the map of the packages is complete, README stays short."""

import re
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT
from trainer import __version__

_HIDDEN = {".git", "demo", "runs", "build", "dist", ".pytest_cache", "wheels"}
DOCUMENTS = sorted(
    path
    for folder in ROOT.iterdir()
    if folder.name not in _HIDDEN and not folder.name.startswith(".venv")
    for path in ([folder] if folder.suffix == ".md" else folder.rglob("*.md"))
)
_MAX_PICTURE_BYTES = 300_000


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors_of(path: Path) -> set[str]:
    """Anchors as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_relative_link_and_anchor_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{names(document)} links to {link}"
        assert target.is_relative_to(ROOT), link
        if target.is_dir():
            assert (target / "README.md").exists(), f"{names(document)} links to {link}, which holds no README.md"
        if anchor:
            assert anchor in anchors_of(target), f"{names(document)} links to {link}, which has no such heading"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=names)
def test_every_file_of_the_repository_that_a_document_names_exists(document: Path) -> None:
    pattern = r"(?<![\w/.])(?:trainer|launch|tools|tests|ds_configs)/[\w/]+\.(?:py|md|json|sbatch|sh)\b"
    for name in re.findall(pattern, document.read_text()):
        assert (ROOT / name).exists(), f"{names(document)} names {name}"


def test_the_map_of_the_packages_names_every_module() -> None:
    text = (ROOT / "trainer" / "README.md").read_text().partition("## Packages")[2]
    for path in (ROOT / "trainer").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", text), f"trainer/README.md lacks {names(path)}"


def test_every_tool_stands_in_the_tools_guide() -> None:
    text = (ROOT / "tools" / "README.md").read_text()
    for path in (ROOT / "tools").glob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text, path.name


def test_the_readme_is_short_and_shows_a_light_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert 900 <= len(text.split()) <= 1200
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).stat().st_size < _MAX_PICTURE_BYTES


def test_the_citation_names_the_version_that_the_package_has() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_table_of_laws_names_every_slow_test_that_make_test_runs() -> None:
    listed = set(re.findall(r"`(\w+/test_\w+\.py::test_\w+)`", (ROOT / "tests" / "README.md").read_text()))
    marked, known = set(), set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        decorators_and_names = re.findall(r"((?:^@.*\n(?:^[ )\]].*\n)*)*)^def (test_\w+)\(", path.read_text(), re.M)
        for decorators, name in decorators_and_names:
            place = f"{path.relative_to(ROOT / 'tests').as_posix()}::{name}"
            known.add(place)
            if "pytest.mark.law" in decorators:
                marked.add(place)
    assert len(marked) > 10
    assert marked <= listed <= known
