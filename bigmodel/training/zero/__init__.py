"""The boundary to DeepSpeed: engine, ZeRO layouts, optimizer state in files, sequence parallelism."""
