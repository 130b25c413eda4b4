"""The table of published results and ours, from what `sweep.py --check TASK` wrote; what was not run says so.

python benchmarks/checked.py runs/*
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from classifier.evaluation.spread import PUBLISHED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", type=Path, help="folders of sweep.py --check")
    args = parser.parse_args()
    checks = {}
    for folder in args.sweeps:
        if (folder / "results.json").is_file():
            content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            if "check" in content:
                checks[content["task"]] = content
    print("| task | metric | published | ours | 95 % interval of the difference | |\n|---|---|---|---|---|---|")
    for name, expected in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        cells = [name, expected["metric"], f"{expected['value']:.4f}", "not yet run", "", ""]
        if name in checks:
            check, scores = checks[name]["check"], checks[name]["settings"][0]["scores"][expected["metric"]]
            low, high = check["interval"]
            cells[3:] = [f"{check['ours']:.4f} ± {scores['std']:.4f}", f"{low:+.4f} to {high:+.4f}", check["verdict"]]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
