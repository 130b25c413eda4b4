"""metrics.py against scikit-learn, scipy, statsmodels and hand-computed values; degenerate input; no files, no network;
intervals that cover what they promise."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats
from sklearn import metrics as sklearn_metrics

from classifier.evaluation import metrics

EXACT = {"rel": 1e-9, "abs": 1e-12}
SIZES = (1, 2, 3, 7, 40, 500)


def scores_by_scikit_learn(predictions, references):
    """The same scores by scikit-learn."""
    zero, columns = {"zero_division": 0}, (references, predictions)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(*columns),
        "matthews_correlation": sklearn_metrics.matthews_corrcoef(*columns),
        "f1_macro": sklearn_metrics.f1_score(*columns, average="macro", **zero),
        "f1_weighted": sklearn_metrics.f1_score(*columns, average="weighted", **zero),
        "precision_weighted": sklearn_metrics.precision_score(*columns, average="weighted", **zero),
        "recall_weighted": sklearn_metrics.recall_score(*columns, average="weighted", **zero),
    }
    if max(predictions.max(), references.max()) < 2 and (predictions.any() or references.any()):
        expected["f1"] = sklearn_metrics.f1_score(*columns, pos_label=1, **zero)
    return expected


@pytest.mark.parametrize("number_of_labels", [2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:A single label was result:UserWarning")
def test_classes_agree_with_scikit_learn(number_of_labels):
    compared_f1 = 0
    for seed in range(5):
        generator = np.random.default_rng([number_of_labels, seed])
        for rows in SIZES:
            skew = generator.dirichlet(np.full(number_of_labels, 0.5))  # imbalanced; classes go missing on either side
            references = generator.choice(number_of_labels, rows, p=skew)
            guess = generator.integers(0, number_of_labels, rows)
            predictions = np.where(generator.random(rows) < generator.random(), references, guess)
            expected = scores_by_scikit_learn(predictions, references)
            compared_f1 += "f1" in expected
            assert metrics.compute_metrics(list(expected), predictions, references) == pytest.approx(expected, **EXACT)
    assert compared_f1 > 20 or number_of_labels > 2


@pytest.mark.parametrize("ties", [False, True])
def test_regression_agrees_with_scipy(ties):
    for seed in range(25):
        generator = np.random.default_rng([ties, seed])
        for rows in (2, 3, 10, 100, 500):
            scale, offset = 10.0 ** generator.integers(-3, 4), generator.normal()
            references = generator.normal(size=rows)
            predictions = generator.normal() * references + generator.normal(size=rows)
            if ties:
                predictions, references = predictions.round(), references.round()
            predictions, references = predictions * scale + offset, references * scale
            if min(np.ptp(predictions), np.ptp(references)) == 0:
                continue  # see the degenerate ones
            expected = {
                "pearson": stats.pearsonr(predictions, references).statistic,
                "spearmanr": stats.spearmanr(predictions, references).statistic,
                "mse": sklearn_metrics.mean_squared_error(references, predictions),
            }
            assert metrics.compute_metrics(list(expected), predictions, references) == pytest.approx(expected, **EXACT)


def test_hand_computed_values():
    # Confusion matrix (rows: references): [[3, 1], [2, 4]]
    references = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    predictions = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])
    scores = metrics.compute_metrics(list(metrics.CLASSIFICATION), predictions, references)
    f1_of_0, f1_of_1 = 6 / 9, 8 / 11
    assert scores == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": f1_of_1,
            "matthews_correlation": (4 * 3 - 1 * 2) / np.sqrt(5 * 6 * 4 * 5),
            "f1_macro": (f1_of_0 + f1_of_1) / 2,
            "f1_weighted": 0.4 * f1_of_0 + 0.6 * f1_of_1,
            "precision_weighted": 0.4 * 3 / 5 + 0.6 * 4 / 5,
            "recall_weighted": 0.7,
        },
        **EXACT,
    )
    assert all(type(score) is float for score in scores.values()) and json.dumps(scores)
    # Ranks 1 2.5 2.5 4 against 1 3 2 4: covariance 4.5, variances 4.5 and 5
    scores = metrics.compute_metrics(["pearson", "spearmanr", "mse"], [0.0, 1.0, 1.0, 3.0], [0.0, 2.0, 1.0, 3.0])
    expected = {"pearson": 4.5 / np.sqrt(4.75 * 5), "spearmanr": 4.5 / np.sqrt(4.5 * 5), "mse": 0.25}
    assert scores == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize("labels", [2, 5, 20])
def test_several_labels_agree_with_scikit_learn(labels):
    names, compared = list(metrics.MULTI_LABEL), 0
    for seed in range(5):
        generator = np.random.default_rng([labels, seed])
        for rows in SIZES:
            rates = generator.random(labels) ** 2  # some labels are rare, and in neither column
            references = (generator.random((rows, labels)) < rates).astype(np.int8)
            guess = (generator.random((rows, labels)) < rates).astype(np.int64)
            predictions = np.where(generator.random((rows, labels)) < generator.random(), references, guess)
            if not (predictions.any() or references.any()):
                continue  # see the degenerate ones
            expected = {
                "f1_micro": sklearn_metrics.f1_score(references, predictions, average="micro", zero_division=0),
                "f1_macro": sklearn_metrics.f1_score(references, predictions, average="macro", zero_division=0),
                "accuracy": np.mean([list(a) == list(b) for a, b in zip(references, predictions, strict=True)]),
            }
            assert expected["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(references, predictions))
            assert metrics.compute_metrics(names, predictions, references) == pytest.approx(expected, **EXACT)
            compared += 1
    assert compared > 20


def test_hand_computed_values_of_several_labels():
    references = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    predictions = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    # tp, fp, fn by label: 2 0 0, 2 0 0, 0 1 1, 0 0 0
    scores = metrics.compute_metrics(["f1_micro", "f1_macro", "accuracy"], predictions, references)
    assert scores == pytest.approx({"f1_micro": 8 / 10, "f1_macro": (1 + 1 + 0 + 0) / 4, "accuracy": 0.5}, **EXACT)
    assert all(type(score) is float for score in scores.values()) and json.dumps(scores)


def test_no_label_anywhere_has_no_f1_micro():
    nothing = np.zeros((3, 2), dtype=int)
    with pytest.warns(UserWarning, match="f1_micro is undefined: no label is predicted or present") as caught:
        scores = metrics.compute_metrics(list(metrics.MULTI_LABEL), nothing, nothing)
    assert scores == {"f1_micro": None, "f1_macro": 0.0, "accuracy": 1.0} and len(caught) == 1


def test_majority_class_of_mrpc():
    references = np.repeat([1, 0], [279, 129])  # the 408 pairs of the validation split
    scores = metrics.compute_metrics(["accuracy", "f1"], np.ones(408, int), references)
    assert scores == pytest.approx({"accuracy": 0.6838, "f1": 0.8122}, abs=5e-5)


def test_perfect_and_opposite_predictions_are_exact():
    ids, values = np.array([0, 1, 1, 0, 1, 0, 1]), np.random.default_rng(0).normal(size=7)
    assert set(metrics.compute_metrics(list(metrics.CLASSIFICATION), ids, ids).values()) == {1.0}
    assert metrics.compute_metrics(["matthews_correlation"], 1 - ids, ids) == {"matthews_correlation": -1.0}
    assert metrics.compute_metrics(["spearmanr", "mse"], values, values) == {"spearmanr": 1.0, "mse": 0.0}
    for rows in range(2, 60):
        values = np.random.default_rng(rows).normal(size=rows)
        assert abs(metrics.compute_metrics(["pearson"], -3 * values, values)["pearson"]) <= 1


@pytest.mark.parametrize("rows", [200_000])
def test_many_rows_do_not_overflow(rows):
    """Counts of 200,000 rows, multiplied by fours, pass 2**63."""
    generator = np.random.default_rng(0)
    references, noise = generator.integers(0, 3, rows), generator.integers(0, 3, rows)
    predictions = np.where(generator.random(rows) < 0.5, references, noise)
    expected = sklearn_metrics.matthews_corrcoef(references, predictions)
    scores = metrics.compute_metrics(["matthews_correlation"], predictions, references)
    assert scores == pytest.approx({"matthews_correlation": expected}, **EXACT)


@pytest.mark.parametrize(
    ("names", "predictions", "references", "reason"),
    [
        (list(metrics.DIRECTION), [], [], "no rows"),
        (["f1"], [0, 0], [0, 0], "class 1 is neither predicted nor present"),
        (["pearson", "spearmanr"], [1.0], [2.0], "one row"),
        (["pearson", "spearmanr"], [0.1] * 3, [1.0, 2.0, 3.0], "all predictions are equal"),
        (["pearson", "spearmanr"], [1.0, 2.0, 3.0], [0.1] * 3, "all references are equal"),
        (["pearson", "spearmanr", "mse"], [1.0, float("nan"), 3.0], [1.0, 2.0, 3.0], "the predictions contain NaN"),
        (["pearson", "spearmanr", "mse"], [1.0, 2.0, 3.0], [1.0, 2.0, float("nan")], "the references contain NaN"),
        (["pearson", "spearmanr", "mse"], [1.0, float("-inf"), 3.0], [1.0, 2.0, 3.0], "infinity"),
        (["pearson", "spearmanr", "mse"], [1.0, 1e300, 3.0], [1.0, 2.0, 3.0], "beyond"),
    ],
)
def test_undefined_is_none_with_one_warning(names, predictions, references, reason):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = metrics.compute_metrics(names, np.array(predictions), np.array(references))
    assert scores == dict.fromkeys(names)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.count(reason) == len(names) and all(f"{name} is undefined" in message for name in names)


@pytest.mark.filterwarnings("error")
def test_degenerate_but_defined():
    one_class = ["matthews_correlation", "f1_macro", "precision_weighted", "accuracy"]
    assert list(metrics.compute_metrics(one_class, [1, 1, 1], [1, 1, 1]).values()) == [0.0, 1.0, 1.0, 1.0]
    assert list(metrics.compute_metrics(one_class, [0, 0], [0, 1]).values()) == [0.0, pytest.approx(1 / 3), 0.25, 0.5]
    assert metrics.compute_metrics(["f1"], [0, 0], [0, 1]) == {"f1": 0.0}
    assert metrics.compute_metrics(["mse"], [1.0], [3.0]) == {"mse": 4.0}
    assert metrics.compute_metrics(["pearson"], [1e-200, 2e-200, 4e-200], [1.0, 2.0, 4.0])["pearson"] == pytest.approx(
        1
    )
    # Class ids need not be dense: no matrix of 10**9 x 10**9
    assert metrics.compute_metrics(["f1_macro"], [0, 10**9], [0, 10**9]) == {"f1_macro": 1.0}


def test_one_warning_names_only_the_undefined():
    with pytest.warns(UserWarning) as caught:
        scores = metrics.compute_metrics(["accuracy", "f1", "f1_macro"], [0, 0], [0, 0])
    assert scores == {"accuracy": 1.0, "f1": None, "f1_macro": 1.0}
    assert [str(warning.message).split(" is undefined")[0] for warning in caught] == ["f1"]


@pytest.mark.parametrize("name", metrics.DIRECTION)
def test_load_gives_an_evaluate_metric_and_pieces_equal_the_whole(name):
    generator = np.random.default_rng(3)
    if name in metrics.REGRESSION:
        predictions, references = generator.normal(size=(2, 50))
    else:
        predictions, references = generator.integers(0, 2, (2, 50))
    whole = metrics.load_metric(name).compute(predictions=predictions, references=references)
    if name != "f1_micro":  # which compute has for several labels alone
        assert whole == metrics.compute_metrics([name], predictions, references)
    metric = metrics.load_metric(name)
    assert isinstance(metric, metrics.import_evaluate().Metric) and metric.name == name
    for again in range(2):  # an instance starts anew after compute()
        metric.add_batch(predictions=predictions[:20], references=references[:20])
        metric.add_batch(predictions=list(predictions[20:]), references=list(references[20:]))
        assert metric.compute() == whole, again


def test_float64_survives():
    """mse of 1e-20: float32 would round 1 + 1e-10 to 1."""
    score = metrics.compute_metrics(["mse"], np.array([1 + 1e-10]), np.array([1.0]))["mse"]
    assert score == pytest.approx(1e-20, rel=1e-5, abs=0)  # approx would take 0 for 1e-20 by default


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, bool])
def test_integer_types(dtype):
    ids = np.array([0, 1, 1, 0])
    assert metrics.compute_metrics(["f1"], ids.astype(dtype), [0, 1, 0, 0]) == {"f1": pytest.approx(2 / 3)}
    assert metrics.compute_metrics(["mse"], ids.astype(np.float16), ids) == {"mse": 0.0}


def test_random_state_is_left_alone():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    metrics.compute_metrics(["accuracy"], [0, 1], [1, 1])
    assert np.random.rand() == expected


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("accuracy", [0, 1], [0], "equally long"),
        ("accuracy", [[0.1, 0.9], [0.2, 0.8]], [0, 1], "equally long"),
        ("mse", [[1.0], [2.0]], [[1.0], [2.0]], "equally long"),
        ("f1", [[1, 0], [0, 1]], [[1, 0], [0, 1]], "equally long"),
        ("f1_micro", [[1, 0]], [[1], [0]], "equally long"),
        ("f1_micro", [[[1, 0]]], [[[1, 0]]], "equally long"),
        ("f1_micro", [[0.9, 0.1]], [[1, 0]], "predictions are float64"),
        ("f1_macro", [[1, 0]], [[1, -1]], "contain -1"),
        ("accuracy", [0.3, 1.7], [0, 1], "predictions are float64"),
        ("f1", [0, 1], [0.0, 1.0], "references are float64"),
        ("f1", [0, 1], [-1, 1], "contain -1"),
        ("acuracy", [0, 1], [0, 1], 'did you mean "accuracy"'),
    ],
)
def test_wrong_columns_are_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.compute_metrics([name], predictions, references)


def test_direction():
    assert metrics.is_better("accuracy", 0.8, 0.7) and not metrics.is_better("accuracy", 0.7, 0.8)
    assert metrics.is_better("mse", 0.7, 0.8) and not metrics.is_better("mse", 0.8, 0.7)
    assert [name for name, way in metrics.DIRECTION.items() if way == "min"] == ["mse"]
    for name in metrics.DIRECTION:
        assert metrics.is_better(name, -1.0, None) and metrics.is_better(name, -1.0, float("nan"))
        assert not metrics.is_better(name, None, -1.0) and not metrics.is_better(name, float("nan"), -1.0)
        assert not metrics.is_better(name, None, None) and not metrics.is_better(name, float("nan"), None)
        assert not metrics.is_better(name, 0.5, 0.5)
    with pytest.raises(ValueError, match="unknown metric"):
        metrics.is_better("loss", 1.0, 2.0)
    names = "accuracy f1 matthews_correlation f1_macro f1_weighted precision_weighted recall_weighted"
    assert list(metrics.DIRECTION) == [*names.split(), "f1_micro", "pearson", "spearmanr", "mse"]


@pytest.mark.parametrize(
    ("names", "number_of_labels", "message"),
    [
        (
            ["accuracy", "f1_marco"],
            3,
            "unknown metric 'f1_marco' (did you mean \"f1_macro\"?). Allowed: accuracy, f1, ",
        ),
        (["zzz"], 2, "unknown metric 'zzz'. Allowed: accuracy, f1, "),
        ([True], 2, "unknown metric True. Allowed: "),
        (["f1"], 3, "f1 is for two labels, this task has 3: use f1_macro"),
        (["accuracy"], None, "accuracy is for classification, this task is regression: use pearson, spearmanr, mse"),
        (["pearson"], 3, "pearson is for regression, this task has labels: use accuracy, matthews_correlation, "),
        (["mse"], 2, "mse is for regression, this task has labels: use accuracy, f1, "),
        ([], 2, "no metrics given. Allowed: accuracy, "),
    ],
)
def test_check_refuses_in_one_line(names, number_of_labels, message):
    with pytest.raises(ValueError) as error:
        metrics.check_metrics(names, number_of_labels)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "labels", "multi_label", "message"),
    [
        ("f1", 2, True, "f1 is not for multi-label tasks: use f1_micro, f1_macro, accuracy"),
        ("pearson", 2, True, "pearson is not for multi-label tasks"),
        ("f1_micro", 3, False, "f1_micro is for multi-label tasks; with one label per text it equals accuracy"),
    ],
)
def test_check_knows_what_several_labels_need(name, labels, multi_label, message):
    with pytest.raises(ValueError, match=message):
        metrics.check_metrics([name], labels, multi_label)


def test_check_accepts_what_fits():
    metrics.check_metrics(list(metrics.MULTI_LABEL), 5, multi_label=True)
    metrics.check_metrics(list(metrics.CLASSIFICATION), 2)
    metrics.check_metrics([name for name in metrics.CLASSIFICATION if name != "f1"], 77)
    metrics.check_metrics(list(metrics.REGRESSION), None)


SCRIPT = """
import socket, sys
from pathlib import Path
asked = []  # the library may swallow the error, so calls are counted too
def refuse(*arguments, **more):
    asked.append(arguments)
    raise OSError("network was asked for")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from classifier.evaluation import metrics
