"""The field's table: error rates for each morphing tool, their worst and mean, beside rows that papers published.

The published rows are of detectors that were trained on SMDD. They are typed in from the paper or repository that each
names. They were computed by other rules: most of them interpolate nothing but may exceed the limit at an operating
point, and scores of MADation were joined over ranks with some images counted twice. On 204 bona fides one error is 0.49
points, and 10 errors (4.9 %) have the 95 % interval [2.4, 8.8]. So small differences between rows mean nothing.

Left out: BPCER@APCER of OrthoMAD and IDistill as reprinted by MADation (their values are no multiples of 1/204, so they
are rates of attacks), and D-FW-CDCN of SYN-MAD-2022 (an EER of 0 beside an error of 44 % at BPCER 5 %).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_LIMITS = ("0.01", "0.10", "0.20")
_FRLL_TOOLS = ("stylegan", "webmorph", "opencv", "amsl", "facemorpher")
_MAD22_TOOLS = ("facemorpher", "mipgan_i", "mipgan_ii", "opencv", "webmorph", "mordiff")
_MADATION = "MADation, arXiv 2501.03800"
_SYN_MAD = "SYN-MAD-2022, arXiv 2208.07337"


@dataclass(frozen=True, slots=True)
class Published:
    """A published detector on one test set, in percent."""

    name: str
    source: str
    d_eer: Mapping[str, float]
    """Morphing tool -> D-EER."""
    bscer_at_macer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Morphing tool -> BSCER at MACER 1, 10 and 20 %."""


def _rows(
    tools: Sequence[str], *rows: tuple[str, str, Sequence[float], Sequence[tuple[float, ...]]]
) -> list[Published]:
    return [
        Published(
            name, source, dict(zip(tools, eers, strict=False)), dict(zip(tools, points, strict=False) if points else ())
        )
        for name, source, eers, points in rows
    ]


PUBLISHED: dict[str, list[Published]] = {
    # D-EER: MADation's table 3, and SelfMAD's README. BSCER@MACER (BPCER@APCER there): MADation's table 3.
    "frll": _rows(
        _FRLL_TOOLS,
        (
            *("MixFaceNet-MAD", _MADATION, (8.99, 12.35, 4.39, 15.18, 3.87)),
            (
                *((42.16, 8.82, 4.41), (80.39, 15.20, 7.84), (26.47, 1.96, 1.47), (49.51, 21.08, 11.76)),
                (23.53, 0.49, 0.49),
            ),
        ),
        (
            *("PW-MAD", _MADATION, (16.64, 16.65, 2.42, 15.18, 2.20)),
            (
                *((80.39, 25.98, 13.24), (80.39, 24.02, 13.24), (22.06, 0.49, 0.49), (96.57, 24.02, 5.88)),
                (26.47, 0.49, 0.0),
            ),
        ),
        (
            *("Inception", _MADATION, (11.37, 9.86, 5.38, 10.79, 3.17)),
            (
                *((72.06, 13.73, 6.86), (53.92, 9.80, 2.94), (38.73, 1.96, 0.98), (72.06, 12.75, 4.90)),
                (30.39, 0.49, 0.49),
            ),
        ),
        ("OrthoMAD", _MADATION, (6.54, 15.23, 0.73, 14.80, 0.98), ()),
        ("IDistill", _MADATION, (1.96, 4.01, 2.46, 4.00, 2.05), ()),
        (
            *("MADation ViT-B/16", _MADATION, (17.21, 3.42, 2.97, 3.85, 1.35)),
            (
                *((54.85, 26.69, 13.10), (5.88, 0.49, 0.0), (4.41, 0.49, 0.49), (12.07, 2.89, 2.41)),
                (1.47, 0.0, 0.0),
            ),
        ),
        (
            *("MADation ViT-L/14", _MADATION, (24.96, 4.07, 0.99, 7.26, 0.74)),
            (
                *((94.17, 49.03, 22.33), (6.86, 1.47, 1.47), (0.98, 0.0, 0.0), (21.26, 10.63, 5.80)),
                (0.98, 0.98, 0.98),
            ),
        ),
        ("SelfMAD HRNet-W18", "SelfMAD, arXiv 2504.05504", (10.34, 3.45, 0.0, 0.99, 0.0), ()),
    ),
    # D-EER: MADation's table 2; its own rows from its README, because the paper's ViT-L row has columns exchanged.
    "mad22": _rows(
        _MAD22_TOOLS,
        ("MixFaceNet-MAD", _SYN_MAD, (4.60, 16.70, 20.62, 8.33, 18.20, 8.50), ()),
        ("Inception-MAD", _SYN_MAD, (0.0, 10.90, 16.22, 7.52, 18.00, 5.30), ()),
        ("MorphHRNet", _SYN_MAD, (5.90, 15.30, 10.41, 5.69, 9.80), ()),
        ("Con-Text Net A", _SYN_MAD, (0.0, 12.30, 12.91, 17.48, 26.20), ()),
        ("D-FW-MixFaceNet", _MADATION, (0.10, 6.70, 6.61, 13.72, 10.80), ()),
        (
            *("MADation ViT-B/16", _MADATION, (0.0, 33.37, 22.21, 3.85, 10.80, 1.10)),
            (
                *((0.0, 0.0, 0.0), (94.12, 72.55, 52.94), (84.80, 47.55, 26.47), (23.53, 0.98, 0.0)),
                *((51.47, 11.76, 4.41), (1.94, 0.0, 0.0)),
            ),
        ),
        (
            *("MADation ViT-L/14", _MADATION, (0.40, 20.32, 9.06, 2.23, 20.40, 19.26)),
            (
                *((0.49, 0.0, 0.0), (79.41, 35.78, 15.69), (100.0, 5.39, 0.98), (15.69, 0.0, 0.0)),
                *((82.35, 37.25, 13.24), (84.47, 34.95, 15.53)),
            ),
        ),
    ),
}
"""Name of a test set -> published rows."""


