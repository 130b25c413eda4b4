"""The state of a training, and its checkpoints, which are written atomically.

A checkpoint is a folder checkpoints/step-N/ of model.safetensors; optimizer.safetensors, keyed by parameter name;
generators.safetensors, the states of torch's random generators in every process; validation_predictions.safetensors,
those of every evaluation so far; progress.json; and manifest.json, written last, with the size and SHA-256 of the
others. All is tensors and JSON, so loading one runs no code.
"""

import errno
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from classifier.files import (
    CannotWrite,
    code_digests,
    copy_folder,
    recover_folder,
    remove_folder,
    replace_folder,
    sha256,
    sync,
    write_json,
)
from classifier.messages import BadInput, RunFailed, log
from classifier.training.run_folder import (
    PREDICTIONS,
    describe_changes,
    log_changed_code,
    read_state,
    save_elsewhere,
    write_model_files,
    write_state,
)

# What --overwrite removes from a run's folder. model/ is replaced at the end, when there is a new one.
RUN_FILES = ("checkpoints", "tensorboard", "metrics.jsonl", "results.json", "bad_rows.csv", "state.json", PREDICTIONS)
CHECKPOINT_FILES = {"model.safetensors", "optimizer.safetensors", "generators.safetensors", "progress.json"}


@dataclass
class State:
    """The progress of a training: between two steps, this and the tensors are its complete state."""

    step: int = 0  # optimiser steps done
    evaluated_step: int = 0
    learning_rate: float = 0.0  # of the last step
    best: dict | None = None  # {"step", "score", "evaluations": {split: {"scores", "majority", "constant"}}}
    best_before: dict | None = None
    evaluations_since_best: int = 0
    micro_batch_size: int = 0
    num_processes: int = 1
    skipped_steps: int = 0  # by fp16's gradient scaler
    # Sums of [loss, examples, tokens, tokens with padding]: over all steps, since the last log line, since the last
    # evaluation.
    sums: list = field(default_factory=lambda: [0.0] * 4)
    since_line: list = field(default_factory=lambda: [0.0] * 4)
    since_evaluation: list = field(default_factory=lambda: [0.0] * 4)
    line_seconds: float = 0.0  # of training, since the last log line
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    save_seconds: float = 0.0

    def __post_init__(self):
        # {step: predictions on the split that chooses, in multi-label logits}; arrays, so saved in a file of their own
        self.candidates = {}


# ------------------------------------------------------------------------------------------------------- checkpoints


def begin_or_resume(folder, settings, fingerprints, resume="auto", overwrite=False):
    """Record that this run trains here, and clean up after a killed one. Only the main process calls this.

    Returns (the checkpoint to resume from, the limit of the micro-batch size after out of memory), each perhaps None.
    """
    before = {} if overwrite else read_state(folder)
    if not before:
        for name in RUN_FILES:
            path = folder / name
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in [folder / "model", *(old.with_suffix("") for old in folder.glob("checkpoints/*.old"))]:
        recover_folder(path)
    for path in [*folder.glob("*.json*.tmp"), *folder.glob("checkpoints/*.tmp")]:
        remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
    if before:
        log_changed_code(before)
    # The same command with --resume DIR, given again, resumes this run, not DIR a second time.
    is_known = resume in ("auto", "never", before.get("resumed"))
    path = newest_valid(folder) if is_known else import_checkpoint(folder, Path(resume), settings, fingerprints)
    try:
        write_state(folder, "running", settings=settings, data=fingerprints, code=code_digests(), resumed=resume)
    except OSError as error:
        raise CannotWrite(folder, error) from None
    return path, before.get("micro_batch_size")


def record_evaluation(state, score, evaluations, is_best):
    """Record that this step was evaluated, and whether its model is the best so far."""
    first = next(iter(evaluations.values()))
    candidate = first["logits"] if first["predictions"].ndim == 2 else first["predictions"]
    state.candidates[state.step] = candidate.astype("float32" if candidate.dtype.kind == "f" else "int32")
    state.evaluated_step = state.step
    state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
    if is_best:
        state.best_before = state.best
        kept = ("scores", "majority", "constant")
        summaries = {name: {key: evaluation[key] for key in kept} for name, evaluation in evaluations.items()}
        state.best = {"step": state.step, "score": score, "evaluations": summaries}


