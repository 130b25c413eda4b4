"""inference.py: a frozen encoder runs once, and no number changes; a device against the CPU."""

import copy
import csv
import json
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import (
    TORCHRUN_2,
    WORDS,
    bert_config,
    lines_of,
    make_rows,
    run_script,
    temperature_of,
    write_review_task,
    write_table,
)
from data_help import use_cache
from safetensors.torch import load_file, save_file
from test_families import FAMILIES

from classifier.data.tasks import Task
from classifier.model import inference, models
from classifier.model.models import load_model
from classifier.model.packing import prepare_model

FLAGS = ("--freeze", "encoder", "--log_every", 1, "--threads", 1, "--learning_rate", 0.01, "--eval_every", 20)
TWO_LABELS = Task(name="", text=["text"], labels=["no", "yes"])
NO_FEATURES = "the frozen encoder runs in each step"


def make_model(folder, vocabulary, family="bert", **changes):
    """Write a tiny random model with dropout (0.1, transformers' own default) and a tokenizer; return the folder."""
    config_class, values = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{"vocab_size": len(WORDS) + 5, **values, **changes})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


@pytest.fixture
def task(reviews, vocabulary, empty_cache):
    """The reviews with a BERT that has dropout everywhere, and a cache of their own."""
    return write_review_task(reviews / "reviews.yaml", str(make_model(reviews / "bert", vocabulary)))


@pytest.fixture
def train(task, run_inside):
    """Train in this process; return [output, losses of the steps, evaluations, weights at the end]."""

    def run(output, *flags):
        arguments = ["--task", task, "--output_dir", output, *FLAGS, *flags]
        code, printed, errors = run_inside("train.py", *arguments, cwd=task.parent)
        assert code == 0, errors
        return [printed, *read_results(task.parent / output)]

    return run


def read_results(folder):
    losses = [line["loss"] for line in lines_of(folder)]
    evaluations = [(line["step"], line["loss"], line["scores"]) for line in lines_of(folder, "eval")]
    return losses, evaluations, load_file(folder / "model" / "model.safetensors")


def without_features(monkeypatch):
    monkeypatch.setattr(inference, "features_of_splits", lambda model, packer, examples, *rest: (packer, examples))


def assert_agree(results, expected, tolerance=1e-5):
    """Losses, evaluations and weights of two runs, as read_results returns them, are the same."""
    (losses, evaluations, weights), (expected_losses, expected_evaluations, expected_weights) = results, expected
    assert len(losses) == len(expected_losses) and losses == pytest.approx(expected_losses, abs=tolerance)
    assert [(step, scores) for step, _, scores in evaluations] == [(s, scores) for s, _, scores in expected_evaluations]
    validation_losses = [loss for _, loss, _ in evaluations]
    assert validation_losses == pytest.approx([loss for _, loss, _ in expected_evaluations], abs=tolerance)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ frozen parts


