"""examples/: an engine that runs the model in its workers answers as predict.py does."""

import ast
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT, make_rows, run_script
from model_help import save_model
from pyarrow import parquet

from classifier.data.tasks import Task

pytestmark = pytest.mark.slow

LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def folder(tiny_bert, tmp_path_factory):
    """A folder with a model of pairs, model/, and three tables, in/."""
    folder = tmp_path_factory.mktemp("engines")
    save_model(folder / "model", tiny_bert, Task("pairs", text=["a", "b"], labels=LABELS, max_length=32))
    (folder / "in").mkdir()
    for number in range(3):
        texts = [[text for text, _ in make_rows(20, seed)] for seed in (number, number + 10)]
        # A column of whole numbers with a null: through NumPy, it would come back as floats.
        rows = {"number": [*range(100 * number, 100 * number + 19), None], "b": texts[1], "a": texts[0]}
        parquet.write_table(pa.table(rows), folder / "in" / f"{number}.parquet")
    done = run_script("predict.py", *flags("expected"), "--mixed_precision", "no", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def flags(output):
    return ["--model", "model", "--input", "in/*.parquet", "--output", output]


@pytest.fixture
def short_folder():
    """A folder with a short name: an engine puts sockets there, and their paths must not be long."""
    with tempfile.TemporaryDirectory(prefix="engine-") as name:
        yield Path(name)


def assert_same(found, expected):
    """Two folders of Parquet files hold the same rows, in some order, and the same columns."""
    tables = []
    for folder in (found, expected):
        files = sorted(folder.glob("*.parquet"))
        table = pa.concat_tables([parquet.read_table(file) for file in files])
        tables.append(table.sort_by([("a", "ascending"), ("b", "ascending")]))
    found, expected = tables
    assert found.schema.names == expected.schema.names and found.schema.types == expected.schema.types
    assert len(found) == 60 and len(set(zip(*(expected[name].to_pylist() for name in "ab"), strict=True))) == 60
    for name in found.schema.names:
        if name.startswith("probability"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
        else:
            assert found[name].to_pylist() == expected[name].to_pylist()
    assert set(found["predicted_label"].to_pylist()) == set(LABELS)


def test_ray_data_answers_as_predict_does(folder, short_folder):
    pytest.importorskip("ray", reason="Ray is not installed (requirements-dev.txt)")
    environment = {
        "RAY_TMPDIR": str(short_folder),
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",
    }
    done = run_script("examples/ray_data.py", *flags("ray"), cwd=folder, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder / "ray", folder / "expected")


def test_spark_answers_as_predict_does(folder, short_folder):
    pytest.importorskip("pyspark", reason="PySpark is not installed (requirements-dev.txt)")
    if not shutil.which("java") and "JAVA_HOME" not in os.environ:
        pytest.skip("PySpark needs Java, which is not here")
    settings = {"spark.ui.enabled": "false", "spark.local.dir": short_folder, "spark.sql.shuffle.partitions": 1}
    words = " ".join(f"--conf {name}={value}" for name, value in settings.items())
    environment = {
        "PYSPARK_SUBMIT_ARGS": f"--master local[1] --driver-memory 512m {words} pyspark-shell",
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    done = run_script("examples/spark.py", *flags("spark"), cwd=folder, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(folder / "spark", folder / "expected")


def test_no_script_imports_an_engine():
    files = sorted(ROOT.glob("*.py"))
    assert ROOT / "predict.py" in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"ray", "pyspark"}, file
