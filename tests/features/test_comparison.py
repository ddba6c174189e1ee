"""Probes of saved features: equal to scikit-learn's, people are kept apart, intervals are over people; refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.helpers.runs import argv_of
from tools.probe import CLI, main
from trainer.config.command_line import call
from trainer.detection.error_rates import bootstrap_weights
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.features.comparison import make_task, measure_set, weights_of
from trainer.features.store import REASON, Features, FeatureStore

PEOPLE, IMAGES, WIDTH = 12, 6, 8


def rows_of_people(people: int = PEOPLE, images: int = IMAGES) -> list[dict[str, Any]]:
    return [
        {"key": f"p{person}-{i}", "identity": f"p{person}", "label": person % 2}
        for person in range(people)
        for i in range(images)
    ]


def values_of(rows: list[dict[str, Any]], *, noise: float, seed: int = 0, label: float = 0.0) -> NDArray[np.float32]:
    """Features around the centre of each person, moved by the label."""
    rng = np.random.default_rng(seed)
    centre = {name: rng.normal(size=WIDTH) for name in sorted({row["identity"] for row in rows})}
    found = [centre[row["identity"]] + noise * rng.normal(size=WIDTH) + label * row.get("label", 0) for row in rows]
    return np.array(found, dtype=np.float32)


def saved(folder: Path, values_ND: NDArray[np.float32], rows: list[dict[str, Any]]) -> Path:
    job = {"num_samples": len(rows), "part_samples": 32, "dtype": "fp32", "format": "safetensors"}
    store = FeatureStore(folder, job | {"features": {"mean": values_ND.shape[1]}})
    store.begin().close()
    for part in range(store.num_parts):
        some = slice(32 * part, 32 * (part + 1))
        store.write_part(part, {"mean": values_ND[some]}, rows[some])
    store.finish({"model": {"origin": folder.name}})
    return folder


def probe(output: Path, **flags: str) -> dict[str, Any]:
    assert call(main, CLI, argv_of({"output": str(output), "num_replicates": "200"} | flags)) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_figures_of_identities_are_scikit_learns(tmp_path: Path) -> None:
    rows = rows_of_people()
    values_ND = values_of(rows, noise=1.0)
    found = probe(tmp_path / "p.json", features=str(saved(tmp_path / "f", values_ND, rows)), field="identity")
    figures = found["sets"]["f"]
    label_N = np.repeat(np.arange(PEOPLE), IMAGES)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000))
    predicted_N = cross_val_predict(model, values_ND.astype(float), label_N, cv=StratifiedKFold(5))
    assert 0.2 < figures["logistic"]["value"] < 0.99, "neither impossible nor perfect"
    # The classes are the people by name, in another order: solvers differ in the last digits.
    assert figures["logistic"]["value"] == pytest.approx(balanced_accuracy_score(label_N, predicted_N), abs=0.03)
    unit_ND = values_ND / np.linalg.norm(values_ND.astype(float), axis=1, keepdims=True)
    first_Q, second_Q = np.triu_indices(len(label_N), k=1)
    far_T, tar_T, _ = roc_curve(label_N[first_Q] == label_N[second_Q], (unit_ND @ unit_ND.T)[first_Q, second_Q])
    assert figures["tar_at_far_0.01"]["value"] == pytest.approx(tar_T[far_T <= 0.01].max())
    for name in ("knn", "ridge", "logistic", "eer", "tar_at_far_0.01"):
        low, high = figures[name]["ci"]
        assert low <= figures[name]["value"] <= high, name
        assert low < high, name
    assert (found["num_tested"], found["num_people"], found["resampled"]) == (72, 12, "people")


def test_a_replicate_that_draws_everyone_once_gives_the_figure_and_one_that_draws_a_person_gives_hers() -> None:
    rows = rows_of_people()
    features = Features(values_of(rows, noise=1.0), rows, {})
    task = make_task(features, "identity")
    once_RN = np.ones((1, len(rows)))
    only_RN = np.array([[float(row["identity"] in ("p3", "p7")) for row in rows]])
    measured = measure_set(features.values_ND, task, np.concatenate([once_RN, only_RN]), k=5)
    for name, replicate_R in measured.replicates.items():
        assert replicate_R[0] == pytest.approx(measured.figures[name]), name
    two = [i for i, row in enumerate(rows) if row["identity"] in ("p3", "p7")]
    alone = Features(features.values_ND[two], [rows[i] for i in two], {})
    pair = measure_set(alone.values_ND, make_task(alone, "identity"), np.ones((1, len(two))), k=5)
    assert measured.replicates["eer"][1] == pytest.approx(pair.figures["eer"]), "pairs of the two people only"


def test_a_person_drawn_twice_counts_twice() -> None:
    rows = rows_of_people()
    features = Features(values_of(rows, noise=1.0), rows, {})
    draws = ({f"p{i}": 1.0} for i in range(PEOPLE))
    drawn = [*draws, {f"p{i}": float(i) for i in range(PEOPLE)}]
    weights_RN = np.array([[some.get(row["identity"], 0.0) for row in rows] for some in drawn])
    measured = measure_set(features.values_ND, make_task(features, "identity"), weights_RN, k=5)
    for name in ("knn", "ridge", "logistic"):
        *alone, mixed = measured.replicates[name].tolist()
        assert mixed == pytest.approx(np.average(alone, weights=range(PEOPLE))), name
        assert mixed != pytest.approx(np.mean(alone)), name


def test_intervals_are_over_people_and_not_over_images(tmp_path: Path) -> None:
    """Images of one person that are all alike hold no more than one image."""
    rows = rows_of_people(people=14, images=40)
    features = Features(values_of(rows, noise=1e-3, seed=3), rows, {})
    task = make_task(features, "label")
    assert all(
        not {rows[i]["identity"] for i in fit_F} & {rows[i]["identity"] for i in test_F} for fit_F, test_F in task.folds
    ), "nobody judges images of their own"
    measured = measure_set(features.values_ND, task, weights_of(task, num_replicates=300, seed=0), k=5)
    images_RN = bootstrap_weights([()] * len(rows), num_replicates=300, seed=0)
    over_images = measure_set(features.values_ND, task, images_RN, k=5)
    spread, narrow = (float(np.std(found.replicates["ridge"])) for found in (measured, over_images))
    assert spread > 3 * narrow


def test_sets_stand_side_by_side_with_paired_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_people()
    good, bad = (values_of(rows, noise=noise, seed=1) for noise in (0.3, 4.0))
    sets = ";".join(f"{name}={saved(tmp_path / name, x, rows)}" for name, x in (("good", good), ("bad", bad)))
    found = probe(tmp_path / "p.json", features=sets, field="identity")
    difference = found["sets"]["bad"]["knn"]
    expected = difference["value"] - found["sets"]["good"]["knn"]["value"]
    assert difference["minus_first"] == pytest.approx(expected)
    assert difference["minus_first_ci"][1] < 0
    out, text = capsys.readouterr().out, (tmp_path / "p.md").read_text()
    assert re.search(r"^bad minus good +-\d", out, re.MULTILINE)
    assert re.search(r"^\| good \| \d+\.\d \[", text, re.MULTILINE)
    assert "identity: 12 classes, chance 8.3 %; 72 of 72 images of 12 people tested" in text
    same = f"a={tmp_path / 'good'};b={tmp_path / 'good'}"
    row = probe(tmp_path / "q.json", features=same, field="identity")["sets"]["b"]["knn"]
    assert (row["minus_first"], row["minus_first_ci"]) == (0, [0, 0])


def test_a_set_of_other_people_tests_what_the_first_has_fitted(tmp_path: Path) -> None:
    rows = rows_of_people()
    others = [row | {"identity": f"q{row['identity']}", "key": f"q{row['key']}"} for row in rows]
    train = saved(tmp_path / "train", values_of(rows, noise=0.5, label=6.0), rows)
    test = saved(tmp_path / "test", values_of(others, noise=0.5, label=6.0, seed=9), others)
    found = probe(tmp_path / "p.json", features=f"m={train}", test_features=f"m={test}", field="label")
    assert found["sets"]["m"]["ridge"]["value"] == 1
    assert (found["num_tested"], found["num_images"]) == (72, 144)
    with pytest.raises(ConfigError, match="features and test_features share 12 people"):
        probe(tmp_path / "q.json", features=f"m={train}", test_features=f"m={train}", field="label")


def test_what_cannot_be_probed_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = rows_of_people()
    rows[0] = {"key": rows[0]["key"], "identity": "p0", REASON: "corrupt"}
    rows[1] = {"key": rows[1]["key"]}
    rows[2] |= {"identity_2": "p5"}
    rows[3] |= {"identity": "once"}
    values_ND = values_of([row | {"identity": row.get("identity", "p0")} for row in rows], noise=0.5)
    values_ND[0] = np.nan
    found = probe(tmp_path / "p.json", features=str(saved(tmp_path / "f", values_ND, rows)), field="identity")
    assert found["num_images"] == 68
    assert sorted(found["notes"]) == [
        "1 images left out: they are the only image of their identity",
        "1 images left out: they could not be read",
        "1 images left out: they have no identity",
        "1 images left out: they show two people",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"field": "attack"}, "field is 'attack', but no image of these features has one"),
        ({"features": "a=AA;a=AA"}, "features names 'a' twice"),
        ({"features": "a=AA;b=BB"}, "features names a (72 images) and b (60 images), which are of other images"),
        ({"features": "nowhere"}, "nowhere holds no features"),
        ({"feature": "cls"}, "has no feature 'cls': choose mean"),
        ({"test_features": "b=BB"}, "test_features names b, but features names a"),
        ({"k": "0"}, "k is 0, but must be at least 1"),
        ({"output": "probe.txt"}, "output is 'probe.txt', but must be a file that ends in .json"),
        ({"features": "c=CC"}, "the features hold 1 class of two images or more"),
    ],
)
def test_wrong_input_is_refused_by_name(flags: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, rows in (("A", rows_of_people()), ("B", rows_of_people(10)), ("C", rows_of_people(1))):
        saved(tmp_path / name, values_of(rows, noise=1.0), rows)
    places = {f"{name}{name}": str(tmp_path / name) for name in "ABC"}
    named = {"features": "a=AA", "field": "identity", "output": str(tmp_path / "p.json")} | flags
    for short, place in places.items():
        named = {name: text.replace(short, place) for name, text in named.items()}
    with pytest.raises(TrainerError, match=re.escape(message)):
        call(main, CLI, argv_of(named))
    assert not (tmp_path / "p.json").exists()


def test_features_that_are_not_finite_are_refused() -> None:
    rows = rows_of_people()
    values_ND = values_of(rows, noise=1.0)
    values_ND[7, 2] = np.inf
    task = make_task(Features(values_ND, rows, {}), "identity")
    with pytest.raises(DataError, match="the features of sample 7 are not finite"):
        measure_set(values_ND, task, np.ones((1, len(rows))), k=5)