@pytest.mark.parametrize("part", ["none", "embeddings", "1", "encoder"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_frozen_part_drops_nothing_and_the_rest_does(tmp_path, vocabulary, part, is_packed):
    make_model(tmp_path, vocabulary, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model, tokenizer, _ = models.load_model(str(tmp_path))
    packer = prepare_model(model, tokenizer)
    assert packer.is_packed
    packer.is_packed = is_packed
    models.freeze(model, part)
    places = {"embeddings": model.bert.embeddings, "first": model.bert.encoder.layer[0], "encoder": model.bert}
    seen = {name: [] for name in [*places, "logits"]}
    for name, module in places.items():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append(output if torch.is_tensor(output) else output[0])
        )
    examples = dict(tokenizer(["the room was very good and the film was bad .", "the meal was fine ."]))
    lengths = [len(ids) for ids in examples["input_ids"]]
    model.train()
    for step in (1, 2):  # the masks are others
        packer.set_batch(step, [0, 1], lengths, "cpu")
        seen["logits"].append(model(**packer.collate(examples)).logits)
    alike = [name for name, outputs in seen.items() if torch.equal(*outputs)]
    assert (
        alike
        == {
            "none": [],
            "embeddings": ["embeddings"],
            "1": ["embeddings", "first"],
            "encoder": ["embeddings", "first", "encoder"],
        }[part]
    )
    model.eval()
    assert not any(module.training for module in model.modules())
    assert model.train().classifier.training


# ------------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("family", FAMILIES)
def test_50_steps_are_those_of_an_encoder_that_runs_in_each(train, task, vocabulary, monkeypatch, family):
    """With dropout in the head, where it has any. The models that run padded (DeBERTa) have features, too."""
    flags = ("--max_steps", 50, "--model", make_model(task.parent / "model", vocabulary, family))
    printed, *cached = train("cached", *flags)
    assert "features of the frozen encoder: train in " in printed
    without_features(monkeypatch)
    assert_agree(cached, train("uncached", *flags)[1:])


@pytest.mark.slow
def test_dropout_in_the_head_is_on(train, task, vocabulary):
    """Else the test above would say nothing of it."""
    dry = make_model(task.parent / "dry", vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with_dropout = train("with", "--max_steps", 3)[1]
    without = train("without", "--max_steps", 3, "--model", dry)[1]
    assert abs(with_dropout[0] - without[0]) > 1e-4


def test_the_encoder_runs_in_no_step_and_no_evaluation(train, monkeypatch):
    features_of_splits, numbers = inference.features_of_splits, []

    def forbidding(model, *arguments):
        def forbidden(*_):
            raise AssertionError("the encoder ran")

        result = features_of_splits(model, *arguments)
        for part in model.base_model.modules():
            if part is not model.base_model:
                part.register_forward_pre_hook(forbidden)
        model.classifier.register_forward_hook(lambda _, inputs, output: numbers.append(len(output)))
        return result

    monkeypatch.setattr(inference, "features_of_splits", forbidding)
    train("run", "--max_steps", 20, "--final_test", "--eval_train_rows", 30, "--micro_batch_size", 7)
    training, evaluated = 19 * 16, 2 * 50 + 30
    assert sum(numbers) > training + evaluated


@pytest.mark.slow
def test_in_bf16_features_are_those_of_bf16(train, monkeypatch):
    flags = ("--max_steps", 20, "--mixed_precision", "bf16")
    cached = train("cached", *flags)[1:]
    fp32 = train("fp32", "--max_steps", 20)[1:]
    without_features(monkeypatch)
    uncached = train("uncached", *flags)[1:]
    # bf16 has 8 bits, and batches of another size round differently.
    assert cached[0] == pytest.approx(uncached[0], abs=2e-3)
    assert cached[0] != fp32[0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--batch_size", 1)])  # with one example per step, a process has none
def test_two_processes_agree_with_one(task, train, flags):
    flags, folder = ("--max_steps", 30, *flags), task.parent
    _, *expected = train("one", *flags)
    environment = {"HF_DATASETS_CACHE": str(folder / "another cache")}
    arguments = ["--task", task, "--output_dir", "two", *FLAGS, *flags]
    done = run_script("train.py", *arguments, cwd=folder, environment=environment, launcher=TORCHRUN_2)
    assert done.returncode == 0, done.stderr
    assert "features of the frozen encoder: train in" in done.stdout
    assert_agree(read_results(folder / "two"), expected)


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def computed(monkeypatch):
    """The numbers of examples whose features were computed, one for each call."""
    numbers, compute_outputs = [], inference.compute_outputs

    def counting(compute, examples, accelerator, batch_size, packer, signals=None):
        if "features" not in examples.column_names:
            numbers.append(len(examples))
        return compute_outputs(compute, examples, accelerator, batch_size, packer, signals)

    monkeypatch.setattr(inference, "compute_outputs", counting)
    return numbers


@pytest.mark.slow
def test_features_are_computed_once_for_all_epochs_and_runs(train, task, vocabulary, computed):
    printed, *first = train("first", "--epochs", 4)
    assert computed == [200, 50]
    printed, *second = train("second", "--epochs", 4)
    assert computed == [200, 50] and "features of the frozen encoder: from the cache" in printed
    assert first[:2] == second[:2] and all(torch.equal(value, second[2][name]) for name, value in first[2].items())
    train("other-head", "--epochs", 1, "--seed", 7, "--learning_rate", 0.001)  # same texts and encoder
    assert computed == [200, 50]


@pytest.mark.slow
def test_other_weights_texts_lengths_and_precisions_have_features_of_their_own(train, task, computed):
    folder, flags = task.parent, ("--max_steps", 2)
    train("run", *flags)
    train("shorter", *flags, "--max_length", 6)
    assert computed == [200, 50] * 2
    train("bf16", *flags, "--mixed_precision", "bf16")
    assert computed == [200, 50] * 3
    weights = load_file(folder / "bert" / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] += 1e-3
    save_file(weights, folder / "bert" / "model.safetensors", metadata={"format": "pt"})
    train("weights", *flags)
    assert computed == [200, 50] * 4
    config = json.loads((folder / "bert" / "config.json").read_text())
    (folder / "bert" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    train("heads", *flags)
    assert computed == [200, 50] * 5
    write_table(folder / "validation.csv", make_rows(50, seed=9))
    train("texts", *flags)
    assert computed == [*[200, 50] * 5, 50]


@pytest.mark.slow
def test_rows_are_computed_some_at_a_time_and_keep_their_order(train, tmp_path, monkeypatch):
    expected = train("at once", "--max_steps", 20)[1:]
    monkeypatch.setattr(inference, "FEATURE_ROWS_AT_A_TIME", 33)
    use_cache(monkeypatch, tmp_path / "another cache")
    assert_agree(train("slices", "--max_steps", 20)[1:], expected)


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_the_saved_model_is_a_whole_one(task, train, run_inside):
    _, _, evaluations, _ = train("run", "--epochs", 2)
    folder = task.parent / "run"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    with open(task.parent / "validation.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    best = json.loads((folder / "results.json").read_text())["best_step"]
    loss = {step: loss for step, loss, _ in evaluations}[best]
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(loss, abs=1e-6)

    code, _, errors = run_inside("evaluate.py", "--model", "run", cwd=task.parent)
    assert code == 0, errors
    evaluation = json.loads((folder / "evaluation-validation" / "evaluation.json").read_text())
    assert evaluation["loss"] == pytest.approx(loss, abs=1e-6)
    arguments = ["--model", "run", "--input", "validation.csv", "--output", "out.csv", "--mixed_precision", "no"]
    code, _, errors = run_inside("predict.py", *arguments, cwd=task.parent)
    assert code == 0, errors
    with open(task.parent / "out.csv", encoding="utf-8") as file:
        probabilities = [float(row["probability_positive"]) for row in csv.DictReader(file)]
    expected = (logits / temperature_of(folder / "model")).softmax(-1)[:, 1]
    assert probabilities == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("has_cache", [True, False])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(task, train, run_inside, monkeypatch, has_cache):
    flags = ("--epochs", 3, "--save_every", 7)
    undisturbed = train("undisturbed", *flags)[1:]
    set_batch = inference.FeaturePacker.set_batch

    def failing(self, step, *arguments):
        if step == 18:
            raise ValueError("stopped here")
        return set_batch(self, step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="stopped here"):
        patch.setattr(inference.FeaturePacker, "set_batch", failing)
        train("run", *flags)
    if not has_cache:
        use_cache(monkeypatch, task.parent / "another cache")
    printed, *resumed = train("run", *flags)
    assert "after step 14" in printed
    assert resumed[:2] == undisturbed[:2]
    assert all(torch.equal(value, resumed[2][name]) for name, value in undisturbed[2].items())
    seconds = json.loads((task.parent / "run" / "results.json").read_text())["train_seconds"]
    assert seconds > 0


@pytest.mark.slow
def test_a_head_that_reads_all_tokens_lets_the_encoder_run(train, task, vocabulary, computed, monkeypatch):
    """ModernBERT with mean pooling; in eval mode it is frozen all the same."""
    make_model(task.parent / "mean", vocabulary, "modernbert", classifier_pooling="mean")
    flags = ("--max_steps", 10, "--model", task.parent / "mean")
    printed, *results = train("run", *flags)
    assert NO_FEATURES in printed and "features of the frozen" not in printed
    without_features(monkeypatch)
    assert results[:2] == train("again", *flags)[1:3]


@pytest.mark.slow
def test_micro_batches_of_what_fits_and_workers(train, task):
    plain = train("plain", "--max_steps", 20)[1:]
    printed, *auto = train("auto", "--max_steps", 20, "--micro_batch_size", "auto", "--num_workers", 1)
    assert "micro-batches of 16" in printed
    assert_agree(plain, auto)


def test_a_dry_run_computes_no_features_of_all_rows(task, run_inside, empty_cache):
    code, printed, errors = run_inside("train.py", "--task", task, *FLAGS, "--dry_run", cwd=task.parent)
    assert code == 0, errors
    assert "at most 0:00:" in printed and "features" not in printed
    assert len(list(empty_cache.glob("*.arrow"))) == 5  # rows of three splits, tokens of two


# ------------------------------------------------------------------------------------------- a device and the CPU


@pytest.fixture
def batch(vocabulary):
    """A model with dropout in training, its packer, and a micro-batch of it; the last pass was of other examples."""
    model, tokenizer, _ = load_model(bert_config(vocabulary, hidden_dropout_prob=0.5), TWO_LABELS)
    packer = prepare_model(model, tokenizer)
    encoded = tokenizer(["the film was very dull", "the room was good", "bad"])
    lengths = [len(ids) for ids in encoded["input_ids"]]
    inputs = packer.collate({"input_ids": encoded["input_ids"], "token_type_ids": encoded["token_type_ids"]})
    packer.set_batch(0, [7], [2], "cpu")
    micro_batch = {"ids": [3, 4, 5], "lengths": lengths, "inputs": inputs, "labels": torch.tensor([1, 0, 0])}
    return model.train(), packer, micro_batch


def test_a_model_computes_what_its_copy_does(batch):
    model, packer, micro_batch = batch
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert inference.compare_with_cpu(model, packer, micro_batch, nullcontext()) == pytest.approx([0, 0], abs=1e-6)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_parts_have_no_gradients_to_compare(batch):
    model, packer, micro_batch = batch
    model.base_model.requires_grad_(False)
    assert inference.compare_with_cpu(model, packer, micro_batch, nullcontext()) == pytest.approx([0, 0], abs=1e-6)


def test_bf16_stays_within_its_tolerance_and_is_seen(batch):
    differences = inference.compare_with_cpu(*batch, torch.autocast("cpu", dtype=torch.bfloat16))
    assert 1e-5 < max(differences) < inference.TOLERANCE["bf16"]


def test_wrong_numbers_are_far_off(batch):
    model, packer, micro_batch = batch

    def perturbed(memo):
        del model.__deepcopy__
        model_copy = copy.deepcopy(model, memo)
        with torch.no_grad():
            model_copy.classifier.weight.mul_(-1)
        return model_copy

    model.__deepcopy__ = perturbed
    logits, gradients = inference.compare_with_cpu(model, packer, micro_batch, nullcontext())
    assert min(logits, gradients) > inference.TOLERANCE["bf16"]


def test_peak_memory_is_that_of_this_process():
    assert 2**26 < inference.peak_memory(torch.device("cpu")) < 2**37
