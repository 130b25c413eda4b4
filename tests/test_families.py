"""Any encoder of the Hub with a sequence-classification head trains, is evaluated and predicts: a tiny one of each."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS, make_rows, run_script, write_table

from classifier import predictor

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
FAMILIES = {
    "bert": ("BertConfig", SMALL),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64} | SMALL),
    "roberta": ("RobertaConfig", SMALL | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}),
    "xlm-roberta": ("XLMRobertaConfig", SMALL | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}),
    "electra": ("ElectraConfig", SMALL | {"embedding_size": 16}),
    "albert": ("AlbertConfig", SMALL | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", SMALL | {"relative_attention": True, "position_buckets": 8}),
    "modernbert": ("ModernBertConfig", SMALL | {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}),
    "mpnet": ("MPNetConfig", SMALL | {"pad_token_id": 0}),
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path, vocabulary):
    """A folder with a tiny random model of one family, and a WordPiece tokenizer."""
    config_class, values = FAMILIES[request.param]
    config = getattr(transformers, config_class)(**{"vocab_size": len(WORDS) + 5, **values})
    torch.manual_seed(0)
    folder = tmp_path / request.param
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


@pytest.mark.slow(after=1)
def test_trains_evaluates_and_predicts(family, tmp_path, run_inside):
    write_table(tmp_path / "my.csv", make_rows(60))
    arguments = ["--train_file", "my.csv", "--model", family, "--epochs", 1, "--batch_size", 8, "--output_dir", "run"]
    code, output, errors = run_inside(
        "train.py", *arguments, "--learning_rate", 1e-3, "--warmup_steps", 2, cwd=tmp_path
    )
    assert code == 0, errors
    assert "newly initialised" in output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    code, _, errors = run_inside("evaluate.py", "--model", "run", cwd=tmp_path)
    assert code == 0, errors
    evaluation = json.loads((tmp_path / "run" / "evaluation-validation" / "evaluation.json").read_text())
    assert evaluation["scores"] == results["scores"]["validation"]
    code, output, errors = run_inside("predict.py", "--model", "run", "--text", "the room was good .", cwd=tmp_path)
    assert code == 0, errors
    assert {line.split()[1] for line in output.splitlines()} == {"negative", "positive"}


# ------------------------------------------------------------- encoder-decoders; tokens that are bytes or characters

BOTH = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
MBART = {"d_model": 32, **BOTH, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
T5 = {"vocab_size": 384, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CANINE = {"downsampling_rate": 4, "upsampling_kernel_size": 4, "local_transformer_stride": 16}
CANINE |= {"num_hash_functions": 4, "num_hash_buckets": 128, "max_position_embeddings": 128}


def make_other(family, folder, vocabulary, **changes):
    """Write a tiny random model and its tokenizer: mbart, byt5 or canine."""
    torch.manual_seed(0)
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    if family == "mbart":
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        model = transformers.MBartModel(transformers.MBartConfig(**{**tokens, **MBART, **changes}))
    elif family == "byt5":
        tokenizer = transformers.ByT5Tokenizer()
        model = transformers.T5Model(transformers.T5Config(**T5, decoder_start_token_id=0, tokenizer_class="ByT5"))
    else:
        tokenizer = transformers.CanineTokenizer()
        model = transformers.CanineModel(transformers.CanineConfig(**{**SMALL, **CANINE}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("family", ["mbart", "byt5", "canine"])
def test_trains_and_answers_as_transformers_does_for_one_text_at_a_time(family, tmp_path, vocabulary):
    """CANINE in batches of one text, as a warning says: transformers' own answers depend on the padding."""
    make_other(family, tmp_path / family, vocabulary)
    write_table(tmp_path / "my.csv", make_rows(60))
    flags = ["--train_file", "my.csv", "--model", family, "--max_steps", 3, "--batch_size", 8, "--output_dir", "run"]
    flags += ["--learning_rate", 1e-2, "--mixed_precision", "no", "--threads", 1]
    done = run_script("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("this model needs padding") == 1
    assert done.stdout.count("some of this model's dropout is torch's own") == (family == "mbart")
    depends = family == "canine"
    assert done.stdout.count("depends on the padding") == depends and ("--eval_batch_size 1" in done.stdout) == depends
    texts = ["the room was good .", "bad", "the film was very very dull and the meal was fine ."]
    logits = predictor.load(tmp_path / "run", batch_size=1 if depends else 64).logits([texts])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts]
    np.testing.assert_allclose(logits, np.concatenate(expected), rtol=1e-5, atol=1e-5)
    short = predictor.load(tmp_path / "run").logits([["a", ""]])  # of which transformers' CANINE computes neither
    assert short.shape == (2, 2) and np.isfinite(short).all()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_a_model_that_computes_no_text_is_refused_by_each_script(script, tmp_path, vocabulary, run_inside):
    """mBART's head reads the last end of a text, and this tokenizer writes none."""
    folder = make_other("mbart", tmp_path / "mbart", vocabulary, eos_token_id=4)
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    transformers.MBartForSequenceClassification.from_pretrained(folder, **names).save_pretrained(folder)
    write_table(tmp_path / "my.csv", make_rows(60))
    (tmp_path / "my.yaml").write_text(json.dumps({"files": {"train": "my.csv", "validation": "my.csv"}}))
    flags = {"predict.py": ["--text", "good"], "evaluate.py": ["--task", "my.yaml"]}
    flags = flags.get(script, ["--task", "my.yaml", "--output_dir", "run"])
    code, _, errors = run_inside(script, "--model", "mbart", *flags, cwd=tmp_path)
    assert code == 2 and "Traceback" not in errors
    reason, advice = [line for line in errors.splitlines() if line.startswith(f"{script}: ")]
    assert "mbart: cannot compute a text (ValueError: Each example must contain at least one <eos> token.)" in reason
    assert "end token (eos_token_id 4 in config.json): use the tokenizer that the model was trained with" in advice
