"""What simpler means reach on the same task: a bag of words, and a frozen encoder under a linear model.

Both are fitted by scikit-learn on the training split. A fine-tuned model that is no better has not earned its price.
"""

import common
import facts


def predictions(task, splits, names, fingerprints, encoder, accelerator, batch_size):
    """Return {split: {baseline: predictions}} for the named splits, fitted to the split `train`.

    encoder: a pretrained model's name, or None. Every process calls this.
    """
    found = {name: {} for name in names}
    words = bag_of_words(task, splits["train"])
    for name in names:
        found[name]["bag of words"] = words(splits[name])
    if encoder:
        features = encoder_features(task, {"train", *names}, splits, fingerprints, encoder, accelerator, batch_size)
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), linear_model(task))
        model.fit(features["train"], common.array_of(splits["train"], "label"))
        for name in names:
            found[name]["frozen encoder"] = model.predict(features[name])
    return found


def bag_of_words(task, train):
    """Fit TF-IDF with a linear model; return a function of rows that predicts ids, values, or 0 and 1.

    Words and pairs of words; characters where the texts are Chinese. Each text of a pair has columns of its own, and
    what both share has, too.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    unit = "char" if facts.is_chinese(train[:1000][task.text[0]]) else "word"
    # A word of one letter is a word, too: the default drops it, and may drop all.
    vectorizer = TfidfVectorizer(analyzer=unit, ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([text for column in task.text for text in train[column]])

    def matrix(rows):
        parts = [vectorizer.transform(rows[column]) for column in task.text]
        return hstack([*parts, parts[0].multiply(parts[1])]).tocsr() if len(parts) == 2 else parts[0]

    model = linear_model(task).fit(matrix(train), common.array_of(train, "label"))
    return lambda rows: model.predict(matrix(rows))


def linear_model(task):
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if task.is_regression:
        return Ridge()
    model = LogisticRegression(max_iter=1000)
    return OneVsRestClassifier(model) if task.is_multi_label else model


def encoder_features(task, names, splits, fingerprints, encoder, accelerator, batch_size):
    """Return {split: the mean of the encoder's last hidden states over each example's tokens, (examples, size)}."""
    import batching

    model, tokenizer, _ = common.load_model(encoder, task)
    named = {name: splits[name] for name in names}
    _, examples = batching.tokenize_splits(task, named, fingerprints, model, tokenizer)
    layout = common.lay_out(model, tokenizer)
    layout.is_row = False  # a mean over tokens needs to know whose they are
    base = model.base_model.to(accelerator.device).eval()

    def compute(inputs):
        with accelerator.autocast():
            hidden = base(**inputs)[0].float()
        is_token = inputs["attention_mask"].unsqueeze(-1)
        return (hidden * is_token).sum(1) / is_token.sum(1)

    return {
        name: batching.all_outputs(compute, of_split, accelerator, batch_size, layout)
        for name, of_split in examples.items()
    }
