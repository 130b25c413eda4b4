"""Why transformers cannot load a model: the cause, as found in the model's files, and what helps against it."""

import json
import zipfile
from pathlib import Path

from classifier.messages import BadInput, nearest

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # and each of them with .index.json, for weights in several files
OTHER_FRAMEWORKS = {  # the ends of their files
    "tf_model.h5": "TensorFlow",
    ".ckpt.index": "TensorFlow 1",
    "flax_model.msgpack": "Flax",
    ".onnx": "ONNX",
    ".gguf": "llama.cpp",
    "rust_model.ot": "Rust",
}
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_model")  # the starts of such names
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", ".model", "vocab.txt", "vocab.json")  # their ends
PEFT_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
AGAIN = "Copy or download {} again."
POINTER = b"version https://git-lfs"


def load_error(name, error, revision=None):
    """Return the BadInput for a model that transformers could not load. revision: the commit of a Hub model."""
    folder, files = _folder_and_files(name, revision)
    cause = (
        find_foreign_layout(name, folder, files)
        or _find_config_problem(folder, files)
        or _find_code(error)
        or _find_missing_weights(folder, files)
        or _find_damage(name, folder, error)
        or _find_tokenizer_problem(name, folder, files)
    )
    if cause:
        return BadInput(f"{name}: cannot be loaded as a text classifier: {cause[0]}", cause[1])
    return BadInput(
        f"{name}: cannot be loaded as a text classifier ({format_error(error)})",
        "Check --model: it needs config.json, the tokenizer and complete weights. Copy or download them again.",
    )


