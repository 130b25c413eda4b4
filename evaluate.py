"""Score a saved model on a split of its own data or on a file: how good it is, how sure that is, and where it is wrong.

    python evaluate.py --model runs/mrpc                    # the validation split: the scores that training printed
    python evaluate.py --model runs/mrpc --split test
    python evaluate.py --model runs/mrpc --file more.csv    # a labelled file with the same columns
    python evaluate.py --model runs/mrpc --compare runs/mrpc,seed=2     # which is better, and is that significant?
    accelerate launch evaluate.py --model runs/mrpc         # several processes: each example is still counted once

Writes RUN/evaluation-SPLIT/ (--output_dir): evaluation.json (scores with 95 % intervals, classes, confusion matrix,
calibration, slices), report.html, predictions.csv with a row for every example, and errors.csv, the worst first.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

import common
from classifier import processes
from classifier.data import tasks
from classifier.data.cache import column_array
from classifier.data.facts import is_chinese, label_counts, small_classes_warning
from classifier.data.labels import (
    format_label,
    majority_prediction,
    prediction_columns,
    prediction_rows,
    predictions_from_logits,
)
from classifier.data.reader import check_file
from classifier.data.splits import read_column
from classifier.data.writer import write_bad_rows, write_csv
from classifier.evaluation import analysis, intervals, metrics, page
from classifier.files import CannotWrite, check_output_folder, safe_name, write_json
from classifier.messages import BadInput, in_red, log
from classifier.model.tokenization import tokenize_splits

# What imports torch is imported inside the functions: it takes seconds, and --help and bad input are answered at once.


def build_parser():
    parser = common.argument_parser(__doc__, data=True)
    add = parser.add_argument_group("evaluation").add_argument
    add("--model", required=True, metavar="ID|DIR", help="a run, a model folder, or a model on the Hub")
    add("--split", default="validation", help="of the task's data (default: validation)")
    add("--file", metavar="FILE", help="score this file instead of a split")
    add("--compare", metavar="OTHER", help="a run, an evaluation folder, or a file of predictions for the same texts")
    add("--slices", metavar="COLUMN[,COLUMN]", help="also score each value of these columns separately")
    add("--baseline", action="store_true", help="also fit and score a bag of words and a frozen encoder")
    add(
        "--output_dir",
        metavar="DIR",
        help="(default: RUN/evaluation-SPLIT; of another model evaluation-MODEL-SPLIT beside it)",
    )
    common.add_machine_arguments(parser)
    return parser


# --------------------------------------------------------------------------------------------- what to score, and where


def choose_data(args, folder):
    """Return (task, fingerprints, split) to score; fingerprints: of the training's splits, empty for other data."""
    task, fingerprints = tasks.read_saved_task(folder)
    if task is None and not args.task:
        raise BadInput(f"{args.model}: has no task.json, so its data are not known", "Name them with --task.")
    if args.task or args.dataset or args.train_file or args.validation_file or args.test_file:
        fingerprints = {}
    task = tasks.task_from_args(args, default=task)
    if not args.file:
        return task, fingerprints, args.split
    return replace(task, dataset=None, files={"file": args.file}, limit=tasks.parse_limits(args.limit)), {}, "file"


def output_folder(args, folder, title, splits):
    """Return the folder for the evaluation of a split. splits: how many of them --output_dir has to hold.

    Raises BadInput for a file in its place.
    """
    if args.output_dir:
        output = Path(args.output_dir) if splits == 1 else Path(args.output_dir, safe_name(title))
    else:
        # A run has one model, other folders may have several: a trainer's checkpoints, or this folder all of the Hub's.
        model = "" if Path(folder).is_dir() and Path(folder).name == "model" else f"{model_name(folder)}-"
        output = run_folder(folder) / safe_name(f"evaluation-{model}{title}", limit=100)
    check_output_folder(output)
    return output


def model_name(folder):
    """Return the name of a model folder, or of a model on the Hub as a name of one folder."""
    return Path(folder).resolve().name if Path(folder).is_dir() else str(folder).replace("/", "--")


def file_title(file):
    """Return the name of an evaluation on a file: the file's, without its format unless a split has that name, too."""
    name = Path(file).name
    stem = Path(name.removesuffix(".gz")).stem
    return name if stem in tasks.SPLIT_NAMES else stem


