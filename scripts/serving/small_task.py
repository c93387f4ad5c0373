"""Two small tasks for lm-eval, from data made here: python small_task.py FOLDER"""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
names = ["open", "close", "read", "write", "seek", "flush", "lock", "join"]
rows = [
    {
        "text": f"def {name}(self):\n    return self._{name}()\n\ndef {name}_all(self):\n    return self._",
        "choices": [f"{name}_all()", "zzzz qqqq"],
        "answer": 0,
        "want": f"{name}_all()",
    }
    for name in names
]
(folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
shared = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
(folder / "choice.yaml").write_text(
    f"""task: quasar_small_choice
output_type: multiple_choice
{shared}doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
)
(folder / "text.yaml").write_text(
    f"""task: quasar_small_text
output_type: generate_until
{shared}doc_to_target: "{{{{want}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
"""
)