assert "evaluate" not in sys.modules and "datasets" not in sys.modules and "torch" not in sys.modules, "slow import"
{before}
path, entries = sys.path, list(sys.path)
library = metrics.import_evaluate()
files = set(Path({watched!r}).rglob("*"))
print(metrics.compute_metrics(["f1", "accuracy"], [1, 0, 1], [1, 1, 1]))
print(metrics.compute_metrics(["pearson"], [1.0, 2.0], [0.0, 3.0]))
assert set(Path({watched!r}).rglob("*")) == files
assert not asked, asked
assert library.Metric and sys.path is path and sys.path == entries
{after}
"""


def run_beside_a_hiding_script(folder, launch, before="", after=""):
    """Run SCRIPT in a folder with classifier/ and an evaluate.py that raises; return the process and the new files."""
    project, home = folder / "project", folder / "home"
    project.mkdir(), home.mkdir()
    shutil.copytree(ROOT / "classifier", project / "classifier")
    (project / "evaluate.py").write_text("raise SystemExit('the script was imported, not the library')\n")
    (project / "script.py").write_text(SCRIPT.format(before=before, after=after, watched=str(folder)))
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    settings |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home / "hub")}
    settings |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    files = set(folder.rglob("*"))
    result = subprocess.run(
        [sys.executable, *launch], cwd=project, env=settings, capture_output=True, text=True, timeout=300
    )
    return result, set(folder.rglob("*")) - files


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("launch", [["script.py"], ["-c", "import sys; sys.path.insert(0, '.'); import script"]])
def test_library_is_found_beside_our_script_without_files_or_network(tmp_path, launch):
    result, new_files = run_beside_a_hiding_script(tmp_path, launch)
    assert result.returncode == 0, result.stderr
    assert "{'f1': 0.8, 'accuracy': 0.6666666666666666}\n{'pearson': 1.0}" in result.stdout
    assert new_files == set()


@pytest.mark.slow
def test_library_is_found_when_our_script_is_already_imported(tmp_path):
    before = "import types; ours = sys.modules['evaluate'] = types.ModuleType('evaluate')"
    after = "assert sys.modules['evaluate'] is ours and metrics.import_evaluate() is library"
    result, new_files = run_beside_a_hiding_script(tmp_path, ["-m", "script"], before, after)
    assert result.returncode == 0, result.stderr
    assert new_files == set()


def test_path_is_restored_when_the_library_is_missing(tmp_path):
    before = """
import importlib
importlib.import_module = refuse
path = sys.path
try:
    metrics.import_evaluate()
except OSError:
    sys.exit(0 if sys.path is path else 3)
sys.exit(4)
"""
    assert run_beside_a_hiding_script(tmp_path, ["script.py"], before)[0].returncode == 0


def test_a_row_that_counts_twice_is_a_row_that_is_there_twice():
    """Also where a class has gone missing."""
    generator = np.random.default_rng(2)
    for _ in range(30):
        labels, predictions = generator.integers(0, 4, (2, 12))
        times = generator.multinomial(12, np.full(12, 1 / 12))
        counts = metrics.count_classes(predictions, labels, times[None])
        drawn = np.repeat(np.arange(12), times)
        for name in ("accuracy", "matthews_correlation", "f1_macro", "f1_weighted", "precision_weighted"):
            expected = metrics.compute_metrics([name], predictions[drawn], labels[drawn])[name]
            assert metrics.FORMULAS[name](counts) == pytest.approx(expected, abs=1e-12), name
