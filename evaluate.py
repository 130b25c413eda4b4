"""Score a saved model on a split of its own data, or on a file: what the score is worth, and where it is wrong.

    python evaluate.py --model runs/mrpc                    # the validation split: the scores that training printed
    python evaluate.py --model runs/mrpc --split test
    python evaluate.py --model runs/mrpc --file more.csv    # a labelled file with the same columns
    python evaluate.py --model runs/mrpc --compare runs/mrpc,seed=2     # is the one better, and do the data tell?
    accelerate launch evaluate.py --model runs/mrpc         # several processes: each example is still counted once

Writes RUN/evaluation-SPLIT/ (--output_dir): evaluation.json (scores with 95 % intervals, each class, the confusion,
calibration, slices), predictions.csv with a row for every example, and errors.csv, the worst mistakes first.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

import common
from classifier import processes
from classifier.data import cache, facts, tasks
from classifier.data.cache import column_array
from classifier.data.labels import (
    format_label,
    majority_prediction,
    prediction_columns,
    prediction_rows,
    predictions_from_logits,
)
from classifier.data.reader import check_file
from classifier.data.writer import write_bad_rows, write_csv
from classifier.files import CannotWrite, write_json
from classifier.messages import BadInput, log
from classifier.model.models import load_model, with_head_labels
from classifier.model.packing import prepare_model


def build_parser():
    parser = common.argument_parser(__doc__, data=True)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--model", required=True, metavar="ID|DIR", help="a run, a model folder, or a model of the Hub")
    group.add_argument("--split", default="validation", help="of the task's data (default: %(default)s)")
    group.add_argument("--file", metavar="FILE", help="score this file instead of a split")
    group.add_argument(
        "--compare",
        metavar="OTHER",
        help="a run, an evaluation folder, or a file of predictions of the same texts",
    )
    group.add_argument("--slices", metavar="COLUMN[,COLUMN]", help="score each value of these columns alone")
    group.add_argument("--baseline", action="store_true", help="fit a bag of words and a frozen encoder beside it")
    group.add_argument("--output_dir", metavar="DIR", help="(default: evaluation-SPLIT beside the model folder)")
    common.add_machine_arguments(parser)
    return parser


def write_predictions(folder, task, rows, logits, wrong, losses):
    """Write predictions.csv, a row for every example, and errors.csv: the wrong ones, by number."""
    columns = [*task.text, "label", *prediction_columns(task)]

    def row_of(row, prediction):
        return [*(row[column] for column in task.text), format_label(task, row["label"]), *prediction]

    pairs = zip(rows, prediction_rows(task, logits), strict=True)
    write_csv(folder / "predictions.csv", columns, (row_of(*pair) for pair in pairs))
    chosen = zip(rows.select(wrong), prediction_rows(task, logits[wrong]), wrong, losses, strict=True)
    lines = ([int(number), f"{loss:.4f}", *row_of(*pair)] for *pair, number, loss in chosen)
    write_csv(folder / "errors.csv", ["example", "loss", *columns], lines)


def write_compared(folder, task, rows, predictions, others, labels):
    """Write compared.csv: the examples that one of two models gets right, and the other does not."""
    from classifier.evaluation import analysis

    numbers = analysis.only_one_right(predictions, others, labels)
    words = [[format_label(task, of[number]) for of in (labels, predictions, others)] for number in numbers]
    texts = ([row[column] for column in task.text] for row in rows.select(numbers))
    lines = ([int(number), *of, *said] for number, of, said in zip(numbers, texts, words, strict=True))
    write_csv(folder / "compared.csv", ["example", *task.text, "label", "here", "other"], lines)


def write_evaluation(folder, task, rows, result, content, left_out, others):
    """Write what evaluate.py says of a split into a folder; return the names of the files.

    result: of common.evaluate; content: of evaluation.json; left_out: bad rows; others: another model's predictions.
    """
    from classifier.evaluation import analysis, page

    folder.mkdir(parents=True, exist_ok=True)
    numbers, losses = analysis.worst_mistakes(result)
    write_predictions(folder, task, rows, result["logits"], numbers, losses)
    write_json(folder / "evaluation.json", content)
    mistakes = page.mistake_rows(task, rows, result["logits"], numbers, losses)
    headline = {"title": f"{task.name}: {content['split']}", "model": content["model"], "text": ""}
    page.write_page(folder, task, headline, [{**content, "mistakes": mistakes}])
    written = ["report.html", "evaluation.json", "predictions.csv", "errors.csv"]
    if others is not None:
        write_compared(folder, task, rows, result["predictions"], others, result["labels"])
        written.append("compared.csv")
    if left_out:
        write_bad_rows(folder / "bad_rows.csv", left_out)
        written.append("bad_rows.csv")
    return written


def other_predictions(path, task, splits, fingerprints, args, accelerator):
    """Return {split: predictions} of the model or the file that --compare names, for the examples of splits."""
    from classifier.evaluation import analysis
    from classifier.model import inference, tokenization
    from classifier.model.models import model_folder

    if not Path(path).exists():
        raise BadInput(f"--compare {path}: is not there", "Give a run, an evaluation folder, or a file of predictions.")
    if Path(path).is_file() or Path(path, "predictions.csv").is_file():
        return {name: analysis.read_predictions(path, task, rows) for name, rows in splits.items()}
    folder = model_folder(path)
    model, tokenizer, facts = load_model(folder, refresh=args.refresh)
    its_own = tasks.read_saved_task(folder)[0] or task
    reads = {key: getattr(its_own, key) for key in ("max_length", "truncate", "thresholds")}
    its_task = with_head_labels(model, facts, replace(task, **reads))
    its_task, examples = tokenization.tokenize_splits(its_task, splits, fingerprints, model, tokenizer)
    packer = prepare_model(model, tokenizer)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    predictions = {}
    for name in splits:
        logits = inference.compute_logits(model, examples[name], accelerator, args.eval_batch_size, packer)
        of_split = predictions_from_logits(its_task, logits)
        if not task.is_regression and its_task.labels != task.labels:  # the same labels, with other ids
            ids = np.array([task.labels.index(label) for label in its_task.labels])
            of_split = of_split[:, np.argsort(ids)] if task.is_multi_label else ids[of_split]
        predictions[name] = of_split
    return predictions


def main():
    args = build_parser().parse_args()
    if args.file:
        check_file(args.file)
    # These import torch, which takes seconds: --help and a mistake are to come at once.
    from classifier.data.facts import label_counts, small_classes_warning
    from classifier.data.splits import read_column
    from classifier.evaluation import analysis, metrics, report
    from classifier.files import check_output_folder
    from classifier.messages import in_red
    from classifier.model import inference, tokenization
    from classifier.model.models import base_model, model_folder, saved_metrics

    folder = model_folder(args.model)
    task, fingerprints = tasks.read_saved_task(folder)
    if task is None and not args.task:
        raise BadInput(f"{args.model}: has no task.json, so its data are not known", "Name them with --task.")
    if args.task or args.dataset or args.train_file or args.validation_file or args.test_file:
        fingerprints = {}  # other data than the model was trained on, by request
    task = tasks.task_from_args(args, default=task)
    split = args.split
    if args.file:
        split, fingerprints = "file", {}
        task = replace(task, dataset=None, files={split: args.file}, limit=tasks.parse_limits(args.limit))
    # MNLI has two validation splits: both are scored.
    beside = Path(folder if Path(folder).is_dir() else "").parent
    check_output_folder(Path(args.output_dir or beside))

    trained_precision, majority = saved_metrics(folder)
    if args.mixed_precision == "auto" and trained_precision != "fp16":  # fp16 is not to be had everywhere
        args.mixed_precision = trained_precision
    accelerator = processes.start(args)
    model, tokenizer, facts = load_model(folder, refresh=args.refresh)
    task = with_head_labels(model, facts, task)
    task, splits, now, bad_rows = common.load_data(task, args)
    names = [name for name in splits if name == split or name.startswith(f"{split}_")] or [split]
    common.check_splits(task, splits, names)
    if not args.limit:
        advice = "Score the data as they are now with --file, or bring back the old ones."
        common.check_unchanged(names, fingerprints, now, advice)
    scored = {name: splits[name] for name in names}
    columns = args.slices.split(",") if args.slices else []
    slices = {name: {of: read_column(task, name, rows, of) for of in columns} for name, rows in scored.items()}
    others, simpler = {}, {name: {} for name in names}
    if args.baseline:
        common.check_splits(task, splits, ["train"])
        given = (task, splits, names, now, base_model(folder, task))
        simpler = baseline_predictions(*given, accelerator, args.eval_batch_size)
        if words := small_classes_warning(task, label_counts(task, column_array(splits["train"], "label"))):
            log.warning(f"WARNING: {words}")
    if args.compare:
        others = other_predictions(args.compare, task, scored, now, args, accelerator)
    task, examples = tokenization.tokenize_splits(task, scored, now, model, tokenizer)
    packer = prepare_model(model, tokenizer)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for name, rows in scored.items():
        shown = Path(args.file).name.split(".")[0] if args.file else name
        output = Path(
            args.output_dir or beside / f"evaluation-{shown}", *([name] if len(names) > 1 and args.output_dir else [])
        )
        check_output_folder(output)
        logits = inference.compute_logits(model, examples[name], accelerator, args.eval_batch_size, packer)
        labels = column_array(rows, "label")
        # Without the training's majority at hand, that of these very labels: no baseline is higher.
        result = common.score_logits(
            task, logits, labels, majority_prediction(task, labels) if majority is None else majority
        )
        if not accelerator.is_main_process:
            continue
        left_out = [bad_row for bad_row in bad_rows if bad_row["split"] == name]
        content = {
            "model": facts["model"],
            "split": shown,
            "examples": len(logits),
            "bad_rows": len(left_out),
            "fingerprint": now[name],
            "mixed_precision": accelerator.mixed_precision,
            "loss": result["loss"],
            "scores": result["scores"],
            "intervals": metrics.intervals(task.metrics, result["predictions"], labels),
            "majority_baseline": result["majority"],
            "baselines": {of: metrics.compute_metrics(task.metrics, found, labels) for of, found in simpler[name].items()},
            "warning": report.collapse_warning(task, shown, result),
            **analysis.analyse(task, result, column_array(examples[name], "length"), slices[name]),
        }
        if args.compare:
            both = (args.model, args.compare)
            content["comparison"] = analysis.compare_models(task, both, result["predictions"], others[name], labels)
        if content["warning"]:
            log.warning(in_red(f"WARNING: {content['warning']}"))
        log.info(analysis.format_evaluation(content))
        try:
            written = write_evaluation(output, task, rows, result, content, left_out, others.get(name))
        except OSError as error:
            raise CannotWrite(output, error) from None
        log.info(f"written: {output}/{', '.join(written)}")
    return accelerator


if __name__ == "__main__":
    processes.run(main)


def baseline_predictions(task, splits, names, fingerprints, encoder, accelerator, batch_size):
    """Return {split: {baseline: predictions}} for the named splits, fitted to the split `train`.

    encoder: a pretrained model's name, or None. Every process calls this.
    """
    found = {name: {} for name in names}
    words = bag_of_words(task, splits["train"])
    for name in names:
        found[name]["bag of words"] = words(splits[name])
    if encoder:
        features = encoder_features(task, {"train", *names}, splits, fingerprints, encoder, accelerator, batch_size)
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), linear_model(task))
        model.fit(features["train"], cache.column_array(splits["train"], "label"))
        for name in names:
            found[name]["frozen encoder"] = model.predict(features[name])
    return found


def bag_of_words(task, train):
    """Fit TF-IDF with a linear model; return a function of rows that predicts ids, values, or 0 and 1.

    Words and pairs of words; characters where the texts are Chinese. Each text of a pair has columns of its own, and
    what both share has, too.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    unit = "char" if facts.is_chinese(train[:1000][task.text[0]]) else "word"
    # A word of one letter is a word, too: the default drops it, and may drop all.
    vectorizer = TfidfVectorizer(analyzer=unit, ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([text for column in task.text for text in train[column]])

    def matrix(rows):
        parts = [vectorizer.transform(rows[column]) for column in task.text]
        return hstack([*parts, parts[0].multiply(parts[1])]).tocsr() if len(parts) == 2 else parts[0]

    model = linear_model(task).fit(matrix(train), cache.column_array(train, "label"))
    return lambda rows: model.predict(matrix(rows))


def linear_model(task):
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if task.is_regression:
        return Ridge()
    model = LogisticRegression(max_iter=1000)
    return OneVsRestClassifier(model) if task.is_multi_label else model


def encoder_features(task, names, splits, fingerprints, encoder, accelerator, batch_size):
    """Return {split: the mean of the encoder's last hidden states over each example's tokens, (examples, size)}."""
    from classifier.model import inference, tokenization

    model, tokenizer, _ = load_model(encoder, task)
    named = {name: splits[name] for name in names}
    _, examples = tokenization.tokenize_splits(task, named, fingerprints, model, tokenizer)
    packer = prepare_model(model, tokenizer)
    packer.is_packed = False  # a mean over tokens needs to know whose they are
    base = model.base_model.to(accelerator.device).eval()

    def compute(inputs):
        with accelerator.autocast():
            hidden = base(**inputs)[0].float()
        is_token = inputs["attention_mask"].unsqueeze(-1)
        return (hidden * is_token).sum(1) / is_token.sum(1)

    return {
        name: inference.compute_outputs(compute, of_split, accelerator, batch_size, packer)
        for name, of_split in examples.items()
    }
