"""Label tables of any size with a saved model on Spark.

    python examples/spark.py --model runs/imdb --input 'in/*.parquet' --output labelled          # on this machine
    spark-submit --master yarn examples/spark.py --model /shared/runs/imdb --input hdfs:///in --output hdfs:///labelled

Adds the columns that predict.py adds, and writes a folder of Parquet files. The project's modules travel to the workers
with the job. --model is a path that each worker sees, or a model of the Hub. Needs pyspark and Java, beside
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

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))


def main():
    from classifier.predictor import load
    from classifier.processes import quieten_libraries

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run, a model folder, or a model of the Hub")
    parser.add_argument("--input", required=True, help="Parquet: 'in/*.parquet', a folder, or its address")
    parser.add_argument("--output", required=True, help="a folder that is not there yet, or its address")
    args = parser.parse_args()
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model  # workers are in other folders
    here = load(model)
    is_pair = len(here.task.text) == 2
    example = here.table([["a text"]] * len(here.task.text))  # tells which columns there will be
    types = {name: StringType() if isinstance(values[0], str) else DoubleType() for name, values in example.items()}

    def make_predict():  # called once in each worker
        quieten_libraries()
        predictor = load(model)

        def predict(*texts):
            table = predictor.table([column.tolist() for column in texts])
            return {name: np.array(values) for name, values in table.items()}

        # Spark hands over as many columns as the function has parameters.
        return (lambda first, second: predict(first, second)) if is_pair else lambda texts: predict(texts)

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName("predict").getOrCreate()
    with tempfile.TemporaryDirectory() as folder:
        package = shutil.make_archive(f"{folder}/classifier", "zip", PROJECT, "classifier")
        spark.sparkContext.addPyFile(package)
    label = predict_batch_udf(
        make_predict, return_type=StructType([StructField(*one) for one in types.items()]), batch_size=4096
    )
    rows = spark.read.parquet(args.input).withColumn("_of_the_model", label(*here.task.text))
    rows.select("*", "_of_the_model.*").drop("_of_the_model").write.parquet(args.output)
    spark.stop()


if __name__ == "__main__":
    main()
