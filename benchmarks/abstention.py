"""Does --target_accuracy keep its promise on rows that did not choose the minimum probability?

    python benchmarks/abstention.py runs/mrpc/evaluation-test/predictions.csv [--samples 200]

Takes a table of predictions (of evaluate.py, or out_of_fold.csv of sweep.py). In each sample one half of the rows
chooses the minimum probability for an accuracy, and the other half tells how often labels above it are right.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classifier.evaluation.analysis import TARGET_ACCURACIES
from classifier.evaluation.selection import min_probability


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="tables with label, predicted_label and probability")
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    print("| table | rows | to be right in | promised in | kept in | answered | right |\n|---|---|---|---|---|---|---|")
    for path in args.tables:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        confidence = np.array([float(row["probability"]) for row in rows])
        is_right = np.array([row["label"] == row["predicted_label"] for row in rows])
        for target in TARGET_ACCURACIES:
            generator, answered, right = np.random.default_rng(0), [], []
            for _ in range(args.samples):
                one, other = np.array_split(generator.permutation(len(rows)), 2)
                least = min_probability(confidence[one], is_right[one], target)
                if least is not None:
                    above = confidence[other] >= least
                    answered.append(above.mean())
                    right.append(is_right[other][above].mean())
            cells = [path.parent.name, f"{len(rows):,}", f"{target:.0%}", f"{len(right)} of {args.samples}"]
            if right:
                kept = sum(share >= target for share in right)
                cells += [f"{kept} of {len(right)}", f"{np.mean(answered):.1%}", f"{np.mean(right):.1%}"]
            print(f"| {' | '.join([*cells, *['-'] * (7 - len(cells))])} |", flush=True)


if __name__ == "__main__":
    main()
