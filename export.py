"""Export a saved model to ONNX, with a certificate: ONNX Runtime compared with PyTorch on the whole validation split.

    python export.py --model runs/mrpc                      # float32
    python export.py --model runs/mrpc --quantize int8      # and model_int8.onnx: smaller, faster, slightly less exact
    python predict.py --model runs/mrpc/model/onnx --text "He left." --text_pair "He went away."
    python predict.py --model runs/mrpc/model/onnx/model_int8.onnx --input pairs.csv --output labelled.csv

Writes RUN/model/onnx/ atomically: model.onnx, model_int8.onnx, config.json, the tokenizer, task.json, and
certificate.json: the first metric, its difference from PyTorch with a 95 % interval, the largest difference of a logit,
milliseconds per example, bytes. The model card repeats it. Where the numbers differ too much, it writes nothing and
exits with code 1.

Inputs, int64 (batch, length): input_ids, attention_mask and, if the model takes them, token_type_ids. Output: logits,
float32 (batch, outputs). Batches of any size, and lengths from 1 to the model's maximum.
"""

import io
import json
import logging
import math
import re
import time
import warnings
from contextlib import contextmanager, redirect_stderr
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
from classifier.evaluation import intervals, metrics
from classifier.files import recover_folder, replace_folder, sha256, write_json, write_text
from classifier.messages import BadInput, RunFailed, format_duration, format_score, log
from classifier.model.models import load_model, model_folder, with_head_labels
from classifier.model.tokenization import encode, longest_input, token_columns
from classifier.predictor import Predictor, load, start_exported

# What imports torch is imported inside the functions: it takes seconds, and --help and bad input are answered at once.

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZED = ["MatMul", "Gemm", "Gather"]  # matrix products, and the embedding tables
MAX_BYTES_IN_ONE_FILE = 2**31 - 2**25  # of weights: an .onnx file ends at 2 GiB, larger models have a second file
TIMED_EXAMPLES, TIMED_ROUNDS = 128, 5
TOKENS_IN_A_BATCH = 1024  # the length up to which a batch of several lengths fits into memory with its attention


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--model", required=True, metavar="DIR", help="a run, or a model folder")
    add("--quantize", choices=["int8"], help="int8: also write a quantized model")
    atol = "largest allowed difference of a float32 logit; rounding explains 1e-6 to 3e-5 (default: 1e-4)"
    add("--atol", type=common.non_negative_float, default=1e-4, metavar="X", help=atol)
    common.add_machine_arguments(parser)
    parser.set_defaults(refresh=False)  # the data must stay those of the training
    return parser


def load_saved(folder, args):
    """Return (model, tokenizer, task, {split: rows}) of a model folder, with its own validation splits."""
    task, fingerprints = tasks.read_saved_task(folder)
    if task is None:
        raise BadInput(f"{args.model}: has no task.json, so its data are not known", "Train it here: train.py.")
    model, tokenizer, facts = load_model(folder)
    task = with_head_labels(model, facts, task)
    task, splits, fingerprints_now, _ = common.load_data(task, args)
    names = [name for name in splits if name.startswith("validation")] or ["validation"]
    common.check_splits(task, splits, names)
    advice = "Restore the old data: the certificate is about them."
    common.check_unchanged(names, fingerprints, fingerprints_now, advice)
    if not tokenizer.is_fast:
        raise BadInput(f"{args.model}: its tokenizer has no tokenizer.json", "Use a model with a fast tokenizer.")
    task = replace(task, max_length=task.max_length or longest_input(model, tokenizer))
    return model.eval(), tokenizer, task, {name: splits[name] for name in names}


