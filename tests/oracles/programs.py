"""What a compiled program does, read in its text."""

import math
import re

SIZES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "s32": 4, "pred": 1}
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = (?P<shape>.*?) (?P<code>[\w-]+)\((?P<rest>.*)$")


def sent(program: str) -> int:
    """Bytes that the all-reduces of an HLO module carry; of a conditional, in its larger branch."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        if found := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations[found[1] or found[2]] = []
        else:
            lines.append(line)

    def of(computation: str) -> int:
        total = 0
        for line in computations[computation]:
            if not (found := INSTRUCTION.match(line)):
                continue
            if found["code"] in ("all-reduce", "all-reduce-start"):
                for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["shape"]):
                    total += SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
                continue
            called = [of(x) for x in re.findall(r"%([\w.-]+)", found["rest"]) if x in computations]
            total += (max if found["code"] == "conditional" else sum)(called or [0])
        return total

    return of("ENTRY ")
