"""How often intervals hold the true score, how wide they are, and how often two equal models are told apart.

    python benchmarks/coverage.py [--samples 400] [--only classes labels regression pairs]

Draws samples from populations whose scores are known, and prints Markdown tables: of classifier/evaluation/intervals.py
beside the percentile bootstrap and, where it is installed, the package confidenceinterval. A cell has the lowest and
the mean coverage over the populations, and the mean width. No model and no data are needed.
"""

import argparse
import functools
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
    elif kind == "ratings":
        references = generator.integers(1, 6, rows).astype(float)
    else:
        references = generator.exponential(1, rows)
    return references + noise * generator.standard_normal(rows), references


def bootstrap_intervals(names, predictions, references, generator, resamples=500):
    """Return {name: [low, high]} by the percentile bootstrap."""
    drawn = generator.integers(0, len(references), (resamples, len(references)))
    with np.errstate(invalid="ignore"):
        if names[0] in metrics.REGRESSION:
            scores = {name: metrics.FORMULAS[name](predictions[drawn], references[drawn]) for name in names}
        else:
            times = np.stack([np.bincount(rows, minlength=len(references)) for rows in drawn])
            counts = metrics.count_classes(predictions, references, times)
            scores = {name: metrics.FORMULAS[name](counts) for name in names}
    return {name: np.nanquantile(values, [0.025, 0.975]).tolist() for name, values in scores.items()}


def peer_intervals(names, predictions, references, generator):
    """Return {name: [low, high]} of the package confidenceinterval: Wilson's, and Takahashi's of F1 (2022)."""
    try:
        import confidenceinterval as peer
    except ImportError:
        return {}
    result = {}
    if references.ndim == 2 or names[0] in metrics.REGRESSION:
        return result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "accuracy" in names:
            result["accuracy"] = peer.accuracy_score(references, predictions)[1]
        if "f1_macro" in names:
            result["f1_macro"] = peer.f1_score(references, predictions, average="macro")[1]
    return result


METHODS = {"ours": lambda *sample: intervals.score_intervals(*sample[:3])}
METHODS |= {"bootstrap": bootstrap_intervals, "confidenceinterval": peer_intervals}


def simulate(names, draw, samples, found):
    """Add to found {(score, rows, method): [(coverage, mean width, share of samples with an interval)]}.

    The others are judged by the samples that have an interval of ours.
    """
    generator = np.random.default_rng(0)
    truth = metrics.compute_metrics(names, *draw(generator, LARGE), warns=False)
    for rows in ROWS:
        results = {}
        for _ in range(samples):
            sample = draw(generator, rows)
            ours = METHODS["ours"](names, *sample)
            for method, compute in METHODS.items():
                for name, interval in compute(names, *sample, generator).items():
                    if ours[name]:
                        is_held = interval[0] <= truth[name] <= interval[1]
                        results.setdefault((name, rows, method), []).append((is_held, interval[1] - interval[0]))
        for key, values in results.items():
            if len(values) >= 0.1 * samples:
                found.setdefault(key, []).append((*np.mean(values, axis=0), len(values) / samples))


def print_coverage(title, found):
    """Print a table with a line for each score and number of rows: the populations' lowest and mean coverage."""
    print(f"\n| {title} | rows | populations | {' | '.join(METHODS)} |\n|{'---|' * (3 + len(METHODS))}")
    for name, rows in sorted({key[:2] for key in found}):
        cells = []
        for method in METHODS:
            values = np.array(found.get((name, rows, method), []))
            cells.append(
                f"{values[:, 0].min():.2f}, {values[:, 0].mean():.2f}, width {values[:, 1].mean():.3f}"
                if len(values)
                else "-"
            )
        print(f"| {name} | {rows} | {len(found[name, rows, 'ours'])} | {' | '.join(cells)} |", flush=True)


def classes(samples, found):
    populations = [(2, 1, 0.7), (2, 1, 0.95), (2, 9, 0.95), (2, 20, 0.9), (3, 1, 0.9)]
    populations += [(6, 1, 0.9), (6, 20, 0.8), (20, 1, 0.9), (20, 20, 0.7)]
    for number, ratio, accuracy in populations:
        names = ["accuracy", "f1_macro", "f1_weighted", "precision_weighted", "matthews_correlation"]
        names += ["f1"] * (number == 2)
        draw = functools.partial(draw_classes, shares=frequencies(number, ratio), accuracy=accuracy)
        simulate(names, draw, samples, found)


def labels(samples, found):
    for number, share, accuracy in [(3, 0.5, 0.9), (3, 0.1, 0.8), (20, 0.1, 0.9), (6, 0.05, 0.7)]:
        draw = functools.partial(draw_labels, labels=number, share=share, accuracy=accuracy)
        simulate(["f1_micro", "f1_macro", "accuracy"], draw, samples, found)


def regression(samples, found):
    for kind, noise in [("normal", 1.0), ("normal", 0.3), ("ratings", 0.7), ("exponential", 0.5)]:
        simulate(metrics.REGRESSION, functools.partial(draw_values, kind=kind, noise=noise), samples, found)


def print_pairs(samples):
    """Print how often one of two equally good models is called better; and of two that differ, the better one."""
    print("\n| score | rows | accuracies | called better | interval alone | test alone |\n|---|---|---|---|---|---|")
    generator = np.random.default_rng(0)
    for name in ("accuracy", "f1_macro"):
        for accuracies in ((0.85, 0.85), (0.85, 0.75)):
            for rows in (10, 20, 50, 100, 200, 1000):
                verdicts = np.zeros((samples, 2))
                for verdict in verdicts:
                    references = (generator.random(rows) < 0.3).astype(int)
                    sides = [
                        np.where(generator.random(rows) < accuracy, references, 1 - references)
                        for accuracy in accuracies
                    ]
                    interval = intervals.difference_intervals([name], *sides, references)[name]
                    p = intervals.randomisation_test(name, *sides, references, draws=999)
                    verdict[:] = interval is not None and not interval[0] <= 0 <= interval[1], p <= 0.05
                both, (by_interval, by_test) = verdicts.all(axis=1).mean(), verdicts.mean(axis=0)
                words = " and ".join(map(str, accuracies))
                print(f"| {name} | {rows} | {words} | {both:.3f} | {by_interval:.3f} | {by_test:.3f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="samples of each population and number of rows")
    parser.add_argument("--only", nargs="+", choices=["classes", "labels", "regression", "pairs"])
    args = parser.parse_args()
    for table in (classes, labels, regression):
        if not args.only or table.__name__ in args.only:
            table(args.samples, found := {})
            print_coverage(table.__name__, found)
    if not args.only or "pairs" in args.only:
        print_pairs(args.samples)


if __name__ == "__main__":
    main()
