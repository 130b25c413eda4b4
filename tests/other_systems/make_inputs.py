"""Small inputs for test_other_systems.py: a task that a tiny model learns in seconds, odd names, labels."""

import csv
import io
import random
import zipfile

GOOD, BAD = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]
THINGS = ["room", "film", "book", "meal", "train", "course", "hotel", "phone", "garden", "museum"]
LABELS = {"": ["positive", "negative"], "world-": ["好评", "سيئ 😀"]}  # the latter in no code page of Windows
MODEL = """  {{model_type: bert, vocab: vocab.txt, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
   intermediate_size: 64, max_position_embeddings: 32, hidden_dropout_prob: {dropout},
   attention_probs_dropout_prob: {dropout}}}"""


def make_rows(number, seed, labels):
    chooser = random.Random(seed)
    for _ in range(number):
        label = chooser.randrange(2)
        words = (GOOD, BAD)[label]
        clauses = [f"the {chooser.choice(THINGS)} was {chooser.choice(words)}" for _ in range(chooser.randrange(1, 4))]
        yield f"{' and '.join(clauses)}, café 好 😀 .", labels[label]


def csv_bytes(rows, header=("text", "label")):
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue().encode()


def make_inputs(folder):
    """Write tiny.yaml, world.yaml and their tables, question.csv and data.zip into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "was", "and", ".", ",", "cafe", "好", "😀"]
    (folder / "vocab.txt").write_bytes("\n".join([*vocabulary, *GOOD, *BAD, *THINGS, ""]).encode())
    for kind, labels in LABELS.items():
        for name, number, seed in (("train", 200, 1), ("validation", 50, 2), ("test", 50, 3)):
            (folder / f"{kind}{name}.csv").write_bytes(csv_bytes(make_rows(number, seed, labels)))
        files = ", ".join(f"{name}: {kind}{name}.csv" for name in ("train", "validation", "test"))
        model = MODEL.format(dropout=0.0 if kind else 0.1)
        task = f"files: {{{files}}}\ntext: text\nlabel: label\nlabels: [{', '.join(labels)}]\n"
        task += f"metrics: [accuracy, f1_macro]\nmodel:\n{model}\n"
        task += "defaults: {learning_rate: 0.003, batch_size: 16, epochs: 2, mixed_precision: 'no'}\n"
        (folder / ("world.yaml" if kind else "tiny.yaml")).write_bytes(task.encode())
    rows = list(make_rows(200, 1, LABELS[""]))
    (folder / "question.csv").write_bytes(csv_bytes(rows, ("text", "Is it good?")))
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("folder/train.csv", csv_bytes(rows))