def export_model(folder, temporary, args, threads):
    """Write all files of an export to the folder `temporary`; return the certificate, as a dict.

    Raises RunFailed where torch cannot export the model, or the certificate is not good enough.
    """
    from classifier.model.padding import choose_padding_side

    model, tokenizer, task, splits = load_saved(folder, args)
    columns = token_columns(tokenizer)
    files = {"fp32": temporary / "model.onnx"} | ({"int8": temporary / "model_int8.onnx"} if args.quantize else {})
    temporary.mkdir()
    with explained(f"torch cannot export this model, of type {model.config.model_type}"):
        write_onnx(model, columns, files["fp32"])
    if args.quantize:
        with explained("ONNX Runtime cannot quantize this model", " Export without --quantize."):
            write_int8(*files.values())
    tokenizer.save_pretrained(temporary)
    tasks.save_task(task, tasks.read_saved_task(folder)[1], temporary / "task.json")
    padding_side = choose_padding_side(model, tokenizer)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"padding_side": padding_side}
    write_json(temporary / "config.json", config)  # predict.py reads how to pad from it
    forward = torch_forward(model, model.config.pad_token_id or 0, padding_side)
    predictors = {"torch": Predictor(task, tokenizer, forward, args.eval_batch_size, [])}
    with explained("ONNX Runtime cannot load what torch exported"):
        predictors |= {name: load_exported(file, args, threads) for name, file in files.items()}
    logits, advice = {}, " Is memory short? Give a smaller --eval_batch_size. Is the model damaged? evaluate.py tells."
    for name, predictor in predictors.items():
        started = time.perf_counter()
        with explained(f"{name}: the logits of the validation texts cannot be computed", advice):
            logits[name] = {split: predictor.dataset_logits(rows) for split, rows in splits.items()}
        log.info(f"{name}: {', '.join(splits)} in {format_duration(time.perf_counter() - started)}")
    content = certify(task, logits, splits)
    with explained("fp32: the logits of random texts of other lengths cannot be computed"):
        lengths, largest = compare_lengths(model, columns, task.max_length, forward, predictors["fp32"].forward)
    content["lengths"] = {"tokens": lengths, "largest_logit_difference": largest}
    check_certificate(task, content, args.atol)
    first_split = next(iter(splits.values()))
    for way, size in (("in_batches", args.eval_batch_size), ("alone", 1)):
        for name, value in milliseconds_per_example(predictors, first_split, size).items():
            content[name][f"milliseconds_per_example_{way}"] = value
    for name, file in {"torch": folder / "model.safetensors", **files}.items():
        written = sorted(file.parent.glob(f"{file.name}*"))  # large models have a second file
        content[name] |= {"file": file.name, "bytes": sum(path.stat().st_size for path in written)}
        content[name] |= {"sha256": {path.name: sha256(path) for path in written}}
    facts = {"task": task.name, "metric": task.metrics[0], "atol": args.atol, "threads": threads}
    facts |= {"examples": {split: len(rows) for split, rows in splits.items()}, "batch_size": args.eval_batch_size}
    return {**facts, "versions": {name: version(name) for name in ("torch", "transformers", *PACKAGES)}, **content}


# ------------------------------------------------------------------------------------------------------- .onnx files


@contextmanager
def quiet():
    """Silence the exporter: it warns of torchvision and the names of axes, and prints graphs that it cannot export."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def explained(failure, advice=""):
    """Raise what a library raises under `with` as RunFailed: a line of reason with the innermost cause, one of advice.

    Exporters raise anything, wrap it several times, and add advice of their own, in colours. A cause is what they raise
    an error `from`, and of it the first sentence counts; what else they were handling then is mostly a detail of
    theirs, such as an index out of range.
    """
    try:
        yield
    except (BadInput, RunFailed, OSError, MemoryError):
        raise
    except Exception as error:
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).strip()
        text = re.sub(r":\s*\n[\s-]*", ": ", text)  # the first item of a list belongs to its heading
        text = re.split(r"\n|\.\s", text)[0].rstrip(".")
        reason = f"{failure} ({type(cause).__name__}{': ' * bool(text)}{text[:300]})"
        advice = advice or " predict.py and evaluate.py take it as it is."
        raise RunFailed(f"{reason}\nNothing was written.{advice}") from error


def write_onnx(model, columns, file):
    """Write a transformers model as an .onnx file. columns: its inputs apart from attention_mask."""
    import torch

    # Two different sizes above 1: torch takes 1 for a constant, and equal sizes for one size. With padding.
    inputs = {name: torch.zeros(3, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    inputs["attention_mask"][:, :5] = 1
    inputs = {name: value for name, value in inputs.items() if name in (*columns, "attention_mask")}
    attention = model.config._attn_implementation
    model.config.use_cache = False  # decoders would return keys and values, too
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    try:
        with quiet():
            # Eager attention has fewer nodes than torch's own. MiniLM: a tenth faster in batches, alone no slower.
            model.set_attn_implementation("eager")
            torch.onnx.export(
                model,
                (),
                str(file),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in inputs},
                dynamo=True,
                external_data=weight_bytes > MAX_BYTES_IN_ONE_FILE,
                verbose=False,
            )
    finally:
        model.set_attn_implementation(attention)


def write_int8(source, target):
    """Write a quantized .onnx file: 8-bit weights, and 8-bit activations scaled by the range of each batch."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        model = onnx.load(source)
        # The quantizer transposes some weights, and would fail at the shapes that the exporter recorded for them.
        del model.graph.value_info[:]
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,  # one scale per row of weights: half the difference of a single scale, on MRPC
            reduce_range=True,  # 7-bit weights: 8-bit sums overflow on CPUs without VNNI, and no certificate would hold
            weight_type=QuantType.QInt8,
            use_external_data_format=target.with_name(f"{source.name}.data").exists(),
        )


