"""A run's folder: whose it is, what state.json says of it, and the finished run's files.

state.json: {"status": "running|done|preempted|failed", "reason", "settings", "data", "code", ...}.
"""

import errno
import json
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors.numpy import save

from classifier.data.tasks import SPLIT_NAMES, save_task
from classifier.files import (
    check_longest_path,
    check_output_folder,
    code_digests,
    flush_folder,
    recover_folder,
    remove_folder,
    replace_folder,
    safe_name,
    sync,
    write_bytes,
    write_json,
    write_text,
)
from classifier.messages import BadInput, Preempted, RunFailed, in_red, log
from classifier.processes import is_out_of_memory, on_main_process
from classifier.training.lock import locked

PREDICTIONS = "validation_predictions.safetensors"  # {step: predictions}, of every evaluation
LONGEST_PATH = f"checkpoints/step-00000000.tmp/{PREDICTIONS}"  # that a run needs below its folder


def finished_results(folder, settings, fingerprints, resume="auto", overwrite=False):
    """Return the results of the finished run in this folder; None if a run may start or resume there.

    Raises BadInput if the folder holds a run with other settings or other data (it names them), or files of no run.
    """
    check_output_folder(folder)
    if is_empty(folder):
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        changes = describe_changes(state, settings, fingerprints)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or another program's
        raise BadInput(f"{folder}: is not empty, but contains no run", "Choose another --output_dir.") from None
    if overwrite:
        return None
    if resume == "never":
        raise BadInput(f"{folder}: holds a run", "--resume never needs an empty folder: choose another --output_dir.")
    if changes:
        reason = f"{folder}: holds a run with other settings ({changes})"
        raise BadInput(reason, "Choose another --output_dir, or --overwrite.")
    if state["status"] != "done":
        return None
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # if it was killed while it removed them
    if not (folder / "model").is_dir() or not (folder / "results.json").is_file():
        raise BadInput(f"{folder}: the model or results of its finished run are gone", "Train again: --overwrite.")
    log_changed_code(state)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def describe_changes(before, settings, fingerprints):
    """Return how settings and data differ from a run's, as text; empty if they do not. before: its state.json."""
    before = {**before["settings"], "data": before["data"]}
    now = {**settings, "data": fingerprints}
    files = {f"{split}_file" for split in SPLIT_NAMES}  # their rows count, in `data`, not how a path is typed
    return "; ".join(
        "data: other rows" if name == "data" else f"{name}: {before.get(name)} before, {now.get(name)} now"
        for name in sorted({*before, *now} - files)
        if before.get(name) != now.get(name)
    )


def is_empty(folder):
    """Return whether a folder is absent, or holds at most a lock."""
    return not folder.exists() or all(path.name.startswith("lock.json") for path in folder.iterdir())


@contextmanager
def hold(folder, accelerator, state):
    """Lock a run's folder and yield it; record in state.json why the run ended, whichever process failed.

    Raises BadInput on all processes if another run holds the folder, or it is not writable. Errors are raised again,
    out of memory and a full disk as RunFailed. After out of memory, the same command halves the micro-batch.
    """
    with ExitStack() as stack:
        on_main_process(accelerator, stack.enter_context, locked(folder))
        on_main_process(accelerator, check_longest_path, folder, LONGEST_PATH)
        try:
            yield folder
        except Preempted as error:
            if accelerator.is_main_process:
                with suppress(OSError):
                    record_end(folder, "preempted", f"{error}")
            raise
        except BaseException as error:
            size, half = state.micro_batch_size, -(-state.micro_batch_size // 2)
            ran_out = size and is_out_of_memory(error)
            is_disk_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            message = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}" or type(error).__name__
            if ran_out:
                advice = f"The same command resumes with micro-batches of {half}, which give the same numbers."
                if size == 1:
                    advice = "Try --gradient_checkpointing, a smaller --max_length or model."
                message = f"out of memory with {size} examples at a time\n{advice}"
            if is_disk_full:
                message = f"{error.filename or folder}: {error.strerror}\nMake room; the same command resumes."
            changes = {"micro_batch_size": half} if ran_out else {}
            with suppress(OSError):  # a full disk may refuse even this
                record_end(folder, "failed", message.partition("\n")[0], **changes)
            if ran_out or is_disk_full:
                raise RunFailed(message) from None
            raise


