"""A run on disk: its state, its checkpoints, the model folder. Every file and folder is complete or absent.

A checkpoint is checkpoints/step-N/: model.safetensors; optimizer.safetensors, by the names of the parameters;
generators.safetensors, torch's random states of every process; progress.json; and manifest.json, written last, with
size and SHA-256 of the others. Tensors and JSON: reading one runs no code.
"""

import errno
import hashlib
import json
import shutil
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model

from classifier.data.tasks import save_task
from classifier.files import check_output_folder, recover_folder, replace_folder, sha256, sync, write_json, write_text
from classifier.messages import BadInput, Preempted, RunFailed, log
from classifier.processes import on_main_process
from classifier.training.lock import locked

# All that a run leaves in its folder; --overwrite removes these and nothing else, model/ only once there is a new one.
LEFT_BY_A_RUN = ("checkpoints", "tensorboard", "metrics.jsonl", "results.json", "bad_rows.csv", "state.json")
IN_A_CHECKPOINT = {"model.safetensors", "optimizer.safetensors", "generators.safetensors", "progress.json"}


@dataclass
class State:
    """Where a training is, besides its tensors. Between two steps this and they are all there is to know."""

    step: int = 0  # optimiser steps done
    evaluated_step: int = 0
    learning_rate: float = 0.0  # of the last step
    best: dict | None = None  # {"step", "score", "evaluations": {split: {"scores", "majority", "constant"}}}
    best_before: dict | None = None
    evaluations_since_best: int = 0
    micro_batch_size: int = 0
    num_processes: int = 1
    # Sums of [loss, examples, tokens, tokens with padding]: of all steps, since the line before, since the evaluation.
    sums: list = field(default_factory=lambda: [0.0] * 4)
    since_line: list = field(default_factory=lambda: [0.0] * 4)
    since_evaluation: list = field(default_factory=lambda: [0.0] * 4)
    line_seconds: float = 0.0  # of training, since the line before
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    save_seconds: float = 0.0


# -------------------------------------------------------------------------------------------------- the run's folder