def format_error(error):
    """Return a library's exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")


def _folder_and_files(name, revision):
    """Return (folder, the names of a model's files). Of a Hub model: the cache's folder, with what is downloaded."""
    if Path(name).is_dir():
        return Path(name), list_files(name)
    from huggingface_hub import constants, hf_hub_download, list_repo_files

    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", revision or "main")
    try:
        files = list_repo_files(name, revision=revision)
        for file in {"config.json", "adapter_config.json"} & {*files}:
            hf_hub_download(name, file, revision=revision)
    except Exception:  # any trouble with the network: what the cache holds has to do
        files = list_files(folder)
    return folder, files


def list_files(folder):
    """Return the names of a folder's files, and of those in its subfolders."""
    return sorted(file.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in Path(folder).glob(depth))


def find_foreign_layout(name, folder, files):
    """Return (reason, advice) for a folder without a config.json, or whose weights are only an adapter's; or None."""
    if "adapter_config.json" in files and not _weights(files):
        return _adapter(name, folder)
    if "config.json" in files:
        return None
    subfolders = [file.removesuffix("/config.json") for file in files if file.endswith("/config.json")]
    if subfolders:
        subfolder = next((each for each in subfolders if each.endswith("Transformer")), subfolders[0])
        kind = " as sentence-transformers once wrote them" if "modules.json" in files else ""
        advice = f"Give the subfolder: --model {Path(name) / subfolder}"
        if not Path(name).is_dir():
            advice = f"Download it (hf download {name} --local-dir FOLDER), then give --model FOLDER/{subfolder}"
        return f"its config.json is in the subfolder {subfolder},{kind}".rstrip(","), advice
    return _find_missing_weights(folder, files) if _foreign_weights(files) else None


def _adapter(name, folder):
    content = _read_json(folder / "adapter_config.json")
    base = content.get("base_model_name_or_path") or "its base model"
    peft_class = PEFT_CLASSES.get(content.get("task_type"), "AutoPeftModel")
    labels = ", num_labels=N" if content.get("task_type") == "SEQ_CLS" else ""
    return (
        f"it is an adapter of {base} (adapter_config.json), not a whole model",
        f'Merge the two with the package peft, and give --model merged: {peft_class}.from_pretrained("{name}"{labels})'
        f'.merge_and_unload().save_pretrained("merged"); AutoTokenizer.from_pretrained("{base}")'
        '.save_pretrained("merged").',
    )


def _find_config_problem(folder, files):
    """Return (reason, advice) for a config.json of which transformers makes no text classifier, or None."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as HEADS

    if "config.json" not in files:
        advice = "Check --model: it must be a folder, or an id of the Hub, with config.json, weights and a tokenizer."
        return "there is no config.json", advice
    file = folder / "config.json"
    if problem := _json_problem(file):
        return f"config.json {problem}", f"Check --model. {AGAIN.format(file.name)}"
    content = _read_json(file)
    model_type = content.get("model_type")
    if model_type in HEADS:
        return None
    if "auto_map" in content:
        return _custom_code("config.json")
    if not model_type:
        return "config.json has no model_type", 'Write it into config.json, such as "model_type": "bert".'
    if model_type not in CONFIG_MAPPING_NAMES:
        return (
            f'transformers {__version__} does not know the model_type "{model_type}" of config.json'
            f"{nearest(model_type, HEADS)}",
            "Upgrade transformers if the model is newer, or correct config.json.",
        )
    return (
        f'transformers has no text classification head for the model_type "{model_type}" of config.json',
        "Give --model a text model of a type that has one, such as bert, roberta, deberta-v2, modernbert or t5.",
    )


def _find_code(error):
    """Return (reason, advice) where transformers asks for leave to run a model's own code, or None."""
    return _custom_code("tokenizer_config.json") if "trust_remote_code" in str(error) else None


def _custom_code(file):
    return (
        f"it needs Python code of its own (auto_map in {file}), and such code is never run here",
        "Give --model a model whose type transformers has itself, such as bert, roberta, deberta-v2 or modernbert.",
    )


def _weights(files):
    return [file for file in files if file.removesuffix(".index.json") in WEIGHTS]


def _foreign_weights(files):
    """Return (file, framework) for weights of another framework, or None."""
    pairs = ((file, framework) for end, framework in OTHER_FRAMEWORKS.items() for file in files if file.endswith(end))
    return next(pairs, None)


def _find_missing_weights(folder, files):
    """Return (reason, advice) for a model without weights for torch, or without some of its weight files, or None."""
    if weights := _weights(files):
        if not all(file.endswith(".index.json") for file in weights):
            return None
        parts = {*_read_json(folder / weights[0]).get("weight_map", {}).values()}
        if missing := sorted(parts - {*files}):
            return f"{len(missing)} of its {len(parts)} weight files are missing: {missing[0]}", AGAIN.format("them")
        return None
    if found := _foreign_weights(files):
        # No command to convert them: transformers 5 has no from_tf, and that of transformers 4.57 fails.
        file, framework = found
        advice = "Choose a copy of it with model.safetensors: weights of another framework than torch are not read."
        return f"its weights are for {framework} only ({file})", advice
    others = [file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    others = [file for file in others if not file.startswith(NO_WEIGHTS)]
    reason = f"there are no weights: no {' and no '.join(WEIGHTS)}"
    if others and "-of-0" in others[0]:
        return f"{reason}, and no .index.json for {others[0]}", "Copy the .index.json of the same model, too."
    if others:
        target = WEIGHTS[0] if others[0].endswith(".safetensors") else WEIGHTS[1]
        return f"{reason}, but {others[0]}", f"If it holds this model's weights, rename it to {target}."
    return reason, "Copy the file with the weights into the folder, or download the model again."


def _find_damage(name, folder, error):
    """Return (reason, advice) for a weights file that cannot be read, or None."""
    from safetensors import SafetensorError, safe_open

    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        again = AGAIN.format(file.name)
        if not Path(name).is_dir():  # of the Hub: the cache keeps what is damaged
            again = f"Delete the folder {folder.parent.parent}: the model is then downloaded again."
        with open(file, "rb") as stream:
            start = stream.read(len(POINTER))
        if start == POINTER:
            return f"{file.name} is a pointer of git-lfs, not the weights", f"Run `git lfs pull` there. Or: {again}"
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    continue
            except SafetensorError as damage:
                return f"{file.name} is damaged ({damage})", again
        if (folder / WEIGHTS[0]).exists():  # it is read instead
            continue
        if "GLOBAL " in str(error) or "Unsupported class" in str(error):
            return _pickled_code(file, error)
        is_cut = start.startswith(b"PK") and not zipfile.is_zipfile(file)
        if not start or is_cut or "Weights only load failed" in str(error):
            return f"{file.name} is damaged", again
    return None


def _pickled_code(file, error):
    name = str(error).partition("GLOBAL ")[2].split(" ")[0]
    return (
        f"{file.name} is not only weights: loading it would run code{f' ({name})' if name else ''}",
        "Choose a copy with model.safetensors. Or, if you trust its author, load the file yourself with "
        "torch.load(..., weights_only=False), and torch.save its state_dict in its place: {name: tensor}, no more.",
    )


def _find_tokenizer_problem(name, folder, files):
    """Return (reason, advice) for a tokenizer whose files are missing or damaged, or None."""
    if not any(file.endswith(TOKENIZER_FILES) for file in files):
        return "there are no tokenizer files", tokenizer_advice(name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if problem := _json_problem(folder / file):
            return f"{file} {problem}, so there is no tokenizer", AGAIN.format(file)
    return None


def tokenizer_advice(name):
    """Return the advice for a model without a tokenizer."""
    where, first = (name, "") if Path(name).is_dir() else ("FOLDER", f"hf download {name} --local-dir FOLDER, then: ")
    advice = "Add the tokenizer (tokenizer.json, ...) of the model that it was made of: "
    return f'{advice}{first}AutoTokenizer.from_pretrained("THAT MODEL").save_pretrained("{where}").'


def _json_problem(path):
    """Return what is wrong with a file that should hold a JSON object, or None; nothing is with one that is absent."""
    try:
        content = path.read_bytes()
        if content.startswith(POINTER):
            return "is a pointer of git-lfs (run `git lfs pull` there)"
        return None if isinstance(json.loads(content), dict) else "holds no JSON object"
    except FileNotFoundError:
        return None
    except ValueError as error:
        return f"is not JSON ({error})"


def _read_json(path):
    """Return the object in a JSON file; an empty one where there is none."""
    return json.loads(path.read_bytes()) if path.exists() and not _json_problem(path) else {}
