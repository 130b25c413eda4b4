"""A model and its tokenizer: of the Hub, of a folder, or new from config values; checked before a step is taken."""

import gc
import inspect
import json
from dataclasses import replace
from pathlib import Path

from classifier.data.cache import hub_commit, note_loaded, unreachable_hub, was_loaded
from classifier.messages import BadInput, log, nearest


def load_model(name, task=None, refresh=False):
    """Return (model, tokenizer, facts) of a Hub id, a folder, or a mapping of config values (trained from scratch).

    With a task, a head that does not fit its labels is replaced by a new one. Weights are float32 whatever the
    checkpoint's type. `facts` holds `model`, `commit` and `new`: the names of newly initialised weights.
    """
    import torch

    head = {}
    if task and task.is_regression:
        head = {"num_labels": 1, "problem_type": "regression"}
    elif task:
        names = dict(enumerate(task.labels))
        head = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
        problem = "multi_label" if task.is_multi_label else "single_label"
        head |= {"num_labels": len(names), "problem_type": f"{problem}_classification"}
    if isinstance(name, dict):
        model, tokenizer = _new_model(name, head, f"task {task.name}: " if task else "")
        values = {key: value for key, value in name.items() if key != "vocab"}
        facts = {"model": values, "commit": None, "new": ["every weight"]}
    else:
        model, tokenizer, facts = _pretrained_model(str(name), head, task, refresh)
    gc.enable()  # see processes.run
    if facts["new"] and task:  # without a task, nothing is learnt, and with_labels_of refuses the model
        parts = sorted({key.rsplit(".", 1)[0] for key in facts["new"]})
        log.info(f"newly initialised: {', '.join(parts)} (not in the checkpoint: learnt in this training)")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where it finds no files
        where = name["vocab"] if isinstance(name, dict) else name
        hint = "Copy the tokenizer's files (tokenizer.json, ...) into the folder."
        raise BadInput(f"{where}: holds no vocabulary", hint)
    # Types such as token_type_ids are made by some tokenizers for models that do not know them.
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key in known]
    # NaN spreads to both extremes. One pass and no copy: isfinite of every weight takes ten times as long.
    extremes = {key: torch.stack(value.detach().aminmax()) for key, value in model.named_parameters() if value.numel()}
    if broken := [key for key, values in extremes.items() if not values.isfinite().all()]:
        raise BadInput(f"{name}: the weights {broken[0]} hold NaN or infinity", "Take another checkpoint.")
    return model, tokenizer, facts


