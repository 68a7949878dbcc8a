"""Who gets which number, computed: node lists, distributions, torchrun, MPI, host files, cluster files, binding."""

from pathlib import Path

import pytest

from bigmodel.config.settings import UserError
from bigmodel.launcher.binding import divide, parse_list
from bigmodel.launcher.cluster import Cluster, host_of, hosts_and_slots, load_cluster, read_hostfile
from bigmodel.launcher.devices import device_variables, given_devices
from bigmodel.launcher.drawing import draw_topology, print_topology, shorten
from bigmodel.launcher.execute import preset
from bigmodel.launcher.fabric import fabric_environment
from bigmodel.launcher.hostlist import expand_counts, expand_hosts
from bigmodel.launcher.placement import distribute, find_place, job_groups, port_of, started_by
from bigmodel.launcher.topology import Topology, even_topology, ranks_per_node

CONFIGS = Path(__file__).parents[2] / "configs" / "clusters"

# ---- node lists


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07-08],login", ["n1", "n2", "n3", "n07", "n08", "login"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("a-b.c,a-b.c", ["a-b.c", "a-b.c"]),
    ],
)
def test_a_node_list_is_expanded_in_its_order(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no host name"),
        ("a,,b", "'' is no host name"),
        ("a b", "'a b' is no host name"),
        ("n[1-3", "a bracket is not closed"),
        ("n1-3]", "brackets do not match"),
        ("n[[1]]", "brackets do not match"),
        ("n[]", "'' in brackets is neither a number nor a range"),
        ("n[a-b]", "'a-b' in brackets is neither"),
        ("n[3-1]", "the range 3-1 is empty"),
        ("n[0-999999999]", "more than 100000 hosts"),
        ("n[0-99999]m[0-99999]", "more than 100000 hosts"),
        ("a,-oProxyCommand=x", "'-oProxyCommand=x' is no host name"),
    ],
)
def test_what_is_no_node_list_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        expand_hosts(text)


def test_tasks_per_node_are_expanded() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(UserError, match=r"'2\(y3\)' is not of the form"):
        expand_counts("2(y3)")


# ---- the value object


def test_a_topology_knows_who_shares_a_node_or_a_switch() -> None:
    topology = Topology(("a", "b", "c"), (0, 1, 0, 1, 2), "a", 15000, ("leaf1", "leaf1", ""))
    assert [topology.local_rank(rank) for rank in range(5)] == [0, 0, 1, 1, 0]
    assert [topology.local_size(rank) for rank in range(5)] == [2, 2, 2, 2, 1]
    assert topology.ranks_of(1) == [1, 3]
    assert [topology.host(rank) for rank in (0, 3, 4)] == ["a", "b", "c"]
    assert topology.share_node(0, 2)
    assert not topology.share_node(0, 1)
    assert topology.share_switch(0, 1)
    assert topology.share_switch(0, 2)
    assert not topology.share_switch(0, 4)  # nobody knows c's switch
    assert topology.share_switch(4, 4)


def test_task_distributions_follow_slurm() -> None:
    assert distribute("block", [3, 2, 2]) == (0, 0, 0, 1, 1, 2, 2)
    assert distribute("cyclic", [3, 2, 2]) == (0, 1, 2, 0, 1, 2, 0)
    assert distribute("plane", [5, 1], plane=2) == (0, 0, 1, 0, 0, 0)


def test_ranks_must_divide_and_have_devices() -> None:
    assert ranks_per_node(0, 4, 8) == 8
    assert ranks_per_node(0, 4, 0) == 1
    assert ranks_per_node(6, 3, 0) == 2
    with pytest.raises(UserError, match="7 ranks do not divide over 3 nodes; set 6 or 9 ranks"):
        ranks_per_node(7, 3, 0)
    with pytest.raises(UserError, match=r"3 ranks on a node, but it has 2 GPU\(s\).*at most 8 ranks on 4 node"):
        ranks_per_node(12, 4, 2)
    with pytest.raises(UserError, match="--ranks -1"):
        ranks_per_node(-1, 1, 0)


