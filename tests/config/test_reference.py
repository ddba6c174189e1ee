from tests.helpers.runs import ROOT
from trainer.config.reference import reference


def test_the_settings_reference_is_what_the_docstrings_say() -> None:
    assert (ROOT / "launch" / "SETTINGS.md").read_text() == reference(), "run make docs"
