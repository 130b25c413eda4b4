"""models.py: new heads, kept heads, float32 weights; the many kinds of damage are in test_bad_input.py."""

import json
import os
from functools import partial

import huggingface_hub
import pytest
import torch
import transformers
from conftest import WORDS, bert_config
from data_help import COMMIT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, GPT2Config, GPT2Model

from classifier.data.tasks import Task, save_task
from classifier.messages import BadInput
from classifier.model.load_errors import load_error
from classifier.model.models import load_model, model_folder, with_head_labels
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
    commands = caught.value.advice.partition("--model new: ")[2].rstrip(".").replace('"new"', f'"{tmp_path / "new"}"')
    exec(commands, vars(transformers))  # the advice works
    model, tokenizer, facts = load_model(str(tmp_path / "new"), task)
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


# ------------------------------------------------------------------------------- why transformers could not load it


def change(file, **values):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def as_adapter(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_model.safetensors").touch()
    base = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(base))


def with_code(folder):
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})


def with_tokenizer_code(folder):
    (folder / "tokenizer.json").unlink()
    change(folder / "config.json", model_type="vit")  # of which transformers knows no tokenizer
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Words", None]})


def as_sentence_transformers(folder):
    files = list(folder.iterdir())
    (folder / "0_Transformer").mkdir()
    for file in files:
        file.rename(folder / "0_Transformer" / file.name)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modules.json").write_text("[]")


def with_weights_as(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def of_type(model_type):
    return lambda folder: change(folder / "config.json", model_type=model_type)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def in_parts(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))


class Spring:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def with_pickled_code(folder, **options):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Spring()}, folder / "pytorch_model.bin", **options)


def as_whole_model(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model, folder / "pytorch_model.bin")


def without_tokenizer(model_type):
    def change_folder(folder):
        for file in folder.glob("*token*"):
            file.unlink()
        change(folder / "config.json", model_type=model_type)

    return change_folder


def as_gguf(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "model-Q4_K_M.gguf").touch()


NO_HEAD = 'transformers has no text classification head for the model_type "{}" of config.json'
CAUSES = {  # what is done to a folder; parts of the reason and of the advice
    "an adapter": (
        as_adapter,
        "it is an adapter of org/base (adapter_config.json), not a whole model",
        'AutoPeftModelForSequenceClassification.from_pretrained("FOLDER", num_labels=N).merge_and_unload()',
    ),
    "code": (with_code, "it needs Python code of its own (auto_map in config.json)", "such as bert"),
    "a tokenizer's code": (with_tokenizer_code, NO_HEAD.format("vit"), "such as bert"),
    "sentence-transformers": (as_sentence_transformers, "subfolder 0_Transformer", "--model FOLDER/0_Transformer"),
    "TensorFlow": (
        with_weights_as("tf_model.h5"),
        "its weights are for TensorFlow only (tf_model.h5)",
        "a copy of it with model.safetensors: weights of another framework than torch are not read",
    ),
    "Flax": (with_weights_as("flax_model.msgpack"), "for Flax only (flax_model.msgpack)", "with model.safetensors"),
    "ONNX": (with_weights_as("model.onnx"), "for ONNX only (model.onnx)", "a copy of it with model.safetensors"),
    **{name: (of_type(name), NO_HEAD.format(name), "bert") for name in ("vit", "whisper", "sam", "clip_text_model")},
    "an unknown type": (of_type("robreta"), 'the model_type "robreta" of config.json (did you mean "rob', "Upgrade"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights", "Copy the"),
    "another name": (with_weights_as("x.safetensors"), "there are no weights", "rename it to model.safetensors"),
    "no index": (with_weights_as("model-00001-of-00002.safetensors"), "no .index.json", "Copy the .index.json"),
    "a missing part": (in_parts, "1 of its 2 weight files are missing: model-00002-of-00002.safetensors", "again"),
    "a cut file": (cut("model.safetensors", 1000), "model.safetensors is damaged (", "download model.safetensors"),
    "a cut end": (cut("model.safetensors", -1), "model.safetensors is damaged (", "download model.safetensors again"),
    "pickled code": (with_pickled_code, "loading it would run code (posix.system)", "torch.save its state_dict"),
    "an old pickle": (
        partial(with_pickled_code, _use_new_zipfile_serialization=False),
        "loading it would run code (posix.system)",
        "torch.save its state_dict",
    ),
    "a whole model": (as_whole_model, "would run code (transformers.models.bert.", "torch.save its state_dict"),
    "no tokenizer": (without_tokenizer("bert"), "has no vocabulary", '.save_pretrained("FOLDER")'),
    "no tokenizer of xlnet": (without_tokenizer("xlnet"), "there are no tokenizer files", "tokenizer.json"),
    "half a tokenizer": (cut("tokenizer.json", 99), "tokenizer.json is not JSON (", "download tokenizer.json again"),
    "half a config": (cut("config.json", 99), "config.json is not JSON (", "download config.json again"),
    "no type": (of_type(None), "config.json has no model_type", '"model_type": "bert"'),
    "GGUF": (as_gguf, "its weights are for llama.cpp only (model-Q4_K_M.gguf)", "a copy of it with model.safetensors"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_told_with_an_advice_of_its_own(tmp_path, tiny_bert, cause, monkeypatch):
    folder = tmp_path / "model"
    save_classifier(folder, tiny_bert, TWO.labels)
    do, reason, advice = CAUSES[cause]
    do(folder)
    monkeypatch.chdir(tmp_path)
    for load_it in (lambda: load_model("model", TWO), lambda: load_model(model_folder("model"))):
        if cause == "ONNX" and (folder / "model.onnx").exists():  # model_folder takes it for one that export.py wrote
            load_it = partial(load_model, "model", TWO)
        with pytest.raises(BadInput) as caught:
            load_it()
        assert caught.value.reason.startswith("model: ") and reason in caught.value.reason
        assert advice.replace("FOLDER", "model") in caught.value.advice
    assert not (tmp_path / "sprung").exists()


def test_the_advice_against_pickled_code_and_another_layout_works(tmp_path, tiny_bert):
    before = save_classifier(tmp_path / "model", tiny_bert, TWO.labels)
    as_whole_model(tmp_path / "model")
    file = tmp_path / "model" / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=False).state_dict(), file)
    as_sentence_transformers(tmp_path / "model")
    model, _, facts = load_model(str(tmp_path / "model" / "0_Transformer"), TWO)
    assert facts["new"] == [] and torch.equal(model.classifier.weight, before.classifier.weight)


def test_the_cause_is_found_in_the_cache_of_the_hub_too(tmp_path, tiny_bert, hub, monkeypatch):
    """Offline, with what was downloaded before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model" / "snapshots" / COMMIT
    save_classifier(folder, tiny_bert, TWO.labels)
    cut("model.safetensors", 1000)(folder)
    error = load_error("some/model", ValueError("whatever"), COMMIT)
    assert error.reason.startswith("some/model: cannot be loaded as a text classifier: model.safetensors is damaged")
    assert error.advice == f"Delete the folder {tmp_path / 'models--some--model'}: the model is then downloaded again."
