"""Label tables of any size with a saved model on Ray: on this machine, or on the cluster that RAY_ADDRESS names.

    python examples/ray_data.py --model runs/imdb --input 'in/*.parquet' --output labelled --workers 2
    python examples/ray_data.py --model runs/imdb --input s3://bucket/in --output s3://bucket/out --workers 64 --gpus 1

Adds the columns that predict.py adds and writes a folder of Parquet files. Ray chooses the order of the rows, and ships
the package classifier/ to the workers. --model must be a path that every worker can read, or a Hub id. Needs ray[data]
in addition to requirements.txt.
"""

import argparse
import os
from glob import glob
from pathlib import Path

import pyarrow as pa
import ray

PROJECT = Path(__file__).resolve().parent.parent


class Labeller:
    """A model that labels batches of rows, loaded once per worker."""

    def __init__(self, model):
        from classifier.predictor import load
        from classifier.processes import quieten_libraries

        quieten_libraries()
        self.predictor = load(model)

    def __call__(self, rows):
        texts = [rows[column].to_pylist() for column in self.predictor.task.text]
        for name, values in self.predictor.table(texts).items():
            rows = rows.append_column(name, pa.array(values))
        return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a run, a model folder, or a Hub id")
    parser.add_argument("--input", required=True, help="Parquet: 'in/*.parquet', a folder, or its URL")
    parser.add_argument("--output", required=True, help="a folder, or its URL")
    parser.add_argument("--workers", type=int, default=1, help="number of workers (default: %(default)s)")
    parser.add_argument("--cpus", type=float, default=1, help="per worker (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="per worker (default: %(default)s)")
    args = parser.parse_args()
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model  # workers run in other folders
    ray.init(runtime_env={"py_modules": [str(PROJECT / "classifier")]})
    ray.data.read_parquet(sorted(glob(args.input)) or args.input).map_batches(
        Labeller,
        fn_constructor_args=[model],
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
        batch_size=4096,
        batch_format="pyarrow",
    ).write_parquet(args.output)


if __name__ == "__main__":
    main()
