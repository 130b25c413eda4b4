"""packing.py: packed examples have the numbers of the padded model, and a model that does not is detected."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TORCHRUN_2, bert_config, lines_of, run_script, write_review_task
from datasets import Dataset
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

from classifier.messages import BadInput, log
from classifier.model import inference, packing, padding
from classifier.model.models import freeze
from classifier.model.packing import check_on_device, prepare_model

PADDING, VOCABULARY = 1, 50
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
MODERNBERT = {"num_hidden_layers": 4, "local_attention": 8, "global_attn_every_n_layers": 3}
FAMILIES = {
    "bert": SMALL,
    "distilbert": DISTILBERT,
    "roberta": SMALL,
    "xlm-roberta": SMALL,
    "mpnet": SMALL,
    "electra": {**SMALL, "embedding_size": 16},
    "albert": {**SMALL, "embedding_size": 16},
    "modernbert": {**SMALL, **MODERNBERT},
}
PADDED = {
    "deberta-v2": {**SMALL, "relative_attention": True, "position_buckets": 8, "pooler_hidden_size": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "convbert": {**SMALL, "embedding_size": 32},
}
RATES = ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "classifier_dropout"]
RATES += ["dropout", "attention_dropout", "seq_classif_dropout", "mlp_dropout", "embedding_dropout"]
LENGTHS = {
    "ragged": [30, 28, 27, 22, 17, 9, 9, 5, 3],
    "all equal": [12, 12, 12],
    "one": [19],
    "one token": [7, 1, 1],
}


def plain_model(family, sizes):
    """A model as transformers computes it, with its explicit attention; its weights are so large that all count."""
    names = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    config = AutoConfig.for_model(family, **sizes, **names, vocab_size=VOCABULARY, pad_token_id=PADDING, num_labels=3)
    for name in RATES:
        if hasattr(config, name):
            setattr(config, name, 0.1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def tokenizer(texts):
    """Stands in for a tokenizer where a model is tried."""
    return {"input_ids": [[2, *(4 + ord(letter) % 40 for letter in text), 3] for text in texts]}


tokenizer.pad_token_id, tokenizer.padding_side = PADDING, "right"


def make_models(family, sizes=None):
    """Return (plain, model, packer): a model of transformers, and the same model prepared by us."""
    plain = plain_model(family, sizes or FAMILIES[family])
    model = copy.deepcopy(plain)
    packer = prepare_model(model, tokenizer, seed=1)
    return plain, model, packer


def make_examples(lengths, pairs=False):
    """The columns of examples of so many tokens; of pairs, the second text is of type 1."""
    chooser = np.random.default_rng(sum(lengths))
    examples = {"input_ids": [chooser.integers(4, VOCABULARY, length).tolist() for length in lengths]}
    if pairs:
        examples["token_type_ids"] = [[0] * (length // 3) + [1] * (length - length // 3) for length in lengths]
    return examples


def padded(examples, side="right"):
    """The inputs of transformers' own models, with torch's padding."""
    columns = {name: [torch.tensor(values) for values in column] for name, column in examples.items()}
    inputs = {name: pad_sequence(column, batch_first=True, padding_side=side) for name, column in columns.items()}
    ones = [torch.ones_like(ids) for ids in columns["input_ids"]]
    inputs["attention_mask"] = pad_sequence(ones, batch_first=True, padding_side=side)
    inputs["input_ids"][inputs["attention_mask"] == 0] = PADDING
    return inputs


def results(model, inputs):
    """Return (logits, {name: gradient}) of a batch, and leave no gradients."""
    logits = model(**inputs).logits.float()
    labels = torch.arange(len(logits)) % 3
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def packer_results(model, packer, examples, is_packed, step=3):
    """Return results of examples packed, or padded, by our packer."""
    packer.is_packed = is_packed
    lengths = [len(ids) for ids in examples["input_ids"]]
    packer.set_batch(step, range(100, 100 + len(lengths)), lengths, "cpu")
    return results(model, packer.collate(examples))


def assert_equal(ours, theirs, tolerance=1e-5):
    """Logits and gradients agree: the difference of each is small beside it, or where it is 0, beside the others."""
    (logits, gradients), (expected_logits, expected) = ours, theirs
    assert logits.shape == expected_logits.shape
    torch.testing.assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == expected.keys() and gradients
    typical = np.median([gradient.norm() for gradient in expected.values()])
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm()
        assert difference <= tolerance * max(expected[name].norm(), typical), (name, difference)


# ------------------------------------------------------------------------------------------ the numbers of the padded


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family, lengths):
    plain, model, packer = make_models(family)
    assert packer.is_packed
    examples = make_examples(lengths)
    expected = results(plain, padded(examples))
    for is_packed in (True, False):
        assert_equal(packer_results(model, packer, examples, is_packed), expected)


@pytest.mark.parametrize("constant", ["LONG", "GROUP_LIMIT"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet"])
def test_other_ways_to_compute_attention_give_the_same(family, constant, monkeypatch):
    """torch's own attention; groups of one example."""
    monkeypatch.setattr(packing, constant, 0)
    plain, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"])
    assert_equal(packer_results(model, packer, examples, is_packed=True), results(plain, padded(examples)))
    inputs = packer.collate(examples)
    packer.set_batch(0, range(9), LENGTHS["ragged"], "cpu")
    with torch.inference_mode():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, plain(**padded(examples)).logits, rtol=1e-5, atol=1e-5)
    groups = {"LONG": [8, 1], "GROUP_LIMIT": [1] * 9}[constant]
    assert [group.number for group in packer.masks.packed.groups] == groups