def save(folder, accelerator, state, model, optimizer, scheduler, keep):
    """Write a checkpoint of this step, and remove all but the newest `keep` and the best; return whether that worked.

    If not (a full disk), the earlier checkpoints are intact, nothing incomplete is left, and the model of this step
    cannot be the best. All processes call this at the same point, and the main one writes.
    """
    state.num_processes = accelerator.num_processes
    generators = {"cpu": torch.get_rng_state()}
    if accelerator.device.type != "cpu":
        module = torch.get_device_module(accelerator.device)
        generators[accelerator.device.type] = module.get_rng_state(accelerator.device)
    everywhere = gather_object([generators])
    is_saved = [True]
    if accelerator.is_main_process:
        tensors = {
            "optimizer": optimizer_tensors(model, optimizer),
            "generators": {
                f"{rank}.{name}": value for rank, states in enumerate(everywhere) for name, value in states.items()
            },
        }
        if state.candidates:
            candidates = {str(step): torch.from_numpy(candidate) for step, candidate in state.candidates.items()}
            tensors["validation_predictions"] = candidates
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        run = read_state(folder)  # empty where the folder was renamed, and then the save fails below
        run = {"settings": run.get("settings"), "data": run.get("data")}
        progress = {"state": asdict(state), "schedule": scheduler.state_dict(), "scaler": scaler, "run": run}
        path = checkpoint_path(folder, state.step)
        try:
            if (folder / "metrics.jsonl").exists():
                sync(folder / "metrics.jsonl")
            write_checkpoint(path, model, tensors, progress)
            prune(folder, state.best, keep)
        except (OSError, SafetensorError) as error:
            is_saved = [False]
            log.warning(f"WARNING: {path} could not be saved, training continues: {error}")
    broadcast_object_list(is_saved)
    if not is_saved[0] and state.best and state.best["step"] == state.step:
        state.best = state.best_before
    return is_saved[0]


def optimizer_tensors(model, optimizer):
    """Return the optimiser's state as {"encoder.weight.exp_avg": tensor, ...}."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write_checkpoint(path, model, tensors, progress):
    """Write a checkpoint atomically. Raises OSError or SafetensorError.

    tensors: {"optimizer": {name: tensor}, "generators": {name: tensor}}; progress: the content of progress.json.
    """
    needed = sum(value.nbytes for value in [*model.state_dict().values(), *tensors["optimizer"].values()]) + 2**20
    path.parent.mkdir(exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.mkdir()
        save_model(model, str(temporary / "model.safetensors"))
        for name, values in tensors.items():
            save_file(values, temporary / f"{name}.safetensors")
        write_json(temporary / "progress.json", progress)
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in temporary.iterdir()}
        write_json(temporary / "manifest.json", manifest)
        replace_folder(temporary, path)
        sync(path.parent.parent)
    finally:
        recover_folder(path)


def checkpoint_paths(folder):
    """Return the paths of a run's checkpoints, valid or not, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix == "" and path.is_dir())