def field_tables(evaluation: Mapping[str, Any]) -> str:
    """Write a table of each test set that several morphing tools made; empty for none.

    A test set named as in `PUBLISHED` has the published rows beside it.
    """
    tables = []
    for test_set in evaluation["test_sets"]:
        results = [result for result in evaluation["results"] if result["test_set"] == test_set["name"]]
        tools = sorted({tool for result in results for tool in result["summary"]["tools"]})
        if len(tools) > 1:
            tables.append(_table(test_set["name"], tools, results))
    return "\n\n".join(tables)


def _table(name: str, tools: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    rows = [(f"{name}, in %", "", *tools, "worst", "mean", "")]
    for result in results:
        of = result["summary"]["tools"]
        rows.append(_row(result["model"], "D-EER", [100 * of[t]["d_eer"]["value"] for t in tools]))
        for limit in _LIMITS:
            values = [100 * of[tool]["bscer_at_macer"][limit]["bscer"] for tool in tools]
            rows.append(_row("", f"BSCER@MACER={limit}", values))
    for other in PUBLISHED.get(name, []):
        if set(tools) & other.d_eer.keys():
            rows.append(_row(other.name, "D-EER", [other.d_eer.get(tool) for tool in tools], other.source))
            for i, limit in enumerate(_LIMITS if other.bscer_at_macer else ()):
                points = [other.bscer_at_macer[tool][i] if tool in other.bscer_at_macer else None for tool in tools]
                rows.append(_row("", f"BSCER@MACER={limit}", points))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, figure: str, values: Sequence[float | None], source: str = "") -> tuple[str, ...]:
    """Write one line; worst and mean only where no tool is missing."""
    known = [value for value in values if value is not None]
    both = (max(known), sum(known) / len(known)) if len(known) == len(values) else (None, None)
    return (name, figure, *("-" if value is None else f"{value:.2f}" for value in (*values, *both)), source)
