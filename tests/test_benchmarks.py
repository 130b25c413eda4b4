"""benchmarks/: the scripts run; memory does not grow with the rows."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_level_from_10_000_to_100_000_rows(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/scale.py", "--rows", "10000", "100000", "--steps", "50"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # 10 bytes of text in Python objects for each of 90,000 rows would be seen here: an empty str alone has 49.
    assert int(re.search(r"difference: (-?\d+) MB", done.stdout)[1]) < 60
    assert list(tmp_path.iterdir()) == []
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines()[2:4]]
    assert [row[0].strip() for row in rows] == ["10,000", "100,000"]
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("FULL") != "1", reason="takes a minute, and other tests compare layouts: FULL=1")
def test_the_equivalence_table_is_of_equal_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/equivalence.py", "--steps", "6", "10"]
    command += ["--layouts", "torchrun_2", "--dropout", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [(row[0].split(" (")[0], row[1]) for row in rows] == [
        (layout, "0.1") for layout in ("1 process", "2 processes, torchrun")
    ]
    for _, _, fp32, float64, weights, decisions in rows:
        assert float(fp32) < 1e-5 and float(float64) < 1e-12 and float(weights) < 1e-12
        assert decisions == "equal"
    # Other layouts do round otherwise: the runs are real ones.
    assert all(float(row[2]) > 0 for row in rows if row[0] != "1 process")


@pytest.mark.full
def test_seeds_are_trained_once_and_their_scores_are_those_of_the_runs(review_task):
    command = [sys.executable, ROOT / "benchmarks/seeds.py", "--task", review_task, "--output_dir", "runs"]
    command += ["--seeds", "2", "--layouts", "fp32"]
    printed = []
    for _ in range(2):
        done = subprocess.run(command, cwd=review_task.parent, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]  # with the seconds of training: nothing was trained again
    scores = []
    for seed in range(2):
        results = json.loads((review_task.parent / f"runs/fp32-{seed}/results.json").read_text())
        assert results["seed"] == seed and results["mixed_precision"] == "no"
        scores.append(results["scores"]["test"]["accuracy"])
    row = [cell.strip() for cell in printed[0].splitlines()[2].strip("|").split("|")]
    assert row[:3] == ["fp32", *(f"{score:.3f}" for score in scores)]
    assert row[3] == f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"


def test_the_table_of_checks_is_of_what_was_run(tmp_path):
    (tmp_path / "mrpc").mkdir()
    check = {"ours": 0.8412, "published": 0.8407, "interval": [-0.02, 0.021], "verdict": "PASS"}
    content = {"task": "mrpc", "check": check, "settings": [{"scores": {"accuracy": {"std": 0.0123}}}]}
    (tmp_path / "mrpc" / "results.json").write_text(json.dumps(content))
    command = [sys.executable, ROOT / "benchmarks/checked.py", *tmp_path.iterdir(), tmp_path / "absent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    ours = {row[0]: row[3:] for row in rows}
    assert ours.pop("mrpc") == ["0.8412 ± 0.0123", "-0.0200 to +0.0210", "PASS"]
    assert len(ours) == 8 and all(cells == ["not yet run", "", ""] for cells in ours.values())


def run_speed(script, folder, *flags):
    """Run a benchmark with one round; return (what it wrote, the rows of its table)."""
    command = [sys.executable, ROOT / "benchmarks" / script, "--runs", "1", "--threads", "1", "--output", "out.json"]
    done = subprocess.run([*command, *flags], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")][2:]
    return json.loads((folder / "out.json").read_text()), [line.strip("|").split(" | ") for line in lines]


def check_ratio(row, base, other, cells):
    """Compare a row with the rates of one round, by hand."""
    assert len(base) == len(other) == 1
    assert row["ratio"] == row["paired_ratio"] == pytest.approx(base[0] / other[0])
    assert cells[4].strip(" |") == f"{row['paired_ratio']:.2f} x" and cells[3] == f"{row['ratio']:.2f} x"


@pytest.mark.slow
def test_training_is_timed_side_by_side(review_task, tiny_bert):
    flags = ["--task", "reviews.yaml", "--model", str(tiny_bert), "--steps", "4", "--warmup", "2", "--batch_size", "8"]
    flags += ["--product_seconds", "0.001", "--only", "trainer", "nothing"]  # the ablation of all measures at once
    content, (_, cells, _) = run_speed("train_speed.py", review_task.parent, *flags)
    assert list(content["runs"]) == ["ours", "trainer", "nothing"]
    assert all(run["examples"] == 4 * 8 for runs in content["runs"].values() for run in runs)
    rates = {name: [run["examples"] / run["seconds"] for run in runs] for name, runs in content["runs"].items()}
    check_ratio(content["rows"][1], rates["ours"], rates["trainer"], cells)
    assert len(content["matrix_products"]) == 2  # before and after the round
    assert content["hardware"]["threads"] == 1 and content["versions"]["torch"]


@pytest.mark.slow
def test_the_start_is_timed(review_task):
    command = [sys.executable, ROOT / "benchmarks/startup.py", "--runs", "1"]
    command += ["--task", "reviews.yaml", "--threads", "1"]
    done = subprocess.run(command, cwd=review_task.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines()[2:-2]]
    seconds = {name.strip(): float(median) for name, median, _ in rows}
    assert list(seconds) == ["train.py --help", "predict.py --help", "imports alone", "train.py, first step"]
    # One run each beside other tests: only what is ten times apart can be compared.
    assert 0 < seconds["train.py --help"] < min(seconds["imports alone"], seconds["train.py, first step"])
    assert not (review_task.parent / "run").exists()


@pytest.mark.full
def test_predicting_is_timed_side_by_side(review_task, tiny_bert):
    flags = ["--data", "reviews.yaml=400", "--model", str(tiny_bert), "--only", "pipeline"]
    content, (_, cells) = run_speed("predict_speed.py", review_task.parent, *flags)
    rates = content["rates"]["reviews"]
    check_ratio(content["rows"][1], rates["ours"], rates["pipeline"], cells)
    assert content["rows"][1]["examples"] == 400  # more than the 300 there are: repeated


@pytest.mark.slow
def test_ratios_of_two_rounds_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import rounds

    contenders = {"ours": ("ours", None, None), "other": ("another", None, "ours")}
    _, row = rounds.compare_rates(contenders, {"ours": [100.0, 300.0], "other": [50.0, 30.0]})
    assert (row["median"], row["min"], row["max"]) == (40.0, 30.0, 50.0)
    assert row["ratio"] == 200 / 40 and row["paired_ratio"] == (100 / 50 + 300 / 30) / 2


@pytest.mark.slow
def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"name": "ours", "base": None}, {"name": "a", "base": "ours", "words": "another", "ratio": 2.0}]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    command = [sys.executable, ROOT / "benchmarks/plot.py", "speed.json", "--output", "speed.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=100)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
