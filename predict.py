"""Label new text with a saved model: one text, a table of any size, many files, or standard input.

    python predict.py --model runs/mrpc --text "He left." --text_pair "He went away."
    python predict.py --model runs/imdb --input reviews.csv --output labelled.csv
    accelerate launch predict.py --model runs/imdb --input reviews.jsonl.gz --output labelled.parquet
    python predict.py --model runs/imdb --input 'in/*.parquet' --output out/ --shard 3/100     # one hundredth of them
    cat reviews.txt | python predict.py --model runs/imdb --input - > labelled.tsv

The columns of the input stay as they are; predicted_label, probability and probability_NAME are added (in regression
predicted_value). --model may be a folder that export.py wrote. Writes --output, complete or not at all; the same
command after a kill goes on where it was.
"""

import codecs
import glob
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import common
from classifier import processes
from classifier.data import writer
from classifier.data.labels import prediction_columns, prediction_rows
from classifier.data.reader import check_file, count_rows, lines_of_text, read_rows, table_format
from classifier.data.tasks import parse_delimiter
from classifier.files import CannotWrite, digest, sha256, write_json
from classifier.messages import BadInput, BadRow, format_duration, location, log, nearest
from classifier.predictor import start_exported

SECONDS_BETWEEN_LINES = 10
TABLE_KINDS = {"txt": "tsv", "json": "jsonl", "parquet": "jsonl"}  # what is written of an input in such a format


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("prediction").add_argument
    add("--model", required=True, metavar="DIR", help="a run, a model folder, an exported one, or a model of the Hub")
    add("--text", help="one text")
    add("--text_pair", metavar="TEXT", help="the second text, for a model of pairs")
    words = "a table; .txt: a text a line (pairs: with a tab); 'in/*.csv': several files; -: standard input"
    add("--input", metavar="FILE|-", help=words)
    add(
        "--output",
        metavar="FILE",
        help="csv, tsv, jsonl (.gz), parquet; of several a folder (default: standard output)",
    )
    add("--top_k", type=common.positive_int, metavar="K", help="the K likeliest labels only, likeliest first")
    add("--shard", type=shard, metavar="I/N", help="every N-th of several files, from the I-th on")
    add("--on_bad_row", choices=["fail", "skip"], default="fail", help="skip: leave bad rows out, list them beside")
    add("--encoding", default="utf-8", metavar="NAME", help="of the input (default: %(default)s)")
    add(
        "--delimiter",
        type=parse_delimiter,
        metavar="MARK",
        help="between columns, such as ';' or tab (default: by the name)",
    )
    common.add_machine_arguments(parser)
    return parser


def shard(words):
    """Return (I, N) of "I/N", 1 to N."""
    number, total = map(int, words.split("/"))
    if not 1 <= number <= total:
        raise ValueError
    return number, total


# ------------------------------------------------------------------------------------------------ rows and predictions


def read_rows_to_label(path, task, columns, args, bad_rows):
    """Yield (line, row) of a table, checked; rows that are bad are refused, or go to the list bad_rows.

    columns: those that the predictions add.
    """
    reading = {"encoding": args.encoding, "delimiter": args.delimiter, "texts": task.text}
    is_first = True
    for line, row in read_rows(path, **reading, on_bad_row="yield"):
        if not isinstance(row, BadRow):
            absent = next((column for column in task.text if column not in row), None)
            if absent and is_first:
                reason = f'{location(path, line)}: the column "{absent}" is not there{nearest(absent, row)}'
                raise BadInput(reason, f"Columns: {', '.join(row)}.")
            is_first = False
            if clash := next((column for column in columns if column in row), None):
                reason = f'{location(path, line)}: there is a column "{clash}" already'
                raise BadInput(reason, "Rename or drop it in the input.")
            wrong = next((column for column in task.text if not isinstance(row.get(column), str)), None)
            if wrong is None:
                yield line, row
                continue
            row = BadRow(path, line, f'the column "{wrong}" holds {row.get(wrong)!r}, not text')
        if args.on_bad_row == "fail":
            raise BadInput(row.reason, row.advice if args.output else row.fix)
        bad_rows.append({"file": str(path), "row": row.line, "reason": row.problem})


def arriving_lines(stream, encoding):
    """Yield lists of the lines that have come: a person at a terminal, or a program at a pipe, waits for the answer."""
    try:
        decoder, text = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)(), ""
    except LookupError:
        raise BadInput(f"--encoding {encoding}: unknown", "Known are utf-8, gb18030, latin-1, utf-16, ...") from None
    while arrived := stream.read1(2**18):
        *lines, text = (text + decoder.decode(arrived)).split("\n")
        if lines:
            yield lines
    if text := text + decoder.decode(b"", final=True):
        yield [text]


def added_columns(task, top_k):
    """Return the names of the columns that are added to a table."""
    if not top_k or task.is_regression:
        return prediction_columns(task)
    numbers = range(1, min(top_k, len(task.labels)) + 1)
    return ["predicted_label", "probability", *(f"{part}_{n}" for n in numbers for part in ("label", "probability"))]