def checkpoint_path(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def recorded_best(path):
    """Return the path of the checkpoint that was the best when this one was saved; None if there was none."""
    try:
        best = json.loads((path / "progress.json").read_text(encoding="utf-8"))["state"]["best"]
        return best and checkpoint_path(path.parent.parent, best["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(folder, best, keep):
    """Remove all checkpoints but the newest `keep`, the best, and those that were the best for the newest."""
    paths = checkpoint_paths(folder)
    best_path = best and checkpoint_path(folder, best["step"])
    newest_paths = [path for path in paths if path != best_path][-keep:]
    for path in set(paths) - {best_path, *newest_paths, *map(recorded_best, newest_paths)}:
        shutil.rmtree(path, ignore_errors=True)


def find_damage(path):
    """Return what is wrong with a checkpoint, as text; None if it is valid."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if CHECKPOINT_FILES - manifest.keys():
            return "manifest.json lacks a file"
        for name, expected in manifest.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} has been altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or damaged"
    return None


def why_unusable(path):
    """Return what is wrong with a checkpoint, or with the one that holds its best model, as text; None if nothing."""
    damage, best = find_damage(path), recorded_best(path)
    if damage or not best:
        return damage
    damage = find_damage(best)
    return damage and f"its best model, {best.name}: {damage}"


def newest_valid(folder):
    """Return the newest checkpoint that is valid and whose best model is; None if there is none.

    Warns about each that it skips. A run repeats exactly, so an earlier checkpoint costs only time.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        problem = why_unusable(path)
        if not problem:
            return path
        log.warning(f"WARNING: {path} skipped: {problem}")
    if paths:
        log.warning(f"WARNING: {folder}: no checkpoint is valid; the run starts again from step 0")
    return None


def import_checkpoint(folder, source, settings, fingerprints):
    """Copy the checkpoint that --resume DIR names, and its best one, into the folder of this run; return its path.

    source: a checkpoint, or a run's folder for its newest one. Later checkpoints of this run are removed. Raises
    BadInput if it is unusable, or of other settings or data.
    """
    path = newest_valid(source) if (source / "checkpoints").is_dir() else source
    if problem := why_unusable(path) if path else "holds no valid checkpoint":
        raise BadInput(f"--resume {source}: {problem}", "Give a run's folder, or one of its checkpoints/step-N.")
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    if changes := describe_changes(progress["run"], settings, fingerprints):
        raise BadInput(f"--resume {source}: it has other settings ({changes})", "Give the same settings.")
    for source_path in {path, recorded_best(path) or path}:
        target = folder / "checkpoints" / source_path.name
        if target.resolve() != source_path.resolve():
            copy_folder(source_path, target.with_name(f"{target.name}.tmp"))
            replace_folder(target.with_name(f"{target.name}.tmp"), target)
    for existing in checkpoint_paths(folder):
        if existing.name > path.name:
            remove_folder(existing)
    return folder / "checkpoints" / path.name


def read_tensors(path, device="cpu"):
    """Yield (name, tensor) of a file, copied: Windows cannot remove a file while a tensor of it is memory-mapped."""
    for name, value in load_file(path).items():
        yield name, value.to(device, copy=True)


def load(path, accelerator, state, model, optimizer, scheduler):
    """Load a checkpoint into the parts of a training; do nothing if path is None."""
    if path is None:
        return
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    vars(state).update(progress["state"])
    load_model(model, path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name, value in read_tensors(path / "optimizer.safetensors", next(model.parameters()).device):
        parameter, _, key = name.rpartition(".")
        optimizer.state[parameters[parameter]][key] = value
    if (path / PREDICTIONS).is_file():  # not before the first evaluation
        state.candidates = {int(step): value.numpy() for step, value in read_tensors(path / PREDICTIONS)}
    scheduler.load_state_dict(progress["schedule"])
    for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(progress["scaler"])
    rank, generators = accelerator.process_index, dict(read_tensors(path / "generators.safetensors"))
    if f"{rank}.cpu" in generators:
        torch.set_rng_state(generators[f"{rank}.cpu"])
    device = accelerator.device
    if device.type != "cpu" and f"{rank}.{device.type}" in generators:
        torch.get_device_module(device).set_rng_state(generators[f"{rank}.{device.type}"], device)
    log.info(f"resuming after step {state.step}: {path}")
    if state.num_processes != accelerator.num_processes:
        log.info(
            f"on {accelerator.num_processes} process(es), before on {state.num_processes}: the plan's remaining "
            "examples are the same, but sums are rounded differently"
        )


def load_best(folder, accelerator, state, model, tokenizer, task, fingerprints):
    """Load the weights of the best step into the model.

    Raises RunFailed if they are not on the disk. The model of the last step, which is in memory, is then written to a
    place that can take it.
    """
    try:
        if state.best is None:
            raise FileNotFoundError("no model could be saved, see the warnings above")
        load_model(model, checkpoint_path(folder, state.best["step"]) / "model.safetensors")
    except (OSError, SafetensorError) as error:
        if state.best and state.best["step"] == state.step:  # the weights in memory are the best ones
            return
        place = None
        if accelerator.is_main_process:
            place = save_elsewhere(folder, lambda place: write_model_files(place, model, tokenizer, task, fingerprints))
        raise RunFailed(
            f"{error}\n{f'The model of the last step is in {place}. ' if place else ''}"
            "Make room on the disk, or undo what removed the checkpoints, then run the same command again."
        ) from None