# ---- where am I

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n8",
    "SLURM_STEP_NODELIST": "n[7-8]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2",
}  # fmt: skip


def test_torchrun_is_believed() -> None:
    topology, rank = find_place({**SLURM, **TORCHRUN})
    assert (rank, topology) == (3, Topology(("node0", "node1"), (0, 0, 1, 1), "a", 9))
    assert started_by({**SLURM, **TORCHRUN}) == "torchrun"
    with pytest.raises(UserError, match="RANK=3 is set in the environment, but MASTER_ADDR is not"):
        find_place({**TORCHRUN, "MASTER_ADDR": ""})
    with pytest.raises(UserError, match="ranks must be consecutive on a node"):
        find_place({**TORCHRUN, "LOCAL_RANK": "0"})


def test_a_slurm_step_gives_names_and_a_port_of_the_job() -> None:
    topology, rank = find_place(SLURM)
    assert (rank, topology) == (3, Topology(("n7", "n8"), (0, 0, 1, 1), "n7", 15000 + 8 * 1234 + 2))
    assert started_by(SLURM) == "slurm"
    assert find_place({**SLURM, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "77"})[0].main_address == "10.0.0.7"
    assert find_place({**SLURM, "SLURM_TOPOLOGY_ADDR": "core.leaf2.n8"})[0].switches == ("", "leaf2")