def load_exported(file, args, threads):
    """Return the Predictor of a new .onnx file. Raises RunFailed, as the BadInput of load advises to export again."""
    try:
        return load(file, None, args.eval_batch_size, threads)
    except BadInput as error:
        raise RunFailed(
            f"{error.reason}\nNothing was written. predict.py and evaluate.py take the model as it is."
        ) from error


def torch_forward(model, pad_token_id, padding_side):
    """Return a Predictor's forward function that computes as transformers does: padded, in float32."""
    import torch

    from classifier.model.padding import pad

    def forward(batch):
        with torch.inference_mode():
            return model(**pad(batch, pad_token_id, padding_side)).logits.numpy()

    return forward


# --------------------------------------------------------------------------------------------------- the certificate


def certify(task, logits, splits):
    """Return the part of certificate.json that compares exported models with torch, by name and split.

    logits: {name: {split: (examples, outputs)}}, with "torch" first; splits: {split: rows}. Raises RunFailed for logits
    that are not finite.
    """
    metric, content = task.metrics[0], {}
    for name, split_logits in logits.items():
        content[name] = {"scores": {}}
        if name != "torch":
            content[name] |= {"differences": {}, "intervals": {}, "largest_logit_difference": 0.0}
        for split, values in split_logits.items():
            labels, torch_values = column_array(splits[split], "label"), logits["torch"][split]
            if not np.isfinite(values).all():
                raise RunFailed(
                    f"{name}: some logits of {split} are not finite\n"
                    "Nothing was written. Is the model damaged? evaluate.py tells."
                )
            predictions = predictions_from_logits(task, values)
            torch_predictions = predictions_from_logits(task, torch_values)
            score = metrics.compute_metrics([metric], predictions, labels, warns=False)[metric]
            content[name]["scores"][split] = score
            if name == "torch":
                continue
            torch_score, figures = content["torch"]["scores"][split], content[name]
            is_known = None not in (score, torch_score)
            figures["differences"][split] = score - torch_score if is_known else None
            found = intervals.difference_intervals([metric], predictions, torch_predictions, labels)
            figures["intervals"][split] = found[metric] if is_known else None
            largest = float(abs(values.astype(np.float64) - torch_values).max())
            figures["largest_logit_difference"] = max(figures["largest_logit_difference"], largest)
    return content


def compare_lengths(model, columns, max_length, torch_forward, onnx_forward):
    """Return (lengths, largest difference of a logit) for random tokens from length 1 to max_length.

    Each length alone, then all in one batch. torch_forward, onnx_forward: forward functions of Predictors.
    """
    generator, lengths = np.random.default_rng(0), sorted({1, 2, max_length // 2, max_length})
    config, ids = model.config, np.arange(model.get_input_embeddings().num_embeddings)
    # No padding token: RoBERTa does not count it among the positions. The end token once, at the end, where it is not
    # also that of padding: BART's head reads it.
    padding, ends = (np.array([] if id is None else id) for id in (config.pad_token_id, config.eos_token_id))
    values = {"input_ids": np.setdiff1d(ids, np.append(padding, ends))}
    ends = np.setdiff1d(np.intersect1d(ids, ends), padding)
    values["token_type_ids"] = np.arange(getattr(config, "type_vocab_size", None) or 1)
    batch = {name: [generator.choice(values[name], length) for length in lengths] for name in columns}
    if len(ends):
        for sequence in batch["input_ids"]:
            sequence[-1] = ends[0]
    batches = [{name: [rows[example]] for name, rows in batch.items()} for example in range(len(lengths))]
    if max_length <= TOKENS_IN_A_BATCH:
        batches.append(batch)
    return lengths, max(float(abs(torch_forward(batch) - onnx_forward(batch)).max()) for batch in batches)


def milliseconds_per_example(predictors, rows, size):
    """Return {name: milliseconds per example} of the forward passes in batches of `size`: medians over rounds.

    The predictors take turns on the same batches. The examples are of all lengths, batched by similar length.
    """
    task, tokenizer = predictors["torch"].task, predictors["torch"].tokenizer
    number = min(TIMED_EXAMPLES if size > 1 else TIMED_EXAMPLES // 4, len(rows))
    sample = rows[np.linspace(0, len(rows) - 1, number).astype(int)]
    encoded, _ = encode(task, tokenizer, [sample[column] for column in task.text], task.max_length)
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]])
    slices = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [{name: [ids[i] for i in examples] for name, ids in encoded.items()} for examples in slices]
    seconds = {name: [] for name in predictors}
    for _ in range(1 + TIMED_ROUNDS):  # the first round warms up
        for name, predictor in predictors.items():
            started = time.perf_counter()
            for batch in batches:
                predictor.forward(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(times[1:])) / number for name, times in seconds.items()}


