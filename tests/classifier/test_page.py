"""report.html as a browser shows it: nothing is loaded, no error, text is text, the search works."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from datasets import Dataset

import common
from classifier.data.labels import majority_prediction
from classifier.data.tasks import Task
from classifier.evaluation import analysis, intervals, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SCRIPT = '<script>document.title = "run"; throw new Error("run")</script>'
HOSTILE = f'{SCRIPT} <img src="x" onerror="throw 1"> {{{{ 7 * 7 }}}} & "quoted"'


def write_page(folder, texts, labels, task, seed=0, lines=(), **more):
    """Write the page of a made-up evaluation of these texts, in which about half are wrong."""
    generator = np.random.default_rng(seed)
    outputs = 1 if task.is_regression else len(task.labels)
    logits = generator.normal(size=(len(texts), outputs)).astype(np.float32)
    labels = np.asarray(labels)
    result = common.score_logits(task, logits, labels, majority_prediction(task, labels))
    rows = Dataset.from_dict({"text": texts, "label": labels.tolist()})
    lengths = np.array([len(text.split()) for text in texts])
    content = {
        "split": "validation",
        "examples": len(texts),
        "scores": result["scores"],
        "intervals": intervals.score_intervals(task.metrics, result["predictions"], labels),
        "no_interval": intervals.missing_intervals(task.metrics, result["predictions"], labels),
        "majority_baseline": result["majority"],
        **analysis.analyse(task, result, lengths, {}),
        "mistakes": page.mistake_rows(task, rows, logits, *analysis.worst_mistakes(result)),
        **more,
    }
    page.write_page(folder, task, {"title": task.name, "model": "a model", "text": ""}, [content], lines)
    return (folder / "report.html").read_text(encoding="utf-8"), content


TWO = Task("two", text=["text"], labels=["no", "yes"], metrics=["accuracy", "matthews_correlation"])


def test_texts_are_shown_and_not_run(tmp_path):
    html, content = write_page(tmp_path, [HOSTILE] * 20, [0, 1] * 10, TWO, warning=HOSTILE)
    assert html.count("<script>") == 1 and "onerror=" not in re.sub(r"&lt;.*?&gt;", "", html)
    assert "{{ 7 * 7 }}" in html and "&lt;script&gt;" in html
    assert len(content["mistakes"]) > 0


def test_the_page_needs_no_other_file(tmp_path):
    html, _ = write_page(tmp_path, ["a text"] * 20, [0, 1] * 10, TWO)
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', html)
    assert all(link.startswith("data:") for link in links), links
    assert "@import" not in html and "url(http" not in html


def test_pictures_and_numbers(tmp_path):
    lines = [{"type": "train", "epoch": 0.5, "loss": 0.7}]
    numbers = {"epoch": 1.0, "step": 10, "loss": 0.6, "train_loss": 0.65, "scores": dict.fromkeys(TWO.metrics, 0.5)}
    lines.append({"type": "eval", "split": "validation", **numbers})
    html, content = write_page(tmp_path, ["a text"] * 40, [0, 1] * 20, TWO, lines=lines)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"{name}.png" for name in ("curves", *(f"{kind}-validation" for kind in page.PICTURES))}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert html.count("<svg") == 4
    low, high = content["intervals"]["accuracy"]
    assert f"95 % interval: {low:.4f} to {high:.4f}" in html and f"<b>{content['scores']['accuracy']:.4f}</b>" in html


def test_hundreds_of_classes_stay_readable(tmp_path):
    names = ["line\nbreak", "pipe|", "$5 and $6", "x" * 300, "<b>", *(f"class {number}" for number in range(295))]
    many = Task("many", text=["text"], labels=names, metrics=["accuracy"])
    labels = [*([5] * 30), *([299] * 20), *range(300)]
    html, content = write_page(tmp_path, ["a text"] * 350, labels, many)
    table = html.partition("Scores by class")[2].partition("</table>")[0]
    assert table.count("<tr>") == 1 + 20 and "and 280 more with fewer examples" in html
    assert table.index("class 0<") < table.index("class 294<") < table.index("line\\nbreak<") < table.index("$5 and $6")
    assert "x" * 38 not in table and "<b>" not in table
    confused = html.partition("Most confused")[2].partition("</table>")[0]
    assert confused.count("<tr>") == 1 + 10
    never = html.partition("Never predicted: ")[2].partition("</p>")[0]
    assert never.endswith(f" and {len(content['never_predicted']) - 10} more")
    printed = analysis.format_evaluation({**content, "bad_rows": 0, "loss": 1.0, "baselines": {}})
    assert all(len(line) < 500 for line in printed.splitlines())
    assert "and 280 more with fewer examples, in evaluation.json" in printed


def test_the_matrix_of_many_classes_has_a_row_for_the_others():
    counts = np.arange(50 * 50).reshape(50, 50)
    sums, names = page._abridge_confusion(counts.tolist(), [f"class {number}" for number in range(50)])
    assert names == [*(f"class {number}" for number in range(30, 50)), "30 others"]  # the larger numbers err more
    assert (sums[:20, :20] == counts[30:, 30:]).all() and sums[20, 20] == counts[:30, :30].sum()
    assert (sums[:20, 20] == counts[30:, :30].sum(axis=1)).all() and sums.sum() == counts.sum()
    few = [[1, 2], [3, 4]], ["a", "b"]
    assert page._abridge_confusion(*few) == few


def test_facts_of_many_classes_do_not_fill_the_page():
    counts = {f"class {number}": number for number in range(300)}
    shown = json.loads(page._format_value({"splits": {"train": {"labels": counts}}, "few": [1, 2]}))
    labels = shown["splits"]["train"]["labels"]
    assert list(labels)[9:] == ["class 9", "and 290 more"] and shown["few"] == [1, 2]
    assert len(counts) == 300


def test_the_commonest_confusions_come_first():
    matrix = [[9, 2, 0], [5, 9, 0], [0, 0, 9]]
    assert analysis.most_confused(matrix, ["a", "b", "c"]) == [("b", "a", 5), ("a", "b", 2)]


def test_all_kinds_of_tasks_have_a_page(tmp_path):
    generator = np.random.default_rng(0)
    texts = [f"text {number}" for number in range(60)]
    tasks = [
        (Task("r", text=["text"], labels="regression", metrics=["pearson"]), generator.normal(size=60)),
        (Task("m", text=["text"], labels=["x", "y", "z"], problem="multi_label", metrics=["f1_micro"]), None),
        (Task("many", text=["text"], labels=[f"l{n}" for n in range(60)], metrics=["f1_macro"]), np.arange(60)),
    ]
    for task, labels in tasks:
        labels = generator.integers(0, 2, (60, 3)) if labels is None else labels
        html, _ = write_page(tmp_path, texts, labels, task)
        assert "mistakes-1" in html


# ---------------------------------------------------------------------------------------------------- a real browser

DRIVER = """
import json, sys
from selenium import webdriver
from selenium.webdriver.common.by import By

