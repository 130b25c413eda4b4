"""What is told of a run: what its data are like, what it will take, what it came to; results.json."""

import json
import math
import platform
from importlib.metadata import version

import numpy as np
import torch

import analysis
import batching
import facts
import metrics
import uncertainty
from cache import array_of
from card import model_card, model_words  # noqa: F401 - for train.py
from common import RunFailed, clock, example_losses, log, number_words, score_words
from progress import Progress, start_trackers, tracker_names  # noqa: F401 - for train.py


def describe_data(task, splits, examples, batches, micro_batch_size, accelerator, tokenizer, layout):
    """Log the facts of the data, and what may be wrong with them; return the facts (see facts.data_facts)."""
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    lengths = array_of(examples["train"], "length")
    of_epoch = batches[: math.ceil(len(lengths) / len(batches[0]))]
    worth = batching.worth_of_a_pass(layout, accelerator.device)
    computed = batching.tokens_with_padding(lengths, of_epoch, accelerator.num_processes, micro_batch_size, worth)
    padding = 1 - sum(int(lengths[batch].sum()) for batch in of_epoch) / computed
    data = facts.data_facts(task, splits, examples, special, padding)
    for name, of_split in data["splits"].items():
        log.info(f"{name}: {_split_words(task, of_split)}")
    if not layout.is_row:
        log.info(f"padding: {data['padding']:.1%} of what a step computes")
    for warning in _data_warnings(task, splits, data):
        log.warning(f"WARNING: {warning}")
    return data


def _split_words(task, of_split):
    """Return the facts of one split in words."""
    rows, tokens, labels = of_split["rows"], of_split["tokens"], list(of_split["labels"].items())
    if task.is_regression:
        words = ", ".join(f"{what} {value:.2f}" for what, value in labels)
    else:
        words = ", ".join(f"{label} {number:,} ({number / rows:.1%})" for label, number in labels[:10])
    return (
        f"{rows:,} rows | labels: {words} | tokens: median {tokens['median']:.0f}, 95 % up to {tokens['p95']:.0f}, "
        f"longest {tokens['longest']}; {of_split['truncated']:.1%} of the texts cut, {of_split['unknown']:.2%} of the "
        f"tokens unknown, {of_split['tokens_per_character']:.2f} a character"
    )


def _data_warnings(task, splits, data):
    """Yield in words what may be wrong with the data."""

    def example(split, row):
        return repr(" / ".join(splits[split][row][column] for column in task.text)[:80])

    of_train = data["splits"]["train"]
    if of_train["unknown"] > 0.2:
        chinese = facts.is_chinese(splits["train"][:1000][task.text[0]])
        better = "google-bert/bert-base-chinese" if chinese else "FacebookAI/xlm-roberta-base"
        unknown = f"{of_train['unknown']:.0%} OF THE TOKENS ARE UNKNOWN"
        yield f"THE TOKENIZER DOES NOT KNOW THIS LANGUAGE: {unknown}. The model cannot read them; try --model {better}"
    elif of_train["unknown"] > 0.01:
        yield f"{of_train['unknown']:.1%} of the tokens are unknown to the tokenizer: does the model fit the language?"
    for variants in data["label_variants"]:
        yield f"labels that differ only in case or blanks: {', '.join(map(repr, variants))}; one class each"
    for name, of_split in data["splits"].items():
        found = of_split["conflicts"]
        if found["texts"]:
            row = example(name, found["position"])
            yield f"{name}: {found['texts']} texts occur with different labels, such as {row}"
    for name, found in data["duplicates"].items():
        if found["rows"]:
            row = example(name, found["position"])
            words = f"{found['rows']} of {len(splits[name])} rows of {name} ({found['share']:.1%}) are in train too"
            yield f"{words}: its scores are too good by that; such as {row}"
    if words := few_rows(task, of_train["labels"]):
        yield words


def few_rows(task, counts):
    """Return in words which classes have few rows in train, as facts.label_counts gives them; None where none has."""
    few = [] if task.is_regression else [f"{name} ({rows})" for name, rows in counts.items() if rows < facts.FEW]
    words = f"classes with fewer than {facts.FEW} rows in train: {', '.join(few[:10])}"
    return f"{words}; methods made for few examples, such as SetFit, are likely better at them" if few else None


