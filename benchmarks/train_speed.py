"""Compare the training speed of train.py with what people would use instead: examples per second of the same steps.

    python benchmarks/train_speed.py --output train_speed.json              # five rounds; an hour on two cores
    python benchmarks/train_speed.py --only ours trainer trainer_grouped
    python benchmarks/train_speed.py --ablations                            # train.py, one optimisation off each
    python benchmarks/train_speed.py --only ours trainer_grouped --architecture deberta-v2    # a model that runs padded

All use the same model, data, batch size and threads, and the dropout of the model's config. After --warmup steps,
--steps steps are timed, without start-up, evaluation and saving: train.py by its own metrics.jsonl, the others by the
clock between two steps. All batches are full and from one epoch. group_by_length sorts 28 batches of MRPC at a time,
longest first, so a multiple of 28 steps counts short and long ones alike.

Each round begins and ends with bf16 matrix products of the model's shapes: x W', g W and g' x of all linear layers, for
the tokens of a mean step. The fraction of their rate that training reaches is

    FLOPs of the timed steps / their seconds / FLOP/s of these products, where the FLOPs of an example of n tokens are
    3 * (2 * n * weights of the encoder's linear layers + 4 * n^2 * hidden size * layers).

This counts real tokens only: the forward pass, twice as much for the backward pass, and attention's two products with
n^2. Everything else counts as nothing.
"""

import json
import math
import runpy
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import rounds
from rounds import ROOT

SEED = 42


class Clock:
    """Times the steps after the warm-up. Call step() at the end of each step."""

    def __init__(self, args):
        self.first, self.last, self.batch_size = args.warmup, args.warmup + args.steps, args.batch_size
        self.done, self.times = 0, []

    def step(self):
        self.done += 1
        if self.done in (self.first, self.last):
            rounds.synchronise()
            self.times.append(time.perf_counter())

    def result(self):
        begin, end = self.times
        return {"examples": (self.last - self.first) * self.batch_size, "seconds": end - begin}


# -------------------------------------------------------------------------------------------------------- contenders


def ours(args, flags=(), patch=None):
    """Run train.py with these flags. patch() is called first, to switch an optimisation off."""
    interval = math.gcd(args.warmup, args.steps)
    total = args.warmup + args.steps
    sys.argv = ["train.py", "--task", args.task, "--model", args.model, "--batch_size", str(args.batch_size)]
    sys.argv += ["--max_steps", str(total), "--eval_every", str(total), "--limit", "validation=8"]
    sys.argv += ["--log_every", str(interval), "--seed", str(SEED), "--output_dir", "run", *flags]
    if patch:
        patch()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    lines = map(json.loads, Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timed = [line for line in lines if line["type"] == "train" and line["step"] > args.warmup]
    examples = interval * args.batch_size  # per line
    precision = json.loads(Path("run/results.json").read_text(encoding="utf-8"))["mixed_precision"]
    seconds = sum(examples / line["examples_per_second"] for line in timed)
    return {"examples": examples * len(timed), "seconds": seconds, "precision": precision}


def load_all(args):
    """Return (task, model, tokenizer, rows, tokens): the train split as texts, and tokenised as usual."""
    from classifier import processes
    from classifier.data.splits import load_splits
    from classifier.data.tasks import read_task
    from classifier.model.models import load_model

    processes.quieten_libraries()
    task, splits, _, _ = load_splits(read_task(args.task))
    model, tokenizer, _ = load_model(args.model, task)  # a plain transformers model in float32
    rows = splits["train"].select_columns([*task.text, "label"])
    limit = task.max_length or model.config.max_position_embeddings

    def tokenize(batch):
        return tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=limit)

    tokens = rows.map(tokenize, batched=True, remove_columns=task.text, keep_in_memory=True)
    return task, model, tokenizer, rows, tokens


def trainer(args, **options):
    """transformers' Trainer at its defaults, which pad to the longest of a batch, except for these options."""
    from transformers import Trainer, TrainingArguments

    _, model, tokenizer, _, tokens = load_all(args)
    settings = TrainingArguments(**trainer_settings(args), **options)
    clock = Clock(args)
    Trainer(model, settings, train_dataset=tokens, processing_class=tokenizer, callbacks=[make_callback(clock)]).train()
    return clock.result()


