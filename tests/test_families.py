"""Any encoder of the Hub with a sequence-classification head trains, is evaluated and predicts: a tiny one of each."""

import json

import pytest
import torch
import transformers
from conftest import WORDS, make_rows, write_table

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