def run_folder(folder):
    """Return the folder that contains a model folder; the current one for a model on the Hub."""
    return Path(folder if Path(folder).is_dir() else "").parent


# ------------------------------------------------------------------------------------------ what to compare scores with


def other_predictions(path, task, splits, fingerprints, args, accelerator):
    """Return {split: predictions} of the model or the file that --compare names, for the examples of splits."""
    from classifier.model import inference
    from classifier.model.models import load_model, model_folder, with_head_labels
    from classifier.model.packing import prepare_to_infer

    if not Path(path).exists():
        raise BadInput(
            f"--compare {path}: does not exist", "Give a run, an evaluation folder, or predictions in a file."
        )
    if Path(path).is_file() or Path(path, "predictions.csv").is_file():
        return {name: analysis.read_predictions(path, task, rows) for name, rows in splits.items()}
    folder = model_folder(path)
    model, tokenizer, facts = load_model(folder, refresh=args.refresh)
    saved_task = tasks.read_saved_task(folder)[0] or task
    settings = {key: getattr(saved_task, key) for key in ("max_length", "truncate", "thresholds", "temperature")}
    other_task = with_head_labels(model, facts, replace(task, **settings))
    other_task, examples = tokenize_splits(other_task, splits, fingerprints, model, tokenizer)
    model, packer = prepare_to_infer(model, tokenizer, accelerator)
    predictions = {}
    for name in splits:
        logits = inference.compute_logits(model, examples[name], accelerator, args.eval_batch_size, packer)
        values = predictions_from_logits(other_task, logits)
        if not task.is_regression and other_task.labels != task.labels:  # the same labels with other ids
            ids = np.array([task.labels.index(label) for label in other_task.labels])
            values = values[:, np.argsort(ids)] if task.is_multi_label else ids[values]
        predictions[name] = values
    return predictions


def baseline_predictions(task, splits, names, fingerprints, encoder, accelerator, batch_size):
    """Return {split: {baseline: predictions}} for the named splits, fitted to the split `train`.

    encoder: a pretrained model's name, or None. Every process calls this.
    """
    common.check_splits(task, splits, ["train"])
    labels = column_array(splits["train"], "label")
    if warning := small_classes_warning(task, label_counts(task, labels)):
        log.warning(f"WARNING: {warning}")
    predict = fit_bag_of_words(task, splits["train"])
    predictions = {name: {"bag of words": predict(splits[name])} for name in names}
    if encoder:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features = encoder_features(task, {"train", *names}, splits, fingerprints, encoder, accelerator, batch_size)
        model = make_pipeline(StandardScaler(), linear_model(task)).fit(features["train"], labels)
        for name in names:
            predictions[name]["frozen encoder"] = model.predict(features[name])
    return predictions


