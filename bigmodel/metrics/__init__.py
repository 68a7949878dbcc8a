"""Everything that is measured while a run goes on, and the process that serves it."""