def check_certificate(task, content, atol):
    """Raise RunFailed where a float32 logit is off by more than atol, or a score fell by more than chance explains."""
    metric, fp32 = task.metrics[0], content["fp32"]
    largest = max(fp32["largest_logit_difference"], content["lengths"]["largest_logit_difference"])
    if not largest <= atol:
        reason = f"fp32: a logit differs by {largest:.1e} from torch's, more than --atol {atol:g}"
        raise RunFailed(f"{reason}\nNothing was written. Give a larger --atol if your use allows it.")
    for name in [name for name in ("fp32", "int8") if name in content]:
        for split, score in content[name]["scores"].items():
            before, interval = content["torch"]["scores"][split], content[name]["intervals"][split]
            if metrics.is_better(metric, before, score) and (fall := describe_fall(metric, before, score, interval)):
                advice = f"Nothing was written.{' Export without --quantize.' * (name == 'int8')}"
                raise RunFailed(f"{name}: {metric} of {split} fell from {fall}\n{advice}")


def describe_fall(metric, before, score, interval):
    """Return the fall from one score to another as text, or None where chance or rounding may explain it."""
    if interval is None:  # a fall only where torch's score is the only one that is defined
        return f"{before:.4f} to {format_score(score)}" if score is None else None
    margin = intervals.rounding_margin(metric, before, score)
    if not intervals.is_beyond_margin(interval, margin):
        return None
    digits = max(4, math.ceil(-math.log10(margin)))  # an error may be smaller than 0.0001
    low, high = map(intervals.format_difference, interval)
    return (
        f"{before:.{digits}f} to {score:.{digits}f}, 95 % interval of the difference {low} to {high}; "
        f"rounding explains up to {margin:.1e}"
    )


# ---------------------------------------------------------------------------------------------------- the model card


def card_section(content):
    """Return a certificate as a section of the model card."""
    size, lines = content["batch_size"], []
    for name in [name for name in ("torch", "fp32", "int8") if name in content]:
        figures = content[name]
        for split, score in figures["scores"].items():
            differences = ["", ""]
            if name != "torch":
                interval, difference = figures["intervals"][split], figures["differences"][split]
                score_difference = "none" if difference is None else f"{difference:+.4f}"
                score_difference += f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
                differences = [score_difference, f"{figures['largest_logit_difference']:.1e}"]
            times = [f"{figures[f'milliseconds_per_example_{way}']:.2f}" for way in ("in_batches", "alone")]
            megabytes = f"{figures['bytes'] / 1e6:.1f}"
            cells = [f"{name} {figures['file']}", split, format_score(score), *differences, *times, megabytes]
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    return f"""## ONNX

`onnx/` holds this model for ONNX Runtime {content["versions"]["onnxruntime"]}, {threads} on a CPU:

| | split | {content["metric"]} | difference (95 %) | largest of a logit | ms, {size} at a time | ms, alone | MB |
|---|---|---|---|---|---|---|---|
{table}
"""


def write_card(file, name, section):
    """Append the section on ONNX to a model card, replacing an older one."""
    card = file.read_text(encoding="utf-8") if file.is_file() else f"# {name}\n"
    card = re.sub(r"^## ONNX\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    write_text(file, f"{card.rstrip()}\n\n{section}")


# -------------------------------------------------------------------------------------------------------------- main


def main():
    args = build_parser().parse_args()
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise BadInput(f"needs the package {name}", "pip install -r requirements-extra.txt") from None
    import torch

    folder = Path(model_folder(args.model))
    if not folder.is_dir():
        raise BadInput(f"{args.model}: is not a folder", "Give a run, or a model folder: first train.py.")
    _, threads = start_exported(args)
    torch.set_num_threads(threads)
    processes.quieten_libraries()
    output, temporary = folder / "onnx", folder / "onnx.tmp"
    recover_folder(output)
    try:
        content = export_model(folder, temporary, args, threads)
        write_json(temporary / "certificate.json", content)
        replace_folder(temporary, output)
        section = card_section(content)
        write_card(folder / "README.md", content["task"], section)
    except OSError as error:
        reason = f"{output}: cannot be written ({error.strerror or error})"
        raise RunFailed(f"{reason}\nFix this, then run the same command again.") from error
    finally:
        recover_folder(output)
    log.info(f"{section}\nwritten: {output}/, {folder / 'README.md'}")


if __name__ == "__main__":
    processes.run(main)
