"""Measurements in processes of their own, variants taking turns, results kept after each.

Knows: this machine, worker processes, whose turn it is, the file of results. Does not
know what is measured.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

from starling_lib.journal import write_atomically
from starling_lib.models import precision

RESULTS = Path(__file__).resolve().parents[2] / "data/studies"
Runs = dict[str, list[dict]]  # variant → its measurements


def machine() -> str:
    """The processor's name, how many cores this process may use, what makes bf16 fast."""
    cores = len(os.sched_getaffinity(0))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            x.split(":")[1].strip() for x in lines if x.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    able = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.10
    fast = [unit for unit in ("amx_bf16", "avx512_bf16") if able.get(unit)]
    return ", ".join([name, f"{cores} cores", *fast[:1]])


def peak_gib() -> float:
    """Peak resident memory of this process alone (ru_maxrss begins at the parent's)."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def run_worker(script: str, variant: str, *options: object) -> dict:
    """What a script's `--worker` measures in a new process; its last line is the result.

    Raises SystemExit with the end of the worker's stderr where it failed.
    """
    command = [sys.executable, script, "--worker", variant, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    runs: Runs,
    variants: Sequence[str],
    repeats: int,
    measure: Callable[[str], dict],
    keep: Callable[[], object],
    figure: str,
) -> None:
    """Measure until every variant has `repeats` runs, one of each a round.

    `keep` is called after each; `figure` says what to print of it, as a format string.
    """
    for repeat in range(repeats):
        for variant in variants:
            if len(runs.setdefault(variant, [])) > repeat:
                continue
            found = measure(variant)
            runs[variant].append(found)
            told = figure.format(**found)
            print(f"{repeat + 1}/{repeats} {variant}: {told}", flush=True)
            keep()


def results_path(name: str) -> Path:
    """Where figures of this name are kept: those of each precision in a file of its own."""
    return RESULTS / f"{name}_{precision()}.json"


def earlier_results(path: Path, fresh: bool, **sizes: int) -> dict:
    """What an earlier call left in `path`, so that this one goes on; {} to begin anew.

    Raises SystemExit that says what differs where that was another machine or other
    sizes; with `fresh` it is replaced.
    """
    if fresh or not path.exists():
        return {}
    before = json.loads(path.read_text())
    differing = [
        f"{name} {before.get(name)}, this is {value}"
        for name, value in {"machine": machine(), **sizes}.items()
        if before.get(name) != value
    ]
    if differing:
        raise SystemExit(
            f"{path} was measured with {'; '.join(differing)}: --fresh replaces it"
        )
    return before


def write_results(
    path: Path, command: str, sizes: Mapping[str, int], **found: object
) -> None:
    """Keep what was measured so far; a kill leaves the file before or this one."""
    result = {"date": date.today().isoformat(), "command": command}
    result |= {"machine": machine(), "precision": precision(), **sizes, **found}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
