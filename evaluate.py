"""Score a saved model on a split of its own data, or on a file.

    python evaluate.py --model runs/mrpc                    # the validation split: the scores that training printed
    python evaluate.py --model runs/mrpc --split test
    python evaluate.py --model runs/mrpc --file more.csv    # a labelled file with the same columns
    accelerate launch evaluate.py --model runs/mrpc         # several processes: each example is still counted once

Writes RUN/evaluation-SPLIT/ (--output_dir): evaluation.json, and predictions.csv with a row for every example.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

import common
import tasks
from cache import array_of, write_json
from common import BadInput, log
from reader import check_file


def build_parser():
    parser = common.argument_parser(__doc__, data=True)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--model", required=True, metavar="ID|DIR", help="a run, a model folder, or a model of the Hub")
    group.add_argument("--split", default="validation", help="of the task's data (default: %(default)s)")
    group.add_argument("--file", metavar="FILE", help="score this file instead of a split")
    group.add_argument("--output_dir", metavar="DIR", help="(default: evaluation-SPLIT beside the model folder)")
    common.add_machine_arguments(parser)
    return parser


def write_predictions(path, task, rows, logits):
    """Write predictions.csv: the texts, the label and the prediction of every example."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        write_row = common.csv_row_writer(file)
        write_row([*task.text, "label", *common.prediction_columns(task)])
        for row, prediction in zip(rows, common.prediction_rows(task, logits), strict=True):
            label = row["label"]
            if task.is_multi_label:
                label = task.separator.join(task.labels[position] for position in np.flatnonzero(label))
            elif not task.is_regression:
                label = task.labels[label]
            write_row([*(row[column] for column in task.text), label, *prediction])
    temporary.replace(path)


def main():
    args = build_parser().parse_args()
    if args.file:
        check_file(args.file)
    # These import torch, which takes seconds: --help and a mistake are to come at once.
    import batching
    import checkpoint

    folder = checkpoint.model_folder(args.model)
    task, fingerprints = tasks.saved_task(folder)
    if task is None and not args.task:
        raise BadInput(f"{args.model}: has no task.json, so its data are not known", "Name them with --task.")
    if args.task or args.dataset or args.train_file or args.validation_file or args.test_file:
        fingerprints = {}  # other data than the model was trained on, by request
    task = tasks.task_of(args, default=task)
    split = args.split
    if args.file:
        split, fingerprints = "file", {}
        task = replace(task, dataset=None, files={split: args.file}, limit=tasks.limits_of(args.limit))
    # MNLI has two validation splits: both are scored.
    beside = Path(folder if Path(folder).is_dir() else "").parent
    checkpoint.check_output(Path(args.output_dir or beside))

    trained_precision, majority = checkpoint.trained(folder)
    if args.mixed_precision == "auto" and trained_precision != "fp16":  # fp16 is not to be had everywhere
        args.mixed_precision = trained_precision
    accelerator = common.start(args)
    model, tokenizer, facts = common.load_model(folder, refresh=args.refresh)
    task = common.with_labels_of(model, facts, task)
    task, splits, now, bad_rows = common.load_data(task, args)
    names = [name for name in splits if name == split or name.startswith(f"{split}_")] or [split]
    common.check_splits(task, splits, names)
    changed = [name for name in names if fingerprints.get(name, now[name]) != now[name]]
    if changed and not args.limit:
        raise BadInput(
            f"the {changed[0]} split is not the one of the training: its data or the rule that made it have changed",
            "Score the data as they are now with --file, or bring back the old ones.",
        )
    task, examples = batching.tokenize_splits(task, {name: splits[name] for name in names}, now, model, tokenizer)
    layout = common.lay_out(model, tokenizer)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for name in names:
        shown = Path(args.file).name.split(".")[0] if args.file else name
        output = Path(
            args.output_dir or beside / f"evaluation-{shown}", *([name] if len(names) > 1 and args.output_dir else [])
        )
        checkpoint.check_output(output)
        logits = batching.all_logits(model, examples[name], accelerator, args.eval_batch_size, layout)
        labels = array_of(splits[name], "label")
        # Without the training's majority at hand, that of these very labels: no baseline is higher.
        result = common.evaluate(task, logits, labels, common.majority(task, labels) if majority is None else majority)
        left_out = sum(bad_row["split"] == name for bad_row in bad_rows)
        words = f"scored {len(logits)} of {len(logits) + left_out} examples" if left_out else f"{len(logits)} examples"
        log.info(
            f"{shown}: {common.score_words(result['scores'])}, loss {result['loss']:.4f}, {words} "
            f"(majority: {common.score_words(result['majority'])})"
        )
        if accelerator.is_main_process:
            evaluation = {
                "model": facts["model"],
                "split": shown,
                "examples": len(logits),
                "bad_rows": left_out,
                "fingerprint": now[name],
                "mixed_precision": accelerator.mixed_precision,
                "loss": result["loss"],
                "scores": result["scores"],
                "majority_baseline": result["majority"],
            }
            output.mkdir(parents=True, exist_ok=True)
            common.write_bad_rows(output, [bad_row for bad_row in bad_rows if bad_row["split"] == name])
            write_predictions(output / "predictions.csv", task, splits[name], logits)
            write_json(output / "evaluation.json", evaluation)
        log.info(f"written: {output}/evaluation.json, predictions.csv{', bad_rows.csv' if left_out else ''}")
    common.finish(accelerator, model)


if __name__ == "__main__":
    common.run(main)