def test_a_group_of_a_het_job_may_say_another_group_s_distribution() -> None:
    topology, _ = find_place({**SLURM, "SLURM_HET_SIZE": "2", "SLURM_DISTRIBUTION": "cyclic"})
    assert topology.nodes == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"SLURM_NODEID": "0"}, "SLURM sets SLURM_NODEID=0 for rank 3, but .* give '1'; use srun --distribution=block"),
        ({"SLURMD_NODENAME": "n9"}, "SLURM sets SLURMD_NODENAME=n9"),
        ({"SLURM_NTASKS": "9"}, "SLURM sets SLURM_NTASKS=9"),
        ({"SLURM_DISTRIBUTION": "cyclic", "SLURM_PROCID": "2"}, "the task distribution 'cyclic'"),
        ({"SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": "/none"}, "SLURM_HOSTFILE=/none: the task distribution"),
    ],
)
def test_a_contradiction_to_slurm_is_an_error(lie: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place({**SLURM, **lie})


@pytest.mark.parametrize("name", sorted(SLURM))
def test_slurm_without_one_of_its_variables_is_the_same_place_or_an_error(name: str) -> None:
    given = {key: value for key, value in SLURM.items() if key != name}
    if name in ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        with pytest.raises(UserError, match="start it"):
            find_place(given)
        return
    topology, rank = find_place(given)
    assert (rank, topology.nodes, topology.main_address) == (3, (0, 0, 1, 1), "n7")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID=x in the environment must be a whole number from 0 to 3"),
        ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 in the environment must be a whole number from 0 to 3"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4"}, "has 2 nodes, but SLURM_STEP_TASKS_PER_NODE=4 has 1"),
        ({**SLURM, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment must be a whole number from 0 to"),
        ({**TORCHRUN, "RANK": "one"}, "RANK=one in the environment must be a whole number from 0 to 3"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 in the environment must be a whole number from 0 to 3"),
        ({**TORCHRUN, "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 in the environment must be a whole number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=1 in the environment must be a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http in the environment must be a whole number"),
    ],
)
def test_a_number_that_cannot_be_is_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place(given)


@pytest.mark.parametrize(
    ("rank", "size", "local_rank", "local_size"),
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
)
def test_mpi_needs_an_address_when_it_spans_machines(rank: str, size: str, local_rank: str, local_size: str) -> None:
    given = {rank: "5", size: "6", local_rank: "2", local_size: "3"}
    with pytest.raises(UserError, match="6 ranks on several machines, and MASTER_ADDR is not set"):
        find_place(given)
    topology, number = find_place({**given, "MASTER_ADDR": "head"})
    assert (number, topology.nodes, topology.main_address) == (5, (0, 0, 0, 1, 1, 1), "head")
    inside, number = find_place({**SLURM, **given, "MASTER_ADDR": "head"})  # mpirun in a job: one SLURM task per node
    assert (number, inside.world_size) == (5, 6)
    assert started_by({**SLURM, **given}) == "mpi"
    assert started_by({**SLURM, rank: "3", size: "4"}) == "slurm"  # srun --mpi=pmi2
    alone, _ = find_place({rank: "1", size: "3", local_rank: "1", local_size: "3"})
    assert alone.main_address == "127.0.0.1"
    with pytest.raises(UserError, match=f"{local_size} is not"):
        find_place({rank: "5", size: "6", local_rank: "2"})


def test_nobody_s_rank_is_an_error_that_says_how() -> None:
    with pytest.raises(UserError, match="inside srun"):
        find_place({"SLURM_JOB_ID": "1"})  # inside a job, but not inside srun


def test_jobs_that_follow_each_other_get_different_ports_below_the_clients() -> None:
    ports = [port_of(str(job), str(step)) for job in range(70_000, 70_100) for step in range(8)]
    assert len(set(ports)) == 800
    assert all(15_000 <= port_of(str(job)) < 31_000 for job in (0, 1, 10**9, "4711_3"))


def test_a_job_s_hosts_come_by_the_groups_of_a_het_job() -> None:
    assert job_groups({}) == []
    assert job_groups({"SLURM_JOB_NODELIST": "n[1-2]"}) == [["n1", "n2"]]
    het = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n1", "SLURM_JOB_NODELIST_HET_GROUP_1": "n[4-5]"}
    assert job_groups({"SLURM_JOB_NODELIST": "n1", **het}) == [["n1"], ["n4", "n5"]]


# ---- cluster and host files


def write(folder: Path, text: str, name: str = "cluster.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_nod = 8", "gpus_per_nod: unknown setting; did you mean 'gpus_per_node'?"),
        ("time_limit = '1:00'", "time_limit: unknown setting; did you mean 'slurm.time_limit'?"),
        ("nodes = 0", "nodes = 0: input should be greater than or equal to 1"),
        ("fabric = 'infiniban'", r"fabric = .*infiniban: neither a profile \(efa, ethernet, infiniband, roce\)"),
        ("environment = { NCCL_IB_GID = '3' }", "NCCL_IB_GID: unknown variable; did you mean NCCL_IB_GID_INDEX?"),
        ("nodes = ", "cannot be read as TOML"),
    ],
)
def test_a_mistake_in_a_cluster_file_names_file_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)(cluster.toml|fabric).*{message}|{message}"):
        load_cluster(write(tmp_path, text))


def test_a_missing_cluster_file_says_where_examples_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such cluster file; configs/clusters/ has examples"):
        load_cluster(tmp_path / "none.toml")


def test_a_fabric_may_be_a_file_beside_the_cluster_file(tmp_path: Path) -> None:
    write(tmp_path, 'NCCL_NET = "IB"\nMY_SITE = "7"', "ours.toml")
    cluster = load_cluster(write(tmp_path, "fabric = 'ours.toml'\ninterface = 'ib0'\nenvironment = { MY_SITE = '8' }"))
    assert cluster.variables() == {
        "NCCL_NET": "IB", "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "MY_SITE": "8"
    }  # fmt: skip
    with pytest.raises(UserError, match="NCCL_NET = 1 must be a text"):
        fabric_environment(str(write(tmp_path, "NCCL_NET = 1", "bad.toml")))


@pytest.mark.parametrize("fabric", ["infiniband", "roce", "efa", "ethernet"])
def test_every_profile_says_which_network_so_that_nothing_falls_back_in_silence(fabric: str) -> None:
    assert fabric_environment(fabric)["NCCL_NET"] == {"ethernet": "Socket", "efa": "AWS Libfabric"}.get(fabric, "IB")


