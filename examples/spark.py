"""Label tables of any size with a saved model on Spark.

    python examples/spark.py --model runs/imdb --input 'in/*.parquet' --output labelled          # on this machine
    spark-submit --master yarn examples/spark.py --model /shared/runs/imdb --input hdfs:///in --output hdfs:///labelled

Adds the columns that predict.py adds, and writes a folder of Parquet files. Spark ships the package classifier/ to the
workers. --model must be a path that every worker can read, or a Hub id. Needs pyspark and Java in addition to
requirements.txt.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import DoubleType, StringType, StructField, StructType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classifier.predictor import load
from classifier.processes import quieten_libraries

PROJECT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run, a model folder, or a Hub id")
    parser.add_argument("--input", required=True, help="Parquet: 'in/*.parquet', a folder, or its URL")
    parser.add_argument("--output", required=True, help="a folder that does not exist yet, or its URL")
    args = parser.parse_args()
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model  # workers run in other folders
    predictor = load(model)
    text_columns = predictor.task.text
    sample = predictor.table([["a text"]] * len(text_columns))  # shows which columns there will be
    types = {name: StringType() if isinstance(values[0], str) else DoubleType() for name, values in sample.items()}

    def make_predict():  # called once in each worker
        quieten_libraries()
        worker_predictor = load(model)

        def predict(*texts):
            table = worker_predictor.table([column.tolist() for column in texts])
            return {name: np.array(values) for name, values in table.items()}

        # Spark passes as many columns as the function has parameters.
        return (lambda first, second: predict(first, second)) if len(text_columns) == 2 else lambda text: predict(text)

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("predict").getOrCreate()
    with tempfile.TemporaryDirectory() as folder:  # kept to the end: workers fetch the package when they start
        spark.sparkContext.addPyFile(shutil.make_archive(f"{folder}/classifier", "zip", PROJECT, "classifier"))
        schema = StructType([StructField(name, kind) for name, kind in types.items()])
        label = predict_batch_udf(make_predict, return_type=schema, batch_size=4096)
        rows = spark.read.parquet(args.input).withColumn("_predictions", label(*text_columns))
        rows.select("*", "_predictions.*").drop("_predictions").write.parquet(args.output)
        spark.stop()


if __name__ == "__main__":
    main()
