"""Does a model answer the same in every way that it can be used? A tiny random one of each family, and five ways.

    python benchmarks/families.py [--only bert gpt2 ...]                 # ten minutes on two cores

Each is saved by one step of train.py. Its logits of 40 texts are compared with those that transformers computes for one
text at a time from the same folder: our predictor with one text at a time and with all in one batch (packed, or padded
where the model needs that), transformers' own padded batch, pipeline(), and what export.py wrote, in ONNX Runtime.
Prints a table for RESULTS.md: the largest difference of a logit in each way.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORDS = "the a room film book meal train hotel was is very not good fine poor dull and but so .".split()
LABELS = ["bad", "good"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"hidden_size": 32, **LAYERS, "intermediate_size": 64, "max_position_embeddings": 64}
DECODER = ENCODER | {"num_key_value_heads": 1, "pad_token_id": None}  # one of two heads: grouped-query attention
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
CANINE = {"downsampling_rate": 4, "upsampling_kernel_size": 4, "local_transformer_stride": 16}
CANINE |= {"num_hash_functions": 4, "num_hash_buckets": 512, "max_position_embeddings": 256}
CLS_SEP = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
FAMILIES = {  # model type: values of its config that differ from the defaults
    "bert": ENCODER,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    "roberta": ENCODER | CLS_SEP,
    "xlm-roberta": ENCODER | CLS_SEP,
    "electra": ENCODER | {"embedding_size": 16},
    "albert": ENCODER | {"embedding_size": 16},
    "mpnet": ENCODER | CLS_SEP,
    "modernbert": ENCODER | CLS_SEP,
    "deberta-v2": ENCODER | {"relative_attention": True, "position_buckets": 8},
    "longformer": ENCODER | CLS_SEP | {"attention_window": 8},
    "fnet": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64},
    "canine": ENCODER | CANINE,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 0},
    "gpt2": GPT,
    "gpt_neox": ENCODER,
    "opt": {"hidden_size": 32, **LAYERS, "ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0},
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 16},
    "gemma2": DECODER | {"head_dim": 16, "pad_token_id": 0},
    "bart": BART | CLS_SEP,
    "mbart": BART | CLS_SEP,
    "t5": T5 | CLS_SEP,
    "byt5": T5 | {"tokenizer_class": "ByT5Tokenizer"},
}
WAYS = ["alone", "batch", "transformers", "pipeline", "exported"]


def make_texts(number, seed):
    """Return this many texts of 1 to 30 words."""
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randrange(1, 31))) for _ in range(number)]


def make_model(family, folder):
    """Write a random model of a family and its tokenizer; its logits have a standard deviation of about 1."""
    import torch
    import transformers

    folder.mkdir()
    if family in ("canine", "byt5"):
        tokenizer = transformers.CanineTokenizer() if family == "canine" else transformers.ByT5Tokenizer()
    else:
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(SPECIAL + WORDS) + "\n", encoding="utf-8")
        side = "left" if family == "xlnet" else "right"
        tokenizer = transformers.BertTokenizer(str(vocabulary), padding_side=side)
    sizes = {} if family == "canine" else {"vocab_size": 384 if family == "byt5" else len(tokenizer)}
    model_type = {"byt5": "t5"}.get(family, family)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **sizes, **FAMILIES[family], id2label=dict(enumerate(LABELS)), label2id={"bad": 0, "good": 1}
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    texts = [tokenizer(text, return_tensors="pt") for text in make_texts(40, 2)]
    with torch.no_grad():  # a fresh model says nearly the same of all texts
        for weight in model.parameters():
            if weight.ndim == 2:
                weight *= 10
        head = [weight for weight in model.parameters() if weight.shape[0] == 2 and weight.ndim == 2][-1]
        head /= torch.cat([model(**text).logits for text in texts]).std(dim=0)[:, None]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_script(script, *arguments, folder):
    """Run one of the scripts; return (exit code, the lines that it wrote)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, (done.stdout + done.stderr).splitlines()


def save_by_training(family, folder):
    """Train for one step; return (the run's folder, is the model packed, its answer depends on the padding)."""
    make_model(family, folder / family)
    rows = [f"{text},{label}" for text, label in zip(make_texts(60, 1), LABELS * 30, strict=True)]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    flags = ["--train_file", "train.csv", "--model", family, "--max_steps", 1, "--mixed_precision", "no"]
    flags += ["--learning_rate", 1e-6]
    code, lines = run_script("train.py", *flags, "--output_dir", "run", folder=folder)
    if code:
        sys.exit(f"{family}: train.py ended with {code}\n" + "\n".join(lines[-30:]))
    log = "\n".join(lines)
    return folder / "run", "this model needs padding" not in log, "depends on the padding" in log


def differences(run, texts):
    """Return (the standard deviation of a logit between texts, {way: largest difference from transformers' logits})."""
    import numpy as np
    import torch
    import transformers

    from classifier import predictor

    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")

    def compute(some):
        with torch.no_grad():
            return model(**tokenizer(some, padding=True, return_tensors="pt")).logits.numpy()

    single = np.concatenate([compute([text]) for text in texts])
    pipe = transformers.pipeline("text-classification", model=str(run / "model"), top_k=None, device="cpu")
    scores = [{row["label"]: row["score"] for row in rows} for rows in pipe(texts, function_to_apply="none")]
    logits = {
        "alone": predictor.load(run, batch_size=1).logits([texts]),
        "batch": predictor.load(run, batch_size=len(texts)).logits([texts]),
        "transformers": compute(texts),
        "pipeline": np.array([[row[model.config.id2label[at]] for at in range(2)] for row in scores]),
    }
    code, lines = run_script("export.py", "--model", run, folder=run)
    if code == 0:
        logits["exported"] = predictor.load(run / "model" / "onnx").logits([texts])
    else:
        print(f"{run}: export.py ended with {code}: {lines[-2:]}", file=sys.stderr)
    return single.std(axis=0).mean(), {way: np.abs(values - single).max() for way, values in logits.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    print("| family | layout | logits differ by | alone | batch | transformers' batch | `pipeline()` | exported |")
    print("|---|---|---|---|---|---|---|---|")
    for family in args.only:
        with tempfile.TemporaryDirectory() as folder:
            run, is_packed, depends = save_by_training(family, Path(folder))
            deviation, found = differences(run, make_texts(40, 2))
        layout = ("packed" if is_packed else "padded") + (" (warned)" if depends else "")
        cells = [f"{found[way]:.0e}" if way in found else "refused" for way in WAYS]
        print(f"| {family} | {layout} | {deviation:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
