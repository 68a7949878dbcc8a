"""launcher: starts the ranks of a run anywhere, looks at the nodes first, and ends the ranks together.

    cluster, fabric       what a cluster file says            hostlist, placement, topology   who is which rank, where
    local, hosts          processes here, and over ssh        slurm, torchrun, execute        ... started by others
    preflight             the nodes before a start            record, watch, drawing          the run after it
    binding, network      processors, ports and interfaces of a machine

Never imports torch: it works on a login node.
"""
