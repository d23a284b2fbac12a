"""A real Slurm cluster on this one machine: munged, slurmctld and two slurmd from the distribution's packages.

Where the kernel allows it every node is a set of namespaces with its own host name, address, localhost, process ids and
/dev/shm, joined by a bridge: what hangs there would hang on a cluster. Elsewhere the nodes are several slurmd of this
host on different ports. Needs root; uses neither systemd nor cgroups, and ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
UNSHARE = ("unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")

# What a node does first. $1 name, $2 address, $3 hosts file, then the command. bash stays as init and reaps orphans.
NODE = """set -e
hostname "$1"; mount -t tmpfs tmpfs /dev/shm; ip link set lo up
mount --bind "$3" /etc/hosts; mount --bind /dev/null /etc/resolv.conf  # no name server: a look-up would wait for it
for _ in $(seq 1000); do ip link set eth0 up 2>/dev/null && break; sleep 0.01; done
ip addr add "$2/24" dev eth0
shift 3; "$@" & wait"""


def missing() -> str:
    """Why a cluster cannot come up here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]:
        return f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2 util-linux)"
    return ""


class Cluster:
    """Nodes node1, node2, ... with `gpus` pretended GPUs each; a context manager."""

    def __init__(self, nodes: int = 2, gpus: int = 8) -> None:
        self.folder = folder = Path(tempfile.mkdtemp(prefix="moue-slurm-"))
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.gpus = gpus
        allowed = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
        self.separate = allowed and shutil.which("ip", path=SEARCH) is not None
        self._subnet = f"198.18.{os.getpid() % 250}"
        self._bridge = f"moue{os.getpid() % 250}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        if not self.separate:
            self.environment["MASTER_ADDR"] = "127.0.0.1"  # the nodes' names do not resolve

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            if self.separate:
                self._ip(f"link del {self._bridge}", check=False)  # of a test process that was killed
                self._ip(f"link add name {self._bridge} type bridge")
                self._ip(f"addr add {self._subnet}.1/24 dev {self._bridge}")
                self._ip(f"link set {self._bridge} up")
            files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
            self._start("munged", ["munged", "-F", f"--socket={self.folder}/munge.sock", *files])
            self._start("slurmctld", ["slurmctld", "-D"])
            for number, node in enumerate(self.nodes, 1):
                self._start_node(number, node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            if jobs := self.call("squeue", "-h", "-o", "%A", check=False).split():
                self.call("scancel", *jobs, check=False)
                time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        if self.separate:
            self._ip(f"link del {self._bridge}", check=False)
        self._daemons = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Runs one of Slurm's commands; its output, errors included."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path) -> str:
        """sbatch; the job's number."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait(self, job: str, timeout: float) -> str:
        """The job's last state, once it is over; TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is still {state} after {timeout:g} s")
            time.sleep(0.3)
        return state

    def _configure(self) -> None:
        host, port = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        folder = self.folder
        for name in ("state", "log", "dev", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        address = [f"{self._subnet}.{11 + i}" if self.separate else "127.0.0.1" for i in range(len(self.nodes))]
        controller = f"{self._subnet}.1" if self.separate else "127.0.0.1"
        lines = [
            "ClusterName=moue",
            f"SlurmctldHost={host}({controller})",
            f"SlurmctldPort={port[0]}",
            "SlurmUser=root",
            f"AuthInfo=socket={folder}/munge.sock,cred_expire=5",  # a requeued job waits that long, else 120 s
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
            "SlurmdParameters=config_overrides",  # nodes have the cores and memory written here
            "PropagateResourceLimits=NONE",
            "GresTypes=gpu",
            "MailProg=/bin/true",
            "ReturnToService=2",
            "KillWait=5",
            "MinJobAge=3600",
        ]
        for node, where, own in zip(self.nodes, address, port[1:], strict=True):
            there = "" if self.separate else f"NodeHostname={host} Port={own} "
            shape = f"Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:{self.gpus}"
            lines.append(f"NodeName={node} NodeAddr={where} {there}{shape}")
        lines.append("PartitionName=debug Nodes=ALL Default=YES")
        for gpu in range(self.gpus):
            (folder / f"dev/nvidia{gpu}").symlink_to("/dev/null")  # Slurm counts files
        names = "".join(f"{where} {node}\n" for node, where in zip(self.nodes, address, strict=True))
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{self.gpus - 1}]\n")
        version = re.findall(r"\d+", self.call("slurmctld", "-V"))
        if (int(version[0]), int(version[1])) >= (23, 11):  # older ones need no word, and do not know this one
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{controller} {host}\n{names}")
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(os.urandom(64))

    def _start(self, name: str, command: list[str]) -> int:
        """A daemon that dies with this process; its output goes to log/NAME. Returns the process id."""
        with (self.folder / f"log/{name}").open("ab") as log:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command], env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._daemons.append(daemon)
        return daemon.pid

    def _start_node(self, number: int, node: str) -> None:
        slurmd = ["slurmd", "-D", "-N", node]
        if not self.separate:
            self._start(node, slurmd)
            return
        address = f"{self._subnet}.{10 + number}"
        pid = self._start(node, [*UNSHARE, "bash", "-c", NODE, "node", node, address, f"{self.folder}/hosts", *slurmd])
        end, ours = time.monotonic() + 10, os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{pid}/ns/net") == ours:
            if time.monotonic() > end:
                raise TimeoutError(f"{node} got no namespace: see {self.folder}/log")
            time.sleep(0.01)
        self._ip(f"link add {self._bridge}.{number} master {self._bridge} up type veth peer name eth0 netns {pid}")

    def _wait_for_nodes(self) -> None:
        end = time.monotonic() + 30
        while self.call("sinfo", "-h", "-N", "-o", "%t", check=False).split() != ["idle"] * len(self.nodes):
            if time.monotonic() > end:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("log/*")))
                raise TimeoutError(f"the nodes are not up after 30 s\n{self.call('sinfo', '-N', check=False)}{logs}")
            time.sleep(0.1)

    def _ip(self, arguments: str, check: bool = True) -> None:
        subprocess.run(["ip", *arguments.split()], env=self.environment, check=check, capture_output=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
