"""The launcher, with real processes: who gets which number, how a run ends, and that nothing is left running."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bigmodel.launcher.record import launches, record_end
from bigmodel.launcher.topology import Topology, even_topology, rank_environment
from bigmodel.run_directory import read_json_lines, record_event

REPOSITORY = Path(__file__).parents[2]

# A trainee: marks itself as started by a file that holds its process id; marks that it got SIGTERM, and "saves".
TRAINEE = """
import os, pathlib, signal, subprocess, sys, time
rank, here = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def save(*_):
    (here / f"saving-{{rank}}").touch()
    time.sleep({save_seconds})
    (here / f"saved-{{rank}}").touch()
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
print("rank", rank, "begins", flush=True)
part = here / f"part-{{rank}}"
part.write_text(str(os.getpid()))
part.rename(here / f"pid-{{rank}}")
{then}
"""

# The launcher as a program of its own, so that it can be signalled like one.
LAUNCHER = """
import sys
from pathlib import Path
from bigmodel.launcher.local import run
from bigmodel.launcher.network import free_port
from bigmodel.launcher.topology import even_topology
here = Path(sys.argv[1])
topology = even_topology(["here"], {ranks}, "127.0.0.1", free_port())
command = [sys.executable, "-c", {trainee!r}, str(here)]
seconds = {{"grace_seconds": {grace_seconds}, "save_seconds": {bound}}}
ending = run(command, topology, here / "logs", control_pipe={control_pipe}, **seconds)
(here / "ending").write_text(f"{{ending.cause}} {{ending.detail}}")
sys.exit(ending.code)
"""
WAIT_FOR_EVER = "while True: time.sleep(0.05)"


class Launch:
    """A launcher and its trainees in a folder of their own."""

    def __init__(
        self,
        here: Path,
        then: str = WAIT_FOR_EVER,
        *,
        ranks: int = 2,
        save_seconds: float = 0.0,
        grace_seconds: float = 1.0,
        bound: float = 60.0,
        control_pipe: bool = False,
    ):
        self.here, self.ranks = here, ranks
        trainee = TRAINEE.format(then=then, save_seconds=save_seconds)
        program = LAUNCHER.format(
            ranks=ranks, trainee=trainee, grace_seconds=grace_seconds, bound=bound, control_pipe=control_pipe
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(here)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE if control_pipe else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pid(self, rank: int) -> int:
        file = self.here / f"pid-{rank}"
        until(file.exists, f"rank {rank} to start")
        return int(file.read_text())

    def order(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words)
        self.process.stdin.flush()

    def wait_until_started(self) -> None:
        for rank in range(self.ranks):
            self.pid(rank)

    def wait_until_saving(self) -> None:
        for rank in range(self.ranks):
            until((self.here / f"saving-{rank}").exists, f"rank {rank} to save")

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, after checking that no process is left."""
        output, errors = self.process.communicate(timeout=60)
        until(lambda: not left_running(self.here), f"{left_running(self.here)} to end")
        return self.process.returncode, output, errors


