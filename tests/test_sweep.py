"""sweep.py: runs of train.py that can be interrupted, and statistics that agree with what the runs themselves wrote."""

import csv
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack

import numpy as np
import pytest
import yaml
from cleanlab.rank import get_label_quality_scores
from conftest import ROOT, lines_of, make_rows, run_script, write_table

from classifier.training.lock import holder, locked
from classifier.training.search import Search

FEW = ("--max_steps", 4, "--threads", 1)


def sweep(folder, *flags, code=0):
    done = run_script("sweep.py", "--output_dir", "sweep", *flags, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def validation_score(run, metric="accuracy"):
    return read(run / "results.json")["scores"]["validation"][metric]


@pytest.mark.slow
def test_seeds_give_the_mean_and_the_spread_of_what_the_runs_wrote(review_task, reviews):
    flags = ("--task", review_task, "--seeds", 2, *FEW)
    done = sweep(reviews, *flags)
    folder = reviews / "sweep"
    runs = [folder / f"seed={seed}" for seed in range(2)]
    scores = [validation_score(run) for run in runs]
    assert [read(run / "results.json")["seed"] for run in runs] == [0, 1]
    (setting,) = read(folder / "results.json")["settings"]
    accuracy = setting["scores"]["accuracy"]
    assert accuracy["values"] == scores
    assert accuracy["mean"] == pytest.approx(statistics.mean(scores))
    assert accuracy["std"] == pytest.approx(statistics.stdev(scores))
    low, high = accuracy["interval"]
    half = 12.706205 * statistics.stdev(scores) / 2**0.5  # Student's t of one degree of freedom, from a table
    assert low == pytest.approx(max(0, statistics.mean(scores) - half))
    assert high == pytest.approx(min(1, statistics.mean(scores) + half))
    collapsed = [
        run.name
        for run in runs
        if validation_score(run) <= read(run / "results.json")["majority_baseline"]["validation"]["accuracy"]
    ]
    assert setting["collapsed"] == collapsed
    assert f"accuracy {statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}" in done.stdout
    names = {"results.json", "report.html", "runs.png"} | {
        f"seed={seed}{end}" for seed in range(2) for end in ("", ".log")
    }
    assert {path.name for path in folder.iterdir()} == names
    # Once more: nothing is trained again; and with other flags it is refused.
    weights = {run: (run / "model" / "model.safetensors").stat().st_mtime_ns for run in runs}
    assert "1 others are complete already" in sweep(reviews, *flags).stdout
    assert {run: (run / "model" / "model.safetensors").stat().st_mtime_ns for run in runs} == weights
    refused = sweep(reviews, *flags, "--learning_rate", 1e-5, code=2)
    assert "holds a run with other settings (learning_rate: 0.003 before, 1e-05 now)" in refused.stderr


@pytest.mark.full
def test_a_sweep_killed_twice_ends_as_an_undisturbed_one(review_task, reviews):
    flags = ["--task", str(review_task), "--seeds", "2", "--epochs", "12", "--save_every", "3", "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    command = [sys.executable, str(ROOT / "sweep.py"), *flags, "--output_dir", "sweep"]
    for number, ending in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            command, cwd=reviews, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        run = reviews / "sweep" / ("seed=0" if ending == 75 else "seed=1")
        while not list(run.glob("checkpoints/step-*[0-9]")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == ending and b"Traceback" not in output
        if ending != 75:
            assert holder(run)["host"] == socket.gethostname()  # the training itself goes on, and is waited for
    done = sweep(reviews, *flags)
    assert "resuming after step" in (reviews / "sweep" / "seed=0.log").read_text()
    undisturbed = run_script("sweep.py", *flags, "--output_dir", "other", cwd=reviews)
    assert undisturbed.returncode == 0 and done.returncode == 0
    for seed in range(2):
        one, other = (reviews / name / f"seed={seed}" for name in ("sweep", "other"))
        assert [line["loss"] for line in lines_of(one)] == [line["loss"] for line in lines_of(other)]
        assert validation_score(one) == validation_score(other)


@pytest.mark.slow
def test_a_run_that_another_process_still_trains_is_waited_for(review_task, reviews):
    command = [sys.executable, str(ROOT / "sweep.py"), "--task", str(review_task), "--seeds", "1"]
    command += [*map(str, FEW), "--output_dir", "sweep"]
    (reviews / "sweep").mkdir()
    with locked(reviews / "sweep" / "seed=0"):
        process = subprocess.Popen(command, cwd=reviews, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout.readline().startswith("runs of train.py in sweep: 1")
        assert process.stdout.readline().startswith(f"seed=0: process {os.getpid()} on ")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_each_example_is_predicted_once_by_a_model_that_did_not_see_it(review_task, reviews):
    task = yaml.safe_load(review_task.read_text())
    task["files"] = {"train": "train.csv"}
    review_task.write_text(yaml.safe_dump(task))
    rows = make_rows(90, 5)
    flipped = {("the garden was very very lovely .", "negative"), ("the hotel was very very awful .", "positive")}
    rows = [row for row in rows if row[0] not in {text for text, _ in flipped}] + sorted(flipped)
    write_table(reviews / "train.csv", rows)
    done = sweep(reviews, "--task", review_task, "--folds", 3, "--epochs", 12, "--threads", 1)
    folder = reviews / "sweep"
    table = rows_of(folder / "out_of_fold.csv")
    assert Counter((row["text"], row["label"]) for row in table) == Counter(rows)
    right = statistics.mean(row["label"] == row["predicted_label"] for row in table)
    content = read(folder / "results.json")
    assert content["out_of_fold"]["scores"]["accuracy"] == pytest.approx(right)
    assert content["settings"][0]["scores"]["accuracy"]["interval"] is None  # folds are not independent
    assert f"out of fold: accuracy {right:.4f}, 95 % interval" in done.stdout
    for fold in range(1, 4):
        share = [row["label"] for row in table if row["fold"] == f"{fold}/3"]
        assert abs(share.count("negative") - sum(label == "negative" for _, label in rows) / 3) <= 1
    # What is wrong with the labels comes first.
    issues = [(row["text"], row["label"]) for row in rows_of(folder / "label_issues.csv")]
    assert flipped <= set(issues[: max(4, len(rows) // 10)])
    doubts = [float(row["probability_of_label"]) for row in rows_of(folder / "label_issues.csv")]
    assert doubts == sorted(doubts) and len(doubts) >= len(rows) // 10
    # cleanlab, on the same probabilities, finds no more of them.
    names = ["negative", "positive"]
    chances = np.array([[float(row[f"probability_{name}"]) for name in names] for row in table])
    quality = get_label_quality_scores(np.array([names.index(row["label"]) for row in table]), chances)
    found = [(table[number]["text"], table[number]["label"]) for number in np.argsort(quality)[: len(rows) // 10]]
    assert len(flipped & set(found)) <= len(flipped & set(issues[: len(rows) // 10]))


@pytest.mark.slow
def test_a_grid_is_every_combination_and_the_best_on_validation_is_tested(review_task, reviews):
    flags = (
        "--task",
        review_task,
        "--grid",
        "learning_rate=1e-6,3e-3",
        "batch_size=16",
        "--epochs",
        3,
        "--workers",
        2,
    )
    for shard in ("1/2", "2/2"):  # as two tasks of a Slurm array
        sweep(reviews, *flags, "--shard", shard, "--threads", 1, "--final_test")
        assert not (reviews / "sweep" / "results.json").exists()
    done = sweep(reviews, *flags, "--threads", 1, "--final_test")
    content = read(reviews / "sweep" / "results.json")
    settings = [each["setting"] for each in content["settings"]]
    assert settings == [{"learning_rate": rate, "batch_size": size} for rate in ("1e-6", "3e-3") for size in ("16",)]
    runs = [
        reviews / "sweep" / f"learning_rate={each['learning_rate']},batch_size={each['batch_size']}"
        for each in settings
    ]
    scores = [validation_score(run) for run in runs]
    assert content["best"] == settings[scores.index(max(scores))]
    tested = [run for run in runs if (run / "evaluation-test").exists()]
    assert tested == [runs[scores.index(max(scores))]]
    test = read(tested[0] / "evaluation-test" / "evaluation.json")["scores"]["accuracy"]
    assert content["test"]["accuracy"]["values"] == [test] and f"test: accuracy {test:.4f}" in done.stdout
    corrected = content["corrected_scores"]["accuracy"]
    assert content["candidates"] == 6  # evaluations of two runs of three epochs
    assert corrected <= max(scores)
    assert f"corrected for the choice among 6 evaluations: accuracy {corrected:.4f}, 95 % interval" in done.stdout


@pytest.mark.slow
def test_two_processes_share_a_search_and_its_best_setting_is_tested(review_task, reviews):
    """Each trial is trained once, within its ranges; the best by the runs' own results is the one that is tested."""
    space = ["learning_rate=1e-6..1e-2", "epochs=1..2", "batch_size=16,32"]
    flags = ["--task", str(review_task), "--search", "4", "--grid", *space, "--threads", "1", "--final_test"]
    command = [sys.executable, str(ROOT / "sweep.py"), *flags, "--output_dir", "sweep"]
    other = subprocess.Popen(command, cwd=reviews, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sweep(reviews, *flags)
    output, _ = other.communicate(timeout=300)
    assert other.returncode == 0, output
    done = sweep(reviews, *flags)  # sums up what both have done, and trains nothing
    folder = reviews / "sweep"
    runs = {run.parent.name: read(run) for run in folder.glob("*/results.json")}
    assert 1 <= len(runs) <= 4
    for name, results in runs.items():
        values = dict(part.split("=") for part in name.split(","))
        assert 1e-6 <= float(values["learning_rate"]) <= 1e-2
        assert results["settings"]["epochs"] == int(values["epochs"]) in (1, 2)
        assert results["settings"]["batch_size"] == int(values["batch_size"]) in (16, 32)
    content = read(folder / "results.json")
    best = max(results["scores"]["validation"]["accuracy"] for results in runs.values())
    name = ",".join(f"{key}={value}" for key, value in content["best"].items())
    assert runs[name]["scores"]["validation"]["accuracy"] == best
    assert [run.parent.name for run in folder.glob("*/evaluation-test")] == [name]
    assert content["ended_early"] == 0 and "corrected for the choice" in done.stdout
    assert not (folder / "trials").exists()


def test_a_search_without_optuna_is_refused_and_leaves_nothing(review_task, reviews):
    (reviews / "optuna.py").write_text("raise ImportError")
    flags = ("--task", review_task, "--search", 2, "--output_dir", "sweep")
    done = run_script("sweep.py", *flags, cwd=reviews, environment={"PYTHONPATH": str(reviews)})
    assert done.returncode == 2 and "the package optuna is not installed" in done.stderr
    assert not (reviews / "sweep").exists()


def test_a_process_that_finds_no_trial_left_leaves_the_summary_to_the_others(review_task, reviews):
    (reviews / "sweep").mkdir()
    with ExitStack() as claims:
        Search(reviews / "sweep", [("learning_rate", "1e-4..1e-2")], 1).take(claims)
        flags = ("--search", 1, "--grid", "learning_rate=1e-4..1e-2")
        done = sweep(reviews, "--task", review_task, *flags)
    assert "no run is complete yet: other processes train them" in done.stdout
    assert not (reviews / "sweep" / "results.json").exists()


@pytest.mark.slow
def test_a_trial_that_a_killed_search_left_is_trained_to_its_end(review_task, reviews):
    flags = ["--task", str(review_task), "--search", "1", "--grid", "learning_rate=1e-4..1e-2", "--threads", "1"]
    flags += ["--epochs", "12", "--save_every", "3"]
    command = [sys.executable, str(ROOT / "sweep.py"), *flags, "--output_dir", "sweep"]
    process = subprocess.Popen(command, cwd=reviews, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not list((reviews / "sweep").glob("learning_rate=*/checkpoints/step-*[0-9]")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    sweep(reviews, *flags)
    (run,) = (reviews / "sweep").glob("learning_rate=*/results.json")
    assert read(run)["epochs"] == 12
    assert read(reviews / "sweep" / "results.json")["best"] == {"learning_rate": run.parent.name.split("=")[1]}


@pytest.mark.slow(after=2)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing is swept"),
        (["--seeds", 2, "--learning_rat", 1], "seed=0: unrecognized arguments: --learning_rat 1"),
        (["--seeds", 2, "--folds", 3], "--seeds and --folds: an interval would mix up both"),
        (["--seeds", 2, "--seed", 1], "--seed: is not for a sweep"),
        (["--grid", "learning_rate"], "--grid learning_rate: neither FLAG=A,B nor bert"),
        (["--grid", "epochs=1,1"], "2 runs, or two of the same setting"),
        (["--seeds", 2, "--shard", "3/2"], "--shard 3/2: not I/N"),
        (["--grid", "learning_rate=1e-5..1e-4"], "--grid learning_rate=1e-5..1e-4: a range is for --search"),
        (["--search", 3, "--grid", "learning_rate=1e-4..1e-5"], "1e-4..1e-5: not LOW..HIGH"),
        (["--search", 3, "--seeds", 3], "--search draws each setting once"),
        (["--folds", 500], "too few rows of any label in 200 rows for 500 folds"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_swept_is_refused(flags, message, review_task, reviews):
    done = sweep(reviews, "--task", review_task, *flags, code=2)
    assert message in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("\n") == 2
    assert not (reviews / "sweep").exists()