def test_every_cluster_file_of_ours_is_sound() -> None:
    files = sorted(CONFIGS.glob("*.toml"))
    sizes = {file.stem: (cluster := load_cluster(file)).nodes * cluster.gpus_per_node for file in files}
    assert sizes == {
        "a100-64": 64, "aws-efa": 64, "b200-64": 64, "h100-512": 512, "h100-64": 64, "h100-8": 8, "h200-64": 64,
        "hosts": 8, "slurm-infiniband": 128,
    }  # fmt: skip


def test_a_host_file_is_deepspeed_s(tmp_path: Path) -> None:
    file = write(tmp_path, "# ours\nw1 slots=8\n\nw2 slots=8  # new\n", "hosts")
    assert read_hostfile(file) == {"w1": 8, "w2": 8}
    assert hosts_and_slots(Cluster(), file) == (["w1", "w2"], 8)
    assert hosts_and_slots(Cluster(hosts="n[1-2]", gpus_per_node=4)) == (["n1", "n2"], 4)
    assert list(map(host_of, hosts_and_slots(Cluster(hosts="me@n[1-2],n3"))[0])) == ["n1", "n2", "n3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w1 slots=8\nw2 slots=4", "slots differ between hosts .w1 8, w2 4.; every node needs the same number"),
        ("w1 slot=8", "hosts:1: 'w1 slot=8' is not of the form `host slots=8`"),
        ("w1\nw1", "hosts:2: w1 is listed twice"),
        ("me@w1\nyou@w1", "hosts:2: w1 is listed twice"),
        ("me@ slots=1", "hosts:1: 'me@' is no host name"),
        ("w1 slots=0", "hosts:1: w1 has no slots; leave its line out"),
        ("w1 slots=-1", "hosts:1: 'w1 slots=-1' is not of the form"),
        ("w1 slots=", "hosts:1: 'w1 slots=' is not of the form"),
        ("-w1", "hosts:1: '-w1' is no host name"),
        ("# none", "lists no host"),
    ],
)
def test_a_mistake_in_a_host_file_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts_and_slots(Cluster(), write(tmp_path, text, "hosts"))


def test_a_host_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"hosts = 'n\[1-2\],n1': n1 is listed twice; set ranks_per_node"):
        hosts_and_slots(Cluster(hosts="n[1-2],n1"))
    with pytest.raises(UserError, match="n1 is listed twice"):
        hosts_and_slots(Cluster(hosts="n1,me@n1"))


def test_without_hosts_it_says_where_they_go() -> None:
    with pytest.raises(UserError, match="give --hostfile FILE, or set hosts or"):
        hosts_and_slots(Cluster())


def test_the_cluster_s_address_comes_first_but_not_before_torchrun_s() -> None:
    cluster = Cluster(main_address="10.0.0.1", main_port=99)
    assert preset({"MASTER_ADDR": "x"}, cluster) == {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}
    assert preset(TORCHRUN, cluster) == TORCHRUN


# ---- devices

CARDS = ["nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"]
PCI = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("files", "visible", "names"),
    [
        ([], None, []),
        (CARDS, None, ["0", "2", "10"]),
        (CARDS, "2", ["2"]),
        (CARDS, "", []),
        (CARDS, "-1", []),
        (CARDS, "2, 0,-1,10", ["2", "0"]),
        (CARDS, "GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"]),
        ([], "0,1", []),
    ],
)
def test_gpus_are_those_that_the_node_has_and_shows(files: list[str], visible: str | None, names: list[str]) -> None:
    assert given_devices(files, visible) == names


