"""Does speed cost quality? MRPC with several seeds, ours in bf16 against the Trainer in bf16: the same recipe.

    python benchmarks/quality.py --output_dir FOLDER [--seeds 10] [--only trainer]

Runs that are complete in FOLDER are not repeated. Prints the means over the best epoch (by F1) of each run, and their
difference with its 95 % interval (Welch's, for two samples of different variance).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
RECIPE = {"learning_rate": 5e-5, "epochs": 3, "batch_size": 32, "weight_decay": 0.01}


def ours(folder, seed):
    """Train with train.py; return the scores of each evaluation."""
    flags = [f"--{name}={value}" for name, value in RECIPE.items()]
    command = [sys.executable, str(ROOT / "train.py"), "--task", "mrpc", "--model", MODEL, *flags]
    command += ["--mixed_precision", "bf16", "--seed", str(seed), "--output_dir", str(folder / "run")]
    done = subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"seed {seed}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["scores"] for line in lines if line["type"] == "eval"]


def trainer(folder, seed):
    """Train with transformers' Trainer, padded to the longest text of a batch; return the scores of each evaluation."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import quality; quality.train({seed})"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"seed {seed}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    return json.loads((folder / "scores.json").read_text())


def train(seed):
    """Run the Trainer in this process; write scores.json into the current folder."""
    from datasets import load_dataset
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    def compute_scores(output):
        predictions = output.predictions.argmax(axis=-1)
        return {
            "f1": f1_score(output.label_ids, predictions),
            "accuracy": accuracy_score(output.label_ids, predictions),
        }

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL)
    rows = load_dataset("nyu-mll/glue", "mrpc")
    rows = rows.map(lambda row: tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=128))
    settings = TrainingArguments(
        "trainer",
        bf16=True,
        use_cpu=True,
        seed=seed,
        learning_rate=RECIPE["learning_rate"],
        num_train_epochs=RECIPE["epochs"],
        per_device_train_batch_size=RECIPE["batch_size"],
        weight_decay=RECIPE["weight_decay"],
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_scores,
    )
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_f1" in line]
    Path("scores.json").write_text(
        json.dumps([{"f1": line["eval_f1"], "accuracy": line["eval_accuracy"]} for line in evaluations])
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", choices=["ours", "trainer"])
    args = parser.parse_args()
    contenders = {"ours": ours, "trainer": trainer}
    best = {name: [] for name in contenders if args.only in (None, name)}
    for seed in range(args.seeds):
        for name in best:
            folder = (args.output_dir / f"{name}-{seed}").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / "evaluations.json"
            if not file.exists():
                evaluations = contenders[name](folder, seed)
                file.with_suffix(".tmp").write_text(json.dumps(evaluations))
                file.with_suffix(".tmp").replace(file)
            best[name].append(max(json.loads(file.read_text()), key=lambda scores: scores["f1"]))
            print(name, seed, best[name][-1], flush=True)
    for metric in ("f1", "accuracy"):
        values = {name: [scores[metric] for scores in runs] for name, runs in best.items()}
        for name, scores in values.items():
            print(f"{metric} {name}: {stats.tmean(scores):.4f} ± {stats.tstd(scores):.4f}")
        if len(values) == 2:
            low, high = stats.ttest_ind(*values.values(), equal_var=False).confidence_interval(0.95)
            difference = stats.tmean(values["ours"]) - stats.tmean(values["trainer"])
            print(f"{metric}, ours - Trainer: {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
