"""Label new text with a saved model: one text, a table of any size, many files, or standard input.

    python predict.py --model runs/mrpc --text "He left." --text_pair "He went away."
    python predict.py --model runs/imdb --input reviews.csv --output labelled.csv
    accelerate launch predict.py --model runs/imdb --input reviews.jsonl.gz --output labelled.parquet
    python predict.py --model runs/imdb --input 'in/*.parquet' --output out/ --shard 3/100     # one hundredth of them
    cat reviews.txt | python predict.py --model runs/imdb --input - > labelled.tsv

Keeps the columns of the input and adds predicted_label, probability and probability_NAME (in regression:
predicted_value). --model may be a folder that export.py wrote. Writes --output atomically: complete or not at all.
After a kill, the same command resumes.
"""

import argparse
import codecs
import glob
import io
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import common
from classifier import processes
from classifier.chunks import LogitChunks, split_into_chunks
from classifier.data import writer
from classifier.data.encodings import utf_16_of
from classifier.data.labels import prediction_columns, prediction_rows
from classifier.data.reader import check_file, count_rows, lines_of_text, read_header, read_rows, table_format
from classifier.data.tasks import parse_delimiter
from classifier.files import CannotWrite, digest, sha256, write_json
from classifier.messages import (
    MOST_NAMES,
    BadInput,
    BadRow,
    NoRows,
    escape,
    format_duration,
    in_red,
    list_names,
    location,
    log,
    nearest,
)
from classifier.predictor import least_probability, load, onnx_file, start_exported

SECONDS_BETWEEN_LINES = 10
OUTPUT_KINDS = {"txt": "tsv", "json": "jsonl", "parquet": "jsonl"}  # for inputs in a format that is not written


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("prediction").add_argument
    add("--model", required=True, metavar="DIR", help="a run, a model folder, an exported model, or a Hub id")
    add("--text", help="one text")
    add("--text_pair", metavar="TEXT", help="the second text, for a model of pairs")
    inputs = "a table; .txt: one text per line (pairs: tab-separated); 'in/*.csv': several files; -: standard input"
    add("--input", metavar="FILE|-", help=inputs)
    outputs = "csv, tsv, jsonl (.gz), parquet; for several files a folder (default: standard output)"
    add("--output", metavar="FILE", help=outputs)
    add("--top_k", type=common.positive_int, metavar="K", help="only the K likeliest labels, likeliest first")
    words = "leave predicted_label empty where the probability is lower"
    add("--min_probability", type=common.fraction, metavar="P", help=words)
    words = "the same, so that this share of the labels is right, by the validation examples of the training"
    add("--target_accuracy", type=common.fraction, metavar="A", help=words)
    add("--shard", type=parse_shard, metavar="I/N", help="every N-th of several files, starting at the I-th")
    bad_rows = "skip: leave bad rows out and list them next to --output (default: %(default)s)"
    add("--on_bad_row", choices=["fail", "skip"], default="fail", help=bad_rows)
    add("--encoding", default="utf-8", metavar="NAME", help="of the input (default: %(default)s)")
    delimiter = "between columns, such as ';' or tab (default: by the file name)"
    add("--delimiter", type=parse_delimiter, metavar="MARK", help=delimiter)
    common.add_machine_arguments(parser)
    return parser


