"""The job scripts on a real Slurm of two nodes: stopped in the middle, they resume, and end as if they had not been."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import slurm_cluster
from conftest import ROOT, lines_of, make_rows, run_script, write_table
from model_help import save_model
from test_preemption import ended, start, start_2

from classifier.data.tasks import Task

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 45, 45 * 13  # 200 rows in batches of 16; long enough to be hit in the middle
FLAGS = ["--epochs", EPOCHS, "--eval_every", 200, "--log_every", 1, "--threads", 1]
SECONDS = 90  # for anything that takes a few where nothing else runs


@pytest.fixture(scope="module")
def cluster():
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.Cluster() as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, review_task):
    """A function that submits train.sbatch from a folder with train.py and returns (id of the job, its log)."""
    folder = review_task.parent
    (folder / "train.py").symlink_to(ROOT / "train.py")
    environment = {"MASTER_ADDR": "127.0.0.1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def submit(*flags, options=(), **more):
        arguments = ["--cpus-per-task=1", *options, ROOT / "slurm/train.sbatch", "--task", review_task, *FLAGS, *flags]
        job = cluster.submit(*arguments, cwd=folder, environment={**environment, **more})
        return job, folder / f"slurm-{job}{'_*' if 'array' in str(options) else ''}.out"

    return submit


def interrupt(cluster, job, log, run, after=30):
    """Send the signal of the time limit once the run has done so many steps; have it requeued and started again."""
    metrics = run / "metrics.jsonl"

    def has_begun(_):
        return metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > after

    cluster.wait(job, has_begun, SECONDS, log)
    # What --signal=B:USR1@120 does; but that may come a minute early.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, lambda task: (task["JobState"], task["Restarts"]) == ("PENDING", "1"), SECONDS, log)
    assert state(run)["status"] == "preempted"
    # The checkpoint of an evaluation would do as well, but the last one is the signal's.
    last = max(path.parent.name for path in (run / "checkpoints").glob("step-*/manifest.json"))
    step = int(last.removeprefix("step-"))
    assert after < step < STEPS and step % 200
    cluster.start_again(job)
    return last


def complete(cluster, job, log):
    return cluster.wait(job, lambda task: task["JobState"] == "COMPLETED", SECONDS, log)


def state(run):
    return json.loads((run / "state.json").read_text(encoding="utf-8"))


def assert_same(run, whole):
    """Two runs have the same losses and weights, to the last bit, at every step."""
    losses = [[(line["step"], line["loss"].hex()) for line in lines_of(folder)] for folder in (run, whole)]
    assert len(losses[1]) == STEPS
    assert losses[0] == losses[1]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("nodes", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_job_that_is_stopped_in_the_middle_ends_as_if_it_had_not_been(cluster, submit, review_task, nodes):
    folder = review_task.parent
    job, log = submit("--output_dir", "run", options=[f"--nodes={nodes}"])
    last = interrupt(cluster, job, log, folder / "run")
    complete(cluster, job, log)
    words = log.read_text(encoding="utf-8")
    assert re.search(rf"resuming after step \d+: run/checkpoints/{last}\n", words), words
    assert state(folder / "run")["status"] == "done"
    assert json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))["num_processes"] == nodes

    start_all = start_2 if nodes == 2 else lambda *arguments: [start(*arguments)]
    for process in start_all(folder, "--task", review_task, *FLAGS, "--output_dir", "whole"):
        code, _, errors = ended(process, SECONDS)
        assert code == 0, errors
    assert_same(folder / "run", folder / "whole")


def test_two_nodes_are_both_used(cluster, submit, review_task):
    folder = review_task.parent
    (folder / "train.py").unlink()
    names = "SLURMD_NODENAME RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS".split()
    (folder / "train.py").write_text(f"import os\nprint(*map(os.environ.get, {names}), flush=True)\n", encoding="utf-8")
    job, log = submit(options=["--nodes=2"])
    complete(cluster, job, log)
    lines = sorted(log.read_text(encoding="utf-8").splitlines())
    assert lines == ["n1 0 2 0 1 127.0.0.1 1", "n2 1 2 0 1 127.0.0.1 1"]


def test_an_array_trains_once_for_each_seed_and_its_tasks_are_stopped_one_by_one(cluster, submit, review_task):
    folder = review_task.parent
    # The Python of .venv comes before that of PATH.
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n", encoding="utf-8")
    job, log = submit(options=["--array=1-2"], PATH="/usr/bin:/bin")
    runs = [folder / "runs" / f"reviews,epochs={EPOCHS}.0,seed={seed},eval_every=200" for seed in (1, 2)]
    interrupt(cluster, f"{job}_2", log, runs[1])
    tasks = complete(cluster, job, log)
    assert sorted(task["Restarts"] for task in tasks) == ["0", "1"]
    assert sorted((folder / "runs").iterdir()) == runs
    for run, seed in zip(runs, (1, 2), strict=True):
        assert state(run)["status"] == "done"
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        assert (results["seed"], results["steps"]) == (seed, STEPS)

    job, log = submit(options=["--array=1"])
    complete(cluster, job, log)
    assert "already complete" in (folder / f"slurm-{job}_1.out").read_text(encoding="utf-8")


# Ends as a test tells it to; where that is by a signal, it takes a moment to save. Two signals may come at once.
STAND_IN = """
import os, signal, sys, time
def stop(number, _):
    time.sleep(0.3)
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, {usr1})
print("start", flush=True)
if {code} is None:
    time.sleep(60)
