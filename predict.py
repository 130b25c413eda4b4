"""Label new text with a saved model.

    python predict.py --model runs/demo --text "The room was lovely, but all in all the stay was far from good."
    python predict.py --model runs/mrpc --text "He left." --text_pair "He went away."
    python predict.py --model runs/mrpc --input pairs.csv --output labelled.csv   # columns kept, rows in order
    cat reviews.txt | python predict.py --model runs/demo --input -               # one text a line, to standard output

Adds the columns predicted_label, probability and probability_NAME (regression: predicted_value) to those of the input.
Writes to --output alone; without it, to standard output. The format follows the name: .csv, .tsv or .jsonl.
"""

import gzip
import json
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

import common
import tasks
from common import BadInput
from reader import check_file, nearest, read_rows, table_format, without_skip

ROWS_AT_A_TIME = 4096  # read, sorted by length, predicted, and written in input order


def build_parser():
    parser = common.argument_parser(__doc__)
    group = parser.add_argument_group("prediction")
    group.add_argument("--model", required=True, metavar="DIR", help="a run, a model folder, or a model of the Hub")
    group.add_argument("--text", help="one text")
    group.add_argument("--text_pair", metavar="TEXT", help="the second text, for a model of pairs")
    group.add_argument(
        "--input", metavar="FILE|-", help="a table, or - for lines of text (pairs: two, with a tab between)"
    )
    group.add_argument("--output", metavar="FILE", help="(default: standard output)")
    group.add_argument(
        "--top_k", type=common.positive, metavar="K", help="the K likeliest labels only, likeliest first (with --text)"
    )
    common.add_machine_arguments(parser)
    return parser


def read_lines(stream, columns):
    """Yield rows of lines of text, as read_rows does of a table; a pair is divided by a tab."""
    for number, line in enumerate(stream, start=1):
        texts = line.rstrip("\r\n").split("\t") if len(columns) == 2 else [line.rstrip("\r\n")]
        if len(texts) != len(columns):
            raise BadInput(
                f"standard input, line {number}: {len(texts)} text(s), the model reads {len(columns)}",
                "Put one tab between the two texts of a pair.",
            )
        yield number, dict(zip(columns, texts, strict=True))


def refuse(bad_row):
    raise BadInput(bad_row.reason, without_skip(bad_row.advice))


def check_columns(where, row, text_columns, new_columns):
    """Raise BadInput where a row lacks a text column, or has one that the predictions would overwrite."""
    for column in text_columns:
        if not isinstance(row.get(column), str):
            found = f"holds {row[column]!r}, not text" if column in row else f"is not there{nearest(column, row)}"
            raise BadInput(f'{where}: the column "{column}" {found}', f"Columns: {', '.join(row)}.")
    for column in new_columns:
        if column in row:
            raise BadInput(f'{where}: there is a column "{column}" already', "Rename or drop it in the input.")