def test_steps_of_similar_size_have_few_shapes():
    """Each new shape costs a CPU some milliseconds to compile its matrix products."""
    chooser = np.random.default_rng(0)
    tokens, groups = set(), set()
    for _ in range(200):
        lengths = -np.sort(-chooser.integers(30, 90, 32))
        packed = packing.PackedBatch(lengths, 12, "cpu")
        assert lengths.sum() <= packed.tokens <= lengths.sum() * 33 / 32 + 1
        assert sum(group.number for group in packed.groups) == 32
        tokens.add(packed.tokens)
        groups |= {(group.number, group.width) for group in packed.groups}
    assert len(tokens) <= 25 and len(groups) <= 20


@pytest.mark.parametrize("family", ["bert", "electra", "albert"])
def test_pairs_of_texts(family):
    plain, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"], pairs=True)
    ours = packer_results(model, packer, examples, is_packed=True)
    assert_equal(ours, results(plain, padded(examples)))
    first_texts = {"input_ids": examples["input_ids"]}
    assert (
        packer_results(model, packer, first_texts, is_packed=True)[0] - ours[0]
    ).abs().max() > 1e-2  # the types count


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_same_packed_and_padded(family, lengths):
    _, model, packer = make_models(family)
    model.train()
    examples = make_examples(lengths)
    packed = packer_results(model, packer, examples, is_packed=True)
    assert_equal(packed, packer_results(model, packer, examples, is_packed=False))
    model.eval()
    assert (packer_results(model, packer, examples, is_packed=True)[0] - packed[0]).abs().max() > 1e-2  # there was some


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_close_as_padded(family):
    """Rounded at other places, no more: as far from fp32 as transformers in bf16 is."""
    plain, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"])
    exact = results(plain, padded(examples))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, theirs = packer_results(model, packer, examples, is_packed=True), results(plain, padded(examples))

    def error(numbers):
        pairs = [(numbers[0], exact[0]), *((numbers[1][name], expected) for name, expected in exact[1].items())]
        squares = [((values - expected).square().sum(), expected.square().sum()) for values, expected in pairs]
        logits, gradients = squares[0], torch.tensor(squares[1:]).sum(dim=0)
        return [float((difference / size) ** 0.5) for difference, size in (logits, gradients)]

    for ours, expected in zip(error(packed), error(theirs), strict=True):
        assert 1e-4 < ours < 1.25 * expected + 2**-9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_speaks_of_padding(family):
    """RoBERTa and its relatives do not count such a token among the positions."""
    plain, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"])
    for ids in examples["input_ids"][::2]:
        ids[1] = PADDING
    assert_equal(packer_results(model, packer, examples, is_packed=True), results(plain, padded(examples)))