def trainer_settings(args):
    return {
        "output_dir": "trainer",
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.warmup + args.steps,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": args.device == "cpu",  # required for bf16
        "seed": SEED,
    }


def make_callback(clock):
    from transformers import TrainerCallback

    class AtEachStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step()

    return AtEachStep()


def cross_encoder(args):
    """sentence-transformers' CrossEncoder with its own trainer, in bf16. It tokenises during training."""
    from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    task, model, tokenizer, rows, _ = load_all(args)
    if len(task.text) != 2:
        sys.exit("cross_encoder is for pairs of texts")
    model.save_pretrained("model")  # with a head, which an encoder for sentence vectors lacks
    tokenizer.save_pretrained("model")
    model = CrossEncoder("model", num_labels=len(task.labels), max_length=task.max_length)
    clock = Clock(args)
    CrossEncoderTrainer(
        model,
        CrossEncoderTrainingArguments(**trainer_settings(args), bf16=True),
        train_dataset=rows,
        loss=CrossEntropyLoss(model),
        callbacks=[make_callback(clock)],
    ).train()
    return clock.result()


def plain_loop(args):
    """A plain loop with Accelerator, like accelerate's examples: fp32, padded to the longest of a batch."""
    import torch
    from accelerate import Accelerator
    from transformers import get_linear_schedule_with_warmup

    accelerator = Accelerator()
    _, model, tokenizer, _, tokens = load_all(args)

    def collate(examples):
        return tokenizer.pad(examples, padding="longest", return_tensors="pt")

    tokens = tokens.rename_column("label", "labels")
    loader = torch.utils.data.DataLoader(tokens, args.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.warmup + args.steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    clock = Clock(args)
    model.train()
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.step()
        if clock.done == clock.last:
            return clock.result()


def matrix_products(args):
    """Return the FLOP/s of bf16 products of the model's shapes, and the FLOPs of the timed steps; see above."""
    import torch

    from classifier.training import batching

    _, model, _, _, tokens = load_all(args)
    total = args.warmup + args.steps
    if total * args.batch_size > len(tokens):
        sys.exit(f"{total} steps of {args.batch_size} are more than one epoch of {len(tokens)} examples: lower --steps")
    plan = batching.make_plan(len(tokens), args.batch_size, SEED, total)[args.warmup :]
    lengths = [len(ids) for ids in tokens["input_ids"]]
    lengths = torch.tensor([[lengths[example] for example in batch] for batch in plan], dtype=torch.float64)
    layers = [part for name, part in model.base_model.named_modules() if "pooler" not in name]
    shapes = [(part.out_features, part.in_features) for part in layers if isinstance(part, torch.nn.Linear)]
    linear = 2 * lengths.sum() * sum(out * into for out, into in shapes)
    attention = 4 * (lengths**2).sum() * model.config.hidden_size * model.config.num_hidden_layers

    number, seconds = round(lengths.sum().item() / args.steps), 0.0
    device = torch.device(args.device)
    for out, into in set(shapes):
        x, weight, gradient = (
            torch.randn(size, device=device).to(torch.bfloat16) for size in ((number, into), (out, into), (number, out))
        )
        # The products of a linear layer: its output, and the gradients of its input and of its weight.
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            times = []
            while len(times) < 20 or sum(times) < args.product_seconds:
                rounds.synchronise()
                begin = time.perf_counter()
                torch.matmul(left, right)
                rounds.synchronise()
                times.append(time.perf_counter() - begin)
            seconds += shapes.count((out, into)) * statistics.median(times)
    flops = 3 * 2 * number * sum(out * into for out, into in shapes)
    return {
        "tokens_per_step": number,
        "flops_per_second": flops / seconds,
        "flops": 3 * (linear + attention).item(),
    }


CONTENDERS = {  # name: (title, function, the contender to compare with)
    "ours": ("train.py", ours, None),
    "ours_fp32": ("train.py, fp32", partial(ours, flags=["--mixed_precision", "no"]), "ours"),
    "trainer": ("Trainer, defaults (fp32)", trainer, "ours"),
    "trainer_bf16": ("Trainer, bf16", partial(trainer, bf16=True), "ours"),
    "trainer_grouped": (
        "Trainer, bf16, group_by_length",
        partial(trainer, bf16=True, train_sampling_strategy="group_by_length"),
        "ours",
    ),
    "cross_encoder": ("sentence-transformers' CrossEncoder, bf16", cross_encoder, "ours"),
    "ours_launched": ("train.py, plain accelerate launch", ours, None),
    "plain_loop": ("accelerate's example loop, plain accelerate launch", plain_loop, "ours_launched"),
}
LAUNCHED = ("ours_launched", "plain_loop")

# --------------------------------------------------------------------------------------------------------- ablations


def padded():
    from classifier.model import packing

    prepare_model = packing.prepare_model

    def prepare_padded(*arguments):
        packer = prepare_model(*arguments)
        packer.is_packed = False
        return packer

    replace(packing, "prepare_model", prepare_padded)


def padded_to_the_longest():
    from classifier.training import batching

    padded()
    replace(batching, "TOKENS_WORTH_A_PASS", {"cpu": math.inf})


def torch_dropout():
    import torch

    from classifier.model import dropout

    def mask(masks, numbers, place, p, dtype):
        shape = (*numbers.shape[:-1], 4 * numbers.shape[-1])
        return torch.empty(shape, dtype=dtype, device=numbers.device).bernoulli_(1 - p)

    replace(dropout.Masks, "_mask", mask)


def fresh_memory():
    from classifier import processes

    replace(processes, "keep_freed_memory", lambda: None)


def small_pages():
    import os

    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"


def sums_in_fp32():
    from classifier.model import packing

    replace(packing.Packer, "_embeddings_to_bf16", lambda self, module, inputs, output: output)


def one_group():
    from classifier.model import packing

    replace(packing, "GROUP_LIMIT", 2**40)


def adamw_not_fused():
    import torch

    initialise = torch.optim.AdamW.__init__

    def initialise_unfused(self, *arguments, **options):
        initialise(self, *arguments, **{**options, "fused": False})

    torch.optim.AdamW.__init__ = initialise_unfused


def nothing_of_ours():
    from classifier.model import packing

    padded_to_the_longest()
    torch_dropout()
    fresh_memory()
    small_pages()
    adamw_not_fused()
    prepare_model = packing.prepare_model

    def prepare_with_sdpa(model, *arguments):
        packer = prepare_model(model, *arguments)
        model.set_attn_implementation("sdpa")
        return packer

    replace(packing, "prepare_model", prepare_with_sdpa)


def replace(owner, name, value):
    """Set an attribute, which must exist: an optimisation that was moved must not look useless."""
    getattr(owner, name)
    setattr(owner, name, value)


ABLATIONS = {
    "padded": ("padded, cut into halves of similar length", partial(ours, patch=padded), "ours"),
    "padded_to_the_longest": (
        "padded to the longest of the batch",
        partial(ours, patch=padded_to_the_longest),
        "ours",
    ),
    "torch_dropout": ("torch's dropout", partial(ours, patch=torch_dropout), "ours"),
    "fresh_memory": ("freed memory returned to the system", partial(ours, patch=fresh_memory), "ours"),
    "small_pages": ("small memory pages", partial(ours, patch=small_pages), "ours"),
    "sums_in_fp32": ("residual sums in fp32", partial(ours, patch=sums_in_fp32), "ours"),
    "one_group": ("attention padded to the longest", partial(ours, patch=one_group), "ours"),
    "adamw_not_fused": ("AdamW not fused", partial(ours, patch=adamw_not_fused), "ours"),
    "no_bf16": ("fp32", partial(ours, flags=["--mixed_precision", "no"]), "ours"),
    "nothing": (
        "bf16 alone: padded, torch's dropout, SDPA, AdamW not fused",
        partial(ours, patch=nothing_of_ours),
        "ours",
    ),
}
# Settings, besides sizes, that make a config of this type match the published models.
ARCHITECTURES = {
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    }
}
PRODUCTS = {"matrix_products": ("bf16 products of the model's shapes", matrix_products, None)}

