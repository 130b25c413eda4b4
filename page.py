"""report.html: what is known of a run or of an evaluation, in one file that needs no other."""

import json
from pathlib import Path

import common
import plots
from cache import write_text

MOST_MISTAKES = 200  # in the page; errors.csv has all of an evaluation
KINDS = {  # of pictures: what draws one, of the entry of the same name
    "confusion": lambda task, content: plots.confusion(content["confusion"], task.labels),
    "calibration": lambda task, content: plots.reliability(content["calibration"]),
    "batches": lambda task, content: plots.batches(content["batches"], content["scores"]["matthews_correlation"]),
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
        plots.png(figure, pictures / f"{name}.png")
        return plots.svg(figure)

    first, metric = evaluations[0], task.metrics[0]
    curves = picture("curves", plots.curves(lines, metric, first["majority_baseline"][metric])) if lines else None
    for content in evaluations:
        drawn = {kind: draw(task, content) for kind, draw in KINDS.items() if kind in content}
        content["pictures"] = {kind: picture(f"{kind}-{content['split']}", figure) for kind, figure in drawn.items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": common.number_words, "value": _value}
    template = environment.get_template("report_template.html")
    epochs = [line for line in lines if line["type"] == "eval"]
    page = template.render(
        task=task, evaluations=evaluations, curves=curves, epochs=epochs, tables=tables or {}, **headline
    )
    write_text(Path(folder) / "report.html", page)


def mistakes_of(task, rows, logits, wrong, losses):
    """Return the worst mistakes as the page shows them; `wrong`: their numbers, worst first."""
    wrong, losses = wrong[:MOST_MISTAKES], losses[:MOST_MISTAKES]
    found = zip(rows.select(wrong), common.prediction_rows(task, logits[wrong]), wrong, losses, strict=True)
    return [
        {
            "example": int(number),
            "texts": [row[column] for column in task.text],
            "label": common.label_word(task, row["label"]),
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
