"""models.py: new heads, kept heads, float32 weights; the many kinds of damage are in test_bad_input.py."""

import json

import pytest
import torch
from conftest import WORDS, bert_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, GPT2Config, GPT2Model

from classifier.data.tasks import Task, save_task
from classifier.messages import BadInput
from classifier.model.models import load_model, with_head_labels
from classifier.model.packing import prepare_model
from classifier.predictor import load

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


def add_words(folder, *words, **special_tokens):
    """Add tokens to the tokenizer of a folder, and no embeddings for them; return the number of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(words))
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.parametrize("task", [TWO, None], ids=["to train", "to use"])
def test_tokens_without_embeddings_are_noticed_when_the_model_is_loaded(tmp_path, tiny_bert, task):
    before = save_classifier(tmp_path, tiny_bert, TWO.labels)
    rows = before.config.vocab_size
    assert add_words(tmp_path, "<user>", "<url>") == rows + 2
    with pytest.raises(BadInput) as caught:
        load_model(str(tmp_path), task)
    assert f"token ids up to {rows + 1}," in caught.value.reason and f"for {rows} only" in caught.value.reason
    commands = caught.value.advice.partition("beside it: ")[2].rstrip(".").replace('"new"', f'"{tmp_path}"')
    exec(commands, {"AutoModelForSequenceClassification": AutoModelForSequenceClassification})  # the advice works
    model, tokenizer, facts = load_model(str(tmp_path), task)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == rows + 2
    assert facts["new"] == [] and torch.equal(model.classifier.weight, before.classifier.weight)


def test_an_id_beyond_the_embeddings_is_noticed_though_others_are_free(tmp_path, tiny_bert):
    """29 tokens, with ids up to 200."""
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["good"] = 200
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="token ids up to 200, but the model has embeddings for"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("rows", [0, 64])
def test_a_table_may_be_larger_and_a_mask_token_needs_no_embedding(tmp_path, tiny_bert, rows):
    """facebook/bart-large-cnn has none for <mask>. Where a text holds it, that is said."""
    model = save_classifier(tmp_path, tiny_bert, TWO.labels)
    if rows:
        model.resize_token_embeddings(rows)
        model.save_pretrained(tmp_path)
    largest = add_words(tmp_path, mask_token="<mask>") - 1
    model, _, _ = load_model(str(tmp_path), TWO)
    assert model.get_input_embeddings().num_embeddings == (rows or largest)
    save_task(TWO, {}, tmp_path / "task.json")
    predictor = load(tmp_path)
    assert predictor.logits([["the room was good ."]]).shape == (1, 2)
    if rows:
        assert predictor.logits([["the <mask> was good ."]]).shape == (1, 2)
    else:
        with pytest.raises(BadInput, match=f"a text holds the token id {largest}, but .* ids 0 to {largest - 1} only"):
            predictor.logits([["the <mask> was good ."]])


def test_a_vocabulary_larger_than_vocab_size_is_bad_input(vocabulary):
    with pytest.raises(BadInput, match=r"token ids up to \d\d, but vocab_size of `model` is 20") as caught:
        load_model(bert_config(vocabulary, vocab_size=20), TWO)
    assert "Drop vocab_size" in caught.value.advice


def test_a_tokenizer_that_cannot_pad_is_bad_input(tmp_path, tiny_bert, vocabulary):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    BertTokenizer(str(vocabulary), pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no padding token") as caught:
        load_model(str(tmp_path), TWO)
    assert '"pad_token": "<unk>"' in caught.value.advice
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "pad_token": "[UNK]"}))
    assert load_model(str(tmp_path), TWO)[1].pad_token == "[UNK]"


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
