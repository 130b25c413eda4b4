"""Files of others: no code in them runs, whatever file of a checkpoint or a model holds it; no name leads elsewhere."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_rows, write_table
from run_help import names
from test_checkpoint import FILES, outcome, stopped  # noqa: F401 - a fixture
from test_preemption import ended, start

from classifier.data import tasks
from classifier.files import sha256
from classifier.messages import BadInput

FLAGS = ("--eval_every", 4, "--save_every", 5, "--keep_checkpoints", 3, "--threads", 1, "--log_every", 1)
CODE_RAN = "code ran"  # the file that a payload makes, in the folder where the script was started


class Payload:
    """Unpickling one makes a file."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch '{self.folder}/{CODE_RAN}'",)


def payloads(folder):
    """The payload as a plain pickle, as torch.save writes it now, and as it did before."""
    weights = {"weights": Payload(folder), "classifier.weight": torch.zeros(2, 32)}
    torch.save(weights, folder / "zip.bin")
    torch.save(weights, folder / "old.bin", _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps(Payload(folder)),
        "zip": (folder / "zip.bin").read_bytes(),
        "old": (folder / "old.bin").read_bytes(),
    }


def test_the_payload_works(tmp_path):
    """If this fails, the tests below prove nothing."""
    for kind, content in payloads(tmp_path).items():
        (tmp_path / "file").write_bytes(content)
        if kind == "pickle":
            pickle.loads(content)
        else:
            torch.load(tmp_path / "file", weights_only=False)
        (tmp_path / CODE_RAN).unlink()


def check(folder, result, codes=(0, 2), may_be_untidy=False):
    """No code ran, and the script ended: without a traceback, with a reason and advice where it failed."""
    code, log, err = result
    assert not list(folder.rglob(CODE_RAN))
    if not may_be_untidy:
        assert code in codes, err
        assert "Traceback" not in err, err
    if code == 2:  # predict.py's log goes before, to standard error
        assert all(".py: " in line for line in err.splitlines()[-2:])
    return code, log, err


def fit_manifest(path):
    """Make a checkpoint's manifest match its files again."""
    files = [path / name for name in FILES[:4]]
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_payload_is_skipped(stopped, tmp_path, name):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    path = folder / "run" / "checkpoints" / "step-00000015"
    (path / name).write_bytes(payloads(tmp_path)["zip" if "model" in name else "pickle"])
    _, log, _ = check(tmp_path, ended(start(folder, "--task", "task.yaml", *FLAGS, "--output_dir", "run")), [0])
    assert "step-00000015 skipped" in log and name in log
    assert outcome(folder / "run") == outcome(stopped / "whole")


@pytest.mark.parametrize("name", FILES[:4])
def test_a_payload_whose_manifest_fits_runs_no_code(stopped, tmp_path, name):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    path = folder / "run" / "checkpoints" / "step-00000015"
    (path / name).write_bytes(payloads(tmp_path)["zip" if "model" in name else "pickle"])
    fit_manifest(path)
    result = ended(start(folder, "--task", "task.yaml", *FLAGS, "--output_dir", "run"), 30)
    check(tmp_path, result, may_be_untidy=True)  # a deliberate attack on this run: a traceback is fair


def test_a_name_in_progress_leads_nowhere_else(stopped, tmp_path):  # noqa: F811
    """The step of the best checkpoint becomes a part of a path."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    path = folder / "run" / "checkpoints" / "step-00000015"
    progress = json.loads((path / "progress.json").read_text())
    progress["state"]["best"]["step"] = "/../../../../evil"
    (path / "progress.json").write_text(json.dumps(progress))
    fit_manifest(path)
    result = ended(start(folder, "--task", "task.yaml", *FLAGS, "--output_dir", "run"), 30)
    check(tmp_path, result, may_be_untidy=True)  # a deliberate attack on this run: a traceback is fair


# ------------------------------------------------------------------------------------------------------- model folders

IN_A_MODEL = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "task.json",
    "metrics.json",
]
SCRIPTS = {
    "train.py": ["--task", "task.yaml", *FLAGS, "--output_dir", "new", "--max_steps", 4, "--model"],
    "evaluate.py": ["--threads", 1, "--model"],
    "predict.py": ["--threads", 1, "--text", "the room was good", "--model"],
}


@pytest.fixture
def model(stopped, tmp_path):  # noqa: F811
    """A copy of a trained model's folder, in that of its task."""
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy" / "whole" / "model"


def run_over(model, script):
    folder = model.parent.parent
    shutil.rmtree(folder / "new", ignore_errors=True)
    return ended(start(folder, *SCRIPTS[script], model, script=script), 30)


@pytest.mark.slow
def test_a_model_is_taken_as_it_is(model):
    """If this fails, the tests below prove nothing."""
    for script in SCRIPTS:
        assert check(model.parent.parent, run_over(model, script))[0] == 0


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in SCRIPTS for name in IN_A_MODEL])
def test_a_payload_in_a_file_of_a_model(model, script, name):
    folder = model.parent.parent
    (model / name).write_bytes(payloads(folder)["zip" if "safetensors" in name else "pickle"])
    code, *_ = check(folder, run_over(model, script))
    # What is of no concern to a script is no reason to refuse: it starts a task of its own, or needs no scores.
    indifferent = {("train.py", "task.json"), ("train.py", "metrics.json"), ("predict.py", "metrics.json")}
    assert code == (0 if (script, name) in indifferent else 2)