def predict(task, model, tokenizer, layout, accelerator, texts, batch_size):
    """Return the logits of texts: an array (texts, outputs). texts: one list, or two of equal length for pairs."""
    import torch
    from accelerate.utils import send_to_device

    import batching

    encoded, _ = batching.encode(task, tokenizer, texts, task.max_length)
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")
    logits = np.zeros((len(order), model.config.num_labels), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {name: [values[i] for i in chosen] for name, values in encoded.items()}
        inputs = send_to_device(layout.lay_out(batch), accelerator.device)
        layout.begin(0, chosen, [len(ids) for ids in batch["input_ids"]], accelerator.device)
        with torch.inference_mode():
            logits[chosen] = model(**inputs).logits.float().cpu().numpy()
    return logits


def write_rows(stream, kind, rows, new_columns):
    """Write (row, prediction) pairs as CSV (quoted), TSV (unquoted) or JSONL, each as soon as it comes."""
    write_row = common.csv_row_writer(stream) if kind == "csv" else lambda fields: print(*fields, sep="\t", file=stream)
    header = None
    for row, values in rows:
        if kind == "jsonl":
            stream.write(json.dumps({**row, **dict(zip(new_columns, values, strict=True))}, ensure_ascii=False) + "\n")
            continue
        if header is None:
            header = list(row)
            write_row([*header, *new_columns])
        if row.keys() != set(header):
            raise BadInput(
                f"the rows have other columns: {', '.join(row)}; {', '.join(header)}", "Name the output .jsonl."
            )
        fields = [row[column] for column in header]
        if kind == "tsv" and any(mark in str(field) for field in fields for mark in "\t\r\n"):
            raise BadInput("a field holds a tab or a line break, which TSV cannot", "Name the output .csv or .jsonl.")
        write_row([*fields, *values])


def main():
    args = build_parser().parse_args()
    if (args.text is None) == (args.input is None):
        raise BadInput("give either --text or --input", "See --help.")
    if args.input not in (None, "-"):
        check_file(args.input)
    # These import torch, which takes seconds: --help and a mistake are to come at once.
    import batching
    import checkpoint

    folder = checkpoint.model_folder(args.model)
    # Standard output is for predictions: what the script says of itself goes to standard error.
    accelerator = common.start(args, stream=sys.stderr)
    if accelerator.num_processes > 1:
        raise BadInput("predict.py runs as one process", "Start it with: python predict.py")
    model, tokenizer, facts = common.load_model(folder)
    task, _ = tasks.saved_task(folder)
    task = task or tasks.Task(
        name=Path(folder).name,
        text=["text"],
        labels=None if model.config.num_labels > 1 else "regression",
        problem="multi_label" if model.config.problem_type == "multi_label_classification" else None,
    )
    task = common.with_labels_of(model, facts, task)
    task = replace(task, max_length=task.max_length or batching.longest_input(model, tokenizer))
    layout = common.lay_out(model, tokenizer)
    model = accelerator.prepare_model(model, evaluation_mode=True).eval()
    new_columns = common.prediction_columns(task)

    def predicted(rows):
        """Yield (row, prediction) for (line, row) pairs, in order."""
        rows = iter(rows)
        # A person at a terminal, or a program at a pipe, waits for an answer to each line.
        at_a_time = 1 if args.input == "-" and sys.stdin.isatty() else ROWS_AT_A_TIME
        while some := list(islice(rows, at_a_time)):
            for line, row in some:
                check_columns(f"{args.input or '--text'}, line {line}", row, task.text, new_columns)
            texts = [[row[column] for _, row in some] for column in task.text]
            logits = predict(task, model, tokenizer, layout, accelerator, texts, args.eval_batch_size)
            yield from zip((row for _, row in some), common.prediction_rows(task, logits), strict=True)

    if args.text is not None:
        texts = [args.text] if args.text_pair is None else [args.text, args.text_pair]
        if len(texts) != len(task.text):
            raise BadInput(
                f"the model reads {len(task.text)} text(s): {', '.join(task.text)}; {len(texts)} given",
                "Give --text and --text_pair for a pair, --text alone else.",
            )
        rows, kind = [(1, dict(zip(task.text, texts, strict=True)))], None
    elif args.input == "-":
        rows, kind = read_lines(sys.stdin, task.text), "tsv"
    else:
        rows, kind = read_rows(args.input, on_bad_row=refuse), table_format(args.input)
    if args.output:
        write_file(args.output, predicted(rows), new_columns)
    elif args.text is not None:
        show(task, next(predicted(rows))[1], args.top_k)
    else:
        write_rows(sys.stdout, kind, predicted(rows), new_columns)


def write_file(path, rows, new_columns):
    """Write rows to a table file; complete or absent."""
    kind = table_format(path)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        open_file = gzip.open if path.endswith(".gz") else open
        with open_file(temporary, "wt", encoding="utf-8", newline="") as stream:
            write_rows(stream, kind, rows, new_columns)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})", "Choose another --output.") from None
    finally:
        temporary.unlink(missing_ok=True)


def show(task, prediction, top_k):
    """Print the prediction for one text: every label with its probability, likeliest first."""
    if task.is_regression:
        print(f"{prediction[0]:.4f}")
        return
    likeliest = sorted(zip(prediction[2:], task.labels, strict=True), reverse=True)  # in multi-label each for itself
    for probability, label in likeliest[:top_k]:
        print(f"{probability:.4f}  {label}")


if __name__ == "__main__":
    common.run(main)
