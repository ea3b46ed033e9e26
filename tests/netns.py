"""Several hosts on one machine: network namespaces with an address and a name each, on one bridge.

    python tests/netns.py --hosts 2 --rate 100mbit -- torchrun --nnodes 2 ... script.py

runs the command on every host at once, with ``HOST_RANK`` and ``NUM_HOSTS`` set; the hosts are called
host0, host1 and on, and know each other by these names. Needs root, iproute2 and Linux network
namespaces. What it makes carries the process id in its name and is gone at the end, however that comes
(only SIGKILL leaves namespaces behind: ``ip netns del`` them).
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, NoReturn

_SUBNET = "10.77.0"  # seen by nobody outside the namespaces
_SWITCH = "switch"
_numbers = itertools.count()  # several sets of hosts may stand side by side


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"needs the command {tool}"
    probe = f"nvrar{os.getpid()}-probe"
    inside = f"ip netns exec {probe}"
    try:
        for command in (
            f"ip netns add {probe}",
            f"{inside} ip link add br0 type bridge",
            f"{inside} ip link add eth0 type veth peer name far",
            f"{inside} tc qdisc add dev eth0 root tbf rate 1mbit burst 10kb latency 10ms",
            f"{inside} unshare --uts hostname probe",
        ):
            _call(command.split())
    except RuntimeError as error:
        return str(error)
    finally:
        _call(["ip", "netns", "del", probe], may_fail=True)
    return ""


class Hosts:
    """``num_hosts`` namespaces on one bridge; a context manager. ``rate``, in tc's words, limits what each
    host sends and what it is sent."""

    def __init__(self, num_hosts: int, rate: str | None = None) -> None:
        self.names = [f"host{i}" for i in range(num_hosts)]
        self.addresses = [f"{_SUBNET}.{i + 1}" for i in range(num_hosts)]
        self._rate = rate
        self._prefix = f"nvrar{os.getpid()}-{next(_numbers)}"
        self._stack = ExitStack()
        self._processes: list[subprocess.Popen[str]] = []
        self._directory = ""

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def namespace(self, name: str) -> str:
        """The namespace of that host, unique to this process and object."""
        return f"{self._prefix}-{name}"

    def start(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
    ) -> subprocess.Popen[str]:
        """``command`` on that host, errors and all to ``output`` (None: where ours go)."""
        # In the private mount namespace that `ip netns exec` makes, so that nobody else sees the files.
        # Without the second mount every unknown name waits for a name server out of reach.
        prepare = (
            'hostname "$0" && mount --bind "$HOSTS_FILE" /etc/hosts && '
            '{ test ! -e /etc/resolv.conf || mount --bind /dev/null /etc/resolv.conf; } && exec "$@"'
        )
        enter = ["ip", "netns", "exec", self.namespace(self.names[host]), "unshare", "--uts"]
        process = subprocess.Popen(
            [*enter, "sh", "-c", prepare, self.names[host], *command],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "HOSTS_FILE": f"{self._directory}/hosts",
                "HOST_RANK": str(host),
                "NUM_HOSTS": str(len(self.names)),
                **(env or {}),
            },
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def run(
        self,
        commands: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> list[str]:
        """The output of one command on each host, started together.

        Raises:
            RuntimeError: one of them failed or took too long; with what all of them said.
        """
        paths = [Path(self._directory, f"{name}.log") for name in self.names[: len(commands)]]
        with ExitStack() as files:
            started = [
                self.start(host, command, env, files.enter_context(path.open("w")))
                for host, (command, path) in enumerate(zip(commands, paths, strict=True))
            ]
            deadline = time.monotonic() + timeout_s
            while any(process.poll() is None for process in started):
                if time.monotonic() > deadline or any(process.returncode for process in started):
                    self._end_processes()  # the others would only wait for the one that failed
                time.sleep(0.05)
        outputs = [path.read_text() for path in paths]
        codes = [process.returncode for process in started]
        if any(codes):
            said = "\n".join(
                f"--- {name} (exit code {code})\n{output}"
                for name, code, output in zip(self.names, codes, outputs, strict=False)
            )
            raise RuntimeError(f"a host failed, or did not end within {timeout_s:g} s\n{said}")
        return outputs

    # -- building and taking down ------------------------------------------------------------------

    def _build(self) -> None:
        self._directory = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="nvrar-hosts-")
        )
        entries = zip(["127.0.0.1", *self.addresses], ["localhost", *self.names], strict=True)
        # c10d looks its peers up by the second form; without it each look-up fails and says so.
        text = "".join(f"{ip} {name}\n::ffff:{ip} {name}\n" for ip, name in entries)
        Path(self._directory, "hosts").write_text(text)
        self._namespace(_SWITCH)
        self._in(_SWITCH, "ip link add br0 type bridge")
        self._in(_SWITCH, "ip link set br0 up")
        for name, address in zip(self.names, self.addresses, strict=True):
            self._namespace(name)
            self._in(name, "ip link set lo up")
            far_end = f"ip link add eth0 type veth peer name {name} netns {self.namespace(_SWITCH)}"
            self._in(name, far_end)
            self._in(name, f"ip address add {address}/24 dev eth0")
            self._in(name, "ip link set eth0 up")
            self._in(_SWITCH, f"ip link set {name} master br0 up")
            if self._rate is not None:
                # A bucket large enough for the segments of 64 KiB that the kernel hands down whole.
                limit = f"root tbf rate {self._rate} burst 128kb latency 200ms"
                self._in(name, f"tc qdisc add dev eth0 {limit}")
                self._in(_SWITCH, f"tc qdisc add dev {name} {limit}")

    def _namespace(self, name: str) -> None:
        full = self.namespace(name)
        self._stack.callback(_call, ["ip", "netns", "del", full], may_fail=True)
        _call(["ip", "netns", "add", full])
        # Last in, first out: before any namespace goes, all processes in it must have gone.
        self._stack.callback(self._end_processes)

    def _in(self, name: str, command: str) -> None:
        _call(["ip", "netns", "exec", self.namespace(name), *command.split()])

    def _end_processes(self) -> None:
        """Everything in the namespaces: torchrun first, by SIGTERM, so that it ends its workers itself."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(p.poll() is None for p in self._processes):
            time.sleep(0.05)
        for name in self.names:
            listing = subprocess.run(
                ["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True
            )
            for pid in map(int, listing.stdout.split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _call(command: Sequence[str], may_fail: bool = False) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _leave(number: int, frame: object) -> NoReturn:
    """Ends this process in the ordinary way, so that everything is taken down, and that undisturbed."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a command on several hosts made here.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rate", help="of each host's link, as tc writes it, such as 100mbit")
    parser.add_argument("command", nargs="+", help="after --; $HOST_RANK and $NUM_HOSTS are set")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"netns: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    with Hosts(options.hosts, options.rate) as hosts:
        started = [hosts.start(host, options.command) for host in range(options.hosts)]
        return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main())
