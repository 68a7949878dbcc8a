#!/usr/bin/env bash
# lm_eval passes over a task file that it cannot parse and says later that the task does not exist.
# Input: TaskManager(include_path=FOLDER) with two task files; in one a quotation mark is not closed.
# Expected: an error or a warning that names the file and the line, as the YAML parser gives them.
# Seen: the other task is listed, and nothing is logged at the level INFO or above; load() says that the name is
# unknown. The parser's words are a debug message, so that one looks for a wrong name or folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-$folder/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3 -m venv "$folder/venv"
  "$python" -m pip install --quiet lm_eval==0.4.13
fi
cd "$folder"
cat >finding.py <<'PYTHON'
import logging
import pathlib
import sys
from importlib.metadata import version

from lm_eval.tasks import TaskManager

records = []
watcher = logging.Handler()
watcher.emit = records.append
logging.getLogger().addHandler(watcher)
logging.getLogger().setLevel(logging.INFO)
folder = pathlib.Path("tasks")
folder.mkdir()
task = 'task: {}\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: {}\n'
(folder / "sound.yaml").write_text(task.format("sound", '"{{question}}"'))
(folder / "broken.yaml").write_text(task.format("broken", '"{{question}}'))
manager = TaskManager(include_path=str(folder), include_defaults=False)
said = [record.getMessage() for record in records if "broken" in record.getMessage()]
try:
    manager.load(["broken"])
    message = "loaded"
except KeyError as error:
    message = str(error)
print(f"lm_eval {version('lm_eval')}")
print("expected: a message with tasks/broken.yaml and its line")
print(f"seen:     tasks {manager.all_tasks}, logged {said}, load() says {message}")
sys.exit(list(manager.all_tasks) != ["sound"] or bool(said) or "not a registered task" not in message)
PYTHON
"$python" finding.py