options = webdriver.ChromeOptions()
options.binary_location = sys.argv[2]
for flag in sys.argv[4:]:
    options.add_argument(flag)
options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
driver = webdriver.Chrome(options, webdriver.ChromeService(sys.argv[3]))
driver.get("file://" + sys.argv[1])
rows = driver.find_elements(By.CSS_SELECTOR, "#mistakes-1 tbody tr")
count = lambda: sum(row.is_displayed() for row in rows)
before = count()
driver.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys("NEEDLE hay")
seen = {"title": driver.title, "before": before, "after": count()}
seen["shown"] = driver.find_element(By.ID, "mistakes-1-count").text
seen["cell"] = next(row for row in rows if row.is_displayed()).find_element(By.CSS_SELECTOR, ".text").text
seen["window"] = driver.execute_script("return window.innerWidth")
seen["wider"] = driver.execute_script("return document.documentElement.scrollWidth > window.innerWidth")
seen["pictures"] = [picture.size["width"] for picture in driver.find_elements(By.CSS_SELECTOR, "svg")]
seen["log"] = driver.get_log("browser")
print(json.dumps(seen))
driver.quit()
"""


@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="needs Chromium and its chromedriver")
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(tmp_path, width):
    texts = [f"{HOSTILE} hay {'needle ' if number < 10 else ''}{number}" for number in range(39)] + ["很好 " * 1250]
    _, content = write_page(tmp_path, texts, [0, 1] * 20, TWO)
    wrong = [row["texts"][0] for row in content["mistakes"]]
    flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command = [sys.executable, "-P", "-c", DRIVER, tmp_path / "report.html", CHROMIUM, shutil.which("chromedriver")]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["title"] == "two" and seen["log"] == []  # no script of a text has run
    matching = sum("needle" in text for text in wrong)
    assert 0 < matching < len(wrong)
    assert (seen["before"], seen["after"]) == (len(wrong), matching)
    assert seen["shown"] == f"{matching} of {len(wrong)}"
    assert SCRIPT in seen["cell"]
    assert not seen["wider"] and all(0 < of <= seen["window"] for of in seen["pictures"]), seen
