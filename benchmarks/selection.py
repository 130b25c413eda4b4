"""How close corrected scores come to the true ones, and what thresholds are worth on fresh rows.

    python benchmarks/selection.py [--samples 200]
    python benchmarks/selection.py --runs RUN ... [--samples 200]      # the same on real rows

Draws validation rows from populations whose scores are known, lets classifier/evaluation/selection.py choose among the
evaluations of a run (and thresholds, with several labels), and compares the score on the rows that chose, and the
corrected one, with that of the very model that was chosen on fresh rows. No model and no data are needed.

With --runs the populations are the validation rows of finished runs of train.py, which kept their predictions of every
evaluation: some rows are drawn to choose, all others tell the truth. Such a run needs thousands of validation rows.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classifier.data.labels import predictions_from_logits
from classifier.data.tasks import Task
from classifier.evaluation import metrics, selection

ROWS = [100, 300, 1000]
FRESH = 40_000  # rows on which the truth is measured
ALIKE = 0.6  # correlation of the errors of two evaluations
ONE_LABEL = {  # (true accuracies of the evaluations, shares of the classes)
    "3 of 0.8": ([0.8] * 3, [0.5, 0.5]),
    "10 of 0.8": ([0.8] * 10, [0.5, 0.5]),
    "30 of 0.8": ([0.8] * 30, [0.5, 0.5]),
    "10 from 0.7 to 0.85": (np.linspace(0.7, 0.85, 10), [0.5, 0.5]),
    "10 of 0.8, classes 9 : 1": ([0.8] * 10, [0.9, 0.1]),
    "10 of 0.8, six classes": ([0.8] * 10, [1 / 6] * 6),
}
MIXED = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
SEVERAL_LABELS = {  # (shares of the labels, distance of the two means, scale and shift of the logits)
    "6 labels of 2 %": (np.full(6, 0.02), 2.5, 1.0, 0.0),
    "2 to 50 %": (MIXED, 2.0, 1.0, 0.0),
    "2 to 50 %, timid": (MIXED, 2.0, 0.4, -1.0),
    "2 to 50 %, bold": (MIXED, 2.0, 1.5, 1.0),
    "30 labels of 5 %": (np.full(30, 0.05), 2.0, 1.0, 0.0),
    "3 labels of 30 %": (np.full(3, 0.3), 1.5, 1.0, 0.0),
}
EVALUATIONS = 5  # of several labels, later ones better


def draw_one_label(generator, rows, accuracies, shares):
    """Return (predictions of each evaluation (evaluations, rows), labels (rows,))."""
    from scipy.stats import norm

    labels = generator.choice(len(shares), rows, p=shares)
    common = generator.standard_normal(rows)
    own = generator.standard_normal((len(accuracies), rows))
    is_right = np.sqrt(ALIKE) * common + np.sqrt(1 - ALIKE) * own < norm.ppf(np.array(accuracies))[:, None]
    wrong = (labels + generator.integers(1, len(shares), is_right.shape)) % len(shares)
    return np.where(is_right, labels, wrong), labels


def draw_several_labels(generator, rows, shares, distance, scale, shift):
    """Return (logits of each evaluation (evaluations, rows, labels), labels (rows, labels)).

    Calibrated for scale 1 and shift 0: the evidence for a label is normal, its mean higher where the label applies.
    """
    labels = (generator.random((rows, len(shares))) < shares).astype(int)
    common, logits = generator.standard_normal(labels.shape), []
    for number in range(EVALUATIONS):
        own = generator.standard_normal(labels.shape)
        evidence = np.sqrt(ALIKE) * common + np.sqrt(1 - ALIKE) * own
        separation = distance + 0.3 * (number / (EVALUATIONS - 1) - 0.5)
        logit = np.log(shares / (1 - shares)) + separation * (evidence + separation * labels) - separation**2 / 2
        logits.append(scale * logit + shift)
    return np.array(logits), labels


def choose(task, candidates, labels):
    """Return (chosen candidate, the task with its thresholds), as train.py chooses."""
    plain = [predictions_from_logits(task, each) if task.is_multi_label else each for each in candidates]
    scores = [metrics.compute_metrics(task.metrics[:1], each, labels)[task.metrics[0]] for each in plain]
    chosen = int(np.argmax(scores))
    return chosen, selection.fit_thresholds(task, candidates[chosen], labels) if task.is_multi_label else task


def simulate(task, draw, samples, rows, generator):
    """Return (samples, metrics, 5): score on the rows that chose, corrected, true, is it in the interval, its width.

    draw: a function of (generator, rows) that returns (candidates, labels) of these rows, and of many others.
    """
    result = []
    for _ in range(samples):
        (candidates, labels), fresh = draw(generator, rows)
        chosen, final = choose(task, candidates, labels)
        sides = [candidates[chosen], fresh[0][chosen]]
        if task.is_multi_label:
            sides = [predictions_from_logits(final, side) for side in sides]
        found, truth = (
            metrics.compute_metrics(task.metrics, side, references, warns=False)
            for side, references in zip(sides, (labels, fresh[1]), strict=True)
        )
        corrected, bounds = selection.corrected_scores(final, candidates, labels, chosen)
        values = []
        for name in task.metrics:
            interval = bounds[name] or [np.nan, np.nan]
            is_held = np.nan if bounds[name] is None else interval[0] <= truth[name] <= interval[1]
            values.append([found[name], corrected[name], truth[name], is_held, interval[1] - interval[0]])
        result.append(values)
    return np.array(result, dtype=float)


def print_correction(title, populations, samples):
    """populations: {name: (task, draw)}; draw: as for simulate."""
    print(f"\n| {title} | rows | score | on the rows that chose | corrected | true | intervals that hold it |")
    print("|---|---|---|---|---|---|---|")
    generator, errors = np.random.default_rng(0), []
    for name, (task, draw) in populations.items():
        for rows in ROWS:
            result = simulate(task, draw, samples, rows, generator)
            for number, metric in enumerate(task.metrics):
                found, corrected, true, held, width = np.nanmean(result[:, number], axis=0)
                has_interval = np.isfinite(result[:, number, 3]).mean()
                cell = f"{held:.2f}, width {width:.3f}" if has_interval >= 0.1 else "none"
                cells = f"{found:.3f} | {corrected:.3f} | {true:.3f} | {cell}"
                print(f"| {name} | {rows} | {metric} | {cells} |", flush=True)
                errors.append((rows, found - true, corrected - true))
    for rows in ROWS:
        before, after = np.mean([error[1:] for error in errors if error[0] == rows], axis=0)
        print(f"| mean difference from the true | {rows} | | {before:+.3f} | {after:+.3f} | | |")


def simulated_population(draw, population, names, **task):
    """Return (task, draw) of a population that can be drawn from without end."""
    fresh = draw(np.random.default_rng(1), FRESH, *population)
    labels = [f"c{number}" for number in range(len(names))]
    return Task("simulated", labels=labels, **task), lambda generator, rows: (
        draw(generator, rows, *population),
        fresh,
    )


def run_population(folder):
    """Return (task, draw) of the validation rows of a finished run."""
    from safetensors.numpy import load_file

    from classifier.data import splits, tasks
    from classifier.data.cache import column_array

    folder = Path(folder)
    task, _ = tasks.read_saved_task(folder / "model")
    by_step = load_file(folder / "validation_predictions.safetensors")
    candidates = np.array([by_step[step] for step in sorted(by_step, key=int)])
    _, rows_of_splits, _, _ = splits.load_splits(task)
    validation = next(rows for name, rows in rows_of_splits.items() if name.startswith("validation"))
    labels = column_array(validation, "label")

    def draw(generator, rows):
        order = generator.permutation(len(labels))
        return [(candidates[:, some], labels[some]) for some in (order[:rows], order[rows:])]

    return task, draw


def print_thresholds(samples):
    print("\n| labels | rows | 0.5 for all | a label's own | ours | own in fresh rows worse than 0.5 | ours worse |")
    print("|---|---|---|---|---|---|---|")
    generator = np.random.default_rng(0)
    for name, population in SEVERAL_LABELS.items():
        labels = [f"c{number}" for number in range(len(population[0]))]
        task = Task("simulated", labels=labels, problem="multi_label", metrics=["f1_macro"])
        fresh_logits, fresh_labels = draw_several_labels(generator, FRESH, *population)
        for rows in ROWS:
            scores = []
            for _ in range(samples):
                logits, labels = draw_several_labels(generator, rows, *population)
                own = replace(task, thresholds=own_thresholds(logits[-1], labels))
                ours = selection.fit_thresholds(task, logits[-1], labels)
                answers = [predictions_from_logits(each, fresh_logits[-1]) for each in (task, own, ours)]
                scores.append(
                    [metrics.compute_metrics(task.metrics, each, fresh_labels)["f1_macro"] for each in answers]
                )
            scores = np.array(scores)
            worse = [(scores[:, side] < scores[:, 0] - 0.01).mean() for side in (1, 2)]
            cells = " | ".join(
                [*(f"{score:.3f}" for score in scores.mean(axis=0)), *(f"{share:.0%}" for share in worse)]
            )
            print(f"| {name} | {rows} | {cells} |", flush=True)


def own_thresholds(logits, labels):
    """Return each label's best threshold by F1 on these rows alone."""
    from sklearn.metrics import precision_recall_curve

    thresholds = []
    for scores, applies in zip(1 / (1 + np.exp(-logits)).T, labels.T, strict=True):
        if not applies.any():
            thresholds.append(0.5)
            continue
        precision, recall, cuts = precision_recall_curve(applies, scores)
        best = int((2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1].argmax())
        thresholds.append(float((cuts[best] + (cuts[best - 1] if best else 0)) / 2))
    return thresholds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="samples of each population and number of rows")
    parser.add_argument("--runs", nargs="+", help="finished runs, instead of simulated populations")
    args = parser.parse_args()
    if args.runs:
        return print_correction("run", {Path(run).name: run_population(run) for run in args.runs}, args.samples)
    one = {"metrics": ["f1_macro", "accuracy"]}
    several = {"metrics": ["f1_macro", "f1_micro", "accuracy"], "problem": "multi_label"}
    populations = {
        name: simulated_population(draw_one_label, population, population[1], **one)
        for name, population in ONE_LABEL.items()
    }
    print_correction("evaluations, true accuracy", populations, args.samples)
    populations = {
        name: simulated_population(draw_several_labels, population, population[0], **several)
        for name, population in SEVERAL_LABELS.items()
    }
    print_correction("labels, of 5 evaluations the best", populations, args.samples)
    print_thresholds(args.samples)


if __name__ == "__main__":
    main()
