"""A run on disk: its state, its best weights, the model folder. Every file and folder is complete or absent."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from cache import write_json, write_text
from reader import BadInput
from tasks import save_task

# All that a run leaves in its folder; --overwrite removes these and nothing else.
LEFT_BY_A_RUN = ("checkpoints", "model", "model.tmp", "tensorboard", "metrics.jsonl", "results.json", "state.json")
LEFT_BY_A_RUN += ("bad_rows.csv",)


def look_at(folder, settings, fingerprints, overwrite=False):
    """Return the results of a run that is complete in this folder, or None where a new run may start.

    Raises BadInput where the folder holds something else: a run with other settings or other data (the differences are
    named), an unfinished run, or files that are no run's. Nothing is written, so that all processes see the same.
    """
    check_output(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        settings_before, data_before = state["settings"], state["data"]
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or another program's
        raise BadInput(f"{folder}: is not empty, and holds no run", "Choose another --output_dir.") from None
    if overwrite:
        return None
    before = {**settings_before, "data": data_before}
    now = {**settings, "data": fingerprints}
    different = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if different:
        words = "; ".join(
            "data: other rows" if name == "data" else f"{name}: {before.get(name)} before, {now.get(name)} now"
            for name in different
        )
        raise BadInput(
            f"{folder}: holds a run with other settings ({words})", "Choose another --output_dir, or --overwrite."
        )
    if state["status"] != "done":
        raise BadInput(
            f"{folder}: holds a run that did not finish ({state['status']}: {state['reason'] or 'no reason noted'})",
            "Start it again with --overwrite, or choose another --output_dir. Resuming is not possible yet.",
        )
    if not (folder / "model").is_dir() or not (folder / "results.json").is_file():
        raise BadInput(f"{folder}: held a finished run, but its model or results are gone", "Train again: --overwrite.")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def check_output(folder):
    """Raise BadInput where a file stands in the place of a folder that is to be written."""
    for path in (folder, *folder.parents):
        try:
            is_other = path.exists() and not path.is_dir()
        except OSError as error:  # a name too long
            raise BadInput(f"{path}: cannot be a folder ({error.strerror})", "Choose another --output_dir.") from None
        if is_other:
            raise BadInput(f"{path}: is a file, not a folder", "Choose another --output_dir.")


def begin(folder, settings, fingerprints):
    """Empty the folder of an older run and note that this one is running. Only the main process calls this."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write_state(folder, "running", settings=settings, data=fingerprints)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})", "Choose another --output_dir.") from None


def read_state(folder):
    """Return the content of state.json, or an empty dict."""
    path = folder / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_state(folder, status, reason="", **more):
    """Write state.json: {"status": "running|done|failed", "reason", "settings", "data"}; `more` replaces keys."""
    write_json(folder / "state.json", {**read_state(folder), "status": status, "reason": reason, **more})


@contextmanager
def failure_noted(folder):
    """Note in state.json why the code under `with` failed; the error goes on. Any process may be the one that fails."""
    try:
        yield
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}".partition("\n")[0]
        # One process failed first; what the others say after it ("connection closed by peer") explains nothing.
        if read_state(folder).get("status") != "failed":
            write_state(folder, "failed", reason or type(error).__name__)
        raise


def save_best(folder, step, model):
    """Save the weights of the best model so far and, once they are whole, remove those of the one before."""
    checkpoints = folder / "checkpoints"
    target = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f"step-{step:08d}.tmp"
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    os.replace(temporary, target)
    for other in checkpoints.iterdir():
        if other != target:
            shutil.rmtree(other)


def load_best(folder, step, model):
    """Load the weights that save_best wrote at this step into the model."""
    from safetensors.torch import load_model

    load_model(model, folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def write_model(folder, model, tokenizer, task, fingerprints, majority, results, card):
    """Write results.json and the model folder, once, at the end; then drop the checkpoints.

    The model folder has all that evaluate.py, predict.py and transformers need. majority: what the baseline predicts;
    card: the text of its README.md.
    """
    temporary = folder / "model.tmp"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    save_task(task, fingerprints, temporary / "task.json")
    scores = {name: results[name] for name in ("scores", "majority_baseline", "best_step", "mixed_precision")}
    write_json(temporary / "metrics.json", {**scores, "majority": majority})
    write_text(temporary / "README.md", card)
    mask = os.umask(0)
    os.umask(mask)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
    write_json(folder / "results.json", results)
    os.replace(temporary, folder / "model")
    shutil.rmtree(folder / "checkpoints")
    write_state(folder, "done")


def trained(folder):
    """Return (mixed precision that the scores of a saved model were computed in, what its majority baseline predicts).

    ("auto", None) where they are not known.
    """
    path = Path(folder) / "metrics.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content.get("mixed_precision", "auto"), content.get("majority")


def model_folder(path):
    """Return the folder of a saved model: the path itself, or model/ of a run. A Hub id comes back as it is."""
    if (Path(path) / "model" / "config.json").is_file():
        return str(Path(path) / "model")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BadInput(f"{path}: holds no model", "Give a model folder, or the folder of a finished run.")
    return str(path)
