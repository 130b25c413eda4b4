"""models.py: new heads, kept heads, float32 weights; the many kinds of damage are in test_bad_input.py."""

import json

import pytest
import torch
from conftest import WORDS, bert_config
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, GPT2Config, GPT2Model

from classifier.data.tasks import Task
from classifier.messages import BadInput
from classifier.model.models import load_model, with_head_labels
from classifier.model.packing import prepare_model

TWO = Task(name="two", text=["text"], labels=["negative", "positive"], metrics=["accuracy", "f1"])
NUMBER = Task(name="number", text=["text"], labels="regression", metrics=["pearson"])


def test_a_base_model_gets_a_new_head_with_the_tasks_labels(tiny_bert, caplog):
    model, tokenizer, facts = load_model(str(tiny_bert), TWO)
    assert facts["new"] == ["classifier.bias", "classifier.weight"]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.problem_type == "single_label_classification"
    assert tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    loaded, saved = model.bert.state_dict(), load_file(tiny_bert / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_mapping_is_trained_from_scratch_with_its_own_vocabulary(vocabulary):
    model, tokenizer, facts = load_model(bert_config(vocabulary), TWO)
    assert facts["new"] == ["every weight"]
    assert model.config.vocab_size == len(tokenizer) == len(WORDS) + 5
    assert tokenizer.tokenize("The ROOM was") == ["the", "room", "was"]


def test_a_vocabulary_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no such vocabulary file"):
        load_model(bert_config(tmp_path / "nowhere.txt"), TWO)


def save_classifier(folder, tiny_bert, labels):
    model, tokenizer, _ = load_model(str(tiny_bert), Task(name="", text=["text"], labels=labels))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_head_for_the_same_labels_is_kept(tmp_path, tiny_bert):
    before = save_classifier(tmp_path, tiny_bert, TWO.labels)
    model, _, facts = load_model(str(tmp_path), TWO)
    assert facts["new"] == []
    assert torch.equal(model.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize("labels", [["happy", "sad"], ["positive", "negative"], ["a", "b", "c"]])
def test_a_head_for_other_labels_is_replaced_never_taken_by_position(tmp_path, tiny_bert, labels):
    before = save_classifier(tmp_path, tiny_bert, labels)
    model, _, facts = load_model(str(tmp_path), TWO)
    assert facts["new"] == ["classifier.bias", "classifier.weight"]
    assert model.classifier.weight.shape == (2, 32)
    assert not torch.equal(model.classifier.weight, before.classifier.weight[:2])
    assert torch.equal(model.bert.pooler.dense.weight, before.bert.pooler.dense.weight)


def test_evaluation_matches_labels_by_name_and_refuses_others(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, ["positive", "negative"])
    model, _, facts = load_model(str(tmp_path))
    assert with_head_labels(model, facts, TWO).labels == ["positive", "negative"]
    with pytest.raises(BadInput, match="positive, negative"):
        with_head_labels(model, facts, Task(name="", text=["text"], labels=["a", "b"]))
    with pytest.raises(BadInput, match="regression"):
        with_head_labels(model, facts, NUMBER)
    several = Task(name="", text=["text"], labels=TWO.labels, problem="multi_label")
    with pytest.raises(BadInput, match="any number of them"):
        with_head_labels(model, facts, several)
    assert with_head_labels(model, facts, Task(name="", text=["text"])).labels == ["positive", "negative"]
    model, _, facts = load_model(str(tiny_bert))
    with pytest.raises(BadInput, match="no trained head"):
        with_head_labels(model, facts, TWO)


def test_weights_are_float32_whatever_the_checkpoint_holds(tmp_path, tiny_bert):
    model = save_classifier(tmp_path, tiny_bert, TWO.labels)
    model.half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded, _, _ = load_model(str(tmp_path), TWO)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_broken_model_folders_are_bad_input(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"classifier\.bias contain NaN"):
        load_model(str(tmp_path), TWO)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(str(tmp_path), TWO)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_found_among_many(tmp_path, tiny_bert, value):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"word_embeddings\.weight contain NaN or infinite values"):
        load_model(str(tmp_path), TWO)


def test_half_a_weights_file_is_bad_input(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(str(tmp_path), TWO)


def test_no_trained_code_of_a_model_folder_is_run(tmp_path, tiny_bert):
    """A folder with auto_map would ask on the terminal, unless trust_remote_code=False is passed."""
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "trap.Config", "AutoModelForSequenceClassification": "trap.Model"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    load_model(str(tmp_path), TWO)
    assert not (tmp_path / "sprung").exists()


def test_a_head_without_names_is_that_of_labels_that_are_positions(tmp_path, tiny_bert, log_lines):
    before = save_classifier(tmp_path, tiny_bert, ["LABEL_0", "LABEL_1"])
    numbered = Task(name="numbered", text=["text"], labels=["0", "1"])
    model, _, facts = load_model(str(tmp_path), numbered)
    assert facts["new"] == [] and torch.equal(model.classifier.weight, before.classifier.weight)
    assert log_lines.count("the head's labels LABEL_0, LABEL_1 are taken for 0, 1") == 1
    model, _, facts = load_model(str(tmp_path))
    assert with_head_labels(model, facts, numbered) == numbered
    for labels in (["0", "1", "2"], ["1", "2"], ["negative", "positive"]):
        with pytest.raises(BadInput) as caught:
            with_head_labels(model, facts, Task(name="other", text=["text"], labels=labels))
        assert "id2label of its config.json" in caught.value.advice
        assert load_model(str(tmp_path), Task(name="other", text=["text"], labels=labels))[2]["new"] != []


def test_a_decoder_without_a_padding_token_pads_with_its_end(tmp_path, vocabulary):
    """And says so in its config: its head reads the last token that is none, here and in transformers' pipeline."""
    tokenizer = BertTokenizer(str(vocabulary), pad_token=None, eos_token="[SEP]")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=3)
    GPT2Model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer, _ = load_model(str(tmp_path), TWO)
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.sep_token_id
    packer = prepare_model(model.eval(), tokenizer)
    ids = [[5, 6, 7, 8], [9, 10]]
    packer.set_batch(0, range(2), [4, 2], "cpu")
    with torch.no_grad():
        logits = model(**packer.collate({"input_ids": ids})).logits
        alone = torch.cat([model(input_ids=torch.tensor([each])).logits for each in ids])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