def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def left_running(here: Path) -> list[int]:
    """Processes whose command line names the folder: the launcher, its trainees, their children and tees."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(here)) for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.fixture(autouse=True)
def _clean_up(tmp_path: Path) -> Iterator[None]:
    """A test that fails must not leave processes to the ones after it."""
    yield
    for pid in left_running(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- who gets which number


def test_each_rank_gets_the_variables_that_torchrun_sets() -> None:
    topology = even_topology(["n1", "n2"], 3, "n1", 4321)
    assert topology == Topology(("n1", "n2"), (0, 0, 0, 1, 1, 1), "n1", 4321)
    assert topology.world_size == 6
    assert rank_environment(topology, 4, cores=7, inherited={}) == {
        "RANK": "4",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "4321",
        "LAUNCH_HOSTS": "n1*3,n2*3",
        "OMP_NUM_THREADS": "2",
    }


def test_threads_are_shared_out_but_a_user_s_choice_stays() -> None:
    topology = even_topology(["here"], 8, "127.0.0.1", 1)
    assert rank_environment(topology, 0, cores=2, inherited={})["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in rank_environment(topology, 0, cores=64, inherited={"OMP_NUM_THREADS": "5"})


def test_a_rank_outside_the_world_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="rank 2 is not in a world of 2"):
        rank_environment(even_topology(["here"], 2, "127.0.0.1", 1), 2, 1, {})


# ---- how a run ends


def test_all_ranks_done_is_success_and_each_saw_its_own_number(tmp_path: Path) -> None:
    then = "(here / f'env-{rank}').write_text(' '.join(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))"
    code, output, errors = Launch(tmp_path, then, ranks=3).end()
    assert (code, errors) == (0, "")
    assert output == "rank 0 begins\n"  # rank 0's is shown here too
    assert [(tmp_path / f"env-{rank}").read_text() for rank in range(3)] == ["0 0 3", "1 1 3", "2 2 3"]
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs == {f"here-rank-{rank}.log": f"rank {rank} begins\n" for rank in range(3)}


def test_a_killed_rank_is_named_and_the_rest_is_ended(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ranks=3)
    launch.wait_until_started()
    os.kill(launch.pid(1), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert "rank 1 of 3 was killed by SIGKILL" in errors
    assert "out: see dmesg" in errors
    assert f"last lines of {tmp_path}/logs/here-rank-1.log:\n  | rank 1 begins\n" in errors
    assert (tmp_path / "saved-0").exists()  # they got SIGTERM, not only SIGKILL


def test_a_rank_killed_because_it_hung_is_named_as_hanging(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.wait_until_started()
    record_event(tmp_path, "launch", by="local", job="", restart=0)
    os.kill(launch.pid(1), signal.SIGSTOP)
    record_event(tmp_path, "launch_ended", cause="hang", detail="rank 1 on here hangs in forward of step 8", step=7)
    os.kill(launch.pid(1), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert errors == "rank 1 on here hangs in forward of step 8; the other rank was ended; its stack: events.jsonl\n"
    assert (tmp_path / "ending").read_text() == "hang rank 1 on here hangs in forward of step 8"
    record_end(tmp_path, "failed", 1, "the launcher of a node over ssh knows less")
    (found,) = launches(read_json_lines(tmp_path / "events.jsonl"))
    assert (found.cause, found.detail, found.step) == ("hang", "rank 1 on here hangs in forward of step 8", 7)


def test_a_stopped_rank_is_killed_with_the_rest(tmp_path: Path) -> None:
    launch = Launch(tmp_path, grace_seconds=0.3)
    launch.wait_until_started()
    os.kill(launch.pid(1), signal.SIGSTOP)
    os.kill(launch.pid(0), signal.SIGKILL)
    assert launch.end()[0] == 1


def test_a_crash_is_shown_by_its_stack_and_the_log_is_named(tmp_path: Path) -> None:
    crash = "from bigmodel.distributed.signals import show_stacks_of_crashes\nshow_stacks_of_crashes()\n"
    crash += "import ctypes\ndef reads_nothing(): ctypes.string_at(0)\nif rank: reads_nothing()\n"
    code, _, errors = Launch(tmp_path, crash + WAIT_FOR_EVER, ranks=2).end()
    log = tmp_path / "logs" / "here-rank-1.log"
    assert code == 1
    # torch's own handler of SIGSEGV allocates, which may abort
    said = re.compile(rf"rank 1 of 2 was killed by (SIGSEGV|SIGABRT); the other rank was ended\nits stacks: {log}")
    assert said.match(errors)
    assert "  | Fatal Python error: Segmentation fault\n  | Current thread" in errors
    assert " in reads_nothing\n" in errors
    text = log.read_text()
    assert text.index(" in reads_nothing\n") < text.index("frame #0: c10::FatalSignalHandler")


def test_a_rank_that_ends_with_an_error_is_named_with_its_last_lines(tmp_path: Path) -> None:
    then = f"if rank == 1:\n  for n in range(50): print('line', n)\n  sys.exit(7)\n{WAIT_FOR_EVER}"
    code, _, errors = Launch(tmp_path, then).end()
    assert code == 1
    assert errors.splitlines()[0] == "rank 1 of 2 ended with exit code 7; the other rank was ended"
    assert errors.splitlines()[2:] == [f"  | line {number}" for number in range(30, 50)]


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(tmp_path: Path) -> None:
    then = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(here / f'deaf-{rank}').touch()\n"
    then += "while rank == 0 and not (here / 'deaf-1').exists(): time.sleep(0.01)\n"
    then += f"if rank == 0: sys.exit(9)\n{WAIT_FOR_EVER}"
    started = time.monotonic()
    code, _, errors = Launch(tmp_path, then, grace_seconds=0.5).end()
    assert (code, time.monotonic() - started < 20) == (1, True)
    assert "rank 0 of 2 ended with exit code 9" in errors


def test_only_this_launch_s_lines_of_a_log_are_shown(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "here-rank-1.log").write_text("an older run\n")
    code, _, errors = Launch(tmp_path, "if rank == 1: sys.exit(7)\n" + WAIT_FOR_EVER).end()
    assert code == 1
    assert "older" not in errors
    assert (tmp_path / "logs" / "here-rank-1.log").read_text() == "an older run\nrank 1 begins\n"


@pytest.mark.parametrize("status", [2, 3])
def test_user_errors_and_stops_are_passed_through(tmp_path: Path, status: int) -> None:
    # Rank 0 ends by itself, even where rank 1 was quicker and rank 0 is asked to end before.
    then = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(here / f'deaf-{rank}').touch()\n"
    then += f"while rank == 1 and not (here / 'deaf-0').exists(): time.sleep(0.01)\nsys.exit({status})"
    code, _, errors = Launch(tmp_path, then, grace_seconds=60.0).end()
    assert (code, errors) == (status, "")


def test_a_user_error_of_another_rank_alone_is_shown(tmp_path: Path) -> None:
    then = f"if rank == 1:\n  print('mend this')\n  sys.exit(2)\n{WAIT_FOR_EVER}"
    code, _, errors = Launch(tmp_path, then).end()
    assert code == 2
    assert "  | mend this\n" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_stop_signal_lets_every_rank_save_however_long_it_takes(tmp_path: Path, number: int) -> None:
    launch = Launch(tmp_path, save_seconds=2.0, grace_seconds=0.2)
    launch.wait_until_started()
    launch.process.send_signal(number)
    code, _, errors = launch.end()
    assert code == 3
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert f"{signal.Signals(number).name}: asked 2 ranks to save and stop" in errors


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path, save_seconds=600.0, bound=600.0)
    launch.wait_until_started()
    launch.process.send_signal(signal.SIGINT)
    launch.wait_until_saving()  # two signals that a process has not handled yet are one
    launch.process.send_signal(signal.SIGINT)
    code, _, errors = launch.end()
    assert code == 1
    assert "killed before every rank had saved" in errors


def test_saving_without_end_is_cut_off_at_the_bound(tmp_path: Path) -> None:
    launch = Launch(tmp_path, save_seconds=50.0, bound=0.5)
    launch.wait_until_started()
    launch.process.send_signal(signal.SIGTERM)
    code, _, errors = launch.end()
    assert code == 1
    assert "killed before every rank had saved" in errors


def test_a_stop_before_a_rank_can_save_is_a_stop(tmp_path: Path) -> None:
    """Rank 1 is still importing (no handler yet) when the signal comes; rank 0 waits for it and must not hang."""
    handler = "signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else signal.SIG_IGN)\n"
    then = handler + "(here / f'ready-{rank}').touch()\n" + WAIT_FOR_EVER
    launch = Launch(tmp_path, then, grace_seconds=0.5)
    for rank in range(2):
        until((tmp_path / f"ready-{rank}").exists, f"rank {rank}")
    launch.process.send_signal(signal.SIGTERM)
    code, _, errors = launch.end()
    assert code == 3
    assert "stopped before every rank could save" in errors


def test_a_rank_terminated_by_someone_else_is_a_death_not_a_stop(tmp_path: Path) -> None:
    then = f"signal.signal(signal.SIGTERM, signal.SIG_DFL)\n(here / f'ready-{{rank}}').touch()\n{WAIT_FOR_EVER}"
    launch = Launch(tmp_path, then)
    until((tmp_path / "ready-1").exists, "rank 1")
    os.kill(launch.pid(1), signal.SIGTERM)
    code, _, errors = launch.end()
    assert code == 1
    assert "rank 1 of 2 was killed by SIGTERM" in errors


def test_a_death_while_saving_is_a_failure(tmp_path: Path) -> None:
    launch = Launch(tmp_path, save_seconds=20.0, grace_seconds=0.3)
    launch.wait_until_started()
    launch.process.send_signal(signal.SIGTERM)
    launch.wait_until_saving()
    os.kill(launch.pid(1), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert "rank 1 of 2 was killed by SIGKILL" in errors


# ---- nothing is left running


def test_kill_dash_nine_of_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ranks=3, save_seconds=50.0)
    launch.wait_until_started()
    assert len(left_running(tmp_path)) == 6  # with the tees of rank 0's output and errors
    launch.process.kill()
    launch.end()


def test_children_of_a_rank_end_with_it(tmp_path: Path) -> None:
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)', str(here)])\n"
    child += "(here / f'child-{rank}').touch()\n"
    launch = Launch(tmp_path, child + f"if rank == 1: sys.exit(0)\n{WAIT_FOR_EVER}")
    until(lambda: all((tmp_path / f"child-{rank}").exists() for rank in range(2)), "the children")
    os.kill(launch.pid(0), signal.SIGKILL)
    code, _, errors = launch.end()
    assert code == 1
    assert "rank 0 of 2 was killed by SIGKILL" in errors


def test_a_program_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    from bigmodel.launcher import local

    with pytest.raises(FileNotFoundError):
        local.run([str(tmp_path / "missing")], even_topology(["here"], 2, "127.0.0.1", 1), tmp_path / "logs")
    assert left_running(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- at the end of a control_pipe, as one node of several


def test_the_order_to_stop_lets_every_rank_save(tmp_path: Path) -> None:
    launch = Launch(tmp_path, save_seconds=1.0, grace_seconds=0.1, control_pipe=True)
    launch.wait_until_started()
    launch.order("stop\n")
    until((tmp_path / "saved-1").exists, "rank 1 to save")
    until((tmp_path / "ending").exists, "the launcher's own end")  # before the control_pipe is let go
    code, _, _ = launch.end()
    assert (code, (tmp_path / "ending").read_text()) == (3, "stopped ")


@pytest.mark.parametrize("order", ["end\n", ""], ids=["told", "control_pipe cut"])
def test_when_a_peer_or_the_far_launcher_is_gone_the_ranks_are_ended(tmp_path: Path, order: str) -> None:
    then = (
        "if rank == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(here / f'set-{rank}').touch()\n" + WAIT_FOR_EVER
    )
    launch = Launch(tmp_path, then, grace_seconds=0.5, control_pipe=True)
    for rank in range(2):
        until((tmp_path / f"set-{rank}").exists, f"rank {rank}")
    if order:
        launch.order(order)
        until(lambda: not left_running(tmp_path), "the end")
    code, _, errors = launch.end()  # closes the pipe
    assert (code, (tmp_path / "ending").read_text()) == (1, "failed another node failed")
    assert errors == ""
    assert (tmp_path / "saved-0").exists()


# Two nodes as `launcher ssh` runs them; the remote shell is a shell here, so that it costs no sshd.
FAR_LAUNCHER = """
import sys
from pathlib import Path
from bigmodel.launcher.cluster import Cluster, SshSettings
from bigmodel.launcher.hosts import run_on_hosts
from bigmodel.launcher.topology import even_topology
here = sys.argv[1]
shell = SshSettings(command=["sh", "-c", 'exec sh -c "$2"', "ssh"])
words = [sys.executable, "-c", {node!r}, here]
hosts = ["one", "two"]
world = even_topology(hosts, 1, "one", 1)
ending = run_on_hosts(Cluster(ssh=shell), hosts, words, world, Path.cwd(), 1.0, 600.0)
(Path(here) / "ending").write_text(f"{{ending.cause}} {{ending.detail}}")
sys.exit(ending.code)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_on_every_host_and_once_more_ends_them_now(tmp_path: Path, times: int) -> None:
    trainee = TRAINEE.format(then=WAIT_FOR_EVER, save_seconds=1.0 if times == 1 else 600.0)
    node = LAUNCHER.format(ranks=1, trainee=trainee, grace_seconds=1.0, bound=600.0, control_pipe=True)
    node = "import os, sys; sys.argv[1] += '/node-' + sys.argv[-1]; os.mkdir(sys.argv[1])\n" + node
    command = [sys.executable, "-c", FAR_LAUNCHER.format(node=node), str(tmp_path)]
    places = [tmp_path / f"node-{number}" for number in (0, 1)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True) as far:
        until(lambda: all((place / "pid-0").exists() for place in places), "a rank on each host")
        far.send_signal(signal.SIGINT)
        until(lambda: all((place / "saving-0").exists() for place in places), "the ranks to save")
        if times == 2:
            far.send_signal(signal.SIGINT)
        _, errors = far.communicate(timeout=60)
    assert "SIGINT: asked 2 node(s) to save and stop" in errors
    assert [(place / "saved-0").exists() for place in places] == [times == 1] * 2
    assert left_running(tmp_path) == []
    ending = far.returncode, (tmp_path / "ending").read_text().split()[0]
    assert ending == ((3, "stopped") if times == 1 else (1, "failed"))


def test_on_a_terminal_rank_zero_draws_its_bar_and_its_log_is_plain(tmp_path: Path) -> None:
    trainee = """
import os
from bigmodel.metrics.progress import LiveLine
line = LiveLine(0, 2, enabled=True)
line.say(f"rank {os.environ['RANK']} begins")
line.update(1, 4.0, 10.0)
line.close()
"""
    program = LAUNCHER.format(ranks=2, trainee=trainee, grace_seconds=1, bound=60, control_pipe=False)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(ours, 65536):
                shown += data
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert b"\x1b[2K" in shown  # it overwrites itself
    assert b"\xe2\x94\x81" in shown  # the bar
    first, second, *_ = (tmp_path / "logs" / "here-rank-0.log").read_text().splitlines()
    assert first == "rank 0 begins"
    assert second.startswith("step 1/2 ")
    assert (tmp_path / "logs" / "here-rank-1.log").read_text().splitlines()[0] == "rank 1 begins"