def parse_shard(text):
    """Return (I, N) for "I/N", with I from 1 to N."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N")
    return int(number), int(total)


# ------------------------------------------------------------------------------------------------ rows and predictions


def read_rows_to_label(path, task, columns, args, bad_rows):
    """Yield (line, row) of a table. A bad row raises BadInput or, with --on_bad_row skip, is appended to bad_rows.

    columns: the names of the columns that predictions add.
    """
    reading = {"encoding": args.encoding, "delimiter": args.delimiter, "texts": task.text}
    is_first = True
    for line, row in read_rows(path, **reading, on_bad_row="yield"):
        if not isinstance(row, BadRow):
            absent = next((column for column in task.text if column not in row), None)
            if absent and is_first:
                reason = f'{location(path, line)}: the column "{absent}" is not there{nearest(absent, row)}'
                raise BadInput(reason, f"Columns: {list_names(row)}.")
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


def added_columns(task, top_k):
    """Return the names of the columns that predictions add to a table."""
    if not top_k or task.is_regression:
        return prediction_columns(task)
    ranks = range(1, min(top_k, len(task.labels)) + 1)
    ranked = [f"{kind}_{rank}" for rank in ranks for kind in ("label", "probability")]
    return ["predicted_label", "probability", *ranked]


def with_predictions(task, rows, logits, columns, args):
    """Yield rows with the added columns. logits: (rows, outputs)."""
    for row, values in zip(rows, prediction_rows(task, logits), strict=True):
        if args.top_k and not task.is_regression:
            values = [*values[:2], *(value for pair in likeliest(task, values, args.top_k) for value in pair)]
        if args.min_probability and values[1] < args.min_probability:
            values[0] = ""
        yield {**row, **dict(zip(columns, values, strict=True))}


def likeliest(task, values, top_k):
    """Return (label, probability) of the likeliest labels. values: a row of labels.prediction_rows."""
    chances = values[2 : 2 + len(task.labels)]  # in multi-label, of independent labels
    ranked = sorted(zip(chances, task.labels, strict=True), reverse=True)
    return [(label, probability) for probability, label in ranked[:top_k]]


def compute_logits(predictor, rows):
    """Return the logits of (line, row) pairs."""
    return predictor.logits([[row[column] for _, row in rows] for column in predictor.task.text])


# ------------------------------------------------------------------------------------------------- one text and streams


def text_row(task, args):
    """Return --text and --text_pair as (line, row)."""
    texts = [args.text] if args.text_pair is None else [args.text, args.text_pair]
    if len(texts) != len(task.text):
        reason = f"the model reads {len(task.text)} text(s): {', '.join(task.text)}; {len(texts)} given"
        raise BadInput(reason, "Give --text and --text_pair for a pair, else only --text.")
    return 1, dict(zip(task.text, texts, strict=True))


def print_prediction(task, logits, args):
    """Print the labels of one text with their probabilities, likeliest first; in regression the value."""
    (values,) = prediction_rows(task, logits)
    if task.is_regression:
        print(f"{values[0]:.4f}")
        return
    if args.min_probability and values[1] < args.min_probability:
        log.info(f"no label: the likeliest is below {args.min_probability:.4f}")
    for label, probability in likeliest(task, values, args.top_k or MOST_NAMES):
        print(f"{probability:.4f}  {escape(label)}")
    if not args.top_k and len(task.labels) > MOST_NAMES:
        log.info(f"and {len(task.labels) - MOST_NAMES:,} more: --top_k {len(task.labels)}")


def predict_stream(predictor, args, columns):
    """Write the predictions for standard input, --text, or a table, each batch as soon as it is computed."""
    task, kind = predictor.task, "tsv"
    if args.input == "-":
        batches = read_standard_input(task, args.encoding)
    elif args.text is not None:
        batches = [[text_row(task, args)]]
    else:
        input_kind = table_format(args.input, has_lines=True)
        kind = OUTPUT_KINDS.get(input_kind, input_kind)
        batches = split_into_chunks(read_rows_to_label(args.input, task, columns, args, []))
    output = writer.open_writer(args.output) if args.output else nullcontext(writer.row_writer(sys.stdout, kind))
    with output as write:
        for batch in batches:
            rows, logits = [row for _, row in batch], compute_logits(predictor, batch)
            for row in with_predictions(task, rows, logits, columns, args):
                write(row)
            sys.stdout.flush()


def read_standard_input(task, encoding):
    """Yield lists of (line, row) from standard input."""
    lines_before = 0
    try:
        for lines in arriving_lines(sys.stdin.buffer, encoding):
            rows = []
            for line, row, _ in lines_of_text("standard input", lines, task.text):
                if isinstance(row, BadRow):
                    raise BadInput(f"standard input, line {lines_before + line}: {row.problem}", row.fix)
                rows.append((lines_before + line, row))
            lines_before += len(lines)
            yield rows
    except UnicodeError as error:
        raise BadInput(f"standard input: is not {encoding} ({error})", "Give --encoding.") from None


def arriving_lines(stream, encoding):
    """Yield lists of lines as they arrive: whoever types or pipes them may wait for the answer to each."""
    try:
        decoder, text = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)(), ""
    except LookupError:
        raise BadInput(f"--encoding {encoding}: unknown", "Known are utf-8, gb18030, latin-1, utf-16, ...") from None
    is_first = encoding == "utf-8"
    while arrived := stream.read1(2**18):
        if is_first and (likely := utf_16_of(arrived[:1000])):
            raise BadInput(f"standard input: looks like {likely}, not utf-8", f"Give --encoding {likely}.")
        is_first = False
        *lines, text = (text + decoder.decode(arrived)).split("\n")
        if lines:
            yield lines
    if text := text + decoder.decode(b"", final=True):
        yield [text]


# --------------------------------------------------------------------------------------------------------------- files


def predict_file(predictor, source, output, args, columns, accelerator):
    """Write a table's predictions to `output`; return its entry of the manifest. Every process must call this."""
    task, started = predictor.task, time.perf_counter()
    settings = chunk_settings(predictor, source, args, accelerator.mixed_precision)
    chunks = LogitChunks(output, settings, accelerator)
    entry, bad_rows, number, unlabelled = {}, [], 0, 0
    try:
        rows = read_rows_to_label(source, task, columns, args, [])
        with progress_bar(source, accelerator) as report:
            chunks.compute(rows, lambda chunk: compute_logits(predictor, chunk), report)
        if accelerator.is_main_process:
            with writer.open_writer(output, source) as write:
                for rows, logits in chunks.read(read_rows_to_label(source, task, columns, args, bad_rows)):
                    for row in with_predictions(task, rows, logits, columns, args):
                        write(row)
                        unlabelled += row.get("predicted_label") == ""
                    number += len(rows)
    except CannotWrite:  # the chunks stay: once there is room, the same command resumes
        raise
    except BadInput:
        chunks.remove()
        raise
    if accelerator.is_main_process:
        writer.write_bad_rows(f"{output}.bad_rows.csv", bad_rows)
        chunks.remove()
        seconds = max(time.perf_counter() - started, 1e-9)
        notes = f", {len(bad_rows)} bad rows skipped" if bad_rows else ""
        notes += f", {unlabelled:,} without a label (below {args.min_probability:.4f})" if args.min_probability else ""
        log.info(f"{output}: {number:,} rows in {format_duration(seconds)}, {number / seconds:,.0f} rows/s{notes}")
        entry = {"input": str(source), "rows": number, "bad_rows": len(bad_rows), "sha256": sha256(output)}
        entry["settings"] = output_digest(settings, args)
    accelerator.wait_for_everyone()
    return entry


