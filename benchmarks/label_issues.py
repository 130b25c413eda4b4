"""How many wrong labels are found? Plants wrong labels in real rows, and looks for them with sweep.py --folds.

    REAL_DATA=FOLDER python benchmarks/label_issues.py --model DIR [--rows 1000] [--output_dir FOLDER]

Prints, for each set of recipe.py that is named, which share of the planted labels is in the worst tenth of
label_issues.csv, and in the worst tenth by cleanlab's label quality scores on the same out-of-fold probabilities.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from recipe import SETS

ROOT = Path(__file__).resolve().parent.parent
PLANTED = 0.05


def plant(rows, generator):
    """Return (rows with wrong labels, numbers of those)."""
    labels = sorted({row[-1] for row in rows})
    chosen = set(generator.sample(range(len(rows)), round(PLANTED * len(rows))))
    changed = [
        (*row[:-1], generator.choice([label for label in labels if label != row[-1]])) if number in chosen else row
        for number, row in enumerate(rows)
    ]
    return changed, chosen


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def find(name, args, folder):
    """Return (share in the worst tenth, the same by cleanlab, accuracy out of fold) of one set."""
    from cleanlab.rank import get_label_quality_scores

    generator = random.Random(0)
    rows = generator.sample(SETS[name][0](Path(os.environ["REAL_DATA"])), args.rows)
    rows, planted = plant(rows, generator)
    texts = ["text"] if len(rows[0]) == 2 else ["text_a", "text_b"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*texts, "label"], *rows])
    flags = ["--train_file", "train.csv", "--text_columns", ",".join(texts), "--model", str(args.model.resolve())]
    flags += ["--folds", "5", "--output_dir", "sweep"] + (["--max_length", str(SETS[name][2])] if SETS[name][2] else [])
    done = subprocess.run([sys.executable, ROOT / "sweep.py", *flags], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    wrong = {rows[number] for number in planted}

    def share(table):
        found = {(*(row[column] for column in texts), row["label"]) for row in table[: len(rows) // 10]}
        return len(found & wrong) / len(wrong)

    everything = read_table(folder / "sweep" / "out_of_fold.csv")
    labels = [column.removeprefix("probability_") for column in everything[0] if column.startswith("probability_")]
    chances = np.array([[float(row[f"probability_{label}"]) for label in labels] for row in everything])
    ids = np.array([labels.index(row["label"]) for row in everything])
    by_cleanlab = [everything[number] for number in np.argsort(get_label_quality_scores(ids, chances))]
    accuracy = np.mean(chances.argmax(axis=1) == ids)
    return share(read_table(folder / "sweep" / "label_issues.csv")), share(by_cleanlab), accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="an encoder's folder")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["docstrings, 6", "mrpc"])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--output_dir", type=Path, help="where runs go on (default: a temporary folder)")
    args = parser.parse_args()
    print("| set | in the worst tenth | by cleanlab | accuracy out of fold |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.sets:
            numbers = find(name, args, Path(args.output_dir or temporary) / name.replace(", ", "-"))
            print(f"| {name}, {args.rows} rows | {' | '.join(f'{number:.3f}' for number in numbers)} |", flush=True)


if __name__ == "__main__":
    main()
