"""A Slurm cluster of two nodes on this machine, for tests: real daemons, in a folder that goes away."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

# No cgroups, accounting or binding to cores: none of them is needed, and containers forbid the first.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """Return why there can be no cluster here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a Slurm cluster needs root"
    # Daemons are in sbin, which is not on every PATH.
    absent = [name for name in PROGRAMS if not find(name)]
    return f"no {', '.join(absent)} here (apt-get install slurmctld slurmd slurm-client munge)" if absent else None


def find(program):
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def poll(check, seconds, failure):
    """Return what check() returns as soon as that is true; raise TimeoutError with failure() after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {failure()}")
        time.sleep(0.1)


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Cluster:
    """Nodes n1 and n2. Use as `with Cluster() as cluster:`; afterwards no process and no file of it is left."""

    def __enter__(self):
        # Not pytest's folder: the path of a socket is short, and munged is strict about who may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        # Neither another Slurm's settings, nor what a launcher of the test session has set.
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "ACCELERATE_", "TORCHELASTIC", "OMP_NUM", "MASTER_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.daemons = []
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self):
        host = socket.gethostname().partition(".")[0]
        configuration = CONFIGURATION.format(host=host, folder=self.folder, ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(configuration, encoding="utf-8")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self.daemon("munged", "--foreground", f"--key-file={key}", *options)
        poll((self.folder / "munge.socket").exists, 10, self.logs)
        self.daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.daemon("slurmd", "-D", "-N", node)
        poll(lambda: self.nodes_are_idle(), 30, self.logs)

    def daemon(self, program, *options):
        with open(self.folder / f"{program}.output", "ab") as output:
            self.daemons.append(
                subprocess.Popen(
                    [find(program), *options],
                    env=self.environment,
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )

    def nodes_are_idle(self):
        dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
        if dead:
            raise RuntimeError(f"ended at once: {dead}\n{self.logs()}")
        listed = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).stdout
        return sorted(set(listed.split("\n"))) == ["", "n1 idle", "n2 idle"]

    def __exit__(self, *_):
        # Jobs' processes are children of slurmstepd, which leaves the group of its slurmd: everything that was started
        # here is found by the variable that names this cluster, and ended by its process id.
        for ending in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 5
            while self.processes() and time.monotonic() < end:
                for process in self.processes():
                    with suppress(ProcessLookupError):
                        os.kill(process, ending)
                time.sleep(0.2)
        for daemon in self.daemons:
            daemon.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self):
        """Return the ids of the living processes that belong to this cluster."""
        mark, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
                is_zombie = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
                if not is_zombie and mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def run(self, *command, check=True, cwd=None, environment=None):
        """Run a Slurm command on this cluster; return its CompletedProcess."""
        done = subprocess.run(
            list(map(str, command)),
            env={**self.environment, **(environment or {})},
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def submit(self, *words, cwd, environment=None):
        """sbatch these words from the folder `cwd`; return the job's id."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, environment=environment)
        return int(done.stdout.split(";")[0])

    def tasks(self, job):
        """Return what `scontrol show job` says, a dictionary for each task of an array, one for another job."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line]

    def wait(self, job, check, seconds, log):
        """Wait until check(task) is true of every task of the job; return the tasks. `log` is shown where it fails."""

        def look():
            tasks = self.tasks(job)
            if all(map(check, tasks)):
                return tasks
            # What has ended will not change again: no need to wait for the time limit.
            if all(task["JobState"] in FINISHED for task in tasks):
                raise RuntimeError(f"the job has ended otherwise: {self.tell(job, log)}")
            return None

        return poll(look, seconds, lambda: self.tell(job, log))

    def start_again(self, job):
        """Start a requeued job, for which Slurm would wait two minutes."""
        # In the same second as it was stopped, slurmd refuses it ("Job credential revoked"), and the job fails.
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2seconds")

    def tell(self, job, log):
        states = [(task["JobState"], task["Restarts"], task["ExitCode"], task["Reason"]) for task in self.tasks(job)]
        words = "\n".join(path.read_text(encoding="utf-8") for path in sorted(log.parent.glob(log.name)))
        return f"{states}\n{words}\n{self.logs()}"

    def logs(self):
        """Return the ends of what the daemons have written."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{path.name}: ...{path.read_text(encoding='utf-8')[-1500:]}" for path in files)
