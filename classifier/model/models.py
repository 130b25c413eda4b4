"""Load a model and its tokenizer from the Hub, a folder or config values, and check them before the first step."""

import gc
import inspect
from dataclasses import replace
from pathlib import Path

from classifier.data.cache import hub_commit, note_loaded, unreachable_hub, was_loaded
from classifier.files import is_path, read_json
from classifier.messages import MOST_NAMES, BadInput, list_names, log, nearest
from classifier.model.load_errors import find_foreign_layout, format_error, list_files, load_error, tokenizer_advice
from classifier.model.tokenization import embedding_rows, largest_id


def load_model(name, task=None, refresh=False):
    """Return (model, tokenizer, facts) of a Hub id, a folder, or a mapping of config values (trained from scratch).

    With a task, a head for other labels is replaced by a new one. Weights are float32 whatever the checkpoint's dtype.
    `facts` holds `model`, `commit` and `new`, the names of newly initialised weights. refresh: ask the Hub for a newer
    commit. Raises BadInput for anything that is not a text classifier in working order.
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
    if facts["new"] and task:  # without a task nothing is trained, and with_head_labels refuses the model
        modules = sorted({key.rsplit(".", 1)[0] for key in facts["new"]})
        log.info(f"newly initialised: {', '.join(modules)} (not in the checkpoint)")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:  # decoders, such as GPT-2 and Llama
        tokenizer.pad_token = tokenizer.eos_token
    _check_tokenizer(name, model, tokenizer, facts)
    if model.config.pad_token_id is None:  # the heads of decoders look for the last token that is none
        model.config.pad_token_id = tokenizer.pad_token_id
    # Some tokenizers return columns, such as token_type_ids, that their model does not take.
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key in known]
    # aminmax propagates NaN, takes one pass and copies nothing: isfinite on every weight takes ten times as long.
    extremes = {key: torch.stack(value.detach().aminmax()) for key, value in model.named_parameters() if value.numel()}
    if broken := [key for key, values in extremes.items() if not values.isfinite().all()]:
        raise BadInput(f"{name}: the weights {broken[0]} contain NaN or infinite values", "Use another checkpoint.")
    return model, tokenizer, facts


def _new_model(mapping, head, prefix):
    """Return (model, tokenizer) for a task's `model:` mapping, with random weights. prefix: of error messages."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

    if not Path(mapping["vocab"]).is_file():
        raise BadInput(f"{mapping['vocab']}: no such vocabulary file", "Fix `vocab` in the task's `model`.")
    values = {key: value for key, value in mapping.items() if key != "vocab"}
    try:
        tokenizer = BertTokenizer(mapping["vocab"])
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **values}, **head)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except Exception as error:  # the libraries raise almost anything for a wrong value
        raise BadInput(
            f"{prefix}`model` cannot be built ({format_error(error)})",
            "Fix its keys: model_type, vocab, and values of that model's config.json.",
        ) from None
    # transformers accepts any key, and ignores one that it does not know.
    known = [*config.attribute_map, *type(config)().to_dict()]
    if unknown := [key for key in values if key not in known]:
        raise BadInput(
            f'{prefix}unknown key "{unknown[0]}" in `model`{nearest(unknown[0], known)}',
            f"Keys are vocab and those of a {config.model_type} config.json.",
        )
    return model, tokenizer