def with_predictions(task, rows, logits, columns, top_k):
    """Yield rows with what their logits (rows, outputs) say."""
    for row, values in zip(rows, prediction_rows(task, logits), strict=True):
        if top_k and not task.is_regression:
            values = [*values[:2], *(part for pair in likeliest(task, values, top_k) for part in pair)]
        yield {**row, **dict(zip(columns, values, strict=True))}


def likeliest(task, values, top_k):
    """Return (label, probability) of the likeliest labels; values: of a row of common.prediction_rows."""
    ranked = sorted(zip(values[2:], task.labels, strict=True), reverse=True)  # in multi-label each for itself
    return [(label, probability) for probability, label in ranked[:top_k]]


def compute_logits(predictor, rows):
    """Return the logits of (line, row) pairs."""
    return predictor.logits([[row[column] for _, row in rows] for column in predictor.task.text])


# ------------------------------------------------------------------------------------------------- one text and streams


def text_row(task, args):
    """Return --text and --text_pair as (line, row)."""
    texts = [args.text] if args.text_pair is None else [args.text, args.text_pair]
    if len(texts) != len(task.text):
        words = f"the model reads {len(task.text)} text(s): {', '.join(task.text)}; {len(texts)} given"
        raise BadInput(words, "Give --text and --text_pair for a pair, --text alone else.")
    return 1, dict(zip(task.text, texts, strict=True))


def show(task, logits, top_k):
    """Print every label of one text with its probability, likeliest first; in regression the value."""
    (values,) = prediction_rows(task, logits)
    if task.is_regression:
        print(f"{values[0]:.4f}")
        return
    for label, probability in likeliest(task, values, top_k):
        print(f"{probability:.4f}  {label}")


def predict_stream(predictor, args, columns):
    """Write what is predicted of standard input, of --text, or of a table, each part as soon as it is known."""
    from classifier.chunks import chunked

    task, kind = predictor.task, "tsv"
    if args.input == "-":
        parts = read_lines(task, args.encoding)
    elif args.text is not None:
        parts = [[text_row(task, args)]]
    else:
        kind, parts = (
            table_format(args.input, has_lines=True),
            chunked(read_rows_to_label(args.input, task, columns, args, [])),
        )
        kind = TABLE_KINDS.get(kind, kind)
    with writer.open_writer(args.output) if args.output else nullcontext(writer.row_writer(sys.stdout, kind)) as write:
        for rows in parts:
            for row in with_predictions(
                task, [row for _, row in rows], compute_logits(predictor, rows), columns, args.top_k
            ):
                write(row)
            sys.stdout.flush()


def read_lines(task, encoding):
    """Yield lists of (line, row) of standard input."""
    before = 0
    try:
        for lines in arriving_lines(sys.stdin.buffer, encoding):
            rows = []
            for line, row, _ in lines_of_text("standard input", lines, task.text):
                if isinstance(row, BadRow):
                    raise BadInput(f"standard input, line {before + line}: {row.problem}", row.fix)
                rows.append((before + line, row))
            before += len(lines)
            yield rows
    except UnicodeError as error:
        raise BadInput(f"standard input: is not {encoding} ({error})", "Give --encoding.") from None


# ------------------------------------------------------------------------------------------------------------- files


class Progress:
    """Says how many rows are done, how fast, and how long the rest will take."""

    def __init__(self, path, accelerator):
        self.processes = accelerator.num_processes
        self.total = count_rows(path) if accelerator.is_main_process else None
        self.rows = self.computed = 0
        self.started = self.last_line = time.monotonic()

    def done(self, rows, computed):
        """Note a part of this process; the others are about as far."""
        self.rows += rows * self.processes
        self.computed += computed * self.processes
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        rate, words = self.computed / (now - self.started), f"{self.rows:,} rows"
        if self.total and self.rows < self.total and rate:
            words = f"{self.rows:,} of {self.total:,} rows, {format_duration((self.total - self.rows) / rate)} left"
        log.info(f"{words}, {rate:,.0f} rows/s")


def chunk_settings(predictor, source, args, precision):
    """Return what the logits of a file depend on."""
    about = os.stat(str(source).partition("::")[0])
    return {
        "input": [str(Path(source).resolve()), about.st_size, about.st_mtime_ns],
        "model": predictor.digest,
        "mixed_precision": precision,
        "reading": [args.encoding, args.delimiter, args.on_bad_row],
    }


def predict_file(predictor, source, output, args, columns, accelerator):
    """Write a table's predictions to `output`; return what the manifest says of it. Every process calls this."""
    from classifier.chunks import LogitChunks

    task, started = predictor.task, time.monotonic()
    settings = chunk_settings(predictor, source, args, accelerator.mixed_precision)
    parts = LogitChunks(output, settings, accelerator)
    progress = Progress(source, accelerator)
    made, bad_rows, number = {}, [], 0
    try:
        rows = read_rows_to_label(source, task, columns, args, [])
        parts.compute(rows, lambda some: compute_logits(predictor, some), progress.done)
        if accelerator.is_main_process:
            with writer.open_writer(output) as write:
                for rows, logits in parts.rows(read_rows_to_label(source, task, columns, args, bad_rows)):
                    for row in with_predictions(task, rows, logits, columns, args.top_k):
                        write(row)
                    number += len(rows)
    except CannotWrite:  # the parts stay: once there is room, the same command goes on
        raise
    except BadInput:
        parts.remove()
        raise
    if accelerator.is_main_process:
        writer.write_bad_rows(f"{output}.bad_rows.csv", bad_rows)
        parts.remove()
        seconds, words = time.monotonic() - started, f", {len(bad_rows)} bad rows left out" if bad_rows else ""
        log.info(f"{output}: {number:,} rows in {format_duration(seconds)}, {number / seconds:,.0f} rows/s{words}")
        made = {"input": str(source), "rows": number, "bad_rows": len(bad_rows), "sha256": sha256(output)}
        made["settings"] = digest(settings, args.top_k)
    accelerator.wait_for_everyone()
    return made


