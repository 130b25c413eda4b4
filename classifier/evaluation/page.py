"""report.html: a run, an evaluation or a sweep as one self-contained page, with its pictures (also as PNG files)."""

import io
import json
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from classifier.data.labels import format_label, prediction_rows
from classifier.evaluation.analysis import largest_classes, most_confused
from classifier.files import safe_name, temporary_file, write_text
from classifier.messages import MOST_NAMES, escape, format_name, format_score, list_names

# ---------------------------------------------------------------------------------------------------------- the page

MOST_MISTAKES = 200  # on the page; an evaluation's errors.csv lists all
PICTURES = {  # how to draw the entry of this name in an evaluation
    "confusion": lambda task, content: draw_confusion(content["confusion"], task.labels),
    "calibration": lambda task, content: draw_calibration(content["calibration"]),
    "batches": lambda task, content: draw_batches(content["batches"], content["scores"]["matthews_correlation"]),
}


def write_page(folder, task, headline, evaluations, lines=(), tables=None):
    """Write report.html and plots/*.png of a run or an evaluation into a folder.

    headline: a dict of title, model and text; evaluations: dicts like evaluation.json, each with `mistakes`, the result
    of mistake_rows; lines: of metrics.jsonl, for a training; tables: {heading: {name: value}} for the end of the page.
    """
    plots = Path(folder) / "plots"
    plots.mkdir(exist_ok=True)

    def save(name, figure):
        save_png(figure, plots / f"{safe_name(name)}.png")
        return to_svg(figure)

    first, metric = evaluations[0], task.metrics[0]
    curves = save("curves", draw_curves(lines, metric, first["majority_baseline"][metric])) if lines else None
    for content in evaluations:
        figures = {name: draw(task, content) for name, draw in PICTURES.items() if name in content}
        content["pictures"] = {name: save(f"{name}-{content['split']}", figure) for name, figure in figures.items()}
    epochs = [line for line in lines if line["type"] == "eval"]
    write_html(
        folder,
        "report_template.html",
        task=task,
        evaluations=evaluations,
        curves=curves,
        epochs=epochs,
        tables=tables or {},
        most_in_confusion=MOST_IN_CONFUSION,
        **headline,
    )


def write_sweep_page(folder, headline, metric, settings, tables):
    """Write report.html of a sweep into a folder.

    headline: as for write_page; settings: dicts of name, values (a score of each run), mean, std, interval and
    collapsed; tables: {heading: {name: value}} for the end of the page.
    """
    figure = draw_runs(settings, metric)
    save_png(figure, Path(folder) / "runs.png")
    picture = to_svg(figure)
    write_html(
        folder, "sweep_template.html", picture=picture, metric=metric, settings=settings, tables=tables, **headline
    )


