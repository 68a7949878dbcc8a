"""The page of `bigmodel report --html`: history of a run, its plots and tables, one self-contained HTML file."""