@pytest.mark.parametrize(
    ("script", "kind"), [*((script, "zip") for script in SCRIPTS), ("evaluate.py", "pickle"), ("evaluate.py", "old")]
)
def test_a_payload_as_pytorch_model_bin(model, script, kind):
    folder = model.parent.parent
    (model / "pytorch_model.bin").write_bytes(payloads(folder)[kind])
    if kind == "zip":
        assert check(folder, run_over(model, script))[0] == 0  # safetensors goes before
    (model / "model.safetensors").unlink()
    assert check(folder, run_over(model, script))[0] == 2


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("model_type", ["bert", "my_own_model"])
def test_code_beside_the_weights(model, script, model_type):
    folder = model.parent.parent
    code = f"open({str(folder / CODE_RAN)!r}, 'w')\n"
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py", "custom_generate.py"):
        (model / name).write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_mine.Config",
        "AutoModelForSequenceClassification": "modeling_mine.Model",
        "AutoTokenizer": ["tokenization_mine.Tokenizer", None],
    }
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["tokenization_mine.Tokenizer", "tokenization_mine.Tokenizer"]}
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer_config, "tokenizer_class": "Tokenizer"}))
    check(folder, run_over(model, script))


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("tag", ["apply:os.system", "new:os.system", "name:os.system", "module:os"])
def test_a_task_with_python_in_it(stopped, tmp_path, tag):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    content = (folder / "task.yaml").read_text()
    value = f"!!python/object/{tag} ['touch {folder}/{CODE_RAN}']"
    if tag.startswith(("name", "module")):
        value = f"!!python/{tag} ''"
    (folder / "task.yaml").write_text(f'{content[:-1]}, "source": {value}}}')
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        yaml.safe_load((folder / "task.yaml").read_text())
    err = check(folder, ended(start(folder, "--task", "task.yaml", "--output_dir", "new")), [2])[2]
    assert "is not YAML" in err


EVIL = "../../evil"


def all_files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.slow
def test_labels_with_slashes_stay_in_the_output_folder(tmp_path, vocabulary):
    from conftest import bert_config

    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    labels = [EVIL, "/tmp/../x"]
    write_table(folder / "train.csv", make_rows(40, 1, ("negative", "positive")))
    content = (folder / "train.csv").read_text().replace("negative", labels[0]).replace("positive", labels[1])
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text(content)
    task = {"files": {"train": "train.csv", "validation": "validation.csv"}, "model": bert_config(vocabulary)}
    (folder / "task.yaml").write_text(json.dumps({**task, "labels": labels}))
    before = all_files(tmp_path)
    flags = ("--task", "task.yaml", "--threads", 1, "--max_steps", 2, "--output_dir", "run", "--mixed_precision", "no")
    assert check(tmp_path, ended(start(folder, *flags)))[0] == 0
    assert check(tmp_path, ended(start(folder, "--model", "run", "--threads", 1, script="evaluate.py")))[0] == 0
    new = {name for name in all_files(tmp_path) - before if "output of" not in name}
    assert all(name == "a/b/run" or name.startswith("a/b/run/") for name in new)


@pytest.mark.parametrize("split", [EVIL, "../evil", "/tmp/evil"])
def test_evaluate_has_no_split_of_such_a_name(model, split):
    folder = model.parent.parent
    before = all_files(folder.parent)
    result = ended(start(folder, "--model", model, "--threads", 1, "--split", split, script="evaluate.py"))
    assert check(folder, result, [2])
    assert {name for name in all_files(folder.parent) - before if "output of" not in name} == set()


def test_a_split_of_a_saved_task_leads_nowhere_else(model):
    """task.json comes with the model, from whoever made it."""
    folder = model.parent.parent
    content = json.loads((model / "task.json").read_text())
    content["files"][f"validation_/{EVIL}"] = content["files"]["validation"]
    (model / "task.json").write_text(json.dumps({**content, "fingerprints": {}}))
    before = all_files(folder.parent)
    check(folder, ended(start(folder, "--model", model, "--threads", 1, script="evaluate.py")))
    new = {name for name in all_files(folder.parent) - before if "output of" not in name}
    assert {name for name in new if not name.startswith("copy/whole/evaluation-validation")} == set()


def test_a_task_s_name_comes_from_its_file(tmp_path):
    """And so has no slash in it."""
    (tmp_path / "..evil.yaml").write_text("files: {train: a.csv}\n")
    assert tasks.read_task(str(tmp_path / "..evil.yaml")).name == "..evil"
    with pytest.raises(BadInput, match="unknown key"):
        (tmp_path / "a.yaml").write_text("name: ../evil\nfiles: {train: a.csv}\n")
        tasks.read_task(str(tmp_path / "a.yaml"))


def test_a_member_of_an_archive_is_read_and_not_unpacked(tmp_path, vocabulary):
    from conftest import bert_config

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        rows = "".join(f"{text},{label}\n" for text, label in make_rows(20, 1))
        archive.writestr("../evil.csv", f"text,label\n{rows}")
    files = {"train": "a.zip::../evil.csv", "validation": "a.zip::../evil.csv"}
    (tmp_path / "task.yaml").write_text(json.dumps({"files": files, "model": bert_config(vocabulary)}))
    flags = ("--task", "task.yaml", "--threads", 1, "--max_steps", 1, "--output_dir", "run")
    check(tmp_path, ended(start(tmp_path, *flags)))
    assert not (tmp_path.parent / "evil.csv").exists() and "evil.csv" not in names(Path(tmp_path))