def test_mpnet_makes_its_bias_for_the_longest_example_not_for_the_packed_batch():
    """Which would be the square of all tokens."""
    _, model, packer = make_models("mpnet")
    shapes = []
    model.mpnet.encoder.relative_attention_bias.register_forward_hook(
        lambda module, given, output: shapes.append(tuple(given[0].shape))
    )
    packer_results(model, packer, make_examples(LENGTHS["ragged"]), is_packed=True)
    assert shapes == [(32, 32)]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_copy_of_a_model_has_parts_of_its_own(family):
    _, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"])
    expected = packer_results(model, packer, examples, is_packed=True)
    model_copy, packer_copy = copy.deepcopy((model, packer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    packer.set_batch(0, [0], [1], "cpu")
    assert_equal(packer_results(model_copy, packer_copy, examples, is_packed=True), expected)


# ------------------------------------------------------------------------------------------------- ways of training


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_activations_that_are_computed_again(family):
    _, model, packer = make_models(family)
    examples = make_examples(LENGTHS["ragged"])
    model.train()
    expected = packer_results(model, packer, examples, is_packed=False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(packer_results(model, packer, examples, is_packed=True), expected)


@pytest.mark.parametrize("frozen", ["encoder", "embeddings", "1"])
def test_frozen_parts(frozen):
    plain, model, packer = make_models("bert")
    examples = make_examples(LENGTHS["ragged"])
    everything = results(plain, padded(examples))
    freeze(plain, frozen)
    freeze(model, frozen)
    expected = results(plain, padded(examples))
    assert len(expected[1]) < len(everything[1])
    assert_equal(packer_results(model, packer, examples, is_packed=True), expected)


@pytest.mark.slow
def test_two_processes_train_packed_as_one_does_padded(review_task, vocabulary, run_inside, monkeypatch):
    config = bert_config(vocabulary, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    task = write_review_task(review_task.with_name("dropout.yaml"), config)
    folder, flags = task.parent, ["--max_steps", 14, "--log_every", 1, "--eval_every", 7, "--micro_batch_size", 5]
    flags += ["--task", task, "--threads", 1, "--output_dir"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "matches_padded", lambda *arguments: False)
        code, printed, errors = run_inside("train.py", *flags, "padded", cwd=folder)
    assert code == 0 and "this model needs padding" in printed, errors
    done = run_script("train.py", *flags, "packed", cwd=folder, launcher=TORCHRUN_2)
    assert done.returncode == 0 and "padding" not in done.stdout, done.stderr
    losses, scores = [], []
    for name in ("padded", "packed"):
        losses.append([line["loss"] for line in lines_of(folder / name)])
        scores.append([(line["loss"], *line["scores"].values()) for line in lines_of(folder / name, "eval")])
    assert len(losses[0]) == 14 and len(scores[0]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)


# ------------------------------------------------------------------------------------------- evaluating and predicting


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_has_the_logits_of_transformers(family, batch_size):
    plain, model, packer = make_models(family)
    lengths = np.random.default_rng(0).permutation(LENGTHS["ragged"] + LENGTHS["one token"]).tolist()
    examples = make_examples(lengths)
    table = Dataset.from_dict({**examples, "length": lengths})
    logits = inference.compute_logits(model, table, Accelerator(cpu=True), batch_size, packer)
    with torch.no_grad():
        expected = plain(**padded(examples)).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- models that cannot do it


def assert_runs_padded(plain, model, packer, text):
    """It is padded, this is logged, and its numbers are those of transformers."""
    assert not packer.is_packed
    assert text.count("this model needs padding") == 1
    side = "left" if model.config.model_type == "xlnet" else "right"
    lengths = [30, 3, 17, 17, 28, 9]
    examples = make_examples(lengths)
    table = Dataset.from_dict({**examples, "length": lengths})
    logits = inference.compute_logits(model, table, Accelerator(cpu=True), 64, packer)
    with torch.no_grad():
        np.testing.assert_allclose(logits, plain(**padded(examples, side)).logits, rtol=1e-5, atol=1e-5)
    longest_first = make_examples(sorted(lengths, reverse=True))
    expected = results(plain, padded(longest_first, side))
    assert_equal(packer_results(model, packer, longest_first, is_packed=False), expected)


@pytest.fixture
def log_text(caplog, monkeypatch):
    """A function that returns the log so far."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger="classifier")
    return lambda: caplog.text


MEAN = {**FAMILIES["modernbert"], "classifier_pooling": "mean"}


@pytest.mark.parametrize(("family", "sizes"), [*PADDED.items(), ("modernbert", MEAN)])
def test_a_family_that_needs_padding_is_found_out(family, sizes, log_text):
    assert_runs_padded(*make_models(family, sizes), log_text())


def test_a_family_that_needs_no_padding_is_not_logged(log_text):
    make_models("bert")
    assert "padding" not in log_text()


def mix_neighbours(module, given, output):
    return output + 0.1 * output.roll(1, dims=1)


def no_attention(module):
    module.forward = lambda hidden_states, *given, **options: (torch.zeros_like(hidden_states), None)


def attention_twice(module):
    forward = module.forward

    def twice(*given, **options):
        forward(*given, **options)
        return forward(*given, **options)

    module.forward = twice


@pytest.mark.parametrize("change", [no_attention, attention_twice])
def test_a_layer_that_does_not_attend_once_is_refused(change, log_text):
    """Though its logits are the same: what else it may do with the other examples is not known."""
    plain = plain_model("bert", SMALL)
    change(plain.bert.encoder.layer[1].attention.self)
    model = plain_model("bert", SMALL)
    change(model.bert.encoder.layer[1].attention.self)
    packer = prepare_model(model, tokenizer, seed=1)
    assert_runs_padded(plain, model, packer, log_text())
    examples = make_examples([9, 4])
    packed = packer_results(model, packer, examples, is_packed=True)
    assert_equal(packed, results(plain, padded(examples)))


def model_that_fails(error, fails):
    """A BERT whose forward raises an error where fails(model, input_ids)."""
    model = plain_model("bert", SMALL)
    forward = model.forward

    def fail(input_ids=None, **options):
        if fails(model, input_ids):
            raise error
        return forward(input_ids=input_ids, **options)

    model.forward = fail
    return model


def has_our_dropout(model, *given):
    return not isinstance(model.dropout, torch.nn.Dropout)


def has_our_attention(model, *given):
    return model.config._attn_implementation == "counted_dropout"


ERRORS = [KeyError("key"), AssertionError("no"), NotImplementedError("not"), ZeroDivisionError("by zero"), OSError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("part", [has_our_dropout, has_our_attention])
def test_a_model_that_fails_with_our_parts_keeps_those_of_transformers(part, error, log_lines):
    model = model_that_fails(error, part)
    plain = copy.deepcopy(plain_model("bert", SMALL))
    packer = prepare_model(model, tokenizer)
    assert not has_our_dropout(model) and model.config._attn_implementation == "eager"
    assert_runs_padded(plain, model, packer, "\n".join(log_lines))
    assert sum("dropout is torch's own" in line for line in log_lines) == 1
    assert not model.training


def test_a_model_that_answers_otherwise_with_our_parts_keeps_those_of_transformers(log_lines):
    model = plain_model("bert", SMALL)
    model.classifier.register_forward_hook(lambda module, given, output: output + has_our_attention(model))
    packer = prepare_model(model, tokenizer)
    assert_runs_padded(plain_model("bert", SMALL), model, packer, "\n".join(log_lines))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("fails", "what"),
    [
        (lambda model, ids: True, "a text"),
        (lambda model, ids: len(ids) > 1, "texts of different lengths together"),
        (lambda model, ids: model.training, "a text in training"),
    ],
)
def test_a_model_that_fails_is_refused(error, fails, what):
    model = model_that_fails(error, fails)
    with pytest.raises(BadInput) as caught:
        prepare_model(model, tokenizer)
    assert f": cannot compute {what} ({type(error).__name__}: " in caught.value.reason
    assert "Do they belong together?" in caught.value.advice
    assert not model.training


def test_a_model_that_pads_on_one_side_only_pads_there():
    model = model_that_fails(ValueError("left"), lambda model, ids: ids[-1, -1] == PADDING)
    packer = prepare_model(model, tokenizer)
    assert packer.padding_side == "left"


def test_a_model_of_few_positions_is_tried_with_shorter_texts(vocabulary):
    tokenizer = BertTokenizer(str(vocabulary))
    sizes = {**SMALL, "max_position_embeddings": 8, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))
    assert prepare_model(model, tokenizer).is_packed


def test_a_layer_that_reads_its_neighbours_is_found_out(log_text):
    plain = plain_model("bert", SMALL)
    plain.bert.encoder.layer[1].intermediate.register_forward_hook(mix_neighbours)
    model = plain_model("bert", SMALL)
    model.bert.encoder.layer[1].intermediate.register_forward_hook(mix_neighbours)
    packer = prepare_model(model, tokenizer, seed=1)
    assert_runs_padded(plain, model, packer, log_text())


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "deberta-v2", "gpt2"])
def test_a_model_that_was_tried_is_as_it_was(family, is_training):
    _, model, packer = make_models(family, {**FAMILIES, **PADDED}[family])
    packer.is_packed = False
    model.train(is_training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    for column in ("input_ids", "token_type_ids"):  # one that the model takes, one that it may not
        packing.matches_padded(model, packer, make_examples([9, 4], pairs=column == "token_type_ids"))
        assert all(module.training == is_training for module in model.modules())
        assert not packer.is_packed and packer.masks.packed is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_attention_takes_what_sdpa_returns_whatever_its_strides(monkeypatch):
    """On CUDA in fp32, heads and positions come back transposed in memory, and cannot be viewed as rows of tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(8, 2, 4, generator=generator) for _ in range(3))
    expected = []
    for tokens in (slice(0, 5), slice(5, 8)):
        weights = (torch.einsum("qhd,khd->hqk", query[tokens], key[tokens]) * 0.5).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, value[tokens]))

    def transposed(*inputs, **options):
        return scaled_dot_product_attention(*inputs, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(packing, "scaled_dot_product_attention", transposed)
    monkeypatch.setattr(packing, "LONG", 0)
    packed = packing.PackedBatch([5, 3], heads=2, device="cpu")
    query, key, value = (
        torch.cat([values, values.new_zeros(packed.tokens - 8, 2, 4)]) for values in (query, key, value)
    )
    result = packing.packed_attention(packed, query, key, value, scaling=0.5)
    assert torch.allclose(result[:8], torch.cat(expected), atol=1e-6)


# ------------------------------------------------------------------------------------------------ the side of padding

BOTH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5_TOKENS = {"eos_token_id": 3, "decoder_start_token_id": 0}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
SIDES = {  # and where padding changes no answer
    "bert": ("right", SMALL),
    "roberta": ("right", SMALL),
    "xlnet": ("left", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    "gpt2": ("right", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "opt": ("either", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}),  # positions follow the attention mask
    "gpt_neox": ("either", SMALL),  # rotary positions: only distances matter
    "llama": ("either", DECODER),
    "mistral": ("either", DECODER),
    "qwen2": ("either", DECODER),
    # Their attention is not only that of queries and keys, and stays transformers' own: a soft cap, sinks.
    "gemma2": ("either", DECODER),
    "gpt_oss": ("either", {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}),
    # Encoder-decoders: their heads read the last end of a text.
    "bart": ("right", {"d_model": 32, **BOTH, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 3}),
    "t5": ("right", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, **T5_TOKENS}),
}


def make_classifier(family, sizes, vocabulary, side):
    tokenizer = BertTokenizer(str(vocabulary), padding_side=side)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=3, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():  # a new head's logits are so small that no difference shows
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model, tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SIDES)
def test_a_texts_answer_is_that_of_transformers_for_it_alone(family, side, vocabulary, log_lines):
    expected_side, sizes = SIDES[family]
    model, tokenizer = make_classifier(family, sizes, vocabulary, side)
    generator = np.random.default_rng(0)
    texts = [generator.integers(5, len(tokenizer), length - 1).tolist() for length in (11, 7, 2)]
    examples = {"input_ids": [[*ids, tokenizer.sep_token_id] for ids in texts]}
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in examples["input_ids"]])
        packer = prepare_model(model, tokenizer)
        packer.is_packed = False
        packer.set_batch(0, range(3), [11, 7, 2], "cpu")
        logits = model(**packer.collate(examples)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert packer.padding_side == side or (packer.padding_side == expected_side and expected_side != "either")
    assert not any("depends on the padding" in line for line in log_lines)


def test_a_model_whose_answers_depend_on_its_batch_is_warned_of(vocabulary, log_lines):
    model, tokenizer = make_classifier("fnet", {**SMALL, "type_vocab_size": 2}, vocabulary, "right")
    assert padding.choose_padding_side(model, tokenizer) == "right"
    assert any("depends on the padding" in line and "--eval_batch_size 1" in line for line in log_lines)


# --------------------------------------------------------------------------------- devices and precisions that cannot


class Elsewhere(str):
    """A name of the CPU, for torch; for our code another device."""

    type = "npu"


BF16 = SimpleNamespace(device=Elsewhere("cpu"), mixed_precision="bf16")


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_rounding_to_bf16_is_no_reason_to_pad(family, log_text):
    _, model, packer = make_models(family, {**FAMILIES, **PADDED}[family])
    was_packed = packer.is_packed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_on_device(model, packer, BF16)
    assert packer.is_packed == was_packed == (family in FAMILIES) and "WARNING" not in log_text()


@pytest.mark.parametrize("amount", [0.5, np.nan])
def test_where_packed_examples_have_other_numbers_they_are_padded_and_this_is_told(amount, log_lines):
    plain, model, packer = make_models("bert")
    examples, expected = packer.probe
    assert abs(expected - plain(**padded(examples)).logits.detach().numpy()).max() < 1e-5
    wrong = amount * abs(expected).max()
    model.classifier.register_forward_hook(lambda module, given, output: output + (wrong if packer.is_packed else 0))
    check_on_device(model, packer, BF16)
    assert not packer.is_packed and len(log_lines) == 1
    assert f"two packed examples differ from the CPU's by {amount:.1e} of the largest" in log_lines[0]
    assert_equal(
        packer_results(model, packer, make_examples([9, 4]), False), results(plain, padded(make_examples([9, 4])))
    )


def test_a_device_on_which_padded_examples_have_other_numbers_is_told(log_lines):
    _, model, packer = make_models("bert")
    model.classifier.register_forward_hook(lambda module, given, output: output * 1.2)
    check_on_device(model, packer, BF16)
    assert not packer.is_packed
    assert [
        re.findall("two (packed|padded) examples differ from the CPU's by 2.0e-01", line) for line in log_lines
    ] == [["packed"], ["padded"]]


def test_on_a_cpu_nothing_is_computed_again():
    _, model, packer = make_models("bert")
    model.forward = None
    check_on_device(model, packer, SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16"))
    assert packer.is_packed
