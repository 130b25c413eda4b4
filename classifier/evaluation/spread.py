"""The spread of several runs: mean, deviation and interval over seeds or folds; beside a published result."""

import statistics
from pathlib import Path

import yaml

from classifier.evaluation import metrics
from classifier.messages import BadInput, format_score, nearest

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "expected.yaml"


def chosen_score(results, name):
    """Return a metric of the split that chose a run's model."""
    return next(iter(results["scores"].values()))[name]


def summarise(task, runs, with_interval=True):
    """Return the statistics of runs that differ only by seed or fold.

    `scores`: of each metric, on the split that chooses the epoch. `collapsed`: the runs whose model is no better there
    than always predicting the majority class.
    """
    results, first = [run.results for run in runs], task.metrics[0]
    majorities = [next(iter(each["majority_baseline"].values()))[first] for each in results]
    return {
        "runs": [run.folder.name for run in runs],
        "scores": {
            name: statistics_of(name, [chosen_score(each, name) for each in results], with_interval)
            for name in task.metrics
        },
        "collapsed": [
            run.folder.name
            for run, each, majority in zip(runs, results, majorities, strict=True)
            if majority is not None and not metrics.is_better(first, chosen_score(each, first), majority)
        ],
        "train_seconds": statistics.mean(each["train_seconds"] for each in results),
    }


def statistics_of(name, values, with_interval=True):
    """Return mean, standard deviation, minimum and maximum of scores, and the 95 % interval of the mean.

    The interval is Student's, within the limits of the metric. It is None for one run, and where all are equal. Folds
    have none: their models share most of their training examples (Bengio and Grandvalet 2004).
    """
    from scipy import stats

    known = [value for value in values if value is not None]
    content = dict.fromkeys(("mean", "std", "min", "max", "interval")) | {"values": values}
    if known:
        content |= {"mean": statistics.mean(known), "min": min(known), "max": max(known)}
    if len(known) > 1:
        content["std"] = statistics.stdev(known)
        half = stats.t.ppf(0.975, len(known) - 1) * content["std"] / len(known) ** 0.5
        low, high = metrics.limits(name)
        if half and with_interval:
            content["interval"] = [max(low, content["mean"] - half), min(high, content["mean"] + half)]
    return content


def choose_setting(summaries, task):
    """Return the number of the setting with the best mean of the first metric on validation."""
    best = 0
    for number, summary in enumerate(summaries):
        means = [each["scores"][task.metrics[0]]["mean"] for each in (summary, summaries[best])]
        if metrics.is_better(task.metrics[0], *means):
            best = number
    return best


# -------------------------------------------------------------------------------------------------- published results


def published(name):
    """Return what benchmarks/expected.yaml holds for a task. Raises BadInput."""
    content = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    if name not in content:
        raise BadInput(f"--check {name}: no published result{nearest(name, content)}", f"Known: {', '.join(content)}.")
    return content[name]


def compare_with_published(name, summary):
    """Return {verdict, words, ...} of a mean over seeds and a published value: FAIL where ours is lower beyond chance.

    The interval is Welch's, of the difference of two means; of a single published run, its deviation is taken from
    ours where none is known.
    """
    from scipy import stats

    expected, ours = published(name), summary["scores"][published(name)["metric"]]
    number, deviation = len(ours["values"]), ours["std"] or 0.0
    parts = [deviation**2 / number, (expected["std"] or deviation) ** 2 / expected["seeds"]]
    half = stats.t.ppf(0.975, max(1, number - 1)) * sum(parts) ** 0.5
    difference = ours["mean"] - expected["value"]
    content = {"published": expected["value"], "ours": ours["mean"], "interval": [difference - half, difference + half]}
    content["verdict"] = "FAIL" if difference + half < 0 else "PASS"
    low, high = content["interval"]
    content["words"] = (
        f"{content['verdict']}: {expected['metric']} {format_score(ours['mean'])} over {number} seeds, published "
        f"{format_score(expected['value'])}; difference {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    )
    return content


# ----------------------------------------------------------------------------------------------------------- as words


def describe_setting(setting):
    return " ".join(f"{key}={value}" for key, value in setting.items()) or "all runs"


def describe_statistics(name, content):
    """Return a metric's mean, and of several runs its spread, as words."""
    words = f"{name} {format_score(content['mean'])}"
    if content["std"] is not None:
        low, high = format_score(content["min"]), format_score(content["max"])
        words += f" ± {format_score(content['std'])} ({low} to {high})"
    if content["interval"]:
        low, high = map(format_score, content["interval"])
        words += f", 95 % interval of the mean {low} to {high}"
    return words


def in_words(interval):
    return f", 95 % interval {format_score(interval[0])} to {format_score(interval[1])}" if interval else ""