def predict_files(predictor, args, columns, accelerator):
    """Write the predictions of the files that --input names into the folder --output, those of this --shard.

    A file that is there already, as any manifest says, of the same input, model and settings, is passed over.
    """
    folder, (number, total) = Path(args.output), args.shard or (1, 1)
    outputs = output_names(args)
    mine = sorted(outputs)[number - 1 :: total]
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"manifest-{number}-of-{total}.json.*.tmp"):  # of a process that was killed
        file.unlink(missing_ok=True)
    manifests = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("manifest-*.json"))]
    manifest, left = {}, []
    for source in mine:
        output, settings = (
            folder / outputs[source],
            chunk_settings(predictor, source, args, accelerator.mixed_precision),
        )
        told = [made for before in manifests if (made := before.get(output.name))]
        told = {made["sha256"]: made for made in told if made["settings"] == digest(settings, args.top_k)}
        made = told.get(sha256(output)) if told and output.is_file() else None
        if made:
            manifest[output.name] = made
        else:
            left.append(source)
    log.info(f"{len(mine)} of {len(outputs)} files, {len(manifest)} of them are there")
    for source in left:
        output = folder / outputs[source]
        manifest[output.name] = predict_file(predictor, source, output, args, columns, accelerator)
        if accelerator.is_main_process:
            write_json(folder / f"manifest-{number}-of-{total}.json", manifest)


def output_names(args):
    """Return {input: name of its output} of a pattern, in a table's own format."""
    outputs = {}
    for source in sorted(glob.glob(args.input)):
        kind, name = table_format(source, has_lines=True), Path(source).name
        if kind in ("txt", "json"):
            name = f"{name[: name.lower().rindex(kind)]}{TABLE_KINDS[kind]}"
        if name in outputs.values():
            raise BadInput(f"--input {args.input}: two files would be written as {name}", "Name them in two commands.")
        outputs[source] = name
    return outputs


# -------------------------------------------------------------------------------------------------------------- main


def check_arguments(args):
    """Raise BadInput for flags that do not go together, and for files that are not there."""
    if (args.text is None) == (args.input is None):
        raise BadInput("give either --text or --input", "See --help.")
    if is_pattern(args.input):
        if not args.output:
            raise BadInput(f"--input {args.input}: names several files", "Name a folder for them: --output out/.")
        if not glob.glob(args.input):
            raise BadInput(f"--input {args.input}: no such files", "Quote the pattern, and check the folder.")
        return
    if args.shard:
        raise BadInput("--shard divides files, and --input names one", "Name several: --input 'in/*.csv'.")
    if args.on_bad_row == "skip" and not args.output:
        raise BadInput("--on_bad_row skip lists the bad rows beside --output", "Name a file with --output.")
    if args.output:
        writer.check_output_file(args.output)
    if args.input not in (None, "-"):
        check_file(args.input)


def is_pattern(words):
    """Return whether --input names several files."""
    return words is not None and not os.path.exists(words) and any(mark in words for mark in "*?[")


def main():
    args = build_parser().parse_args()
    check_arguments(args)
    # torch takes seconds: --help and a mistake are to come at once.
    from classifier.predictor import load, onnx_file

    # Standard output is for predictions: what the script says of itself goes to standard error.
    threads, exported, started = None, onnx_file(args.model), time.perf_counter()
    if exported:
        accelerator, threads = start_exported(args, stream=sys.stderr)
    else:
        accelerator = processes.start(args, stream=sys.stderr)
    is_file = args.input not in (None, "-") and args.output
    if accelerator.num_processes > 1 and not is_file:
        raise BadInput("several processes share a file with an --output", "For this: python predict.py")
    predictor = load(args.model, accelerator, args.eval_batch_size, threads)
    if exported:
        log.info(f"{exported}: loaded in {time.perf_counter() - started:.2f} s")
    columns = added_columns(predictor.task, args.top_k)
    if args.text is not None and not args.output:
        show(predictor.task, compute_logits(predictor, [text_row(predictor.task, args)]), args.top_k)
    elif not is_file:
        predict_stream(predictor, args, columns)
    elif is_pattern(args.input):
        predict_files(predictor, args, columns, accelerator)
    else:
        predict_file(predictor, args.input, args.output, args, columns, accelerator)
    return accelerator


if __name__ == "__main__":
    processes.run(main)