def record_end(folder, status, reason, **more):
    """Record in state.json why a run ended, unless it had not begun, or another process failed first.

    The errors of the other processes ("connection closed by peer") explain nothing.
    """
    if read_state(folder).get("status") == "running":
        write_state(folder, status, reason, **more)


def log_changed_code(state):
    """Log what code has changed since a run began. state: its state.json."""
    changed = [name for name, value in code_digests().items() if state.get("code", {}).get(name) != value]
    if changed:
        log.info(f"code changed since this run began: {', '.join(changed[:5])}{' and more' * (len(changed) > 5)}")


def read_state(folder):
    """Return the content of state.json, or an empty dict if there is none."""
    path = folder / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_state(folder, status, reason="", **more):
    """Update state.json: {"status": "running|done|preempted|failed", "reason", "settings", "data", "code", ...}."""
    write_json(folder / "state.json", {**read_state(folder), "status": status, "reason": reason, **more})


def write_model(folder, state, model, tokenizer, task, fingerprints, majority, results, card):
    """Write the model folder and results.json at the end of a run, then remove its checkpoints.

    The model folder has all that evaluate.py, predict.py and transformers need. state: of the training; majority: the
    prediction of the majority baseline; card: the text of README.md. Raises RunFailed where the run's folder cannot
    take all of it; the model is then in a place that could.
    """
    names = ("scores", "choice", "corrected_scores", "majority_baseline", "best_step", "mixed_precision", "trained_on")
    metrics = {**{name: results[name] for name in names}, "majority": majority}

    def write(place):
        write_model_files(place, model, tokenizer, task, fingerprints, metrics, card)

    def write_with_results(place):
        write(place)
        write_json(place / "results.json", results)

    place = None
    try:
        if not folder.is_dir():  # save_pretrained would make it again, without what belongs to the run
            raise FileNotFoundError("its run's folder is gone; was it renamed?")
        write(folder / "model.tmp")
        replace_folder(folder / "model.tmp", folder / "model")
        place = folder / "model"
        if state.candidates:
            write_bytes(folder / PREDICTIONS, save({str(step): each for step, each in state.candidates.items()}))
        write_json(folder / "results.json", results)
        write_state(folder, "done")
        sync(folder)
    except Exception as error:  # all that tokenizers raises on a full disk
        what = f"{folder}: the results" if place else f"{folder}/model"
        place = place or save_elsewhere(folder, write_with_results)
        where = f"The model is in {place}. Fix this" if place else "Fix this"
        raise RunFailed(f"{what} could not be written: {error}\n{where}, then run the same command again.") from error
    finally:
        with suppress(OSError):
            recover_folder(folder / "model")
    remove_folder(folder / "checkpoints")


def write_model_files(folder, model, tokenizer, task, fingerprints, metrics=None, card=None):
    """Write the files of a model folder, those that are known."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_task(task, fingerprints, folder / "task.json")
    if metrics:
        write_json(folder / "metrics.json", metrics)
    if card:
        write_text(folder / "README.md", card)


def save_elsewhere(folder, write):
    """Write a model to the first place that can take it: beside a run's folder, the working or the temporary folder.

    write(place) writes the files. Returns the new folder, or None where no place can take it.
    """
    for find_parent in (lambda: folder.absolute().parent, Path.cwd, tempfile.gettempdir):
        place = None
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{safe_name(folder.name)}-model-", dir=find_parent()))
            write(place)
            flush_folder(place)
        except Exception as error:  # as in write_model: the next place may do
            log.warning(f"WARNING: the model could not be written to another place: {error}")
            if place:
                shutil.rmtree(place, ignore_errors=True)
            continue
        log.warning(in_red(f"WARNING: {folder} CANNOT TAKE THE MODEL. IT IS IN {place}"))
        return place
    return None