def fit_bag_of_words(task, train):
    """Fit TF-IDF with a linear model; return a function of rows that predicts ids, values, or 0 and 1.

    Features are words and pairs of words, characters for Chinese texts. Each text of a pair has its own columns, and
    the products of the two are columns too: what both texts contain.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    unit = "char" if is_chinese(train[:1000][task.text[0]]) else "word"
    # The default pattern drops words of one letter, which may be all there are.
    vectorizer = TfidfVectorizer(analyzer=unit, ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([text for column in task.text for text in train[column]])

    def features(rows):
        blocks = [vectorizer.transform(rows[column]) for column in task.text]
        return hstack([*blocks, blocks[0].multiply(blocks[1])]).tocsr() if len(blocks) == 2 else blocks[0]

    model = linear_model(task).fit(features(train), column_array(train, "label"))
    return lambda rows: model.predict(features(rows))


def linear_model(task):
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if task.is_regression:
        return Ridge()
    model = LogisticRegression(max_iter=1000)
    return OneVsRestClassifier(model) if task.is_multi_label else model


def encoder_features(task, names, splits, fingerprints, encoder, accelerator, batch_size):
    """Return {split: the mean of the encoder's last hidden states over each example's tokens, (examples, size)}."""
    from classifier.model import inference
    from classifier.model.models import load_model
    from classifier.model.packing import prepare_model

    model, tokenizer, _ = load_model(encoder, task)
    chosen = {name: splits[name] for name in names}
    _, examples = tokenize_splits(task, chosen, fingerprints, model, tokenizer)
    packer = prepare_model(model, tokenizer)
    packer.is_packed = False  # a mean over an example's tokens needs a row for each example
    base = model.base_model.to(accelerator.device).eval()

    def mean_of_tokens(inputs):
        with accelerator.autocast():
            hidden = base(**inputs)[0].float()
        is_token = inputs["attention_mask"].unsqueeze(-1)
        return (hidden * is_token).sum(1) / is_token.sum(1)

    return {
        name: inference.compute_outputs(mean_of_tokens, rows, accelerator, batch_size, packer)
        for name, rows in examples.items()
    }


# ---------------------------------------------------------------------------------------------------- what it comes to


def choice_in_training(trained, split, task, args):
    """Return what the examples of a split chose in training, and the scores corrected for that; empty if nothing.

    trained: of models.saved_metrics. Empty, too, where other scores are asked for than the training had.
    """
    choice = None if args.file or args.limit else trained.get("choice", {}).get(split)
    corrected = trained["corrected_scores"][split] if choice else {}
    return {"choice": choice, "corrected_scores": corrected} if corrected.keys() >= set(task.metrics) else {}


def summarise(task, title, result, lengths, slices, baselines, trained_on):
    """Return the scores of evaluation.json and what they are made of.

    result: of common.score_logits; lengths: (examples,), in tokens; slices: {column: a value for each example};
    baselines: {name: predictions}; trained_on: the splits whose scores say nothing about other texts.
    """
    from classifier.evaluation import report

    labels = result["labels"]
    return {
        "loss": result["loss"],
        "scores": result["scores"],
        "intervals": intervals.score_intervals(task.metrics, result["predictions"], labels),
        "no_interval": intervals.missing_intervals(task.metrics, result["predictions"], labels),
        "majority_baseline": result["majority"],
        "baselines": {
            name: metrics.compute_metrics(task.metrics, predictions, labels) for name, predictions in baselines.items()
        },
        "warning": report.collapse_warning(task, title, result) or trained_on_warning(title, trained_on),
        **analysis.analyse(task, result, lengths, slices),
    }


def trained_on_warning(title, trained_on):
    """Return a warning if the model was trained on this split, else None."""
    words = f"the model was trained on {title}: these scores say nothing about other texts"
    return words if title in trained_on else None


def write_evaluation(folder, task, rows, result, content, bad_rows, others):
    """Write all files of an evaluation into a folder.

    result: of common.score_logits; content: of evaluation.json; others: predictions of another model, or None. Raises
    CannotWrite.
    """
    numbers, losses = analysis.worst_mistakes(result)
    headline = {"title": f"{task.name}: {content['split']}", "model": content["model"], "text": ""}
    mistakes = page.mistake_rows(task, rows, result["logits"], numbers, losses)
    names = ["report.html", "evaluation.json", "predictions.csv", "errors.csv"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder, task, rows, result["logits"], numbers, losses)
        write_json(folder / "evaluation.json", content)
        page.write_page(folder, task, headline, [{**content, "mistakes": mistakes}])
        if others is not None:
            write_compared(folder, task, rows, result["predictions"], others, result["labels"])
            names.append("compared.csv")
        if bad_rows:
            write_bad_rows(folder / "bad_rows.csv", bad_rows)
            names.append("bad_rows.csv")
    except OSError as error:
        raise CannotWrite(folder, error) from None
    log.info(f"written: {folder}/{', '.join(names)}")


def write_predictions(folder, task, rows, logits, wrong, losses):
    """Write predictions.csv, a row for every example, and errors.csv. wrong, losses: of analysis.worst_mistakes."""
    columns = [*task.text, "label", *prediction_columns(task)]

    def cells(row, prediction):
        return [*(row[column] for column in task.text), format_label(task, row["label"]), *prediction]

    pairs = zip(rows, prediction_rows(task, logits), strict=True)
    write_csv(folder / "predictions.csv", columns, (cells(*pair) for pair in pairs))
    mistakes = zip(wrong, losses, rows.select(wrong), prediction_rows(task, logits[wrong]), strict=True)
    lines = ([int(number), f"{loss:.4f}", *cells(*pair)] for number, loss, *pair in mistakes)
    write_csv(folder / "errors.csv", ["example", "loss", *columns], lines)


def write_compared(folder, task, rows, predictions, others, labels):
    """Write compared.csv: the examples that exactly one of two models gets right."""
    numbers = analysis.only_one_right(predictions, others, labels)
    lines = (
        [
            int(number),
            *(row[column] for column in task.text),
            *(format_label(task, values[number]) for values in (labels, predictions, others)),
        ]
        for number, row in zip(numbers, rows.select(numbers), strict=True)
    )
    write_csv(folder / "compared.csv", ["example", *task.text, "label", "here", "other"], lines)


def main():
    args = build_parser().parse_args()
    if args.file:
        check_file(args.file)
    from classifier.model import inference
    from classifier.model.models import base_model, load_model, model_folder, saved_metrics, with_head_labels
    from classifier.model.packing import prepare_to_infer

    # --- the data, and the model in the precision of its training
    folder = model_folder(args.model)
    trained = saved_metrics(folder)
    task, fingerprints, split = choose_data(args, folder)
    check_output_folder(Path(args.output_dir or run_folder(folder)))
    if args.mixed_precision == "auto" and trained.get("mixed_precision") != "fp16":  # which not every device has
        args.mixed_precision = trained.get("mixed_precision", "auto")
    accelerator = processes.start(args)
    model, tokenizer, facts = load_model(folder, refresh=args.refresh)
    task = with_head_labels(model, facts, task)
    task, splits, current, bad_rows = common.load_data(task, args)
    # MNLI has two validation splits: both are scored.
    names = [name for name in splits if name == split or name.startswith(f"{split}_")] or [split]
    common.check_splits(task, splits, names)
    if not args.limit:
        advice = "Score the current data with --file, or restore the old data."
        common.check_unchanged(names, fingerprints, current, advice)
    trained_on = trained.get("trained_on", ["train"]) if fingerprints else []
    titles = {name: file_title(args.file) if args.file else name for name in names}
    outputs = {name: output_folder(args, folder, title, len(names)) for name, title in titles.items()}

    # --- what the scores are compared with
    columns = args.slices.split(",") if args.slices else []
    slices = {name: {column: read_column(task, name, splits[name], column) for column in columns} for name in names}
    scored = {name: splits[name] for name in names}
    baselines, others, batch_size = {}, {}, args.eval_batch_size
    if args.baseline:
        encoder = base_model(folder, task)
        baselines = baseline_predictions(task, splits, names, current, encoder, accelerator, batch_size)
    if args.compare:
        others = other_predictions(args.compare, task, scored, current, args, accelerator)

    # --- logits and scores
    task, examples = tokenize_splits(task, scored, current, model, tokenizer)
    model, packer = prepare_to_infer(model, tokenizer, accelerator)
    for name, rows in scored.items():
        logits = inference.compute_logits(model, examples[name], accelerator, batch_size, packer)
        labels, lengths = column_array(rows, "label"), column_array(examples[name], "length")
        # If the training's majority is unknown, that of these labels stands in: no constant scores higher.
        baseline = trained.get("majority", majority_prediction(task, labels))
        result = common.score_logits(task, logits, labels, baseline)
        if not accelerator.is_main_process:
            continue
        skipped = [bad_row for bad_row in bad_rows if bad_row["split"] == name]
        content = {
            "model": facts["model"],
            "split": titles[name],
            "examples": len(rows),
            "bad_rows": len(skipped),
            "fingerprint": current[name],
            "mixed_precision": accelerator.mixed_precision,
            **summarise(task, titles[name], result, lengths, slices[name], baselines.get(name, {}), trained_on),
            **choice_in_training(trained, name, task, args),
        }
        if args.compare:
            models = (args.model, args.compare)
            content["comparison"] = analysis.compare_models(task, models, result["predictions"], others[name], labels)
        if content["warning"]:
            log.warning(in_red(f"WARNING: {content['warning']}"))
        log.info(analysis.format_evaluation(content))
        write_evaluation(outputs[name], task, rows, result, content, skipped, others.get(name))
    return accelerator


if __name__ == "__main__":
    processes.run(main)