def _pretrained_model(name, head, task, refresh):
    """Return (model, tokenizer, facts) of a Hub id or a folder; see load_model."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    options = {"revision": None, "trust_remote_code": False}
    is_of_hub = not Path(name).is_dir()
    if is_of_hub:
        _check_hub_name(name)
        options["revision"] = hub_commit(name, "model", refresh=refresh)
        # transformers would list the files on the Hub each time, and hang where it is unreachable.
        options["local_files_only"] = was_loaded(name, options["revision"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        labels_before = AutoConfig.from_pretrained(name, **options).id2label
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, **options, **head, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # the libraries raise almost anything for a damaged file
        if _is_unreachable(error):
            raise unreachable_hub(name, error) from None
        raise load_error(name, error, options["revision"]) from None
    if is_of_hub:
        note_loaded(name, options["revision"])
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    _check_encoder(name, model, info)
    is_same = task and (list(labels_before.values()) == task.labels or are_positions(labels_before.values(), task))
    if not new and task and not task.is_regression and not is_same:
        # A head of the right size, but for other labels: its classes would be mapped to ours by position.
        fresh = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
        for child, module in fresh.named_children():
            if child != model.base_model_prefix:
                setattr(model, child, module)
                new |= {f"{child}.{key}" for key in module.state_dict()}
    return model, tokenizer, {"model": name, "commit": options["revision"], "new": sorted(new)}


def _check_tokenizer(name, model, tokenizer, facts):
    """Raise BadInput for a tokenizer without a vocabulary, a padding token or with ids that the model lacks."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where it finds no files
        if isinstance(name, dict):
            raise BadInput(f"{name['vocab']}: has no vocabulary", "It must hold one token on each line.")
        raise BadInput(f"{name}: has no vocabulary", tokenizer_advice(name))
    if tokenizer.pad_token_id is None:
        advice = 'Name one of its tokens in tokenizer_config.json, such as "pad_token": "<unk>"; padding is masked.'
        raise BadInput(f"{name}: its tokenizer has no padding token, and no end token to take its place", advice)
    rows = embedding_rows(model)
    # Not len(tokenizer): ids may have gaps. This takes 0.02 s for 30,000 tokens, 0.2 s for 250,000.
    if rows is None:
        return
    used = [tokenizer.pad_token_id, *tokenizer("a")["input_ids"]]
    if (largest := largest_id(tokenizer.get_vocab(), set(tokenizer.all_special_tokens), used)) < rows:
        return
    if isinstance(name, dict):
        reason = f"{name['vocab']}: has token ids up to {largest}, but vocab_size of `model` is {rows}"
        raise BadInput(reason, "Drop vocab_size from the task's `model`: it is then that of the vocabulary.")
    classes = "AutoModel" if facts["new"] else "AutoModelForSequenceClassification"  # the latter keeps a trained head
    raise BadInput(
        f"{name}: its tokenizer has token ids up to {largest}, but the model has embeddings for {rows} only "
        f"(the ids 0 to {rows - 1})",
        "Use the tokenizer that the model was trained with. If tokens were added to it, give --model new: "
        f'm = {classes}.from_pretrained("{name}"); m.resize_token_embeddings({largest + 1}); m.save_pretrained("new"); '
        f'AutoTokenizer.from_pretrained("{name}").save_pretrained("new").',
    )


def _check_hub_name(name):
    """Raise BadInput for a name that was meant as a folder, instead of asking the Hub for it."""
    path = Path(name)
    if path.is_file():
        raise BadInput(f"{name}: is a file, not a model folder", "Give the folder with config.json, or a Hub id.")
    if is_path(name):
        path = Path(name.replace("\\", "/"))
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(f"{name}: no such folder{nearest(path.name, siblings)}", "Check --model.")


