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