def describe_run(task, args, accelerator, model, layout, plan, examples, validation_splits, progress, micro_batch):
    """Log what the whole run will take, after a few steps of it; on a GPU also how its numbers differ from a CPU's.

    plan: the global batches of the whole run; micro_batch: one that was trained on. The time is that of training and
    evaluating, without the start.
    """
    processes, steps = accelerator.num_processes, len(plan)
    of_process = math.ceil(args.batch_size / processes)
    micro_batch_size = min(progress.state.micro_batch_size, of_process)
    seconds, filled = np.sum(progress.intervals[len(progress.intervals) // 2 :], axis=0)  # the first steps warm up
    rate = filled / seconds
    lengths = facts.array_of(examples["train"], "length")
    worth = batching.worth_of_a_pass(layout, accelerator.device)
    training = batching.tokens_with_padding(lengths, plan, processes, micro_batch_size, worth) / rate
    every = progress.steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
    evaluations = math.ceil(steps / every)
    tokens = sum(int(facts.array_of(examples[name], "length").sum()) for name in validation_splits)
    tokens += lengths.mean() * min(args.eval_train_rows or 0, len(lengths))
    # A forward pass alone takes a third of a training step; with a frozen encoder, whose features are computed once
    # for all epochs but not here, most of it. Once, the metrics are loaded.
    bound, part = ("at most ", 1) if args.freeze == "encoder" else ("", 1 / 3)
    evaluating = evaluations * tokens * part / rate + progress.state.evaluation_seconds
    whole, parts = clock(training + evaluating), f"{clock(training)} training, {clock(evaluating)} evaluating"
    saved = sum(file.stat().st_size for file in (progress.lines.parent / "checkpoints").rglob("*") if file.is_file())
    weights = sum(value.nbytes for value in model.state_dict().values())
    memory = facts.peak_memory(accelerator.device) / 2**30
    table = {
        "steps": f"{steps} of {args.batch_size}, {progress.steps_per_epoch} an epoch; {evaluations} evaluations",
        "batch": f"{args.batch_size} = {processes} process(es) x {of_process}, {micro_batch_size} at a time",
        "memory": f"{memory:.2f} GiB in each process; the longest texts may need more",
        "time": f"{bound}{whole} ({parts}), give or take 20 %",
        "files": f"{args.output_dir}/: model/ {weights / 1e6:.0f} MB, and until then up to "
        f"{args.keep_checkpoints + 2} checkpoints of {saved / 1e6:.0f} MB",
    }
    if accelerator.device.type != "cpu" and accelerator.is_main_process:
        table["check"] = _check_against_cpu(task, accelerator, model, layout, micro_batch)
    log.info("\n".join(f"{name:8}{words}" for name, words in table.items()))


def _check_against_cpu(task, accelerator, model, layout, micro_batch):
    """Return in words how far the device's numbers are from the CPU's; warn where that is too far."""

    def loss_of(logits, labels):
        return example_losses(task, logits, labels).mean()

    logits, gradients = facts.compare_with_cpu(model, layout, micro_batch, loss_of, accelerator.autocast())
    words = f"largest difference from fp32 on the CPU: logits {logits:.1e}, gradients {gradients:.1e}"
    tolerance = facts.TOLERANCE[accelerator.mixed_precision]
    if not (logits < tolerance and gradients < tolerance):  # NaN is not below anything, and no maximum
        log.warning(f"WARNING: {accelerator.device.type.upper()} COMPUTES OTHER NUMBERS THAN THE CPU: {words}")
    return words


def results(args, task, facts, progress, evaluations, data, accelerator):
    """Return the content of results.json; evaluations: of the best model, by split."""
    return {
        "task": task.name,
        "model": facts["model"],
        "model_commit": facts["commit"],
        "seed": args.seed,
        **progress.totals(),
        "best_step": progress.state.best["step"],
        "scores": {name: evaluation["scores"] for name, evaluation in evaluations.items()},
        "intervals": {
            name: uncertainty.intervals(task.metrics, evaluation["predictions"], evaluation["labels"])
            for name, evaluation in evaluations.items()
        },
        "majority_baseline": {name: evaluation["majority"] for name, evaluation in evaluations.items()},
        "data": data,
        "settings": vars(args),
        **environment(accelerator),
    }


def summary(results):
    """Return the scores of a finished run as lines: each split's, the majority's, and 95 % intervals."""
    lines = [
        f"{results['steps']} steps in {clock(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; best at step {results['best_step']}"
    ]
    for split, scores in results["scores"].items():
        lines.append(f"{split}: {score_words(scores)} (majority: {score_words(results['majority_baseline'][split])})")
        lines.append(f"{split}, 95 % intervals: {uncertainty.words(results.get('intervals', {}).get(split, {}))}")
    return "\n".join(lines)


def epoch_table(lines):
    """Return the evaluations in metrics.jsonl as lines of a table: losses, scores, and the time that each took."""
    rows, before = [], 0.0
    lines = [line for line in lines if line["type"] == "eval"]
    names = list(lines[0]["scores"]) if lines else []
    for line in lines:
        # All splits of one evaluation come together; the time goes with the first of them.
        seconds, before = line["seconds"] - before, line["seconds"]
        numbers = [line["train_loss"], line["loss"], *(line["scores"][name] for name in names)]
        rows.append([f"{line['epoch']:.2f}", line["split"], *map(number_words, numbers), clock(seconds)])
    rows = [["epoch", "split", "train loss", "loss", *names, "h:mm:ss"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows)


def overfitting(lines):
    """Return a hint where the validation loss has risen since its lowest while the training loss fell, else None."""
    lines = [line for line in lines if line["type"] == "eval" and line["split"] != "train"]
    lines = [line for line in lines if line["split"] == lines[0]["split"]]
    lowest, last = min(lines, key=lambda line: line["loss"], default=None), lines[-1] if lines else None
    if not lines or last["loss"] <= 1.05 * lowest["loss"] or last["train_loss"] >= lowest["train_loss"]:
        return None
    return (
        f"{lowest['split']} loss rose from {lowest['loss']:.4f} (epoch {lowest['epoch']:.2f}) to {last['loss']:.4f} "
        "while that of train fell: the model learns its examples by heart. What usually helps: fewer --epochs, "
        "--early_stopping_patience 2, a lower --learning_rate, --weight_decay 0.1, more data."
    )


def say_results(folder, task, results, evaluations, progress):
    """Log what a run has come to: first what is wrong with it, then the table of its epochs, and its scores."""
    if progress.state.step < progress.total_steps:
        since = progress.state.evaluations_since_best
        log.info(f"no better {task.metrics[0]} in {since} evaluations: stopped early")
    for name, evaluation in evaluations.items():
        if warning := collapse(task, name, evaluation):
            log.warning(in_red(f"WARNING: {warning}"))
    lines = lines_of(folder)
    if hint := overfitting(lines):
        log.warning(f"WARNING: {hint}")
    log.info(f"{epoch_table(lines)}\n{summary(results)}\nmodel: {folder / 'model'}, report: {folder / 'report.html'}")


def lines_of(folder):
    """Return the lines of a run's metrics.jsonl; none where there is no such file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def in_red(words):
    """Return words as a terminal shows them in red; as they are where the log goes elsewhere."""
    return f"\x1b[1;31m{words}\x1b[0m" if log.handlers and log.handlers[0].stream.isatty() else words


def write_page(folder, task, results, evaluations, splits, examples):
    """Write report.html and plots/ of a run. Raises RunFailed where that does not work."""
    import page

    contents = []
    for split in [name for name in evaluations if name != "train"]:
        evaluation = evaluations[split]
        contents.append(
            {
                "split": split,
                "examples": len(evaluation["labels"]),
                "scores": evaluation["scores"],
                "majority_baseline": evaluation["majority"],
                "intervals": results["intervals"][split],
                "warning": collapse(task, split, evaluation),
                **analysis.analyse(task, evaluation, array_of(examples[split], "length"), {}),
                "mistakes": page.mistakes_of(
                    task, splits[split], evaluation["logits"], *analysis.mistakes(task, evaluation)
                ),
            }
        )
    lines = lines_of(folder)
    headline = {
        "title": task.name,
        "model": model_words(results),
        "text": f"{results['steps']} steps in {clock(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; the best at step {results['best_step']}",
        "hint": overfitting(lines),
    }
    tables = {
        "Settings": results["settings"],
        "Data": {**results["data"], "source": task.source, "licence": task.licence},
        "Environment": {name: results[name] for name in ("num_processes", "mixed_precision", "versions", "hardware")},
    }
    try:
        page.write(folder, task, headline, contents, lines, tables)
    except OSError as error:
        words = f"{folder}/report.html could not be written: {error}\nMend this; then the same command."
        raise RunFailed(words) from error


def already_complete(folder, results, final_test):
    """Log the scores of a run that is finished."""
    log.info(f"{folder}: already complete (--overwrite trains again)\n{summary(results)}")
    if final_test and not any(name.startswith("test") for name in results["scores"]):
        log.info(f"its test split was not scored: evaluate.py --model {folder} --split test")


def collapse(task, split, evaluation):
    """Return None, or in words that a model has learnt nothing: one prediction for all, no better than the majority."""
    metric, constant = task.metrics[0], evaluation["constant"]
    score, limit = evaluation["scores"][metric], evaluation["majority"][metric]
    if constant is not None:
        what = f"ON {split.upper()} THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE"
        if not task.is_multi_label:
            what += f": {constant if task.is_regression else task.labels[constant]!r}"
    elif limit is not None and not metrics.is_better(metric, score, limit):
        words = f"{metric} {number_words(score)} to {number_words(limit)}"
        what = f"ON {split.upper()} THE MODEL IS NO BETTER THAN THE MAJORITY CLASS ({words})"
    else:
        return None
    return (
        f"{what}.\nIt has learnt nothing of use. What usually helps: a lower --learning_rate, "
        "--warmup_ratio 0.1, more --epochs, another --seed, --class_weights balanced; or the labels are wrong."
    )


def environment(accelerator):
    """Return the versions of Python and of the libraries that numbers depend on, and what they were computed on.

    As observed: `products` is the type of a product under autocast.
    """
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    device = accelerator.device
    one = torch.ones(1, 1, device=device)
    with accelerator.autocast():
        products = (one @ one).dtype
    return {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": {
            "device": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "products": str(products).removeprefix("torch."),
            "gradient_scaler": accelerator.scaler is not None,
        },
    }
