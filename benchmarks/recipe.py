"""Which recipe fine-tunes best on a few hundred rows? Trains many small models; the default of own files is what won.

    REAL_DATA=FOLDER python benchmarks/recipe.py --output recipe.jsonl [--rows 100 300] [--seeds 3] [--only ARM ...]
    python benchmarks/recipe.py --output recipe.jsonl --table            # what was measured so far

Each cell is one run of train.py: a set, a number of rows, a seed (of the rows, too), an arm. Its macro F1 on 1,000
test rows goes to the output, a line each; the same command goes on where it stopped. REAL_DATA: see README.md.
The sets that choose and the sets that confirm were marked before anything was measured.
"""

import argparse
import ast
import csv
import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_ROWS = 1000
PACKAGES = ["numpy", "scipy", "sklearn", "pandas", "sympy", "torch"]


# ------------------------------------------------------------------------------------------------------------- the sets


def imdb(data):
    """Long reviews, two classes."""
    with gzip.open(data / "data" / "movie_data.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return [(row["review"].replace("<br />", " ")[:4000], row["sentiment"]) for row in csv.DictReader(file)]


def docstrings_rare(data):
    """Is a docstring of this one package, as one in ten is?"""
    rows = [(text, str(int(label == "scipy"))) for text, label in docstrings(6)]
    others = [row for row in rows if row[1] == "0"]
    return others + [row for row in rows if row[1] == "1"][: len(others) // 9]


def cola(data):
    """Short sentences: grammatical or not?"""
    lines = (data / "data" / "cola_public_raw" / "in_domain_train.tsv").read_text(encoding="utf-8").splitlines()
    return [(cells[3], cells[1]) for cells in (line.split("\t") for line in lines)]


def mrpc(data):
    """Pairs of sentences: do they say the same?"""
    lines = (data / "data" / "mrpc_glue_tsv" / "train.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
    return [(cells[3], cells[4], cells[0]) for cells in (line.split("\t") for line in lines)]


def docstrings(classes):
    """First sentences of docstrings: of which package, or of which of twenty subpackages?"""
    rows = defaultdict(dict)
    for package in PACKAGES:
        folder = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(folder.rglob("*.py")):
            if "test" in path.as_posix():
                continue
            part = path.relative_to(folder).parts[0].removesuffix(".py")
            label = package if classes == 6 else f"{package}.{part}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    text = re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(node) or "")[0].replace("\n", " ")
                    text = re.sub("|".join(PACKAGES), "this package", text, flags=re.IGNORECASE)
                    if 5 <= len(text.split()) <= 60:
                        rows[label][text] = None
    labels = sorted(rows, key=lambda label: -len(rows[label]))[:classes]
    fewest = min(len(rows[label]) for label in labels)
    return [(text, label) for label in labels for text in random.Random(0).sample(list(rows[label]), fewest)]


SETS = {  # name: (rows, what it is for, tokens)
    "imdb": (imdb, "choose", 128),
    "docstrings, 1:9": (docstrings_rare, "choose", None),
    "docstrings, 6": (lambda data: docstrings(6), "choose", None),
    "cola": (cola, "choose", None),
    "mrpc": (mrpc, "confirm", None),
    "docstrings, 20": (lambda data: docstrings(20), "confirm", None),
}


def write_set(folder, rows, number, seed):
    """Write train.csv with so many rows and test.csv; return the flags for train.py."""
    chosen = random.Random(seed).sample(rows, number + TEST_ROWS)
    texts = ["text"] if len(chosen[0]) == 2 else ["text_a", "text_b"]
    for name, part in (("train", chosen[:number]), ("test", chosen[number:])):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([[*texts, "label"], *part])
    files = ["--train_file", str(folder / "train.csv"), "--test_file", str(folder / "test.csv")]
    return [*files, "--text_columns", ",".join(texts)]


# ------------------------------------------------------------------------------------------------------------- the arms


def epochs_of(rows, batch_size, steps=300, least=6, most=40):
    """Return the epochs of so many steps."""
    per_epoch = -(-rows * 9 // 10 // batch_size)  # a tenth is held out
    return min(most, max(least, -(-steps // per_epoch)))


def long(rate, batch_size, steps=300, *flags):
    """Return an arm: so many steps, 10 % warm-up, linear to 0."""

    def arm(rows):
        return [
            *("--epochs", str(epochs_of(rows, batch_size, steps)), "--learning_rate", str(rate)),
            *("--batch_size", str(batch_size), "--warmup_ratio", "0.1", *flags),
        ]

    return arm


def plain(rate, batch_size, epochs=3):
    return lambda rows: ["--epochs", str(epochs), "--learning_rate", str(rate), "--batch_size", str(batch_size)]


ARMS = {  # name: flags of train.py for a number of rows
    "plain": plain(2e-5, 32),
    "Trainer 2e-5": plain(2e-5, 8),
    "Trainer 5e-5": plain(5e-5, 8),
    "long 5e-5 b16": long(5e-5, 16),
    "long 1e-4 b16": long(1e-4, 16),
    "long 2e-4 b16": long(2e-4, 16),
    "long 1e-4 b32": long(1e-4, 32),
    "long 2e-4 b32": long(2e-4, 32),
    "long 1e-4 b16, last": long(1e-4, 16, 300, "--eval_every", "1000000"),
    "long 1e-4 b16, balanced": long(1e-4, 16, 300, "--class_weights", "balanced"),
    "long 1e-4 b16, no dropout": long(1e-4, 16),
    "long 1e-4 b16, no attention dropout": long(1e-4, 16),
    "head": lambda rows: ["--freeze", "encoder", "--epochs", "40", "--learning_rate", "1e-2", "--batch_size", "16"],
}
DROPOUT = {  # values of the model's configuration
    "long 1e-4 b16, no dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "long 1e-4 b16, no attention dropout": {"attention_probs_dropout_prob": 0.0},
}
PEERS = ["bag of words", "linear"]  # on TF-IDF, on the mean of the encoder's last states: scikit-learn


def train(arm, folder, flags, rows, seed, args):
    """Run train.py; return its macro F1 on test, and seconds of training."""
    model = args.model
    if changes := DROPOUT.get(arm):
        model = folder / "model"
        shutil.copytree(args.model, model)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--recipe", "plain", *ARMS[arm](rows)]
    command += ["--model", str(model)]
    command += [
        "--seed",
        str(seed),
        "--metrics",
        "f1_macro,accuracy",
        "--final_test",
        "--output_dir",
        str(folder / "run"),
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    scores, majority = results["scores"]["test"], results["majority_baseline"]["test"]["f1_macro"]
    return {**scores, "majority": majority, "seconds": time.monotonic() - started, "steps": results["steps"]}


def measure_peer(arm, folder, args):
    """Fit a linear model of scikit-learn; return its macro F1 on test."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import accuracy_score, f1_score, make_scorer

    tables = []
    for name in ("train", "test"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            tables.append(list(csv.reader(file))[1:])
    texts, labels = ([[" ".join(row[:-1]) for row in t] for t in tables], [[row[-1] for row in t] for t in tables])
    started = time.monotonic()
    if arm == "linear":
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(str(args.model), device="cpu")
        features = [encoder.encode(each, show_progress_bar=False) for each in texts]
    else:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        features = [vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1])]
    fewest = min(labels[0].count(label) for label in set(labels[0]))
    scoring = make_scorer(f1_score, average="macro", zero_division=0)
    model = LogisticRegressionCV(Cs=10, cv=max(2, min(5, fewest)), max_iter=2000, scoring=scoring)
    predicted = model.fit(features[0], labels[0]).predict(features[1])
    return {
        "f1_macro": f1_score(labels[1], predicted, average="macro"),
        "accuracy": accuracy_score(labels[1], predicted),
        "seconds": time.monotonic() - started,
    }


def measure(cell, sets, args):
    """Measure one cell; append it to the output."""
    name, rows, seed, arm = cell
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        flags = write_set(folder, sets(name), rows, seed)
        if SETS[name][2]:
            flags += ["--max_length", str(SETS[name][2])]
        result = measure_peer(arm, folder, args) if arm in PEERS else train(arm, folder, flags, rows, seed, args)
    line = {"set": name, "rows": rows, "seed": seed, "arm": arm, "model": Path(args.model).name, **result}
    with open(args.output, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{name}, {rows} rows, seed {seed}, {arm}: {result['f1_macro']:.3f}, {result['seconds']:.0f} s", flush=True)


def print_table(lines):
    """Print a Markdown table: mean macro F1 of each arm, its spread over seeds, runs that collapsed, seconds."""
    columns = sorted(
        {(line["set"], line["rows"]) for line in lines}, key=lambda each: (list(SETS).index(each[0]), each[1])
    )
    cells = defaultdict(list)
    for line in lines:
        cells[line["arm"], (line["set"], line["rows"])].append(line)
    print(f"| arm | {' | '.join(f'{name}, {rows}' for name, rows in columns)} | mean | std | collapsed | seconds |")
    print("|---" * (len(columns) + 5) + "|")
    for arm in [*ARMS, *PEERS]:
        own = [cells[arm, column] for column in columns]
        if not any(own):
            continue
        means = [statistics.mean(line["f1_macro"] for line in each) if each else None for each in own]
        spreads = [statistics.stdev(line["f1_macro"] for line in each) for each in own if len(each) > 1]
        runs = [line for each in own for line in each]
        known = [line for line in runs if "majority" in line]
        collapsed = sum(line["f1_macro"] <= line["majority"] + 0.02 for line in known)
        words = [f"{100 * mean:.1f}" if mean is not None else "-" for mean in means]
        words.append(f"{100 * statistics.mean(means):.1f}" if None not in means else "-")
        words.append(f"{100 * statistics.mean(spreads):.1f}" if spreads else "-")
        words += [
            f"{collapsed} of {len(known)}" if known else "-",
            f"{statistics.median(line['seconds'] for line in runs):.0f}",
        ]
        print(f"| {arm} | {' | '.join(words)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an encoder's folder")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*ARMS, *PEERS], default=[*ARMS, *PEERS], metavar="ARM")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    lines = [json.loads(line) for line in lines]
    if args.table:
        return print_table(lines)
    data, made = Path(os.environ["REAL_DATA"]), {}
    args.model = args.model.resolve()

    def sets(name):
        return made[name]

    for name in args.sets:
        made[name] = SETS[name][0](data)
    done = {
        (line["set"], line["rows"], line["seed"], line["arm"]) for line in lines if line["model"] == args.model.name
    }
    cells = [
        (name, rows, seed, arm)
        for seed in range(args.seeds)
        for rows in args.rows
        for name in args.sets
        for arm in args.only
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda cell: measure(cell, sets, args), [cell for cell in cells if cell not in done]))


if __name__ == "__main__":
    main()