def write_html(folder, template, **values):
    """Write report.html into a folder from a template beside this file."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": format_score, "value": _format_value, "name": format_name, "names": list_names}
    environment.filters |= {"largest": largest_classes, "most_confused": most_confused}
    write_text(Path(folder) / "report.html", environment.get_template(template).render(**values))


def mistake_rows(task, rows, logits, numbers, losses):
    """Return the worst mistakes as dicts for the page. numbers, losses: of analysis.worst_mistakes."""
    numbers, losses = numbers[:MOST_MISTAKES], losses[:MOST_MISTAKES]
    mistakes = zip(rows.select(numbers), prediction_rows(task, logits[numbers]), numbers, losses, strict=True)
    return [
        {
            "example": int(number),
            "texts": [row[column] for column in task.text],
            "label": format_label(task, row["label"]),
            "prediction": prediction[0],
            "probability": None if task.is_regression else prediction[1],
            "loss": float(loss),
        }
        for row, prediction, number, loss in mistakes
    ]


def _format_value(value):
    if isinstance(value, (dict, list)):
        return json.dumps(_abridge(value), ensure_ascii=False)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else escape(str(value))


def _abridge(value):
    """Return a JSON value in which lists and mappings end after ten entries, with how many more there are."""
    if not isinstance(value, (dict, list)):
        return value
    more = [f"and {len(value) - MOST_NAMES:,} more"] if len(value) > MOST_NAMES else []
    if isinstance(value, list):
        return [*map(_abridge, value[:MOST_NAMES]), *more]
    entries = [(format_name(key), _abridge(entry)) for key, entry in list(value.items())[:MOST_NAMES]]
    return dict(entries) | dict.fromkeys(more, "")


# ------------------------------------------------------------------------------------------------------- its pictures

INK = "#1a1b1c"  # of text and axes; on the page it becomes the colour of the surrounding text
BLUE, ORANGE = "#3b7dd8", "#e07b39"  # distinguishable with any colour vision, on white and on black
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "SimHei", "PingFang SC"]
MOST_IN_CONFUSION, MOST_NUMBERS = 40, 21  # most classes that a confusion matrix shows, and with counts


@contextmanager
def _style():
    import matplotlib
    from matplotlib import font_manager

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it reports missing fonts
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(names, INK) | {
        "font.family": ["sans-serif"],
        "font.sans-serif": [name for name in FONTS if name in font_manager.get_font_names()],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same ids inside the SVG each time
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser that shows the page has fonts enough
        yield


def _new_figure(width, height, columns=1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_curves(lines, metric, majority):
    """Draw losses and the first metric over the epochs. lines: of metrics.jsonl; majority: the baseline, or None."""
    with _style():
        figure, (left, right) = _new_figure(8, 3, 2)
        steps = [line for line in lines if line["type"] == "train"]
        evaluations = [line for line in lines if line["type"] == "eval"]
        left.plot([line["epoch"] for line in steps], [line["loss"] for line in steps], color=BLUE, lw=1, label="train")
        for number, split in enumerate(dict.fromkeys(line["split"] for line in evaluations)):
            split_lines = [line for line in evaluations if line["split"] == split]
            epochs, style = [line["epoch"] for line in split_lines], ("-", "--", ":")[number % 3]
            name = "sample of train" if split == "train" else split
            left.plot(epochs, [line["loss"] for line in split_lines], style, marker="o", ms=4, color=ORANGE, label=name)
            scores = [np.nan if line["scores"][metric] is None else line["scores"][metric] for line in split_lines]
            right.plot(epochs, scores, style, marker="o", ms=4, color=ORANGE, label=name)
        if majority is not None:
            right.axhline(majority, color=INK, lw=0.8, ls=":", label="majority")
        left.set(title="loss", xlabel="epoch", ylim=(0, None))
        right.set(title=metric, xlabel="epoch")
        for axes in (left, right):
            axes.legend(frameon=False)
        return figure


def draw_confusion(matrix, names):
    """Draw how often each label is predicted as each: fractions of the label's row, with the counts where they fit.

    Of many labels, the 20 with most errors have a row and a column each, and all others share one.
    """
    matrix, names = _abridge_confusion(matrix, names)
    with _style():
        counts, size = np.array(matrix), len(names)
        fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        side = min(2.2 + 0.45 * size, 11)
        figure, (axes,) = _new_figure(side + 1, side)
        axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="label")
        axes.spines[:].set_visible(False)
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in map(escape, names)]
        rotation, place = (45, "right") if size > 3 else (0, "center")
        axes.set_xticks(range(size), short, rotation=rotation, ha=place, parse_math=False)  # "$5" is no formula
        axes.set_yticks(range(size), short, parse_math=False)
        if size <= MOST_NUMBERS:
            for (row, column), fraction in np.ndenumerate(fractions):
                colour = "#ffffff" if fraction > 0.5 else "#111111"  # not the page's: the cell is the background
                axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
        return figure


def _abridge_confusion(matrix, names):
    """Return (matrix, names): of more than 40 classes the 20 with most errors, in order, and the sum of the others."""
    if len(names) <= MOST_IN_CONFUSION:
        return matrix, names
    counts, number = np.array(matrix), MOST_NUMBERS - 1
    errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[:number])
    groups = np.full(len(names), number)  # the row that each class is counted in
    groups[shown] = range(number)
    sums = np.zeros((number + 1, number + 1), dtype=counts.dtype)
    np.add.at(sums, (groups[:, None], groups), counts)
    return sums, [*(names[position] for position in shown), f"{len(names) - number:,} others"]


def draw_calibration(calibration):
    """Draw accuracy with its 95 % intervals against confidence; the area of a dot is its number of examples."""
    with _style():
        figure, (axes,) = _new_figure(3.6, 3.4)
        bins = calibration["bins"]
        examples, confidence, accuracy, low = (
            np.array([row[name] for row in bins]) for name in ("examples", "confidence", "accuracy", "low")
        )
        axes.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=":")
        axes.plot(confidence, accuracy, color=BLUE, lw=1)
        axes.vlines(confidence, *np.transpose([row["interval"] for row in bins]), color=BLUE, lw=1, alpha=0.5)
        axes.scatter(confidence, accuracy, s=10 + 190 * examples / examples.max(), color=BLUE, alpha=0.8)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(min(0.5, low.min()), 1.02), ylim=(-0.02, 1.04))
        return figure


def draw_batches(scores, total):
    """Draw Matthews' correlation of every 32 examples as bars, and that of all examples as a line."""
    with _style():
        figure, (axes,) = _new_figure(8, 2.6)
        heights = [np.nan if score is None else score for score in scores]
        axes.bar(range(1, len(heights) + 1), heights, color=BLUE)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if total is not None:
            axes.axhline(total, color=ORANGE, lw=1.2, label=f"all examples: {total:.3f}")
            axes.legend(frameon=False)
        axes.set(xlabel="batches of 32 examples", ylabel="matthews_correlation")
        return figure


def draw_runs(settings, metric):
    """Draw the score of each run as a dot, and the mean of each setting with its 95 % interval as a line."""
    with _style():
        figure, (axes,) = _new_figure(8, 1.2 + 0.4 * len(settings))
        for place, setting in enumerate(settings):
            values = setting["values"]
            axes.scatter(values, [place] * len(values), s=28, color=BLUE, alpha=0.6, zorder=2)
            if setting["interval"]:
                axes.hlines(place, *setting["interval"], color=ORANGE, lw=2, zorder=1)
            if setting["mean"] is not None:
                axes.plot(setting["mean"], place, "|", color=ORANGE, ms=14, mew=2, zorder=3)
        axes.set_yticks(range(len(settings)), [setting["name"] for setting in settings], parse_math=False)
        axes.set(xlabel=metric, ylim=(len(settings) - 0.5, -0.5))
        return figure


def save_png(figure, path):
    with _style(), temporary_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor="white")


def to_svg(figure):
    """Return a figure as an SVG element that takes its colours from the page."""
    stream = io.StringIO()
    with _style():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
