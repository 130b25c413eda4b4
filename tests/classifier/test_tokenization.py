"""tokenization.py: token ids as transformers makes them, cut as it cuts, or with a head and a tail."""

import numpy as np
import pytest

from classifier.data.tasks import Task
from classifier.model.tokenization import encode

LAYOUTS = {
    "bert": ("<s> $A <e>", "<s> $A <e> $B:1 <e>:1"),
    "roberta": ("<s> $A <e>", "<s> $A <e> <e> $B <e>"),  # two special tokens between the texts
    "xlnet": ("$A <e> <s>", "$A <e> $B:1 <e>:1 <s>"),  # none at the start
}


@pytest.fixture(params=LAYOUTS)
def words(request):
    """A tokenizer of the words a to z that lays out special tokens as a family of models does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "<e>", *"abcdefghijklmnopqrstuvwxyz"]
    plain = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = LAYOUTS[request.param]
    plain.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("<s>", 2), ("<e>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.mark.parametrize(("truncate", "side"), [("head", "right"), ("tail", "left")])
@pytest.mark.parametrize("number_of_texts", [1, 2])
def test_head_and_tail_cut_as_transformers_does(words, truncate, side, number_of_texts):
    """A text at the right or the left; of a pair the longer one first, with an odd and an even room."""
    task = Task(name="", text=["a", "b"][:number_of_texts], truncate=truncate)
    chooser = np.random.default_rng(0)
    texts = [[" ".join(chooser.choice(list("abcdefg"), number)) for number in range(13)] for _ in range(2)]
    pairs = [(first, second) for first in texts[0] for second in texts[1]]
    texts = [list(column) for column in zip(*pairs, strict=True)][:number_of_texts]
    specials = words.num_special_tokens_to_add(pair=number_of_texts == 2)
    words.truncation_side = side
    for max_length in range(specials + number_of_texts, 28):
        columns, facts = encode(task, words, texts, max_length)
        expected = words(*texts, truncation="longest_first", max_length=max_length)
        assert columns == {name: expected[name] for name in ("input_ids", "token_type_ids")}, max_length
        examples = [" ".join(pair).split() for pair in zip(*texts, strict=True)]
        assert facts["full_length"] == [len(example) + specials for example in examples]


@pytest.mark.parametrize(("room", "expected"), [(1, "j"), (4, "a hij"), (7, "a efghij"), (8, "ab efghij"), (10, None)])
def test_head_tail_keeps_a_quarter_from_the_start(words, room, expected):
    specials = words.num_special_tokens_to_add(pair=False)
    columns, _ = encode(
        Task(name="", text=["a"], truncate="head_tail"), words, [["a b c d e f g h i j"]], room + specials
    )
    (ids,) = columns["input_ids"]
    kept = "".join(words.convert_ids_to_tokens(ids, skip_special_tokens=False)).replace("<s>", "").replace("<e>", "")
    assert kept == (expected or "abcdefghij").replace(" ", "")
    assert ids.count(2) == 1 and ids.count(3) == 1 and len(ids) == room + specials


@pytest.mark.parametrize(
    ("first", "second", "room", "expected"),
    [
        # The shorter text fits into a half: only the longer one is cut, to 8 = 2 + 6.
        ("a b c d e f g h i j", "x y", 10, ("abefghij", "xy")),
        ("x y", "a b c d e f g h i j", 10, ("xy", "abefghij")),
        # Neither fits: 4 = 1 + 3 for the shorter one, 5 = 1 + 4 for the longer one.
        ("a b c d e f g h i j", "p q r s t u", 9, ("aghij", "pstu")),
        ("p q r s t u", "a b c d e f g h i j", 9, ("pstu", "aghij")),
        # Equally long, and an odd room: the second gets one more, as in transformers.
        ("a b c d e", "p q r s t", 7, ("cde", "pqrst"[:1] + "rst")),
        ("a b c d e", "", 4, ("acde", "")),
    ],
)
def test_head_tail_of_pairs_by_hand(words, first, second, room, expected):
    specials = words.num_special_tokens_to_add(pair=True)
    task = Task(name="", text=["a", "b"], truncate="head_tail")
    columns, _ = encode(task, words, [[first], [second]], room + specials)
    (ids,) = columns["input_ids"]
    ends = "".join(words.convert_ids_to_tokens(ids))
    assert ends == "".join(
        words.convert_ids_to_tokens(words([" ".join(expected[0])], [" ".join(expected[1])])["input_ids"][0])
    )
    assert len(ids) == room + specials == len(columns["token_type_ids"][0])


def test_special_tokens_written_in_a_text_are_text(words):
    """`<e>` in a text becomes the id of the special token; it may be cut like any word, and divides no texts."""
    words.add_special_tokens({"additional_special_tokens": ["<e>"]})
    task = Task(name="", text=["a"], truncate="head")
    columns, facts = encode(task, words, [["a <e> b <e> c <e> d"]], 5)
    assert facts["full_length"] == [9]
    assert columns["input_ids"] == words(["a <e> b <e> c <e> d"], truncation=True, max_length=5)["input_ids"]


def test_facts_of_encoding(words):
    task = Task(name="", text=["a", "b"])
    _, facts = encode(task, words, [["a ? b", "c"], ["? ?", "d e"]], 8)
    specials = words.num_special_tokens_to_add(pair=True)
    assert facts == {"full_length": [5 + specials, 3 + specials], "unknown": [3, 0], "characters": [8, 4]}