# ------------------------------------------------------------------------------------------------------------ rounds


def new_model(architecture, like, folder):
    """Write a new model of this architecture into a folder, with the sizes and the tokenizer of `like`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from classifier import processes
    from classifier.model.models import load_model

    processes.quieten_libraries()
    model, tokenizer, _ = load_model(like)
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    sizes += ["max_position_embeddings", "type_vocab_size", "pad_token_id"]
    values = {name: getattr(model.config, name) for name in sizes}
    config = AutoConfig.for_model(architecture, **values, **ARCHITECTURES.get(architecture, {}))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main():
    everything = CONTENDERS | ABLATIONS | PRODUCTS
    parser = rounds.argument_parser(__doc__, everything)
    parser.add_argument("--ablations", action="store_true", help="train.py with one optimisation off at a time")
    parser.add_argument("--steps", type=int, default=56, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="an id or a folder")
    parser.add_argument(
        "--architecture", metavar="TYPE", help="a new model of this type, with the sizes and tokenizer of --model"
    )
    parser.add_argument("--product_seconds", type=float, default=0.2, help="time to spend on each matrix product")
    args = parser.parse_args()
    if args.contender:
        return rounds.write_result(everything, args)
    if args.runs < 1 or args.steps < 1 or args.warmup < 1:
        parser.error("--runs, --steps and --warmup must be at least 1")
    contenders = rounds.choose_contenders(everything, args.only or (ABLATIONS if args.ablations else CONTENDERS))
    if any(name in LAUNCHED for name in contenders):
        from accelerate.commands.config.config_args import default_config_file

        if Path(default_config_file).exists():
            sys.exit(
                f"{default_config_file}: plain accelerate launch would read it. Set HF_HOME to a folder without it."
            )
    scratch = tempfile.TemporaryDirectory() if args.architecture else None
    if args.architecture:
        args.model = new_model(args.architecture, args.model, scratch.name)
    arguments = []
    for name in ("task", "model", "batch_size", "warmup", "steps", "product_seconds"):
        value = getattr(args, name)
        arguments += [f"--{name}", str(Path(value).resolve() if Path(str(value)).exists() else value)]

    def products():
        return rounds.run_contender(__file__, "matrix_products", arguments, args)

    runs, product_rates = {name: [] for name in contenders}, [products()]
    for number in range(1, args.runs + 1):
        for name in contenders:
            run = rounds.run_contender(__file__, name, arguments, args, name in LAUNCHED)
            runs[name].append(run)
            rounds.log_progress(f"round {number}, {name}: {run['examples'] / run['seconds']:.2f} examples/s")
        product_rates.append(products())
    rates = {name: [run["examples"] / run["seconds"] for run in results] for name, results in runs.items()}
    rows = rounds.compare_rates(contenders, rates)
    content = {"benchmark": "train_speed", **rounds.describe_machine(args), "rows": rows, "rates": rates, "runs": runs}
    content["matrix_products"] = product_rates
    print(rounds.format_table(rows))
    fractions = {}
    for name in ("ours", "ours_launched"):
        if runs.get(name) and {run["precision"] for run in runs[name]} == {"bf16"}:
            speeds = [
                (before["flops_per_second"] + after["flops_per_second"]) / 2
                for before, after in pairwise(product_rates)
            ]
            fractions[name] = [
                product_rates[0]["flops"] / run["seconds"] / speed
                for run, speed in zip(runs[name], speeds, strict=True)
            ]
            median, low, high = statistics.median(fractions[name]), min(fractions[name]), max(fractions[name])
            print(
                f"\n{contenders[name][0]}: {median:.1%} of the rate of bf16 matrix products ({low:.1%} to {high:.1%}), "
                f"which is {statistics.median(speeds) / 1e9:.0f} GFLOP/s"
            )
    content["shares_of_matrix_products"] = fractions
    rounds.write_content(args.output, content)


if __name__ == "__main__":
    main()
