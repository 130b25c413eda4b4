"""export.py: the numbers of transformers from onnxruntime, at any length; a certificate that is right, or no export."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import WORDS, make_rows, run_script, write_table
from sklearn.metrics import f1_score
from test_families import BOTH, FAMILIES

import export
from classifier import predictor
from classifier.data.tasks import Task, save_task
from classifier.messages import BadInput, RunFailed

FP32 = ("--mixed_precision", "no", "--threads", 1)
LABELS = ["negative", "positive"]
PAIR, ONE = ["first", "second"], ["text"]
PROBLEMS = {  # each family with another problem
    "bert": {"text": PAIR, "labels": LABELS, "metrics": ["f1", "accuracy"]},
    "distilbert": {"text": ONE, "labels": "regression", "metrics": ["mse"]},
    "roberta": {"text": ONE, "labels": LABELS, "problem": "multi_label", "metrics": ["f1_micro"]},
    "modernbert": {"text": PAIR, "labels": [*LABELS, "neither"], "metrics": ["f1_macro"]},
}
LONGEST = {"bert": 40, "distilbert": 40, "roberta": 39, "modernbert": 40}  # RoBERTa begins behind its padding token
MORE = {"modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "bos_token_id": 2, "eos_token_id": 3}}


def build_run(folder, family, vocabulary):
    """Make a run as train.py leaves it, with random weights that answer in every way; return the folder."""
    problem = PROBLEMS[family]
    config_class, values = FAMILIES[family]
    heads = {"num_labels": 1} if problem["labels"] == "regression" else {"id2label": dict(enumerate(problem["labels"]))}
    kind = "multi_label_classification" if "problem" in problem else None
    values = {"vocab_size": len(WORDS) + 5, "initializer_range": 0.3, "initializer_cutoff_factor": 2.0, **values}
    values = {**values, **MORE.get(family, {}), **heads, "problem_type": kind}
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(getattr(transformers, config_class)(**values))
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    texts = [[text for text, _ in make_rows(60, seed)] for seed in range(len(problem["text"]))]
    for parameter in model.parameters():
        if parameter.dim() > 1:  # heads of transformers begin small
            parameter.data.normal_(0, 0.3)
    options = {"truncation": "longest_first", "max_length": LONGEST[family], "return_tensors": "pt"}
    with torch.no_grad():  # examples on each side of the bias
        middle = model.eval()(**tokenizer(*texts, padding=True, **options)).logits.mean(dim=0)
    getattr(model.classifier, "out_proj", model.classifier).bias.data -= middle
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = {"distilbert": [str(n % 7 / 3) for n in range(60)], "roberta": ["negative", "", "positive,negative"] * 20}
    labels = words.get(family, (problem["labels"] * 60)[:60])
    for split in ("train", "validation"):
        write_table(folder / f"{split}.csv", list(zip(*texts, labels, strict=True)), (*problem["text"], "label"))
    files = {split: str(folder / f"{split}.csv") for split in ("train", "validation")}
    task = Task(name="mine", files=files, max_length=LONGEST[family], **problem)
    save_task(task, {}, folder / "model" / "task.json")
    return folder


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def run_main(monkeypatch, *arguments):
    """export.py's main() in this process."""
    monkeypatch.setattr(sys, "argv", ["export.py", "--threads", "1", *map(str, arguments)])
    export.main()


@pytest.fixture(scope="module", params=PROBLEMS)
def exported(request, tmp_path_factory, vocabulary):
    """A run of one family with its export; transformers' own model and tokenizer of it."""
    run = build_run(tmp_path_factory.mktemp(request.param), request.param, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, "--model", run, "--quantize", "int8")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    return run, request.param, model, transformers.AutoTokenizer.from_pretrained(run / "model")


@pytest.fixture(scope="module")
def bert(tmp_path_factory, vocabulary):
    """A run of a BERT on pairs, exported in fp32 and int8; tests do not change it."""
    run = build_run(tmp_path_factory.mktemp("one"), "bert", vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, "--model", run, "--quantize", "int8")
    return run


@pytest.fixture
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "copy")


