"""launcher: checks the nodes, starts the ranks of a run anywhere, and ends them together.

    cluster, fabric       cluster files                       hostlist, placement, topology   rank numbers and nodes
    local, hosts          processes here, and over ssh        slurm, torchrun, execute        ranks started by others
    preflight             check of the nodes before a start   record, watch, drawing          a started run
    binding, devices, network      processors, GPUs, ports and interfaces of a machine

Never imports torch, so that it works on a login node.
"""