def chunk_settings(predictor, source, args, precision):
    """Return what the logits of a file depend on."""
    facts = os.stat(str(source).partition("::")[0])
    return {
        "input": [str(Path(source).resolve()), facts.st_size, facts.st_mtime_ns],
        "model": predictor.digest,
        "mixed_precision": precision,
        "reading": [args.encoding, args.delimiter, args.on_bad_row],
    }


def output_digest(settings, args):
    """Return a digest of what an output depends on. settings: of chunk_settings."""
    return digest(settings, args.top_k, args.min_probability)


@contextmanager
def progress_bar(path, accelerator):
    """Yield report(rows, computed) for LogitChunks.compute: a bar on a terminal, else a log line every 10 seconds."""
    from tqdm import tqdm

    on_terminal, last_line = sys.stderr.isatty(), time.perf_counter()
    total = count_rows(path) if accelerator.is_main_process else None
    file = sys.stderr if on_terminal and accelerator.is_main_process else io.StringIO()
    with tqdm(total=total, unit=" rows", smoothing=0, leave=False, file=file) as bar:

        def report(rows, computed):  # the other processes are about as far
            nonlocal last_line
            bar.initial += (rows - computed) * accelerator.num_processes  # rows from disk took no time
            bar.update(rows * accelerator.num_processes)
            if not on_terminal and time.perf_counter() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.perf_counter()
                log.info(str(bar))

        yield report


def predict_files(predictor, args, columns, accelerator):
    """Write the predictions for the files of --input, or of its --shard, into the folder --output.

    Skips a file whose output exists, with the same input, model and settings, according to any manifest in the folder.
    """
    folder, (number, total) = Path(args.output), args.shard or (1, 1)
    outputs = output_names(args)
    sources = sorted(outputs)[number - 1 :: total]
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"manifest-{number}-of-{total}.json.*.tmp"):  # of a process that was killed
        file.unlink(missing_ok=True)
    manifests = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("manifest-*.json"))]
    manifest, missing = {}, []
    for source in sources:
        output = folder / outputs[source]
        settings = output_digest(chunk_settings(predictor, source, args, accelerator.mixed_precision), args)
        entries = [earlier[output.name] for earlier in manifests if output.name in earlier]
        entries = {entry["sha256"]: entry for entry in entries if entry["settings"] == settings}
        entry = entries.get(sha256(output)) if entries and output.is_file() else None
        if entry:
            manifest[output.name] = entry
        else:
            missing.append(source)
    log.info(f"{len(sources)} of {len(outputs)} files, {len(manifest)} of them already done")
    unreadable = []
    for source in missing:
        output = folder / outputs[source]
        try:
            manifest[output.name] = predict_file(predictor, source, output, args, columns, accelerator)
        except NoRows:
            manifest[output.name] = write_without_rows(predictor, source, output, args, columns, accelerator)
        except BadInput as error:
            if args.on_bad_row == "fail":
                raise
            log.warning(in_red(f"WARNING: {error.reason} (goes on with the next file)"))
            unreadable.append(error)
            continue
        if accelerator.is_main_process:
            write_json(folder / f"manifest-{number}-of-{total}.json", manifest)
    if unreadable:
        others = f", and {len(unreadable) - 1} more of {len(sources)} files" if len(unreadable) > 1 else ""
        advice = f"{unreadable[0].advice} The other files are done; the same command tries these again."
        raise BadInput(f"not predicted: {unreadable[0].reason}{others}", advice)


