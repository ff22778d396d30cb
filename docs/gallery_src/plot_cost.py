r"""
What a step costs
=================

Milliseconds per step of the perceptron, batch 128, as ``benchmarks/run.py`` measured them: a bar
ends at the median of :doc:`the table </benchmarks>`, its line is the interquartile range. The
dashed line is the floor of every method that takes two full gradients in each step.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt

# The table of the repository, in which this runs.
ROOT = next(path for path in Path.cwd().parents if (path / "benchmarks").is_dir())
text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
table = re.search(r"<!-- mlp-128 -->(.*?)<!-- end", text, re.DOTALL)[1]
machine = table.strip().splitlines()[0]
rows = re.findall(r"^\| ([a-z][^|]*?) \| ([\d.]+) \| ([\d.]+) \|", table, re.MULTILINE)
rows = [(name, float(ms), float(iqr)) for name, ms, iqr in rows]
floor = dict((name, ms) for name, ms, _ in rows)["two gradients"]
rows = sorted((row for row in rows if row[0] != "two gradients"), key=lambda row: -row[1])

fig, ax = plt.subplots(figsize=(8, 6), layout="constrained")
names, ms, iqr = zip(*rows, strict=True)
colours = ["#999999" if name == "base" else "#0072b2" for name in names]
ax.barh(names, ms, xerr=[i / 2 for i in iqr], color=colours, ecolor="black")
ax.axvline(floor, color="#d55e00", linestyle="--", label="two gradients, by hand")
ax.set_xlabel("time per step (ms)")
ax.set_title(" · ".join(machine.split(" · ")[:2]), fontsize=10)
ax.legend(loc="upper right")
plt.show()