def session_of(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def onnx_logits(session, inputs):
    names = [of.name for of in session.get_inputs()]
    return session.run(["logits"], {name: inputs[name].numpy() for name in names})[0]


def texts_of_lengths(texts, longest):
    """Texts of one word up to more than the maximum, perhaps with a second text of a word."""
    words = [" ".join(WORDS[(start + at) % len(WORDS)] for at in range(start)) for start in range(1, longest + 3)]
    return [words, ["room"] * len(words)][:texts]


def test_the_logits_are_those_of_transformers_at_any_length_alone_and_in_a_batch(exported):
    run, family, model, tokenizer = exported
    texts = texts_of_lengths(len(PROBLEMS[family]["text"]), LONGEST[family])
    options = {"truncation": "longest_first", "max_length": LONGEST[family], "return_tensors": "pt"}
    together = tokenizer(*texts, padding=True, **options)
    session = session_of(run / "model/onnx/model.onnx")
    known = [of.name for of in session.get_inputs()]
    together = {name: together[name] for name in known}
    lengths = set(together["attention_mask"].sum(dim=1).tolist())
    assert len(lengths) > 30 and max(lengths) == LONGEST[family]
    with torch.no_grad():
        expected = model(**together).logits.numpy()
    assert expected.std(axis=0).min() > 0.01
    np.testing.assert_allclose(onnx_logits(session, together), expected, atol=2e-5)
    for length in (1, 2, 3, LONGEST[family]):
        one = {name: of[-2:-1, :length] for name, of in together.items()}
        one["attention_mask"] = torch.ones_like(one["attention_mask"])
        with torch.no_grad():
            alone = model(**one).logits.numpy()
        np.testing.assert_allclose(onnx_logits(session, one), alone, atol=2e-5)
    # Through the predictor: its own tokenizer, truncation, padding, order.
    loaded = predictor.load(run / "model/onnx", batch_size=7)
    np.testing.assert_allclose(loaded.logits(texts), expected, atol=2e-5)


def test_names_types_and_dynamic_axes(exported):
    run, family, model, _ = exported
    for file in ("model.onnx", "model_int8.onnx"):
        session = session_of(run / "model/onnx" / file)
        types = ["token_type_ids"] if family in ("bert", "roberta") else []
        described = [(of.name, of.type, of.shape) for of in session.get_inputs()]
        names = ["input_ids", "attention_mask", *types]
        assert sorted(described) == sorted((name, "tensor(int64)", ["batch", "length"]) for name in names)
        (logits,) = session.get_outputs()
        assert (logits.name, logits.type) == ("logits", "tensor(float)")
        assert logits.shape == ["batch", model.config.num_labels]


def test_the_folder_holds_these_files_and_the_int8_model_is_smaller_and_near(exported):
    run, family, _, _ = exported
    folder = run / "model/onnx"
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "model_int8.onnx", "config.json", "task.json", "certificate.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert (folder / "model_int8.onnx").stat().st_size < 0.8 * (folder / "model.onnx").stat().st_size
    types = {of.data_type for of in onnx.load(folder / "model_int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    texts = texts_of_lengths(len(PROBLEMS[family]["text"]), 20)
    logits = [predictor.load(folder / name).logits(texts) for name in ("model.onnx", "model_int8.onnx")]
    assert 0 < abs(logits[0] - logits[1]).max() < abs(logits[0]).max()
    assert np.corrcoef(*[of.ravel() for of in logits])[0, 1] > 0.9


def test_every_problem_has_a_certificate_of_its_first_metric(exported):
    run, family, _, _ = exported
    found = json.loads((run / "model/onnx/certificate.json").read_text())
    assert found["metric"] == PROBLEMS[family]["metrics"][0]
    assert found["lengths"]["tokens"] == [1, 2, LONGEST[family] // 2, LONGEST[family]]
    assert found["fp32"]["largest_logit_difference"] < 1e-4 < found["int8"]["largest_logit_difference"]
    assert found["fp32"]["scores"]["validation"] == pytest.approx(found["torch"]["scores"]["validation"], abs=1e-5)


def test_the_certificate_says_what_onnxruntime_and_scikit_learn_say(bert):
    folder = bert / "model/onnx"
    found = json.loads((folder / "certificate.json").read_text())
    with open(bert / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    truth = [LABELS.index(row["label"]) for row in rows]
    texts = [[row[column] for row in rows] for column in PAIR]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert / "model")
    options = {"padding": True, "truncation": "longest_first", "max_length": 40, "return_tensors": "pt"}
    inputs = tokenizer(*texts, **options)
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    score = f1_score(truth, theirs.argmax(1))
    assert 0.1 < score < 0.9
    assert found["torch"]["scores"]["validation"] == pytest.approx(score, abs=1e-12)
    assert (found["examples"], found["task"], found["threads"]) == ({"validation": 60}, "mine", 1)
    for name, file in (("fp32", "model.onnx"), ("int8", "model_int8.onnx")):
        ours, said = onnx_logits(session_of(folder / file), inputs), found[name]
        assert said["scores"]["validation"] == pytest.approx(f1_score(truth, ours.argmax(1)), abs=1e-12)
        assert said["differences"]["validation"] == pytest.approx(f1_score(truth, ours.argmax(1)) - score, abs=1e-12)
        low, high = said["intervals"]["validation"]
        assert low <= said["differences"]["validation"] <= high
        largest = abs(ours - theirs).max()
        # Products in 8 bits have the range of their batch; in 32 bits sums are in another order.
        assert said["largest_logit_difference"] == pytest.approx(largest, rel=1e-3 if name == "int8" else 1, abs=1e-5)
        assert said["bytes"] == (folder / file).stat().st_size
        for size in ("in_batches", "alone"):
            assert 0 < said[f"milliseconds_per_example_{size}"] < 1000
    assert found["torch"]["bytes"] == (bert / "model/model.safetensors").stat().st_size


def test_the_model_card_has_the_figures_once_and_keeps_the_rest(copy, run_inside):
    card = copy / "model/README.md"
    card.write_text("# mine\n\nWords.\n\n## ONNX\n\nold figures\n\n## Use\n\nMore words.\n")
    code, printed, errors = run_inside("export.py", "--model", copy, cwd=copy)
    assert code == 0, errors
    words = card.read_text()
    assert words.startswith("# mine\n\nWords.\n\n## Use\n\nMore words.\n\n## ONNX\n") and "old figures" not in words
    section = words[words.index("## ONNX") :]
    assert words.count("## ONNX") == 1 and "| fp32 model.onnx | validation | " in section and section in printed
    assert not (copy / "model/onnx/model_int8.onnx").exists()


# ----------------------------------------------------------------------------------------- exports that are refused


@pytest.mark.parametrize("is_there", [True, False])
def test_a_difference_beyond_atol_leaves_nothing_new(copy, run_inside, is_there):
    if not is_there:
        shutil.rmtree(copy / "model/onnx")
    before = contents_of(copy)
    code, _, errors = run_inside("export.py", "--model", copy, "--atol", "1e-12", cwd=copy)
    assert code == 1 and "more than --atol 1e-12" in errors and "Nothing was written" in errors, errors
    assert contents_of(copy) == before
    assert not (copy / "model/onnx.tmp").exists() and (copy / "model/onnx").exists() == is_there


def rows_of_labels(labels):
    from datasets import Dataset

    return {"validation": Dataset.from_dict({"label": labels})}


@pytest.mark.parametrize(("wrong", "refuses"), [(0, False), (2, False), (60, True)])
def test_a_score_that_falls_past_its_interval_is_refused(wrong, refuses):
    task = Task(name="", text=["text"], labels=LABELS, metrics=["accuracy"])
    labels = np.arange(200) % 2
    theirs = np.stack([1.0 - labels, labels], axis=1).astype(np.float32)
    ours = theirs.copy()
    ours[:wrong] = ours[:wrong, ::-1]
    logits = {"torch": {"validation": theirs}, "fp32": {"validation": theirs}, "int8": {"validation": ours}}
    content = export.certify(task, logits, rows_of_labels(labels))
    content["lengths"] = {"largest_logit_difference": 0.0}
    assert content["int8"]["differences"]["validation"] == pytest.approx(-wrong / 200)
    if refuses:
        with pytest.raises(RunFailed, match=r"int8: accuracy of validation fell from 1\.0000 to 0\.7000"):
            export.check_certificate(task, content, 1e-4)
        better = {"torch": logits["int8"], "fp32": logits["int8"], "int8": logits["torch"]}  # a rise is welcome
        content = export.certify(task, better, rows_of_labels(labels))
        content["lengths"] = {"largest_logit_difference": 0.0}
    export.check_certificate(task, content, 1e-4)


def test_an_error_that_grows_is_a_fall_too():
    task = Task(name="", text=["text"], labels="regression", metrics=["mse"])
    labels = np.linspace(0, 1, 100)
    theirs = labels[:, None].astype(np.float32)
    logits = {"torch": {"validation": theirs}, "fp32": {"validation": theirs}, "int8": {"validation": theirs + 1}}
    content = export.certify(task, logits, rows_of_labels(labels))
    content["lengths"] = {"largest_logit_difference": 0.0}
    with pytest.raises(RunFailed, match="int8: mse of validation fell"):
        export.check_certificate(task, content, 1e-4)


def certificate_of_errors(scale, shift):
    """The task and certificate of a model that is off by `scale` and, exported, by a share `shift` of that more."""
    task = Task(name="", text=["text"], labels="regression", metrics=["mse"])
    labels = np.zeros(60)
    theirs = scale * (np.random.default_rng(0).normal(size=(60, 1)) + 1)
    ours = theirs + scale * shift
    logits = {name: {"validation": ours if name == "fp32" else theirs} for name in ("torch", "fp32")}
    content = export.certify(task, logits, rows_of_labels(labels))
    content["lengths"] = {"largest_logit_difference": 0.0}
    return task, content


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_an_error_that_grows_by_rounding_is_no_fall(scale):
    """All errors in one direction: their interval leaves out 0."""
    task, content = certificate_of_errors(scale, shift=9e-07)
    low, high = content["fp32"]["intervals"]["validation"]
    assert 0 < low < high < 1e-5 * content["torch"]["scores"]["validation"]
    export.check_certificate(task, content, atol=np.inf)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (
            1.0,
            r"fell from 1\.\d{4} to 1\.\d{4}, 95 % interval of the difference \+0\.\d{4} to \+0\.\d{4}; "
            r"rounding explains up to 2\.0e-04",
        ),
        (
            1e-3,
            r"fell from 0\.000001\d{4} to 0\.000001\d{4}, 95 % interval of the difference \+\d\.\de-09 to "
            r"\+\d\.\de-08; rounding explains up to 2\.0e-10",
        ),
    ],
)
def test_a_refusal_has_digits_that_tell_the_scores_apart(scale, words):
    task, content = certificate_of_errors(scale, shift=0.005)
    with pytest.raises(RunFailed, match=f"fp32: mse of validation {words}") as refused:
        export.check_certificate(task, content, atol=np.inf)
    before, after = str(refused.value).partition("fell from ")[2].partition(",")[0].split(" to ")
    assert float(after) > float(before) and "+0.0000" not in str(refused.value)


def test_logits_that_are_no_numbers_are_refused():
    task = Task(name="", text=["text"], labels=LABELS, metrics=["accuracy"])
    logits = {"torch": {"validation": np.ones((2, 2))}, "fp32": {"validation": np.full((2, 2), np.nan)}}
    with pytest.raises(RunFailed, match="not finite"):
        export.certify(task, logits, rows_of_labels([0, 1]))


def test_a_model_that_torch_cannot_export_is_said_in_two_plain_lines(tmp_path, capfd):
    from transformers import LongformerConfig, LongformerForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LongformerConfig(vocab_size=50, attention_window=[4], max_position_embeddings=40, **sizes)
    model = LongformerForSequenceClassification(config).eval()
    with pytest.raises(RunFailed) as refused, export.explained("torch cannot export this model, of type longformer"):
        export.write_onnx(model, ["input_ids"], tmp_path / "model.onnx")
    reason, advice = str(refused.value).splitlines()
    assert reason.startswith("torch cannot export this model, of type longformer (") and len(reason) < 300
    assert "\x1b" not in reason and "torch.onnx" not in reason
    assert capfd.readouterr() == ("", "")  # torch prints the graph as far as it came
    assert advice == "Nothing was written. predict.py and evaluate.py take it as it is."


@pytest.mark.parametrize(
    ("function", "reason", "advice"),
    [
        (
            "write_onnx",
            "torch cannot export this model, of type bert (ValueError: red)",
            "predict.py and evaluate.py take it as it is.",
        ),
        ("write_int8", "ONNX Runtime cannot quantize this model (ValueError: red)", "Export without --quantize."),
        (
            "load",
            "ONNX Runtime cannot load what torch exported (ValueError: red)",
            "predict.py and evaluate.py take it as it is.",
        ),
    ],
)
def test_whatever_a_library_raises_is_said_in_two_lines_and_leaves_nothing(copy, monkeypatch, function, reason, advice):
    def broken(*arguments):
        try:
            raise ValueError("\x1b[31mred\x1b[0m\nand more")
        except ValueError as error:
            raise RuntimeError("\x1b[96mThe exporter gave up.\nPlease report this bug\x1b[0m") from error

    monkeypatch.setattr(export, function, broken)
    before = contents_of(copy)
    with pytest.raises(RunFailed) as refused:
        run_main(monkeypatch, "--model", str(copy), "--quantize", "int8")
    assert str(refused.value).splitlines() == [reason, f"Nothing was written. {advice}"]
    assert contents_of(copy) == before and not (copy / "model/onnx.tmp").exists()


def test_a_cause_is_what_an_error_was_raised_from_with_the_first_item_of_a_list():
    def reason_of(error):
        with pytest.raises(RunFailed) as refused, export.explained("It fails"):
            raise error
        return str(refused.value).splitlines()[0]

    error = RuntimeError("outer")
    error.__cause__ = ValueError("What was asked for differs:\n  - 8 for the length\n- 3 for the batch")
    error.__cause__.__context__ = IndexError("list index out of range")
    assert reason_of(error) == "It fails (ValueError: What was asked for differs: 8 for the length)"
    assert reason_of(ValueError("No v1.2 here.  Refer to the manual. Or ask.")) == "It fails (ValueError: No v1.2 here)"
    assert reason_of(AssertionError()) == "It fails (AssertionError)"


@pytest.mark.parametrize("moment", ["loading", "validation", "lengths"])
def test_an_exported_file_that_onnx_runtime_cannot_use_is_said_in_two_lines(copy, monkeypatch, moment):
    if moment == "loading":
        monkeypatch.setattr(export, "write_onnx", lambda model, columns, file: file.write_bytes(b"no graph"))
    else:
        compute = onnxruntime.InferenceSession.run

        def run(session, names, inputs):
            length = inputs["input_ids"].shape[1]
            if moment == "validation" or length == 1:
                raise onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument(f"length {length} does not fit")
            return compute(session, names, inputs)

        monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    before = contents_of(copy)
    with pytest.raises(RunFailed) as refused:
        run_main(monkeypatch, "--model", str(copy))
    reason, advice = str(refused.value).splitlines()
    beginnings = {
        "loading": f"{copy}/model/onnx.tmp/model.onnx: cannot be loaded (",
        "validation": "fp32: the logits of the validation texts cannot be computed (InvalidArgument: length ",
        "lengths": "fp32: the logits of random texts of other lengths cannot be computed (InvalidArgument: length 1 ",
    }
    assert reason.startswith(beginnings[moment])
    assert advice.startswith("Nothing was written. ") and "evaluate.py" in advice and "xport again" not in advice
    assert contents_of(copy) == before and not (copy / "model/onnx.tmp").exists()


@pytest.fixture
def refused(run_inside, copy):
    """Exit code 2, a line of reason and one of advice at the end, nothing changed; returns the two lines."""

    def run(script, *arguments):
        before = contents_of(copy)
        code, printed, errors = run_inside(script, *arguments, cwd=copy)
        lines = errors.splitlines()
        assert code == 2 and "Traceback" not in errors and contents_of(copy) == before, printed + errors
        assert all(line.startswith(f"{script}: ") for line in lines[-2:]), errors
        return "\n".join(lines[-2:])

    return run


def test_what_cannot_be_exported(copy, refused):
    assert "exported model" in refused("export.py", "--model", "model/onnx")
    assert "not a folder" in refused("export.py", "--model", "somebody/model")
    assert "--mixed_precision bf16" in refused("export.py", "--model", copy, "--mixed_precision", "bf16")
    content = json.loads((copy / "model/task.json").read_text())
    task = Task(**{key: value for key, value in content.items() if key != "fingerprints"})
    save_task(task, {"validation": "of other rows"}, copy / "model/task.json")
    assert "the validation split is not the one used in training" in refused("export.py", "--model", copy)
    (copy / "model/task.json").unlink()
    assert "no task.json" in refused("export.py", "--model", copy)


@pytest.mark.parametrize("package", export.PACKAGES)
def test_a_package_that_is_not_installed(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"needs the package {package}\nexport.py: pip install" in refused("export.py", "--model", "model")
    if package == "onnxruntime":
        words = refused("predict.py", "--model", "model/onnx", "--text", "a", "--text_pair", "b")
        assert "needs the package onnxruntime\npredict.py: pip install" in words


# ------------------------------------------------------------------------------------------- the folder in use


def test_predict_gives_the_table_of_the_run_without_torch(bert, tmp_path, run_inside):
    given = ("--input", bert / "validation.csv", "--eval_batch_size", 7, "--output")
    code, _, errors = run_inside("predict.py", *FP32, "--model", bert, *given, "run.csv", cwd=tmp_path)
    assert code == 0, errors
    launcher = (sys.executable, "-X", "importtime")
    for model in ("model/onnx", "model/onnx/model.onnx"):
        arguments = ("--threads", 1, "--model", bert / model, *given, "onnx.csv")
        ended = run_script("predict.py", *arguments, cwd=tmp_path, launcher=launcher)
        assert ended.returncode == 0, ended.stderr
        imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import")}
        assert "onnxruntime" in imported and not imported & {"torch", "transformers", "accelerate"}
        assert "loaded in " in ended.stderr and "1 thread (--threads)" in ended.stderr
        tables = [list(csv.DictReader(io.StringIO((tmp_path / name).read_text()))) for name in ("run.csv", "onnx.csv")]
        assert [list(row) for row in tables[0]] == [list(row) for row in tables[1]] and len(tables[0]) == 60
        for ours, theirs in zip(*tables, strict=True):
            assert ours["predicted_label"] == theirs["predicted_label"]
            for column in ("probability_negative", "probability_positive"):
                assert float(ours[column]) == pytest.approx(float(theirs[column]), abs=1e-4)


def test_one_text_and_the_int8_file(bert, tmp_path, run_inside):
    texts = ("--text", "the room was good", "--text_pair", "the film was bad")
    code, printed, errors = run_inside(
        "predict.py", "--model", bert / "model/onnx/model_int8.onnx", *texts, cwd=tmp_path
    )
    assert code == 0, errors
    assert {line.split()[1] for line in printed.splitlines()} == set(LABELS)


def test_what_an_exported_model_refuses(copy, refused, monkeypatch):
    texts = ("--text", "a", "--text_pair", "b")
    assert "the precision of an exported model is fixed" in refused(
        "predict.py", "--model", "model/onnx", *texts, "--mixed_precision", "bf16"
    )
    assert "exported model" in refused("evaluate.py", "--model", "model/onnx")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(BadInput, match="one process"):
            from classifier.predictor import start_exported

            start_exported(export.build_parser().parse_args(["--model", "x"]))
    whole = (copy / "model/onnx/model.onnx").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no model"):
        (copy / "model/onnx/model.onnx").write_bytes(damaged)
        assert "model.onnx: cannot be loaded" in refused("predict.py", "--model", "model/onnx", *texts)
    (copy / "model/onnx/model.onnx").write_bytes(whole)
    (copy / "model/onnx/task.json").unlink()
    assert "no task.json" in refused("predict.py", "--model", "model/onnx", *texts)


def test_weights_too_large_for_one_file_lie_beside_it(copy, monkeypatch):
    expected = predictor.load(copy / "model/onnx").logits([["the room"], ["was good"]])
    monkeypatch.setattr(export, "MAX_BYTES_IN_ONE_FILE", 0)
    run_main(monkeypatch, "--model", copy, "--quantize", "int8")
    folder = copy / "model/onnx"
    assert (folder / "model.onnx.data").stat().st_size > 0.5 * (copy / "model/model.safetensors").stat().st_size
    np.testing.assert_allclose(predictor.load(folder).logits([["the room"], ["was good"]]), expected, atol=1e-6)
    assert predictor.load(folder / "model_int8.onnx").logits([["the room"], ["was good"]]).shape == (1, 2)
    found = json.loads((folder / "certificate.json").read_text())["fp32"]
    assert set(found["sha256"]) == {"model.onnx", "model.onnx.data"}
    assert predictor.load(folder).digest != predictor.load(folder / "model_int8.onnx").digest


def test_a_tokenizer_of_another_model_is_noticed_when_an_export_is_loaded(copy):
    file = copy / "model" / "onnx" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["good"] = 500
    file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"tokenizer\.json has token ids up to 500, but config\.json a vocabulary of"):
        predictor.load(copy / "model" / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_models_that_generate_text_export_as_classifiers(family, tmp_path, vocabulary, monkeypatch):
    """Their forward returns keys and values, too, and BART's head reads the last end token."""
    tokens = {"vocab_size": len(WORDS) + 5, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}, "bart": BOTH | {"d_model": 32}}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **tokens, **sizes[family], **names, init_std=0.3)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    rows = make_rows(30)
    write_table(tmp_path / "validation.csv", rows)
    files = {"train": str(tmp_path / "validation.csv"), "validation": str(tmp_path / "validation.csv")}
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    save_task(
        Task(name="mine", text=ONE, labels=LABELS, files=files, max_length=32), {}, tmp_path / "model" / "task.json"
    )
    run_main(monkeypatch, "--model", tmp_path / "model")
    texts = [text for text, _ in rows]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts]
    logits = predictor.load(tmp_path / "model" / "onnx").logits([texts])
    np.testing.assert_allclose(logits, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    assert np.ptp(np.concatenate(expected), axis=0).min() > 0.01
