"""report.html: what is known of a run or of an evaluation, in one file that needs no other."""

import io
import json
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from classifier.data.labels import format_label, prediction_rows
from classifier.files import write_text
from classifier.messages import format_score

MOST_MISTAKES = 200  # in the page; errors.csv has all of an evaluation
KINDS = {  # of pictures: what draws one, of the entry of the same name
    "confusion": lambda task, content: draw_confusion(content["confusion"], task.labels),
    "calibration": lambda task, content: draw_reliability(content["calibration"]),
    "batches": lambda task, content: draw_batches(content["batches"], content["scores"]["matthews_correlation"]),
}


def write(folder, task, headline, evaluations, lines=(), tables=None):
    """Write report.html and plots/*.png into a folder.

    headline: a dict of title, model and text; evaluations: dicts as evaluation.json holds them, each with `mistakes`,
    a list of dicts; lines: of metrics.jsonl, where there was a training; tables: {heading: {name: value}} for the end.
    """
    import jinja2

    pictures = Path(folder) / "plots"
    pictures.mkdir(exist_ok=True)

    def picture(name, figure):
        save_png(figure, pictures / f"{name}.png")
        return as_svg(figure)

    first, metric = evaluations[0], task.metrics[0]
    curves = picture("curves", draw_curves(lines, metric, first["majority_baseline"][metric])) if lines else None
    for content in evaluations:
        drawn = {kind: draw(task, content) for kind, draw in KINDS.items() if kind in content}
        content["pictures"] = {kind: picture(f"{kind}-{content['split']}", figure) for kind, figure in drawn.items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": format_score, "value": _value}
    template = environment.get_template("report_template.html")
    epochs = [line for line in lines if line["type"] == "eval"]
    page = template.render(
        task=task, evaluations=evaluations, curves=curves, epochs=epochs, tables=tables or {}, **headline
    )
    write_text(Path(folder) / "report.html", page)


def mistakes_of(task, rows, logits, wrong, losses):
    """Return the worst mistakes as the page shows them; `wrong`: their numbers, worst first."""
    wrong, losses = wrong[:MOST_MISTAKES], losses[:MOST_MISTAKES]
    found = zip(rows.select(wrong), prediction_rows(task, logits[wrong]), wrong, losses, strict=True)
    return [
        {
            "example": int(number),
            "texts": [row[column] for column in task.text],
            "label": format_label(task, row["label"]),
            "prediction": prediction[0],
            "probability": None if task.is_regression else prediction[1],
            "loss": float(loss),
        }
        for row, prediction, number, loss in found
    ]


def _value(value):
    """Return a setting as words."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


INK = "#1a1b1c"  # of text and axes; in the page it becomes the colour of the text around
BLUE, ORANGE = "#3b7dd8", "#e07b39"  # told apart by all, on white and on black
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "SimHei", "PingFang SC"]
MOST_NAMES, MOST_NUMBERS = 40, 20  # of classes, beside and in a confusion matrix


@contextmanager
def _style():
    import matplotlib
    from matplotlib import font_manager

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of fonts that are not there
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, INK) | {
        "font.family": ["sans-serif"],
        "font.sans-serif": [name for name in FONTS if name in font_manager.get_font_names()],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same names inside each time
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the page, the browser has fonts enough
        yield


def _figure(width, height, columns=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_curves(lines, metric, of_majority):
    """Draw losses and the first metric over the epochs; lines: of metrics.jsonl; of_majority: the baseline, or None."""
    with _style():
        figure, (left, right) = _figure(8, 3, 2)
        trained = [line for line in lines if line["type"] == "train"]
        evaluated = [line for line in lines if line["type"] == "eval"]
        left.plot(
            [line["epoch"] for line in trained], [line["loss"] for line in trained], color=BLUE, lw=1, label="train"
        )
        for number, split in enumerate(dict.fromkeys(line["split"] for line in evaluated)):
            of_split = [line for line in evaluated if line["split"] == split]
            epochs, style = [line["epoch"] for line in of_split], ("-", "--", ":")[number % 3]
            name = "a part of train" if split == "train" else split
            left.plot(epochs, [line["loss"] for line in of_split], style, marker="o", ms=4, color=ORANGE, label=name)
            scores = [np.nan if line["scores"][metric] is None else line["scores"][metric] for line in of_split]
            right.plot(epochs, scores, style, marker="o", ms=4, color=ORANGE, label=name)
        if of_majority is not None:
            right.axhline(of_majority, color=INK, lw=0.8, ls=":", label="majority")
        left.set(title="loss", xlabel="epoch", ylim=(0, None))
        right.set(title=metric, xlabel="epoch")
        for axes in (left, right):
            axes.legend(frameon=False)
        return figure


def draw_confusion(matrix, names):
    """Draw how often each label is predicted as each; shares of the label's row, with the counts where they fit."""
    with _style():
        counts, size = np.array(matrix), len(names)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        side = min(2.2 + 0.45 * min(size, MOST_NAMES), 11)
        figure, (axes,) = _figure(side + 1, side)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="label")
        axes.spines[:].set_visible(False)
        if size <= MOST_NAMES:
            short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
            axes.set_xticks(range(size), short, rotation=45 if size > 3 else 0, ha="right" if size > 3 else "center")
            axes.set_yticks(range(size), short)
        if size <= MOST_NUMBERS:
            for (row, column), share in np.ndenumerate(shares):
                colour = "#ffffff" if share > 0.5 else "#111111"  # the cell's own colour is under it
                axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
        return figure


def draw_reliability(calibration):
    """Draw how often a model is right against how sure it is; a dot's area is its number of examples."""
    with _style():
        figure, (axes,) = _figure(3.6, 3.4)
        bins = calibration["bins"]
        number = np.array([of_bin["examples"] for of_bin in bins])
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        x, y = ([of_bin[name] for of_bin in bins] for name in ("confidence", "accuracy"))
        axes.plot(x, y, color=BLUE, lw=1)
        axes.scatter(x, y, s=10 + 190 * number / number.max(), color=BLUE, alpha=0.8)
        lowest = min(0.5, *(of_bin["low"] for of_bin in bins))
        axes.set(xlabel="how sure", ylabel="how often right", xlim=(lowest, 1.02), ylim=(-0.02, 1.04))
        return figure


def draw_batches(scores, total):
    """Draw Matthews' correlation of each 32 examples as bars, and that of all as a line."""
    with _style():
        figure, (axes,) = _figure(8, 2.6)
        heights = [np.nan if score is None else score for score in scores]
        axes.bar(range(1, len(heights) + 1), heights, color=BLUE)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if total is not None:
            axes.axhline(total, color=ORANGE, lw=1.2, label=f"all examples: {total:.3f}")
            axes.legend(frameon=False)
        axes.set(xlabel="32 examples each", ylabel="matthews_correlation")
        return figure


def save_png(figure, path):
    with _style():
        figure.savefig(path, format="png", dpi=150, facecolor="white")


def as_svg(figure):
    """Return a figure as an SVG element that takes its colours from the page."""
    stream = io.StringIO()
    with _style():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