def _new_model(mapping, head, where):
    """Return (model, tokenizer) of a task's `model:` mapping, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

    if not Path(mapping["vocab"]).is_file():
        raise BadInput(f"{mapping['vocab']}: no such vocabulary file", "Mend `vocab` in the task's `model`.")
    values = {key: value for key, value in mapping.items() if key != "vocab"}
    try:
        tokenizer = BertTokenizer(mapping["vocab"])
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **values}, **head)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except Exception as error:  # of a library, about any of the values
        raise BadInput(
            f"{where}`model` cannot be built ({_format_error(error)})",
            "Mend its keys: model_type, vocab, and values of that model's config.json.",
        ) from None
    # transformers takes any key, and does nothing with one that it does not know.
    known = [*config.attribute_map, *type(config)().to_dict()]
    if unknown := [key for key in values if key not in known]:
        raise BadInput(
            f'{where}unknown key "{unknown[0]}" in `model`{nearest(unknown[0], known)}',
            f"Keys are vocab and those of a {config.model_type} config.json.",
        )
    return model, tokenizer


def _pretrained_model(name, head, task, refresh):
    """Return (model, tokenizer, facts) of a Hub id or a folder, as load_model."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": None, "trust_remote_code": False}
    is_of_hub = not Path(name).is_dir()
    if is_of_hub:
        _check_hub_name(name)
        options["revision"] = hub_commit(name, "model", refresh=refresh)
        # transformers would ask the Hub each time which files there are, and wait where it is out of reach.
        options["local_files_only"] = was_loaded(name, options["revision"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        labels_before = AutoConfig.from_pretrained(name, **options).id2label
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, **options, **head, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        if _is_unreachable(error):
            raise unreachable_hub(name, error) from None
        raise BadInput(
            f"{name}: cannot be loaded as a text classifier ({_format_error(error)})",
            "Check --model: it needs config.json, the tokenizer and whole weights; copy or download them again.",
        ) from None
    if is_of_hub:
        note_loaded(name, options["revision"])
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    _check_encoder(name, model, info)
    if not new and task and not task.is_regression and list(labels_before.values()) != task.labels:
        # A head of the right size, but for other labels: its classes would be taken for ours by position.
        fresh = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
        for child, module in fresh.named_children():
            if child != model.base_model_prefix:
                setattr(model, child, module)
                new |= {f"{child}.{key}" for key in module.state_dict()}
    return model, tokenizer, {"model": name, "commit": options["revision"], "new": sorted(new)}


def _check_hub_name(name):
    """Raise BadInput where a name that is no folder was meant for one, before the Hub is asked for it."""
    path = Path(name)
    if path.is_file():
        hint = "Give the folder with config.json, or a name of the Hub."
        raise BadInput(f"{name}: is a file, not a model folder", hint)
    if name.startswith((".", "/", "~")):
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(f"{name}: no such folder{nearest(path.name, siblings)}", "Check --model.")


def _format_error(error):
    """Return what an exception of a library says, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")


def _is_unreachable(error):
    """Return whether a file of the Hub is what was missing: transformers raises an OSError of its own about it."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error and not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_encoder(name, model, info):
    """Raise BadInput where the weights are not those of the model that config.json describes: transformers would
    replace them by random ones. A new head or pooler is nothing unusual."""
    encoder = f"{model.base_model_prefix}."
    keys = {key for key, _ in model.named_parameters() if key.startswith(encoder)}
    if wrong := sorted(key for key, *_ in info["mismatched_keys"] if key.startswith(encoder)):
        reason = f"{name}: {len(wrong)} weights have another shape than config.json says, the first: {wrong[0]}"
    elif lacking := sorted(key for key in keys & set(info["missing_keys"]) if "pooler" not in key):
        reason = f"{name}: config.json describes {len(keys)} weights, the checkpoint lacks {len(lacking)}: {lacking[0]}"
    else:
        return
    raise BadInput(reason, "Take config.json and the weights from the same checkpoint.")


def with_head_labels(model, facts, task):
    """Return the task with its labels in the order of the model's head; matched by name, never by position."""
    name, names = facts["model"], list(model.config.id2label.values())
    head_is_multi_label = model.config.problem_type == "multi_label_classification"
    head_is_regression = model.config.num_labels == 1 and not head_is_multi_label
    if facts["new"]:
        raise BadInput(f"{name}: has no trained head ({', '.join(facts['new'])})", f"First: train.py --model {name}")
    if (head_is_regression, head_is_multi_label) != (task.is_regression, task.is_multi_label) or not (
        task.is_regression or task.labels is None or sorted(task.labels) == sorted(names)
    ):
        raise BadInput(
            f"{name}: its head is for {'a number' if head_is_regression else ', '.join(names)}"
            f"{' (any number of them)' if head_is_multi_label else ''}; the labels of the task {task.name} are "
            f"{', '.join(task.labels) if isinstance(task.labels, list) else task.labels}"
            f"{' (any number of them)' if task.is_multi_label else ''}",
            f"Score it on data like those it was trained on, or fine-tune it first: train.py --model {name}",
        )
    return task if task.is_regression else replace(task, labels=names)


def freeze(model, part):
    """Stop the gradients of a pretrained part: none, encoder, embeddings, or N (embeddings and the first N layers).

    Its dropout is off, too, in model.train() as well: what is not trained needs no noise.
    """
    from torch.nn import ModuleList

    encoder = model.base_model
    embeddings = [module for name, module in encoder.named_children() if "embed" in name]
    layers = next(
        (list(m) for m in encoder.modules() if isinstance(m, ModuleList) and len(m) == model.config.num_hidden_layers),
        [],
    )
    parts = {"none": [], "encoder": [encoder], "embeddings": embeddings}
    parts |= {str(number): embeddings + layers[:number] for number in range(1, len(layers) + 1)}
    if part not in parts:
        raise BadInput(f"--freeze {part}: no such part of this model", f"Parts: {', '.join(parts)}.")
    for module in parts[part]:
        module.requires_grad_(False)
        module.eval().train = lambda mode=True, module=module: module  # model.train() calls this, and changes nothing


def saved_metrics(folder):
    """Return (mixed precision that the scores of a saved model were computed in, what its majority baseline predicts).

    ("auto", None) where they are not known.
    """
    path = Path(folder) / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content.get("mixed_precision", "auto"), content.get("majority")
    except (ValueError, AttributeError):
        raise BadInput(f"{path}: is damaged", "Copy the model folder again, or train again.") from None


def base_model(folder, task):
    """Return the name of the pretrained model that a saved one was trained from; None where its weights were new."""
    results = Path(folder).parent / "results.json"
    model = json.loads(results.read_text(encoding="utf-8"))["model"] if results.is_file() else task.model
    return model if isinstance(model, str) else None


def model_folder(path):
    """Return the folder of a saved model: the path itself, or model/ of a run. A Hub id comes back as it is."""
    if (Path(path) / "model" / "config.json").is_file():
        return str(Path(path) / "model")
    if (Path(path) / "model.onnx").is_file():
        raise BadInput(f"{path}: is an exported model", "predict.py takes it. Here: the model it was exported from.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BadInput(f"{path}: holds no model", "Give a model folder, or the folder of a finished run.")
    return str(path)
