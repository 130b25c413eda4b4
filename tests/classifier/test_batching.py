"""The plan, its division among processes, padding, tokenising, and logits by example id."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import bert_config, make_rows
from datasets import Dataset

from classifier.data import cache
from classifier.data.tasks import Task
from classifier.messages import BadInput, Preempted, RunFailed
from classifier.model import inference, packing, padding, tokenization
from classifier.model.models import load_model
from classifier.model.packing import prepare_model
from classifier.training import batching

TASK = Task(name="reviews", text=["text"], labels=["negative", "positive"])


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def rows():
    texts, labels = zip(*make_rows(40), strict=True)
    return Dataset.from_dict({"text": list(texts), "label": [TASK.labels.index(label) for label in labels]})


@pytest.fixture
def model_and_tokenizer(tiny_bert):
    model, tokenizer, _ = load_model(str(tiny_bert), TASK)
    return model.eval(), tokenizer


@pytest.fixture
def packer(model_and_tokenizer):
    """The packer of this model: one row."""
    packer = prepare_model(*model_and_tokenizer, seed=1)
    assert packer.is_packed
    return packer


# ---------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1), (101, 7)])
def test_every_epoch_of_the_plan_holds_each_example_once(examples, batch_size):
    steps = -(-examples // batch_size)
    plan = batching.make_plan(examples, batch_size, seed=1, steps=3 * steps)
    assert len(plan) == 3 * steps
    for epoch in range(3):
        batches = plan[epoch * steps : (epoch + 1) * steps]
        assert sorted(np.concatenate(batches)) == list(range(examples))
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}


def test_plan_depends_on_seed_and_epoch_and_a_shorter_one_is_its_beginning():
    plan = batching.make_plan(100, 10, seed=1, steps=20)
    assert all((a == b).all() for a, b in zip(plan, batching.make_plan(100, 10, seed=1, steps=20), strict=True))
    assert all((a == b).all() for a, b in zip(plan, batching.make_plan(100, 10, seed=1, steps=7), strict=False))
    assert (np.concatenate(plan[:10]) != np.concatenate(plan[10:])).any()
    assert (np.concatenate(plan[:10]) != np.concatenate(batching.make_plan(100, 10, seed=2, steps=10))).any()
    assert (np.concatenate(plan[:10]) != np.arange(100)).any()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 64, 512])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 32, 100])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 1000])
def test_shares_of_all_processes_are_the_batch_each_example_once(processes, batch_size, micro_batch_size):
    batch = np.random.default_rng(0).permutation(1000)[:batch_size]
    shares = [batching.micro_batches_of_rank(batch, rank, processes, micro_batch_size) for rank in range(processes)]
    assert all(shares)  # every process takes part in every step
    counted = [ids for share in shares for ids, weight in share if weight == 1]
    assert sorted(np.concatenate(counted)) == sorted(batch)
    assert all(0 < len(ids) <= micro_batch_size for share in shares for ids, _ in share)
    sizes = [sum(len(ids) * weight for ids, weight in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_like_lengths_by_hand():
    """16 x 100 positions for 8 of 100 tokens and 8 of 20: a cut in the middle saves 8 x 80 = 640 of them."""
    lengths = np.repeat([100, 20], 8)
    halves = batching.split_by_length(np.arange(16), lengths, min_saving=639)
    assert [part.tolist() for part in halves] == [[*range(8)], [*range(8, 16)]]
    assert [part.tolist() for part in batching.split_by_length(np.arange(16), lengths, min_saving=640)] == [
        [*range(16)]
    ]
    assert len(batching.split_by_length(np.arange(16), np.full(16, 50), min_saving=0)) == 1
    # A cut in the middle saves nothing, however short the last one is.
    assert len(batching.split_by_length(np.arange(4), np.array([100, 100, 100, 20]), min_saving=10)) == 1


def test_tokens_with_padding_by_hand():
    lengths = np.array([3, 5, 2, 8, 4, 6, 7])
    batches = [np.array([0, 1, 2, 3]), np.array([4, 5, 6])]

    def computed(micro_batch_size, processes, min_saving=math.inf):
        return batching.padded_tokens(lengths, batches, processes, micro_batch_size, min_saving)

    assert computed(4, 1) == 4 * 8 + 3 * 7
    assert computed(2, 1) == 2 * 8 + 2 * 3 + 2 * 7 + 4  # longest first: 8 5, 3 2 and 7 6, 4
    assert computed(3, 1) == 3 * 8 + 2 + 3 * 7
    assert computed(4, 2) == 2 * 8 + 2 * 5 + 2 * 7 + 6  # rank 0 has 8 3 and 7 4, rank 1 has 5 2 and 6
    assert computed(1, 2) == computed(1, 1) == computed(9, 8) == lengths.sum()
    # In halves: 8 5 and 3 2 save 2 x 5 tokens; 7 6 and 4 save 1 x 3; 8 and 5 save 3, 7 and 6 one, 3 and 2 one.
    assert computed(4, 1, min_saving=9) == 2 * 8 + 2 * 3 + 3 * 7
    assert computed(4, 1, min_saving=10) == 4 * 8 + 3 * 7
    assert computed(4, 1, min_saving=2) == 8 + 5 + 2 * 3 + 2 * 7 + 4
    assert computed(4, 1, min_saving=0) == lengths.sum()
    assert computed(4, 2, min_saving=4) == 8 + 3 + 2 * 5 + 2 * 7 + 6
    assert computed(4, 1, min_saving=None) == computed(2, 3, min_saving=None) == lengths.sum()  # end to end


def lengths_like_those_of_mrpc(number):
    """As MRPC's pairs have them: 53 tokens on average, and up to 100."""
    return np.random.default_rng(0).normal(53, 15, number).clip(15, 100).astype(int)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "processes"),
    [(32, 32, 1), (32, 16, 2), (32, 8, 1), (32, 5, 2), (5, 2, 1), (5, 5, 3), (5, 100, 7)],
)
def test_tokens_with_padding_are_those_that_the_loader_lays_out(
    vocabulary, batch_size, micro_batch_size, processes, is_packed
):
    """Also where a process has none of the last batch's examples: it computes one, that is not counted."""
    task = Task(name="", text=["text"], labels=["no", "yes"])
    model, _, _ = load_model(bert_config(vocabulary), task)
    packer = packing.Packer(model, masks=None, pad_token_id=0)
    packer.is_packed = is_packed
    number = 4 * batch_size + 1
    lengths = lengths_like_those_of_mrpc(number)
    rows = {"input_ids": [[1] * n for n in lengths], "length": lengths, "label": [0] * number}
    examples, batches = Dataset.from_dict(rows), batching.make_plan(number, batch_size, seed=1, steps=7)
    device, said, counted, passes = torch.device("cpu"), 0, 0, 0
    for rank in range(processes):
        process = SimpleNamespace(process_index=rank, num_processes=processes, device=device)
        for micro_batches in batching.load_steps(examples, batches, process, micro_batch_size, packer):
            said += sum(part["positions"] for part in micro_batches)
            counted += sum(part["inputs"]["input_ids"].numel() for part in micro_batches if part["weight"])
            passes += sum(part["weight"] for part in micro_batches)
    min_saving = batching.choose_min_saving(packer, device)
    found = batching.padded_tokens(lengths, batches, processes, micro_batch_size, min_saving)
    assert found == said and (is_packed or found == counted)
    shares = [batch[rank::processes] for batch in batches for rank in range(processes)]
    uncut = sum(-(-len(share) // micro_batch_size) for share in shares)
    assert (passes > uncut) == (not is_packed and min(batch_size // processes, micro_batch_size) > 8)  # some are halved


def test_halves_leave_three_fifths_of_the_padding():
    lengths = lengths_like_those_of_mrpc(3668)
    batches = batching.make_plan(3668, 32, seed=42, steps=115)
    savings = {"whole": math.inf, "in halves": batching.TOKENS_WORTH_A_PASS["cpu"]}
    padding = {
        name: 1 - lengths.sum() / batching.padded_tokens(lengths, batches, 1, 32, min_saving)
        for name, min_saving in savings.items()
    }
    assert padding == {"whole": pytest.approx(0.37, abs=0.01), "in halves": pytest.approx(0.215, abs=0.01)}


@pytest.mark.parametrize("number", [1, 2, 3, 9, 64])
def test_like_lengths_leave_no_half_that_is_worth_a_cut(number):
    lengths = np.sort(np.random.default_rng(number).integers(10, 128, number))[::-1]
    ids = np.random.default_rng(0).permutation(number)
    parts = batching.split_by_length(ids, lengths, min_saving=100)
    assert np.concatenate(parts).tolist() == ids.tolist()  # each once, longest first
    assert len({len(part) for part in parts}) <= 2 + number.bit_length()
    length_of = dict(zip(ids.tolist(), lengths.tolist(), strict=True))
    for part in parts:
        of_part = [length_of[example] for example in part.tolist()]
        first = -(-len(part) // 2)  # of two halves
        in_two = first * of_part[0] + (len(part) - first) * of_part[min(first, len(part) - 1)]
        assert len(part) * of_part[0] - in_two <= 100


def test_steps_of_a_padded_model_are_cut_by_length(accelerator, packer):
    """The cuts make no difference to what a step is: the same examples, and fewer positions that hold padding."""
    from datasets import Dataset

    lengths = [60, 8, 8, 60] * 16
    examples = Dataset.from_dict({"input_ids": [[5] * n for n in lengths], "length": lengths, "label": [0] * 64})
    plan = batching.make_plan(64, 32, seed=0, steps=2)
    packer.is_packed = False
    for batch, parts in zip(plan, batching.load_steps(examples, plan, accelerator, 32, packer), strict=True):
        assert [set(part["lengths"]) for part in parts] == [{60}, {8}]
        assert sorted(np.concatenate([part["ids"] for part in parts])) == sorted(batch)
        assert sum(part["positions"] for part in parts) == sum(lengths[i] for i in batch.tolist())
        assert {part["weight"] for part in parts} == {1.0}


# -------------------------------------------------------------------------------------------------------- laying out


def test_pad_is_what_the_tokenizer_would_make(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    first, second = ["the room was good .", "film", "very very dull ."], ["bad", "the train was late and awful .", "a"]
    expected = tokenizer(first, second, padding=True, return_tensors="pt")
    ragged = tokenizer(first, second)
    padded = padding.pad({name: ragged[name] for name in ("input_ids", "token_type_ids")}, tokenizer.pad_token_id)
    assert padded.keys() == expected.keys()
    for name, tensor in padded.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("is_packed", [False, True])
def test_load_steps_yields_the_plan_with_its_labels(rows, model_and_tokenizer, packer, accelerator, is_packed):
    """The examples of a step come longest first."""
    model, tokenizer = model_and_tokenizer
    packer.is_packed = is_packed
    examples, _ = tokenization.tokenize(TASK, rows, "loader", model, tokenizer)
    plan = batching.make_plan(len(rows), 16, seed=3, steps=5)
    loader = batching.load_steps(examples, plan, accelerator, micro_batch_size=5, packer=packer)
    state = torch.random.get_rng_state()
    for batch, micro_batches in zip(plan, loader, strict=True):
        lengths = {example: len(tokenizer(rows[example]["text"])["input_ids"]) for example in batch.tolist()}
        longest_first = sorted(batch.tolist(), key=lengths.get, reverse=True)
        assert np.concatenate([part["ids"] for part in micro_batches]).tolist() == longest_first
        assert [len(part["ids"]) for part in micro_batches] == ([5, 5, 5, 1] if len(batch) == 16 else [5, 3])
        for part in micro_batches:
            assert part["labels"].tolist() == [rows[int(i)]["label"] for i in part["ids"]]
            expected = tokenizer([rows[int(i)]["text"] for i in part["ids"]], padding=True, return_tensors="pt")
            is_token = expected["attention_mask"].bool()
            assert part["lengths"] == is_token.sum(dim=1).tolist()
            assert part["tokens"] == is_token.sum()
            if is_packed:
                positions = torch.arange(is_token.shape[1]).expand_as(is_token)
                tokens = int(is_token.sum())
                row = {name: values[0, :tokens] for name, values in part["inputs"].items()}
                assert torch.equal(row["input_ids"], expected["input_ids"][is_token])
                assert torch.equal(row["position_ids"], positions[is_token])
                filling = part["inputs"]["input_ids"][0, tokens:]
                assert len(filling) < 32 and not filling.any()
                assert part["positions"] == part["tokens"]
            else:
                assert torch.equal(part["inputs"]["input_ids"], expected["input_ids"])
                assert part["positions"] == is_token.numel()
    assert torch.equal(state, torch.random.get_rng_state())  # dropout must not depend on the loader


def test_workers_yield_what_the_process_itself_would(rows, model_and_tokenizer, packer, accelerator):
    examples, _ = tokenization.tokenize(TASK, rows, "workers", *model_and_tokenizer)
    plan = batching.make_plan(len(rows), 16, seed=3, steps=5)
    here, there = (batching.load_steps(examples, plan, accelerator, 5, packer, num_workers) for num_workers in (0, 2))
    for ours, theirs in zip(here, there, strict=True):
        assert [part["ids"].tolist() for part in ours] == [part["ids"].tolist() for part in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one["labels"], other["labels"])
            assert all(torch.equal(one["inputs"][name], other["inputs"][name]) for name in one["inputs"])


def test_a_loader_of_the_rest_of_a_plan_goes_on_where_the_whole_one_would(
    rows, model_and_tokenizer, packer, accelerator
):
    examples, _ = tokenization.tokenize(TASK, rows, "rest", *model_and_tokenizer)
    plan = batching.make_plan(len(rows), 16, seed=3, steps=7)
    whole, rest = (list(batching.load_steps(examples, part, accelerator, 16, packer)) for part in (plan, plan[4:]))
    for ours, theirs in zip(whole[4:], rest, strict=True):
        assert torch.equal(ours[0]["inputs"]["input_ids"], theirs[0]["inputs"]["input_ids"])


@pytest.mark.parametrize(("fits", "found"), [(16, 16), (15, 8), (8, 8), (3, 2), (1, 1), (0, None)])
def test_the_largest_micro_batch_is_found_by_halving(
    rows, model_and_tokenizer, packer, accelerator, monkeypatch, fits, found
):
    """A model of which so many examples fit into memory; the longest ones are tried, and nothing is left behind."""
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "memory", model, tokenizer)
    longest = sorted(examples["length"], reverse=True)
    forward, tried = model.forward, []

    def limited(**inputs):
        positions = inputs["position_ids"][0].numpy()
        positions = positions[: positions.nonzero()[0][-1] + 1]  # without what fills the row up
        tried.append(np.diff([*np.flatnonzero(positions == 0), len(positions)]).tolist())
        if len(tried[-1]) > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", limited)
    state = torch.random.get_rng_state()
    if found is None:
        with pytest.raises(BadInput, match="not even one example"):
            inference.largest_micro_batch(accelerator, model, packer, examples, 16)
    else:
        assert inference.largest_micro_batch(accelerator, model, packer, examples, 16) == found
    assert all(lengths == longest[: len(lengths)] for lengths in tried)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_error_that_is_not_about_memory_is_not_taken_for_it(
    rows, model_and_tokenizer, packer, accelerator, monkeypatch
):
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "memory", model, tokenizer)
    monkeypatch.setattr(model, "forward", lambda **inputs: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        inference.largest_micro_batch(accelerator, model, packer, examples, 16)


# --------------------------------------------------------------------------------------------------------- tokenising


def test_tokens_are_made_once_and_cached_by_content(rows, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    examples, made = tokenization.tokenize(TASK, rows, "content-1", model, tokenizer)
    assert made
    assert examples["input_ids"][:] == tokenizer(rows["text"][:])["input_ids"]
    assert not tokenization.tokenize(TASK, rows, "content-1", model, tokenizer)[1]
    assert tokenization.tokenize(TASK, rows, "content-2", model, tokenizer)[1]
    shorter = Task(name="", text=["text"], labels=TASK.labels, max_length=5)
    cut, made = tokenization.tokenize(shorter, rows, "content-1", model, tokenizer)
    assert made
    assert max(cut["length"]) == 5


def test_a_broken_tokenising_leaves_nothing_in_the_cache(rows, model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    with pytest.raises(KeyError):
        tokenization.tokenize(Task(name="", text=["nowhere"], labels=["a", "b"]), rows, "broken", model, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_max_length_beyond_the_positions_and_ids_beyond_the_vocabulary_are_refused(rows, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    too_long = Task(name="", text=["text"], labels=TASK.labels, max_length=33)
    with pytest.raises(BadInput, match=r"33 .* 32 positions"):
        tokenization.tokenize(too_long, rows, "long", model, tokenizer)
    model.set_input_embeddings(torch.nn.Embedding(8, 32))
    with pytest.raises(BadInput, match="embeddings for the ids 0 to 7 only"):
        tokenization.tokenize(TASK, rows, "ids", model, tokenizer)


def test_positions_of_roberta_start_after_its_padding(model_and_tokenizer):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    _, tokenizer = model_and_tokenizer
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=20, pad_token_id=1, **small)).eval()
    limit = tokenization.longest_input(model, tokenizer)
    assert limit == 18
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_the_way_of_cutting_is_part_of_the_cache_and_of_what_is_trained_on(rows, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    cut = {}
    for truncate in ("head", "tail", "head_tail"):
        task = Task(name="", text=["text"], labels=TASK.labels, max_length=7, truncate=truncate)
        examples, made = tokenization.tokenize(task, rows, "ways of cutting", model, tokenizer)
        assert made
        cut[truncate] = examples["input_ids"][:]
        assert all(ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in cut[truncate])
    whole = tokenizer(rows["text"][:])["input_ids"]
    assert cut["head"] == [ids[:-1][:6] + ids[-1:] for ids in whole]
    assert cut["tail"] == [ids[:1] + ids[1:][-6:] for ids in whole]
    assert cut["head_tail"] == [ids if len(ids) <= 7 else ids[:2] + ids[-5:] for ids in whole]


def test_a_sample_is_the_same_one_and_keeps_the_shares(rows, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "sample", model, tokenizer)
    some = batching.stratified_sample(examples, 20)
    assert some["input_ids"][:] == batching.stratified_sample(examples, 20)["input_ids"][:]
    assert abs(sum(some["label"]) - sum(rows["label"]) / 2) <= 1
    assert batching.stratified_sample(examples, 1000)["input_ids"][:] == examples["input_ids"][:]


# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("is_packed", [False, True])
def test_logits_come_by_example_id_and_equal_the_model_on_each_alone(
    rows, model_and_tokenizer, accelerator, batch_size, is_packed
):
    model, tokenizer = model_and_tokenizer
    plain = copy.deepcopy(model)
    packer = prepare_model(model, tokenizer)
    packer.is_packed = is_packed
    examples, _ = tokenization.tokenize(TASK, rows, "logits", model, tokenizer)
    model.train()
    logits = inference.compute_logits(model, examples, accelerator, batch_size, packer)
    assert model.training  # as it was
    with torch.no_grad():
        alone = [plain(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in rows["text"]]
    np.testing.assert_allclose(logits, np.stack(alone), atol=1e-5)


def test_an_example_evaluated_twice_is_an_error(rows, model_and_tokenizer, packer, accelerator, monkeypatch):
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "twice", model, tokenizer)
    monkeypatch.setattr(inference, "gather_object", lambda parts: parts + parts[:1])
    with pytest.raises(RuntimeError, match="exactly once"):
        inference.compute_logits(model, examples, accelerator, 8, packer)


class Watch:
    """Stands in for a SignalWatch: a signal comes at the poll of this number."""

    def __init__(self, ends_at=None):
        self.polls, self.resets, self.ends_at = 0, 0, ends_at

    def poll(self):
        self.polls += 1
        if self.polls == self.ends_at:
            raise Preempted("SIGTERM")

    def poll_next_time(self):
        self.resets += 1


def test_an_evaluation_polls_for_signals_before_every_batch(rows, model_and_tokenizer, packer, accelerator):
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "logits", model, tokenizer)
    signals = Watch()
    inference.compute_logits(model, examples, accelerator, 8, packer, signals)
    assert (signals.polls, signals.resets) == (5, 2)  # 40 rows; before the first and after the last
    with pytest.raises(Preempted):
        inference.compute_logits(model, examples, accelerator, 8, packer, Watch(ends_at=3))


@pytest.mark.parametrize(("ranks", "expected"), [(2, 3), (4, 2), (7, 1)])
def test_all_processes_poll_equally_often(rows, model_and_tokenizer, packer, monkeypatch, ranks, expected):
    """40 rows are five batches of 8, and no process may wait for the poll of one that has had its last batch."""
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "logits", model, tokenizer)
    gathered = []
    for rank in range(ranks):
        process = SimpleNamespace(num_processes=ranks, process_index=rank, device=torch.device("cpu"))
        monkeypatch.setattr(inference, "gather_object", lambda parts: gathered.extend(parts) or [])
        signals = Watch()
        with pytest.raises(RuntimeError, match="exactly once"):  # nothing was gathered from the others
            inference.compute_logits(model, examples, process, 8, packer, signals)
        assert signals.polls == expected
    assert sorted(example for batch, _ in gathered for example in batch.tolist()) == list(range(40))


def test_an_evaluation_that_does_not_fit_into_memory_says_what_to_do(
    rows, model_and_tokenizer, packer, accelerator, monkeypatch
):
    model, tokenizer = model_and_tokenizer
    examples, _ = tokenization.tokenize(TASK, rows, "logits", model, tokenizer)
    words = "CUDA out of memory. Tried to allocate 2.00 GiB"
    monkeypatch.setattr(model, "forward", lambda **inputs: (_ for _ in ()).throw(RuntimeError(words)))
    with pytest.raises(RunFailed, match="with one example in an evaluation\nTry a smaller --max_length"):
        inference.compute_logits(model, examples, accelerator, 7, packer)


def test_a_model_without_a_limit_of_its_own_takes_the_tokenizers():
    """XLNet's positions are relative, and its configuration says -1."""
    config = SimpleNamespace(max_position_embeddings=-1)
    model = SimpleNamespace(config=config, named_modules=lambda: iter(()))
    assert tokenization.longest_input(model, SimpleNamespace(model_max_length=77)) == 77
