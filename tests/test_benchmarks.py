"""benchmarks/: the scripts run; memory does not grow with the rows."""

import re
import subprocess
import sys

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