def finished_results(folder, settings, fingerprints, resume="auto", overwrite=False):
    """Return the results of a run that is complete in this folder, or None where a run may start or go on.

    Raises BadInput where the folder holds something else: a run with other settings or other data (the differences are
    named), or files that are no run's.
    """
    check_output_folder(folder)
    if is_empty(folder):
        return None
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        differences(state, settings, fingerprints)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or another program's
        raise BadInput(f"{folder}: is not empty, and holds no run", "Choose another --output_dir.") from None
    if overwrite:
        return None
    if resume == "never":
        raise BadInput(f"{folder}: holds a run", "--resume never wants an empty folder: another --output_dir.")
    if words := differences(state, settings, fingerprints):
        raise BadInput(
            f"{folder}: holds a run with other settings ({words})", "Choose another --output_dir, or --overwrite."
        )
    if state["status"] != "done":
        return None
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # where it was killed at its very end
    if not (folder / "model").is_dir() or not (folder / "results.json").is_file():
        raise BadInput(f"{folder}: held a finished run, but its model or results are gone", "Train again: --overwrite.")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def differences(before, settings, fingerprints):
    """Return in words how a run's settings and data differ from those of now; an empty string where they do not."""
    before = {**before["settings"], "data": before["data"]}
    now = {**settings, "data": fingerprints}
    return "; ".join(
        "data: other rows" if name == "data" else f"{name}: {before.get(name)} before, {now.get(name)} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    )


def is_empty(folder):
    """Return whether a folder is absent or holds nothing but what a run writes before anything else."""
    return not folder.exists() or all(path.name.startswith("lock.json") for path in folder.iterdir())


@contextmanager
def hold(folder, accelerator, state):
    """Hold a run's folder under `with`, alone, and yield it; note in state.json why the run ended.

    Raises BadInput on all processes where another run is there, or nothing can be written. An error goes on; any
    process may be the one that fails. Out of memory: half the micro-batch is noted, for the same command to go on with.
    """
    with ExitStack() as stack:
        on_main_process(accelerator, stack.enter_context, locked(folder))
        try:
            yield folder
        except Preempted as error:
            if accelerator.is_main_process:
                with suppress(OSError):
                    record_end(folder, "preempted", f"{error}")
            raise
        except BaseException as error:
            size, half = state.micro_batch_size, -(-state.micro_batch_size // 2)
            no_memory = size and (isinstance(error, MemoryError) or should_reduce_batch_size(error))
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}" or type(error).__name__
            if no_memory:
                goes_on = f"The same command goes on with micro-batches of {half}, and the same numbers."
                smaller = "Try --gradient_checkpointing, a smaller --max_length or model."
                reason = f"out of memory with {size} examples at a time\n{goes_on if size > 1 else smaller}"
            if no_room := getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                reason = f"{error.filename or folder}: {error.strerror}\nMake room; the same command goes on."
            with suppress(OSError):  # on a full disk not even this may be possible
                record_end(
                    folder, "failed", reason.partition("\n")[0], **({"micro_batch_size": half} if no_memory else {})
                )
            if no_memory or no_room:
                raise RunFailed(reason) from None
            raise


def begin_or_resume(folder, settings, fingerprints, resume="auto", overwrite=False):
    """Note that this run trains here, and clean up after one that was killed. Only the main process calls this.

    Returns (the checkpoint to go on from, half the micro-batch that was too large for memory), each perhaps None.
    """
    before = {} if overwrite else read_state(folder)
    if not before:
        for name in LEFT_BY_A_RUN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in [folder / "model", *(old.with_suffix("") for old in folder.glob("checkpoints/*.old"))]:
        recover_folder(path)
    for path in [*folder.glob("*.json*.tmp"), *folder.glob("checkpoints/*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    code = code_digests()
    other = [name for name, value in code.items() if before and before.get("code", {}).get(name) != value]
    if other:
        log.info(f"other code than when this run began: {', '.join(other)}")
    # The same command typed again goes on where it was, and not a second time from the checkpoint that it names.
    is_known = resume in ("auto", "never", before.get("resumed"))
    path = newest_valid(folder) if is_known else import_checkpoint(folder, Path(resume), settings, fingerprints)
    try:
        write_state(folder, "running", settings=settings, data=fingerprints, code=code, resumed=resume)
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror})", "Make room there.") from None
    return path, before.get("micro_batch_size")


def code_digests():
    """Return the content of the scripts, as digests, and the versions of what computes."""
    package = Path(__file__).resolve().parents[1]
    files = sorted([*package.parent.glob("*.py"), *package.rglob("*.py")])
    digests = {
        file.relative_to(package.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in files
    }
    return digests | {name: version(name) for name in ("torch", "transformers", "accelerate")}


def read_state(folder):
    """Return the content of state.json, or an empty dict."""
    path = folder / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_state(folder, status, reason="", **more):
    """Write state.json: {"status": "running|done|preempted|failed", "reason", "settings", "data", "code"}; `more`
    replaces keys."""
    write_json(folder / "state.json", {**read_state(folder), "status": status, "reason": reason, **more})


def record_end(folder, status, reason, **more):
    """Note in state.json why a run ended, unless it had not begun, or another process failed first.

    What the others say after that one ("connection closed by peer") explains nothing.
    """
    if read_state(folder).get("status") == "running":
        write_state(folder, status, reason, **more)


# ------------------------------------------------------------------------------------------------------- checkpoints


def record_evaluation(state, score, evaluations, is_best):
    """Note that this step was evaluated, and whether its model is the best so far."""
    state.evaluated_step = state.step
    state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
    if is_best:
        state.best_before = state.best
        state.best = {"step": state.step, "score": score, "evaluations": _for_json(evaluations)}


def _for_json(evaluations):
    kept = ("scores", "majority", "constant")
    return {name: {key: evaluation[key] for key in kept} for name, evaluation in evaluations.items()}


def save(folder, accelerator, state, model, optimizer, scheduler, keep):
    """Write a checkpoint of this step, and drop all but the newest `keep` and the best; return whether that worked.

    Where it did not (a full disk), what was there is there, nothing half is left, and a best model of this step does
    not count. All processes call this at the same point; the main one writes.
    """
    state.num_processes = accelerator.num_processes
    generators = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    everywhere = gather_object([generators])
    is_saved = [True]
    if accelerator.is_main_process:
        tensors = {
            "optimizer": optimizer_tensors(model, optimizer),
            "generators": {f"{rank}.{name}": value for rank, of in enumerate(everywhere) for name, value in of.items()},
        }
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        run = read_state(folder)
        run = {"settings": run["settings"], "data": run["data"]}
        progress = {"state": asdict(state), "schedule": scheduler.state_dict(), "scaler": scaler, "run": run}
        path = checkpoint_path(folder, state.step)
        try:
            if (folder / "metrics.jsonl").exists():
                sync(folder / "metrics.jsonl")
            write_checkpoint(path, model, tensors, progress)
            prune(folder, state.best, keep)
        except (OSError, SafetensorError) as error:
            is_saved = [False]
            log.warning(f"WARNING: {path} could not be saved, training goes on: {error}")
    broadcast_object_list(is_saved)
    if not is_saved[0] and state.best and state.best["step"] == state.step:
        state.best = state.best_before
    return is_saved[0]


def optimizer_tensors(model, optimizer):
    """Return the optimiser's state as tensors: "encoder.weight.exp_avg", ..."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def write_checkpoint(path, model, tensors, progress):
    needed = sum(value.nbytes for value in [*model.state_dict().values(), *tensors["optimizer"].values()]) + 2**20
    path.parent.mkdir(parents=True, exist_ok=True)
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
    """Return the paths of a run's checkpoints, oldest first, whole or not."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix == "" and path.is_dir())


def checkpoint_path(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def best_known_to(path):
    """Return the path of the best checkpoint when this one was saved; None where there was none or it is not known."""
    try:
        best = json.loads((path / "progress.json").read_text(encoding="utf-8"))["state"]["best"]
        return best and checkpoint_path(path.parent.parent, best["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(folder, best, keep):
    """Remove all checkpoints but the newest `keep`, the best one, and the best ones that those rely on."""
    paths = checkpoint_paths(folder)
    best_path = best and checkpoint_path(folder, best["step"])
    newest_paths = [path for path in paths if path != best_path][-keep:]
    for path in set(paths) - {best_path, *newest_paths, *map(best_known_to, newest_paths)}:
        shutil.rmtree(path, ignore_errors=True)


def find_damage(path):
    """Return in words what is wrong with a checkpoint, or None where it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if IN_A_CHECKPOINT - manifest.keys():
            return "manifest.json names too few files"
        for name, facts in manifest.items():
            file = path / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if sha256(file) != facts["sha256"]:
                return f"{name} has been altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or damaged"
    return None


def why_unusable(path):
    """Return in words what is wrong with a checkpoint, or with the best one that it relies on; else None."""
    words, best = find_damage(path), best_known_to(path)
    if words or not best:
        return words
    words = find_damage(best)
    return words and f"its best model, {best.name}: {words}"


def newest_valid(folder):
    """Return the newest checkpoint that is whole, and whose best one is; None where there is none.

    Tells of each that is passed over. Since a run repeats exactly, going on earlier costs time and nothing else.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        words = why_unusable(path)
        if not words:
            return path
        log.warning(f"WARNING: {path} is passed over: {words}")
    if paths:
        log.warning(f"WARNING: {folder}: no checkpoint is whole; the run starts again from its beginning")
    return None


def import_checkpoint(folder, source, settings, fingerprints):
    """Bring the checkpoint that --resume DIR names into the folder of this run, with its best one; return its path.

    Later ones of this run are dropped. source: a checkpoint, or a run's folder: its newest one.
    """
    path = newest_valid(source) if (source / "checkpoints").is_dir() else source
    if words := why_unusable(path) if path else "no checkpoint in it is whole":
        raise BadInput(f"--resume {source}: {words}", "Give a run's folder, or one of its checkpoints/step-N.")
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    if words := differences(progress["run"], settings, fingerprints):
        raise BadInput(f"--resume {source}: of a run with other settings ({words})", "Give the same settings.")
    for source_path in {path, best_known_to(path) or path}:
        target = folder / "checkpoints" / source_path.name
        if target.resolve() != source_path.resolve():
            shutil.copytree(source_path, target.with_name(f"{target.name}.tmp"))
            replace_folder(target.with_name(f"{target.name}.tmp"), target)
    for other in checkpoint_paths(folder):
        if other.name > path.name:
            shutil.rmtree(other)
    return folder / "checkpoints" / path.name


def load(path, accelerator, state, model, optimizer, scheduler):
    """Load a checkpoint into the parts of a training; where path is None, they are as they begin."""
    if path is None:
        return
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    vars(state).update(progress["state"])
    load_model(model, path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name, value in load_file(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[parameters[parameter]][key] = value.to(parameters[parameter].device)
    scheduler.load_state_dict(progress["schedule"])
    for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(progress["scaler"])
    rank, generators = accelerator.process_index, load_file(path / "generators.safetensors")
    if f"{rank}.cpu" in generators:
        torch.set_rng_state(generators[f"{rank}.cpu"])
    if f"{rank}.cuda" in generators and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(generators[f"{rank}.cuda"], accelerator.device)
    log.info(f"goes on after step {state.step}: {path}")
    if state.num_processes != accelerator.num_processes:
        log.info(
            f"on {accelerator.num_processes} process(es), before on {state.num_processes}: the remaining examples of "
            "the plan, each once; sums are rounded otherwise"
        )


def load_best(folder, best, model):
    """Load the weights of the best step into the model."""
    if best is None:
        raise RunFailed(
            "no model could be saved, see the warnings above\nMake room on the disk; then the same command."
        )
    load_model(model, checkpoint_path(folder, best["step"]) / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------- the model


def write_model(folder, model, tokenizer, task, fingerprints, majority, results, card):
    """Write results.json and the model folder, once, at the end; then drop the checkpoints.

    The model folder has all that evaluate.py, predict.py and transformers need. majority: what the baseline predicts;
    card: the text of its README.md.
    """
    temporary = folder / "model.tmp"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_task(task, fingerprints, temporary / "task.json")
        scores = {name: results[name] for name in ("scores", "majority_baseline", "best_step", "mixed_precision")}
        write_json(temporary / "metrics.json", {**scores, "majority": majority})
        write_text(temporary / "README.md", card)
        write_json(folder / "results.json", results)
        replace_folder(temporary, folder / "model")
        write_state(folder, "done")
        sync(folder)
    except Exception as error:  # tokenizers raises nothing more special where the disk is full
        raise RunFailed(f"{folder}/model could not be written: {error}\nMend this; then the same command.") from error
    finally:
        recover_folder(folder / "model")
    shutil.rmtree(folder / "checkpoints")
