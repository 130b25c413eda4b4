"""Export a saved model to ONNX, with a certificate: its whole validation split through onnxruntime, beside torch.

    python export.py --model runs/mrpc                      # float32
    python export.py --model runs/mrpc --quantize int8      # and model_int8.onnx: smaller, faster, a little less exact
    python predict.py --model runs/mrpc/model/onnx --text "He left." --text_pair "He went away."
    python predict.py --model runs/mrpc/model/onnx/model_int8.onnx --input pairs.csv --output labelled.csv

Writes RUN/model/onnx/, whole or not at all: model.onnx, model_int8.onnx, config.json, the tokenizer, task.json, and
certificate.json: the first metric, its difference from torch with a 95 % interval, the largest difference of a logit,
milliseconds per example, bytes. The model card repeats it. Where the numbers are off, nothing is left, and exit code 1.

Inputs, int64 (batch, length): input_ids, attention_mask and, if the model reads them, token_type_ids. Output: logits,
float32 (batch, outputs). Batches of any size, and lengths from 1 to the model's maximum.
"""

import logging
import math
import re
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

import common
from classifier import processes
from classifier.data import tasks
from classifier.data.cache import column_array
from classifier.data.labels import predictions_from_logits
from classifier.evaluation import metrics
from classifier.files import sha256, write_json, write_text
from classifier.messages import BadInput, RunFailed, format_duration, format_score, log
from classifier.model.models import load_model, with_head_labels
from classifier.model.tokenization import encode, token_columns
from classifier.predictor import start_exported

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZED = ["MatMul", "Gemm", "Gather"]  # products, and the tables of embeddings
LARGEST = 2**31 - 2**25  # bytes of weights in an .onnx file, whose format ends at 2 GiB; more lie in a file beside it


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--model", required=True, metavar="DIR", help="a run, or a model folder")
    add("--quantize", choices=["int8"], help="int8: write a quantized model, too")
    words = "how far a float32 logit may be from torch's; sums in another order: 1e-6 to 3e-5 (default: 1e-4)"
    add("--atol", type=common.non_negative_float, default=1e-4, metavar="X", help=words)
    common.add_machine_arguments(parser)
    parser.set_defaults(refresh=False)  # the data stay those of the training
    return parser


@contextmanager
def quiet():
    """Keep the exporter's warnings off the terminal: they are about torchvision, and names of axes."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(model, columns, file):
    """Write a transformers model as an .onnx file. columns: what it reads beside the mask."""
    import torch

    # Two different sizes above 1: torch takes a 1 for a constant, and equal sizes for one size. With padding.
    inputs = {name: torch.zeros(3, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    inputs["attention_mask"][:, :5] = 1
    inputs = {name: value for name, value in inputs.items() if name in (*columns, "attention_mask")}
    attention = model.config._attn_implementation
    large = sum(parameter.nbytes for parameter in model.parameters()) > LARGEST
    try:
        with quiet():
            model.set_attn_implementation(
                "eager"
            )  # fewer nodes than torch's own; MiniLM: a tenth faster in batches, alone no slower
            torch.onnx.export(
                model,
                (),
                str(file),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in inputs},
                dynamo=True,
                external_data=large,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        words = " ".join(str(error).split())[:300]
        raise RunFailed(f"a {model.config.model_type} model cannot be exported by torch ({words})") from error
    finally:
        model.set_attn_implementation(attention)


def write_int8(source, target):
    """Write a quantized .onnx file: weights in 8 bits, activations in 8 bits by the range that each batch has."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        model = onnx.load(source)
        # The quantizer turns some weights round, and would stop at the shapes that the exporter noted of them.
        del model.graph.value_info[:]
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,  # a scale for each row of weights; on MRPC half the difference of one for all
            reduce_range=True,  # weights of 7 bits: sums of 8 overflow on CPUs without VNNI, and no certificate holds
            weight_type=QuantType.QInt8,
            use_external_data_format=target.with_name(f"{source.name}.data").exists(),
        )