@pytest.mark.parametrize(
    ("files", "given", "expected"),
    [
        (CARDS, {}, {**PCI, "CUDA_VISIBLE_DEVICES": "0,2,10"}),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "2,0"}, {**PCI, "CUDA_VISIBLE_DEVICES": "2,0"}),
        (CARDS, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST",
                                                         "CUDA_VISIBLE_DEVICES": "0,2,10"}),
        # srun --gpus-per-task=1, as a real task had it
        (CARDS, {"CUDA_VISIBLE_DEVICES": "2", "SLURM_GPUS_ON_NODE": "2"}, {**PCI, "CUDA_VISIBLE_DEVICES": "2"}),
        (CARDS, {"CUDA_VISIBLE_DEVICES": ""}, {}),  # for CPUs, on purpose
        ([], {"CUDA_VISIBLE_DEVICES": "0,1"}, {}),
    ],
    ids=["all", "given", "order", "its own", "none", "no GPU"],
)  # fmt: skip
def test_two_ranks_see_all_that_their_node_was_given(
    files: list[str], given: dict[str, str], expected: dict[str, str]
) -> None:
    assert device_variables(files, 2, "n1", given) == expected


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        ({}, 4, r"4 ranks on n1, with 3 visible GPU\(s\) \(0,2,10\)"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 2, r"2 ranks on n1, with 1 visible GPU\(s\) \(2\)"),
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_GPUS_ON_NODE": "1"}, 2, "each rank needs its own"),
        ({"CUDA_VISIBLE_DEVICES": "0,2", "SLURM_GPUS_ON_NODE": "8"}, 4, "each rank needs its own"),
    ],
)
def test_more_ranks_than_gpus_are_refused(given: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        device_variables(CARDS, size, "n1", given)


# ---- binding

NUMA = {0: [0, 1, 2, 3, 8, 9], 1: [4, 5, 6, 7, 10, 11]}
ALL = sorted(NUMA[0] + NUMA[1])


def test_ranks_are_bound_beside_their_devices() -> None:
    devices = [1, 1, 0, 0]  # GPUs 0 and 1 hang on NUMA node 1
    shares = [divide("device", rank, 4, ALL, devices, NUMA) for rank in range(4)]
    assert shares == [{4, 5, 6}, {7, 10, 11}, {0, 1, 2}, {3, 8, 9}]
    assert divide("device", 0, 2, ALL, [-1, -1], NUMA) is None
    assert divide("device", 0, 2, ALL, [], NUMA) is None


def test_cores_are_shared_out_node_by_node_and_never_too_few() -> None:
    assert [divide("cores", rank, 3, ALL, [], NUMA) for rank in range(3)] == [
        {0, 1, 2, 3},
        {4, 5, 8, 9},
        {6, 7, 10, 11},
    ]
    assert [divide("cores", rank, 2, [0, 1], [], NUMA) for rank in range(2)] == [{0}, {1}]
    assert divide("cores", 0, 3, [0, 1], [], NUMA) is None  # less than one each
    assert divide("device", 0, 4, ALL, [0, 0, 0, 0], NUMA) is None  # less than two each
    assert divide("cores", 1, 2, [0, 1, 4, 5], [], NUMA) == {4, 5}  # only what the job may use
    assert divide("none", 0, 1, ALL, [0], NUMA) is None
    assert parse_list("0-3,8\n") == [0, 1, 2, 3, 8]


# ---- drawing


def test_the_drawing_has_every_node_and_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topology = even_topology(["n1", "n2", "n3"], 8, "n1", 15000, ["leaf1", "leaf1", "$\\leaf$"])
    print_topology(topology)
    shown = capsys.readouterr().out
    for words in ("24 ranks on 3 nodes; rank 0 at n1:15000", "switch leaf1", "n2 8-15", "n3 16-23"):
        assert words in shown
    assert shown.index("switch $\\leaf$") < shown.index("n3 16-23")
    draw_topology(topology, tmp_path / "topology.png")
    assert (tmp_path / "topology.png").read_bytes().startswith(b"\x89PNG")
    assert shorten([0, 3, 4, 5, 9]) == "0,3-5,9"