sys.exit({code})
"""


@pytest.mark.parametrize("option", ["--nodes=1", "--nodes=2", "--array=1"])
@pytest.mark.parametrize(
    ("code", "usr1", "send", "end", "exit_code", "saves"),
    [
        ("2", "stop", None, "FAILED", "2:0", False),
        # A cancelled job saves, but does not come back.
        ("None", "stop", ["scancel"], "CANCELLED", "75:0", True),
        # As in a preemption's time of grace: the tasks are told, the script is not.
        ("None", "stop", ["scancel", "--signal=TERM"], "PENDING", "0:0", True),
        # The signal comes before Python listens to it.
        ("None", "signal.SIG_DFL", ["scancel", "--batch", "--signal=USR1"], "PENDING", "0:0", False),
    ],
    ids=["fails", "cancelled", "tasks-stopped", "stopped-early"],
)
def test_only_what_was_stopped_comes_back(
    cluster, submit, review_task, option, code, usr1, send, end, exit_code, saves
):
    folder = review_task.parent
    (folder / "train.py").unlink()
    (folder / "train.py").write_text(STAND_IN.format(code=code, usr1=usr1), encoding="utf-8")
    processes = 2 if option == "--nodes=2" else 1
    job, log = submit(options=[option])

    def words():
        return "".join(path.read_text(encoding="utf-8") for path in folder.glob(log.name))

    if send:
        slurm_cluster.poll(lambda: words().count("start\n") == processes, SECONDS, lambda: cluster.tell(job, log))
        cluster.run(*send, job)
    try:
        (task,) = cluster.wait(job, lambda task: task["JobState"] == end, SECONDS, log)
        assert task["ExitCode"] == exit_code
        assert int(task["Restarts"]) == (end == "PENDING")
        assert words().count("saved\n") == processes * saves
    finally:
        if end == "PENDING":
            cluster.run("scancel", job)


def test_a_job_does_not_come_back_for_ever(cluster, submit, review_task):
    folder = review_task.parent
    (folder / "train.py").unlink()
    (folder / "train.py").write_text("import sys\nsys.exit(75)\n", encoding="utf-8")
    job, log = submit(MAX_RESTARTS="1")
    cluster.wait(job, lambda task: (task["JobState"], task["Restarts"]) == ("PENDING", "1"), SECONDS, log)
    cluster.start_again(job)
    (task,) = cluster.wait(job, lambda task: task["JobState"] == "FAILED", SECONDS, log)
    assert (task["Restarts"], task["ExitCode"]) == ("1", "75:0")


# ---------------------------------------------------------------------------------------------------- predictions


@pytest.fixture
def predict(cluster, tmp_path):
    """A function that submits predict.sbatch from tmp_path and returns (id of the job, its log)."""
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def submit(array, *words):
        words = ["--cpus-per-task=1", f"--array={array}", ROOT / "slurm" / "predict.sbatch", *words]
        job = cluster.submit(*words, cwd=tmp_path, environment=environment)
        return job, tmp_path / f"slurm-{job}_*.out"

    return submit


def test_an_array_predicts_every_file_once(cluster, predict, tiny_bert, tmp_path):
    save_model(tmp_path / "model", tiny_bert, Task("", text=["text"], labels=["negative", "positive"], max_length=32))
    (tmp_path / "in").mkdir()
    for number in range(7):
        write_table(tmp_path / "in" / f"{number}.csv", make_rows(20, number))
    (tmp_path / "predict.py").symlink_to(ROOT / "predict.py")
    words = ["--model", "model", "--input", "in/*.csv", "--mixed_precision", "no", "--threads", 1, "--output"]
    job, log = predict("1-3", *words, "out")
    tasks = complete(cluster, job, log)
    assert len(tasks) == 3
    done = run_script("predict.py", *words, "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.csv")}
    assert outputs == {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.csv")}
    assert sorted(outputs) == [f"{number}.csv" for number in range(7)]
    manifests = sorted(tmp_path.glob("out/manifest-*.json"))
    names = [name for manifest in manifests for name in json.loads(manifest.read_text(encoding="utf-8"))]
    assert len(manifests) == 3 and sorted(names) == sorted(outputs)


def test_a_prediction_that_is_stopped_comes_back(cluster, predict, tmp_path):
    program = "import os, sys, time\nprint(*sys.argv[1:], flush=True)\n"
    program += "time.sleep(0 if os.environ.get('SLURM_RESTART_COUNT') else 60)\n"
    (tmp_path / "predict.py").write_text(program, encoding="utf-8")
    job, log = predict("1", "--model", "a b")
    file = tmp_path / f"slurm-{job}_1.out"
    slurm_cluster.poll(lambda: file.exists() and file.read_text(), SECONDS, lambda: cluster.tell(job, log))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait(job, lambda task: (task["JobState"], task["Restarts"]) == ("PENDING", "1"), SECONDS, log)
    cluster.start_again(f"{job}_1")
    complete(cluster, job, log)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("--model")] == ["--model a b --shard 1/1"] * 2
    assert f"job {job}_1 was stopped (exit code 138): back into the queue" in lines