def _is_unreachable(error):
    """Return whether a file of the Hub was missing: transformers wraps that in an OSError of its own."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error and not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_encoder(name, model, info):
    """Raise BadInput where the weights do not match config.json: transformers would replace them by random ones.

    A new head or pooler is fine.
    """
    encoder = f"{model.base_model_prefix}."
    keys = {key for key, _ in model.named_parameters() if key.startswith(encoder)}
    if wrong := sorted(key for key, *_ in info["mismatched_keys"] if key.startswith(encoder)):
        reason = f"{name}: {len(wrong)} weights have another shape than in config.json, the first: {wrong[0]}"
    elif lacking := sorted(key for key in keys & set(info["missing_keys"]) if "pooler" not in key):
        reason = f"{name}: config.json describes {len(keys)} weights, the checkpoint lacks {len(lacking)}: {lacking[0]}"
    else:
        return
    raise BadInput(reason, "Use config.json and the weights of the same checkpoint.")


def with_head_labels(model, facts, task):
    """Return the task with its labels in the order of the model's head, matched by name, never by position.

    Raises BadInput where the head is new or for other labels.
    """
    name, names = facts["model"], list(model.config.id2label.values())
    head_is_multi_label = model.config.problem_type == "multi_label_classification"
    head_is_regression = model.config.num_labels == 1 and not head_is_multi_label
    if facts["new"]:
        raise BadInput(f"{name}: has no trained head ({', '.join(facts['new'])})", f"First: train.py --model {name}")
    if head_is_multi_label == task.is_multi_label and are_positions(names, task):
        return task
    if (head_is_regression, head_is_multi_label) != (task.is_regression, task.is_multi_label) or not (
        task.is_regression or task.labels is None or sorted(task.labels) == sorted(names)
    ):
        raise BadInput(
            f"{name}: its head is for {'a number' if head_is_regression else _list_labels(names, task.labels)}"
            f"{' (any number of them)' if head_is_multi_label else ''}; the labels of the task {task.name} are "
            f"{_list_labels(task.labels, names) if isinstance(task.labels, list) else task.labels}"
            f"{' (any number of them)' if task.is_multi_label else ''}",
            f"Use data with its labels, or fine-tune it first: train.py --model {name}"
            + " Or write the names of its labels into id2label of its config.json." * (names == _unnamed(len(names))),
        )
    return task if task.is_regression else replace(task, labels=names)


def _list_labels(names, others):
    """Return names of labels as text; where not all are listed, those that `others` lack come first."""
    known = set(others) if isinstance(others, list) and len(names) > MOST_NAMES else ()
    return list_names(sorted(names, key=lambda name: name in known))


def _unnamed(number):
    return [f"LABEL_{position}" for position in range(number)]


def are_positions(names, task):
    """Return whether a head's labels are LABEL_0, LABEL_1, ... and the task's 0, 1, ...: the same. Logs it."""
    labels = task.labels if isinstance(task.labels, list) else []
    is_same = [*names] == _unnamed(len(labels)) and labels == [str(number) for number in range(len(labels))]
    if is_same:
        log.info(f"the head's labels {list_names(names)} are taken for {list_names(labels)}")
    return is_same


def pretrained_parts(model):
    """Return (embeddings, layers) of the encoder as lists of modules, the lowest layer first; empty if not found."""
    from torch.nn import ModuleList

    encoder, number = model.base_model, model.config.num_hidden_layers
    embeddings = [module for name, module in encoder.named_children() if "embed" in name]
    lists = (module for module in encoder.modules() if isinstance(module, ModuleList) and len(module) == number)
    return embeddings, list(next(lists, []))


def freeze(model, part):
    """Freeze a pretrained part: none, encoder, embeddings, or N (embeddings and the first N layers).

    Its dropout stays off, even after model.train(): what is not trained needs no noise.
    """
    embeddings, layers = pretrained_parts(model)
    parts = {"none": [], "encoder": [model.base_model], "embeddings": embeddings}
    parts |= {str(number): embeddings + layers[:number] for number in range(1, len(layers) + 1)}
    if part not in parts:
        raise BadInput(f"--freeze {part}: no such part of this model", f"Parts: {', '.join(parts)}.")
    for module in parts[part]:
        module.requires_grad_(False)
        module.eval().train = lambda mode=True, module=module: module  # a no-op for model.train()


def saved_metrics(folder):
    """Return what metrics.json of a saved model says of its training: scores, precision; empty if there is none."""
    path = Path(folder) / "metrics.json"
    if not path.is_file():
        return {}
    with read_json(path) as content:
        return content


def base_model(folder, task):
    """Return the name of the pretrained model that a saved one was trained from, or None where it was new."""
    results = Path(folder).parent / "results.json"
    model = task.model
    if results.is_file():
        with read_json(results) as content:
            model = content["model"]
    return model if isinstance(model, str) else None


def model_folder(path):
    """Return the folder of a saved model: the path itself, or model/ of a run. A Hub id is returned unchanged."""
    if (Path(path) / "model" / "config.json").is_file():
        return str(Path(path) / "model")
    if (Path(path) / "model.onnx").is_file():
        raise BadInput(f"{path}: is an exported model", "Only predict.py takes it. Use the model it was exported from.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        reason, advice = f"{path}: holds no model", "Give a model folder, or the folder of a finished run."
        if cause := find_foreign_layout(path, Path(path), list_files(path)):
            reason, advice = f"{reason}: {cause[0]}", cause[1]
        raise BadInput(reason, advice)
    return str(path)
