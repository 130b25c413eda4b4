"""Plot how many times faster ours is, from the files that train_speed.py and predict_speed.py write.

python benchmarks/plot.py train_speed.json predict_speed.json --output docs/pictures/speed.png
"""

import argparse
import json
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bars = []
    for file in args.files:
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            if row["base"] and row["name"] != "ours_fp32":  # ours against ours belongs in the tables
                work = f"predicting, {row['data']}" if "data" in row else "training"
                bars.append((row["ratio"], f"{work}: {row['words']}"))
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(bars)), facecolor="white")
    ratios, titles = zip(*reversed(bars), strict=True)
    rectangles = axes.barh(titles, ratios, color="#4477aa", height=0.65)
    axes.bar_label(rectangles, [f"{ratio:.1f} x" for ratio in ratios], padding=4)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xlim(0, max(1, *ratios) * 1.12)
    axes.set_xlabel("how many times faster ours is (examples per second); the line: equally fast")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(args.output, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
