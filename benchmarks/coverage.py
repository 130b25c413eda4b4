"""How often intervals hold the true score, how wide they are, and how often two equal models are told apart.

    python benchmarks/coverage.py [--samples 400] [--only classes labels regression pairs]

Draws samples from populations whose scores are known, and prints Markdown tables: of classifier/evaluation/intervals.py
beside the percentile bootstrap and, where it is installed, the package confidenceinterval. No model and no data are
needed; all of it takes about ten minutes on one core.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classifier.evaluation import intervals, metrics

ROWS = [20, 50, 100, 200, 500]
LARGE = 400_000  # rows of a population whose scores have no formula here


def frequencies(number, ratio):
    """Return the shares of so many classes, the most frequent `ratio` times as frequent as the rarest."""
    shares = np.geomspace(ratio, 1, number)
    return shares / shares.sum()


def draw_classes(generator, rows, shares, accuracy):
    """Return (predictions, references) of one label per row; a wrong one is any other, by its share."""
    references = generator.choice(len(shares), rows, p=shares)
    predictions = references.copy()
    wrong = np.flatnonzero(generator.random(rows) >= accuracy)
    while len(wrong):
        predictions[wrong] = generator.choice(len(shares), len(wrong), p=shares)
        wrong = wrong[predictions[wrong] == references[wrong]]
    return predictions, references


def draw_labels(generator, rows, labels, share, accuracy):
    """Return (predictions, references), (rows, labels) of 0 and 1. Three rows in ten are hard in all labels."""
    references = (generator.random((rows, labels)) < share).astype(int)
    is_hard = generator.random((rows, 1)) < 0.3
    kept = generator.random((rows, labels)) < np.where(is_hard, 1 - 2.5 * (1 - accuracy), 1 - 0.35 * (1 - accuracy))
    spurious = generator.random((rows, labels)) < (1 - accuracy) * share
    return np.where(references == 1, kept, spurious).astype(int), references


def draw_values(generator, rows, kind, noise):
    """Return (predictions, references) of regression, (rows,) each."""
    if kind == "normal":
        references = generator.standard_normal(rows)
    elif kind == "ratings from 1 to 5":
        references = generator.integers(1, 6, rows).astype(float)
    else:
        references = generator.exponential(1, rows)
    return references + noise * generator.standard_normal(rows), references


def bootstrap_intervals(names, predictions, references, generator, resamples=500):
    """Return {name: [low, high]} by the percentile bootstrap."""
    drawn = generator.integers(0, len(references), (resamples, len(references)))
    result = {}
    with np.errstate(invalid="ignore"):
        if names[0] in metrics.REGRESSION:
            scores = {name: metrics.FORMULAS[name](predictions[drawn], references[drawn]) for name in names}
        else:
            times = np.stack([np.bincount(rows, minlength=len(references)) for rows in drawn])
            counts = metrics.count_classes(predictions, references, times)
            scores = {name: metrics.FORMULAS[name](counts) for name in names}
    for name, values in scores.items():
        result[name] = np.nanquantile(values, [0.025, 0.975]).tolist()
    return result


PEER = {"accuracy": "accuracy_score", "f1_macro": "f1_score", "matthews_correlation": "matthews_corrcoef"}


def peer_intervals(names, predictions, references, generator):
    """Return {name: [low, high]} of the package confidenceinterval: Wilson's, and Takahashi's of F1 (2022)."""
    try:
        import confidenceinterval as peer
    except ImportError:
        return {}
    result = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "accuracy" in names:
            result["accuracy"] = peer.accuracy_score(references, predictions)[1]
        if "f1_macro" in names:
            result["f1_macro"] = peer.f1_score(references, predictions, average="macro")[1]
    return result


def simulate(title, names, draw, samples, seed=0):
    """Print a line of a table for each number of rows: coverage and mean width, of ours and of others."""
    generator = np.random.default_rng(seed)
    truth = metrics.compute_metrics(names, *draw(generator, LARGE), warns=False)
    for rows in ROWS:
        found = {}
        for _ in range(samples):
            sample = draw(generator, rows)
            ours = intervals.score_intervals(names, *sample)
            for kind, result in (
                ("ours", ours),
                ("bootstrap", bootstrap_intervals(names, *sample, generator)),
                ("peer", peer_intervals(names, *sample, generator) if sample[1].ndim == 1 else {}),
            ):
                for name, interval in result.items():
                    if interval and ours[name]:  # the others are judged where there is an interval of ours
                        low, high = interval
                        found.setdefault((name, kind), []).append((low <= truth[name] <= high, high - low))
        for name in names:
            given = len(found.get((name, "ours"), [])) / samples
            cells = []
            for kind in ("ours", "bootstrap", "peer"):
                values = found.get((name, kind), [])
                enough = len(values) >= 0.1 * samples
                cells.append("{:.3f}, {:.3f}".format(*np.mean(values, axis=0)) if enough else "-")
            yield [title, name, rows, f"{truth[name]:.3f}", f"{given:.2f}", *cells]


HEADER = ["population", "score", "rows", "true", "given", "ours", "bootstrap", "confidenceinterval"]


def print_table(header, lines):
    print("| " + " | ".join(map(str, header)) + " |\n|" + "---|" * len(header))
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |", flush=True)
    print()


def classes(samples):
    populations = [(2, 1, 0.7), (2, 1, 0.95), (2, 9, 0.95), (2, 20, 0.9), (3, 1, 0.9)]
    populations += [(6, 1, 0.9), (6, 20, 0.8), (20, 1, 0.9), (20, 20, 0.7)]
    for number, ratio, accuracy in populations:
        names = ["accuracy", "f1_macro", "f1_weighted", "precision_weighted", "matthews_correlation"]
        names += ["f1"] * (number == 2)
        shares = frequencies(number, ratio)
        title = f"{number} classes, {ratio} : 1"
        yield from simulate(title, names, lambda g, rows: draw_classes(g, rows, shares, accuracy), samples)  # noqa: B023


def labels(samples):
    for number, share, accuracy in [(3, 0.5, 0.9), (3, 0.1, 0.8), (20, 0.1, 0.9), (6, 0.05, 0.7)]:
        names = ["f1_micro", "f1_macro", "accuracy"]
        title = f"{number} labels of {100 * share:.0f} %"
        yield from simulate(title, names, lambda g, rows: draw_labels(g, rows, number, share, accuracy), samples)  # noqa: B023


def regression(samples):
    for kind, noise in [("normal", 1.0), ("normal", 0.3), ("ratings from 1 to 5", 0.7), ("exponential", 0.5)]:
        names = list(metrics.REGRESSION)
        yield from simulate(kind, names, lambda g, rows: draw_values(g, rows, kind, noise), samples)  # noqa: B023


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="samples of each population and number of rows")
    parser.add_argument("--only", nargs="+", choices=["classes", "labels", "regression", "pairs"])
    args = parser.parse_args()
    for table in (classes, labels, regression):
        if not args.only or table.__name__ in args.only:
            print_table(HEADER, table(args.samples))


if __name__ == "__main__":
    main()
