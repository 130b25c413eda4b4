"""Compare the speed of predict.py with transformers' pipeline: examples per second, without start-up.

    python benchmarks/predict_speed.py --output predict_speed.json     # 10,000 MRPC pairs, 2,000 IMDb reviews

The model has a new head (one training step). The texts are a seeded sample of all splits, repeated if there are too
few. For predict.py everything but start-up and loading is timed: reading the table, tokenising, logits, writing the
predictions. For the pipeline it is the call on a list of texts. Both have warmed up on 64 texts.
"""

import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import rounds
from rounds import ROOT

WARMUP_ROWS = 64


def ours(args, flags=()):
    """Time predict.py's reading, predicting and writing of the rows."""
    import predict

    predict_file, seconds = predict.predict_file, []

    def timed(*arguments):
        begin = time.perf_counter()
        predict_file(*arguments)
        seconds.append(time.perf_counter() - begin)

    predict.predict_file = timed
    for name in ("few", "rows"):
        sys.argv = ["predict.py", "--model", str(args.folder / "run"), "--input", str(args.folder / f"{name}.jsonl")]
        sys.argv += ["--output", f"{name}.jsonl", *flags]
        predict.main()
    return {"examples": len(read_rows("rows.jsonl")), "seconds": seconds[-1]}


def pipeline(args, precision="float32"):
    """Time transformers' pipeline on the rows, 32 at a time."""
    import torch
    import transformers

    from classifier.data import tasks

    folder = str(args.folder / "run/model")
    task, _ = tasks.read_saved_task(folder)
    classify = transformers.pipeline(
        "text-classification", model=folder, device=args.device, dtype=getattr(torch, precision), batch_size=32
    )
    for name in ("few", "rows"):
        rows = read_rows(args.folder / f"{name}.jsonl")
        inputs = [dict(zip(("text", "text_pair"), (row[column] for column in task.text), strict=False)) for row in rows]
        begin = time.perf_counter()
        predictions = classify(inputs, truncation=True, max_length=task.max_length)
        seconds = time.perf_counter() - begin
    return {"examples": len(predictions), "seconds": seconds}


def read_rows(path):
    with open(path, encoding="utf-8") as file:  # splitlines() would cut a text at its U+2028
        return [json.loads(line) for line in file]


CONTENDERS = {  # name: (title, function, the contender to compare with)
    "ours": ("predict.py", ours, None),
    "ours_fp32": ("predict.py, fp32", partial(ours, flags=["--mixed_precision", "no"]), "ours"),
    "pipeline": ("transformers' pipeline, batch_size=32", pipeline, "ours"),
    "pipeline_bf16": ("transformers' pipeline, batch_size=32, bf16", partial(pipeline, precision="bfloat16"), "ours"),
}


def prepare(args, folder):
    """Train a model for one step in a folder (run/), and write the rows there: rows.jsonl and a few.jsonl."""
    from classifier import processes
    from classifier.data.splits import load_splits
    from classifier.data.tasks import read_task

    processes.quieten_libraries()
    task, splits, _, _ = load_splits(read_task(args.task))
    limits = [flag for name in splits for flag in ("--limit", f"{name}=64")]
    command = ["--task", args.task, "--model", args.model, "--max_steps", "1", *limits]
    rounds.run_command(
        [sys.executable, str(ROOT / "train.py"), *command, "--output_dir", str(folder / "run")], args, folder
    )
    rows = [{column: row[column] for column in task.text} for split in splits.values() for row in split]
    random.Random(0).shuffle(rows)
    rows = (rows * -(-args.rows // len(rows)))[: args.rows]
    for name, part in (("rows", rows), ("few", rows[:WARMUP_ROWS])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main():
    parser = rounds.argument_parser(__doc__, CONTENDERS)
    parser.add_argument("--data", nargs="+", default=["mrpc=10000", "imdb=2000"], metavar="TASK=ROWS")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="an id or a folder")
    parser.add_argument("--folder", type=Path, help="the folder that prepare() wrote, for the process of one contender")
    args = parser.parse_args()
    if args.contender:
        return rounds.write_result(CONTENDERS, args)
    args.model = str(Path(args.model).resolve() if Path(args.model).exists() else args.model)
    content = {"benchmark": "predict_speed", **rounds.describe_machine(args), "rows": [], "rates": {}}
    for data in args.data:
        name, _, number = data.rpartition("=")
        args.rows, args.task = int(number), str(Path(name).resolve() if Path(name).exists() else name)
        contenders = rounds.choose_contenders(CONTENDERS, args.only)
        rates = {contender: [] for contender in contenders}
        with tempfile.TemporaryDirectory() as folder:
            prepare(args, Path(folder))
            for round_number in range(1, args.runs + 1):
                for contender in contenders:
                    run = rounds.run_contender(__file__, contender, ["--folder", folder], args)
                    rates[contender].append(run["examples"] / run["seconds"])
                    rate = f"{contender}: {rates[contender][-1]:.2f} examples/s"
                    rounds.log_progress(f"{Path(name).stem}, round {round_number}, {rate}")
        rows = rounds.compare_rates(contenders, rates)
        print(f"\n{args.rows:,} rows of {Path(name).stem}\n\n{rounds.format_table(rows)}", flush=True)
        content["rows"] += [{**row, "data": Path(name).stem, "examples": args.rows} for row in rows]
        content["rates"][Path(name).stem] = rates
    rounds.write_content(args.output, content)


if __name__ == "__main__":
    main()
