"""benchmarks/: the scripts run; memory does not grow with the rows."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_level_from_10_000_to_100_000_rows(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/memory.py", "--rows", "100000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # 10 bytes of text in Python objects for each of 90,000 rows would be seen here: an empty str alone has 49.
    assert int(re.search(r"difference: (-?\d+) MB", done.stdout)[1]) < 60
    assert list(tmp_path.iterdir()) == []


def test_the_equivalence_table_is_of_equal_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/equivalence.py", "--steps", "6", "10"]
    command += ["--layouts", "micro_3", "torchrun_2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [(row[0].split(" (")[0], row[1]) for row in rows] == [
        (layout, dropout)
        for dropout in ("off", "0.1")
        for layout in ("1 process", "accumulation by 3", "2 processes, torchrun")
    ]
    for _, _, fp32, float64, weights, decisions in rows:
        assert float(fp32) < 1e-5 and float(float64) < 1e-12 and float(weights) < 1e-12
        assert decisions == "equal"
    # Other layouts do round otherwise: the runs are real ones.
    assert all(float(row[2]) > 0 for row in rows if row[0] != "1 process")


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
