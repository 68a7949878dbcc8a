"""Looking at a run before it starts and after it ends: data, batches, memory, loss, time."""
