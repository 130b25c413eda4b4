"""The recipe: how long and how fast a model is trained, where neither a flag nor the task says so.

The recipe of small data was measured before it became the default: benchmarks/recipe.py, and its table in RESULTS.md.
"""

from classifier.messages import log

PLAIN = {"epochs": 3, "batch_size": 32, "learning_rate": 2e-5, "warmup_ratio": 0.0}  # as in most tutorials
MOST_ROWS = 10_000  # of training that are small data
BATCH_SIZE, WARMUP_RATIO = 16, 0.1
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 300, 6, 40  # as many steps as need at least 6 epochs, at most 40
LEARNING_RATES = {512: 1e-4, 800: 5e-5}  # {largest size of a hidden state: rate}; the larger, the lower
LEARNING_RATE_OF_LARGE = 3e-5


def is_plain(args, task):
    """Return whether PLAIN holds: where it was asked for, the task has a recipe of its own, or the encoder is new."""
    own = task.defaults.keys() & {"epochs", "max_steps", "learning_rate"}
    return args.recipe == "plain" or bool(own) or isinstance(args.model or task.model, dict)


def fill_in(args, values):
    """Set the arguments that no flag and no default of the task has set; return those that were set."""
    missing = {name: value for name, value in values.items() if getattr(args, name) is None}
    vars(args).update(missing)
    return missing


def choose(args, model, rows):
    """Set the arguments that depend on the number of training rows and on the encoder; log them."""
    if rows > MOST_ROWS:
        name, values = "many rows", PLAIN
    else:
        name = "small data"
        steps_per_epoch = -(-rows // (args.batch_size or BATCH_SIZE))
        epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, -(-STEPS // steps_per_epoch)))
        values = {"epochs": epochs, "batch_size": BATCH_SIZE, "warmup_ratio": WARMUP_RATIO}
        values["learning_rate"] = learning_rate_of(getattr(model.config, "hidden_size", 768))
    if chosen := fill_in(args, values):
        words = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())
        args.recipe = f"{name}: {words}"
        log.info(f"recipe: {name}, {rows:,} rows: {words} (--recipe plain: as in most tutorials)")


def learning_rate_of(hidden_size):
    """Return the learning rate for an encoder with hidden states of this size."""
    return next((rate for size, rate in LEARNING_RATES.items() if hidden_size <= size), LEARNING_RATE_OF_LARGE)