def torch_forward(model, pad_token_id):
    """Return the function of a Predictor that computes as transformers does, on padded rows, in float32."""
    import torch

    from classifier.model.packing import pad

    def forward(batch):
        with torch.inference_mode():
            return model(**pad(batch, pad_token_id)).logits.numpy()

    return forward


def write_card(file, name, words):
    """Put a section on ONNX at the end of a model card, in place of an older one."""
    card = file.read_text(encoding="utf-8") if file.is_file() else f"# {name}\n"
    card = re.sub(r"^## ONNX\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    write_text(file, f"{card.rstrip()}\n\n{words}")


def saved(folder, args):
    """Return (model, tokenizer, task, {split: rows}) of a model folder, with its own validation splits."""
    from classifier.model.tokenization import longest_input

    task, fingerprints = tasks.read_saved_task(folder)
    if task is None:
        raise BadInput(f"{args.model}: has no task.json, so its data are not known", "Train it here: train.py.")
    model, tokenizer, facts = load_model(folder)
    task = with_head_labels(model, facts, task)
    task, splits, now, _ = common.load_data(task, args)
    names = [name for name in splits if name.startswith("validation")] or ["validation"]
    common.check_splits(task, splits, names)
    common.check_unchanged(names, fingerprints, now, "Bring back the old data: the certificate is about them.")
    if not tokenizer.is_fast:
        raise BadInput(f"{args.model}: its tokenizer has no tokenizer.json", "Take a model with a fast tokenizer.")
    task = replace(task, max_length=task.max_length or longest_input(model, tokenizer))
    return model.eval(), tokenizer, task, {name: splits[name] for name in names}


def export(folder, temporary, args, threads):
    """Write all files of an export into the folder `temporary`; return the certificate. Raises RunFailed."""
    from classifier.predictor import Predictor, load

    model, tokenizer, task, splits = saved(folder, args)
    columns = token_columns(tokenizer)
    files = {"fp32": temporary / "model.onnx"} | ({"int8": temporary / "model_int8.onnx"} if args.quantize else {})
    temporary.mkdir()
    write_onnx(model, columns, files["fp32"])
    if args.quantize:
        write_int8(*files.values())
    tokenizer.save_pretrained(temporary)
    tasks.save_task(task, tasks.read_saved_task(folder)[1], temporary / "task.json")
    write_text(temporary / "config.json", model.config.to_json_string(use_diff=False))  # the pad token, too
    forward = torch_forward(model, model.config.pad_token_id or 0)
    predictors = {"torch": Predictor(task, tokenizer, forward, args.eval_batch_size, [])}
    predictors |= {name: load(file, None, args.eval_batch_size, threads) for name, file in files.items()}
    logits = {}
    for name, predictor in predictors.items():
        started = time.perf_counter()
        logits[name] = {split: predictor.logits_of_rows(rows) for split, rows in splits.items()}
        log.info(f"{name}: {', '.join(splits)} in {format_duration(time.perf_counter() - started)}")
    content = certify(task, logits, splits)
    lengths, largest = difference_of_lengths(model, columns, task.max_length, forward, predictors["fp32"].forward)
    content["lengths"] = {"tokens": lengths, "largest_logit_difference": largest}
    check_certificate(task, content, args.atol)
    first = next(iter(splits.values()))
    timed = {"in_batches": args.eval_batch_size, "alone": 1}
    for how, size in timed.items():
        for name, value in milliseconds(predictors, first, size).items():
            content[name][f"milliseconds_per_example_{how}"] = value
    for name, file in {"torch": folder / "model.safetensors", **files}.items():
        parts = sorted(file.parent.glob(f"{file.name}*"))  # large ones have a second file
        content[name] |= {"file": file.name, "bytes": sum(part.stat().st_size for part in parts)}
        content[name] |= {"sha256": {part.name: sha256(part) for part in parts}}
    about = {"task": task.name, "metric": task.metrics[0], "atol": args.atol, "threads": threads}
    about |= {"examples": {split: len(rows) for split, rows in splits.items()}, "batch_size": args.eval_batch_size}
    return {**about, "versions": {name: version(name) for name in ("torch", "transformers", *PACKAGES)}, **content}


def main():
    args = build_parser().parse_args()
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise BadInput(f"needs the package {name}", "pip install -r requirements-extra.txt") from None
    from classifier.files import recover_folder, replace_folder
    from classifier.model.models import model_folder
    from classifier.training import checkpoint

    folder = Path(model_folder(args.model))
    if not folder.is_dir():
        raise BadInput(f"{args.model}: is not a folder", "Give a run, or a model folder: first train.py.")
    _, threads = start_exported(args)
    checkpoint.torch.set_num_threads(threads)
    processes.quieten_libraries()
    output, temporary = folder / "onnx", folder / "onnx.tmp"
    recover_folder(output)
    try:
        content = export(folder, temporary, args, threads)
        write_json(temporary / "certificate.json", content)
        replace_folder(temporary, output)
        write_card(folder / "README.md", content["task"], card_section(content))
    except OSError as error:
        raise RunFailed(f"{output} could not be written: {error}\nMend this; then the same command.") from error
    finally:
        recover_folder(output)
    log.info(f"{card_section(content)}\nwritten: {output}/, {folder / 'README.md'}")


if __name__ == "__main__":
    processes.run(main)

TIMED, ROUNDS = 128, 5  # examples that are timed, and how often
TOGETHER = 1024  # tokens up to which several examples of any length fit into memory with all their attention weights


def difference_of_lengths(model, columns, max_length, ours, theirs):
    """Return (lengths, largest difference of a logit) of random tokens: from 1 to the longest, alone and together.

    ours, theirs: forward passes, as a Predictor has them.
    """
    generator, lengths = np.random.default_rng(0), sorted({1, 2, max_length // 2, max_length})
    types = getattr(model.config, "type_vocab_size", None) or 1
    limits = {"input_ids": model.get_input_embeddings().num_embeddings, "token_type_ids": types}
    batch = {name: [generator.integers(0, limits[name], length) for length in lengths] for name in columns}
    # RoBERTa counts positions without the padding token.
    pad, size = model.config.pad_token_id, limits["input_ids"]
    batch["input_ids"] = [np.where(ids == pad, (ids + 1) % size, ids) for ids in batch["input_ids"]]
    batches = [{name: [rows[at]] for name, rows in batch.items()} for at in range(len(lengths))]
    if max_length <= TOGETHER:
        batches.append(batch)
    return lengths, max(float(abs(ours(some) - theirs(some)).max()) for some in batches)


def milliseconds(predictors, rows, size):
    """Return {name: milliseconds per example} of the forward passes, `size` examples at a time: medians of rounds.

    In turn, on the same batches: examples of all lengths, those of like length together.
    """
    task = predictors["torch"].task
    some = rows[np.linspace(0, len(rows) - 1, min(TIMED if size > 1 else TIMED // 4, len(rows))).astype(int)]
    encoded, _ = encode(task, predictors["torch"].tokenizer, [some[column] for column in task.text], task.max_length)
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]])
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [{name: [ids[i] for i in part] for name, ids in encoded.items()} for part in parts]
    seconds = {name: [] for name in predictors}
    for _ in range(ROUNDS + 1):
        for name, predictor in predictors.items():
            started = time.perf_counter()
            for batch in batches:
                predictor.forward(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(of[1:])) / len(order) for name, of in seconds.items()}  # the first warms up


def certify(task, logits, splits):
    """Return what certificate.json says of an exported model's logits beside torch's, by name and split.

    logits: {name: {split: (examples, outputs)}}, "torch" among the names; splits: {split: rows}.
    """
    metric, content = task.metrics[0], {}
    for name, of_splits in logits.items():
        content[name] = {"scores": {}}
        if name != "torch":
            content[name] |= {"differences": {}, "intervals": {}, "largest_logit_difference": 0.0}
        for split, found in of_splits.items():
            labels, theirs = column_array(splits[split], "label"), logits["torch"][split]
            if not np.isfinite(found).all():
                raise RunFailed(f"{name}: some logits of {split} are not finite")
            predictions, others = predictions_from_logits(task, found), predictions_from_logits(task, theirs)
            score = content[name]["scores"][split] = metrics.compute_metrics([metric], predictions, labels, warns=False)[metric]
            if name == "torch":
                continue
            before, this = content["torch"]["scores"][split], content[name]
            is_known = None not in (score, before)
            this["differences"][split] = score - before if is_known else None
            intervals = metrics.difference_intervals([metric], predictions, others, labels)
            this["intervals"][split] = intervals[metric] if is_known else None
            largest = float(abs(found.astype(np.float64) - theirs).max())
            this["largest_logit_difference"] = max(this["largest_logit_difference"], largest)
    return content


def check_certificate(task, content, atol):
    """Raise RunFailed where a logit in float32 is off by more than atol, or a score fell by more than chance."""
    metric, of_fp32 = task.metrics[0], content["fp32"]
    largest = max(of_fp32["largest_logit_difference"], content["lengths"]["largest_logit_difference"])
    if not largest <= atol:
        words = "Nothing was written. Give a larger --atol if your use allows it."
        raise RunFailed(f"fp32: a logit is {largest:.1e} from torch's, more than --atol {atol:g}\n{words}")
    for name in [name for name in ("fp32", "int8") if name in content]:
        for split, score in content[name]["scores"].items():
            before, interval = content["torch"]["scores"][split], content[name]["intervals"][split]
            if metrics.is_better(metric, before, score) and (words := describe_fall(metric, before, score, interval)):
                words = f"{name}: {metric} of {split} fell from {words}"
                raise RunFailed(f"{words}\nNothing was written.{' Export without --quantize.' * (name == 'int8')}")


def describe_fall(metric, before, score, interval):
    """Return a fall from one score to another in words; None where it may be chance, or rounding."""
    if interval is None:  # a fall to say of where only torch's score has a value
        return f"{before:.4f} to {format_score(score)}" if score is None else None
    margin = metrics.rounding_margin(metric, before, score)
    if not metrics.is_beyond_margin(interval, margin):
        return None
    digits = max(4, math.ceil(-math.log10(margin)))  # an error may be smaller than 0.0001
    low, high = map(metrics.format_difference, interval)
    return (
        f"{before:.{digits}f} to {score:.{digits}f}, 95 % interval of the difference {low} to {high}; "
        f"rounding explains up to {margin:.1e}"
    )


def card_section(content):
    """Return a certificate as a section of the model card."""
    size, lines = content["batch_size"], []
    for name in [name for name in ("torch", "fp32", "int8") if name in content]:
        this = content[name]
        for split, score in this["scores"].items():
            words = ["", ""]
            if name != "torch":
                interval, difference = this["intervals"][split], this["differences"][split]
                words = [
                    "none" if difference is None else f"{difference:+.4f}",
                    f"{this['largest_logit_difference']:.1e}",
                ]
                words[0] += f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
            times = (f"{this[f'milliseconds_per_example_{how}']:.2f}" for how in ("in_batches", "alone"))
            cells = [
                f"{name} {this['file']}",
                split,
                format_score(score),
                *words,
                *times,
                f"{this['bytes'] / 1e6:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    return f"""## ONNX

`onnx/` holds this model for onnxruntime {content["versions"]["onnxruntime"]}, {threads} on a CPU:

| | split | {content["metric"]} | difference (95 %) | largest of a logit | ms, {size} at a time | ms, alone | MB |
|---|---|---|---|---|---|---|---|
{table}
"""