def write_without_rows(predictor, source, output, args, columns, accelerator):
    """Write the output of a table without rows, its header alone; return its entry of the manifest."""
    entry = {}
    if accelerator.is_main_process:
        header = read_header(source, args.encoding, args.delimiter) or predictor.task.text
        writer.write_empty(output, [*header, *columns])
        log.info(f"{output}: 0 rows, as in {source}")
        settings = chunk_settings(predictor, source, args, accelerator.mixed_precision)
        entry = {"input": str(source), "rows": 0, "bad_rows": 0, "sha256": sha256(output)}
        entry["settings"] = output_digest(settings, args)
    accelerator.wait_for_everyone()
    return entry


def output_names(args):
    """Return {input: name of its output} for a pattern. An output has the format of its input where that is written."""
    outputs = {}
    for source in sorted(glob.glob(args.input)):
        kind, name = table_format(source, has_lines=True), Path(source).name
        if kind in ("txt", "json"):
            name = f"{name[: name.lower().rindex(kind)]}{OUTPUT_KINDS[kind]}"
        if name in outputs.values():
            raise BadInput(f"--input {args.input}: two files would be written as {name}", "Name them in two commands.")
        outputs[source] = name
    return outputs


# ---------------------------------------------------------------------------------------------------------------- main


def check_arguments(args):
    """Raise BadInput for flags that contradict each other, and for files that do not exist."""
    if (args.text is None) == (args.input is None):
        raise BadInput("give either --text or --input", "See --help.")
    if args.min_probability and args.target_accuracy:
        raise BadInput("--min_probability and --target_accuracy are two ways to say the same", "Give one of them.")
    if is_pattern(args.input):
        if not args.output:
            raise BadInput(f"--input {args.input}: names several files", "Name a folder for them: --output out/.")
        if not glob.glob(args.input):
            raise BadInput(f"--input {args.input}: no such files", "Quote the pattern, and check the folder.")
        return
    if args.shard:
        raise BadInput("--shard divides files, but --input names one", "Name several: --input 'in/*.csv'.")
    if args.on_bad_row == "skip" and not args.output:
        raise BadInput("--on_bad_row skip lists the bad rows next to --output", "Name a file with --output.")
    if args.output:
        writer.check_output_file(args.output)
    if args.input not in (None, "-"):
        check_file(args.input)


def is_pattern(path):
    """Return whether --input names several files."""
    return path is not None and not os.path.exists(path) and any(mark in path for mark in "*?[")


def main():
    args = build_parser().parse_args()
    check_arguments(args)
    if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):  # predictions are data, the same on every system
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    # Standard output is for predictions, so the log goes to standard error.
    threads, exported, started = None, onnx_file(args.model), time.perf_counter()
    if exported:
        accelerator, threads = start_exported(args, stream=sys.stderr)
    else:
        accelerator = processes.start(args, stream=sys.stderr)
    is_file = args.input not in (None, "-") and args.output
    if accelerator.num_processes > 1 and not is_file:
        raise BadInput("several processes need a file as --input and an --output", "For this: python predict.py")
    predictor = load(args.model, accelerator, args.eval_batch_size, threads)
    if exported:
        log.info(f"{exported}: loaded in {time.perf_counter() - started:.2f} s")
    columns = added_columns(predictor.task, args.top_k)
    args.min_probability = least_probability(predictor.task, args.min_probability, args.target_accuracy)
    if args.text is not None and not args.output:
        print_prediction(predictor.task, compute_logits(predictor, [text_row(predictor.task, args)]), args)
    elif not is_file:
        predict_stream(predictor, args, columns)
    elif is_pattern(args.input):
        predict_files(predictor, args, columns, accelerator)
    else:
        predict_file(predictor, args.input, args.output, args, columns, accelerator)
    return accelerator


if __name__ == "__main__":
    processes.run(main)
