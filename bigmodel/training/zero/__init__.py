"""The DeepSpeed boundary: ZeRO, the state of each rank, sequence parallelism."""
