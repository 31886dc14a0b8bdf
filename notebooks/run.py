"""Execute notebooks 01-05 in order and report their key figures (`make run`).

Knows: notebooks, kernels, the `parameters` cell, the mime type of key figures, reports.
Does not know: what a notebook computes.

    python notebooks/run.py --preset tiny --only 01 02 --set SEED=1

Each notebook gets a kernel of its own, running the Python that runs this file.
A run leaves in `runs/<timestamp>/`: the executed notebooks, HTML copies of them,
`report.json` and `report.md`. It stops at the first failure and exits with status 1.
"""

import argparse
import ast
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TextIO

import nbformat
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import run_sync
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from traitlets import default

FOLDER = Path(__file__).resolve().parent
FIGURES_MIME = "application/vnd.starling.figures+json"
PRESETS = ("small", "tiny")
# Minutes on two cores, with fast bf16 and without; longer is a warning, not a failure.
BUDGETS = {
    "01_nectar": 1.5,
    "02_reward_model": 5,
    "03_apa": 7,
    "04_evaluation": 4,
    "05_full_scale": 2,
}
SLOW_BUDGETS = {
    "01_nectar": 1,
    "02_reward_model": 11,
    "03_apa": 12,
    "04_evaluation": 8.5,
    "05_full_scale": 3,
}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "scipy")
INLINE_FIGURES = "module://matplotlib_inline.backend_inline"


class NotebookError(ValueError):
    """A notebook that does not keep the runner's contract."""


# --- choosing notebooks and their parameters


def select_notebooks(folder: Path, only: Iterable[str] = ()) -> list[Path]:
    """Return the notebooks whose names start with `only` (default 01 to 05), in order.

    Raises NotebookError for a number that no notebook has.
    """
    chosen = []
    for number in sorted(set(only)) or ["01", "02", "03", "04", "05"]:
        found = sorted(folder.glob(f"{number}_*.ipynb"))
        if not found:
            raise NotebookError(f"no notebook {number}_*.ipynb in {folder.name}/")
        chosen += found
    return chosen


def parameters_index(nb: NotebookNode) -> int:
    """Return the index of the one code cell tagged `parameters`, or raise."""
    tagged = [
        index
        for index, cell in enumerate(nb.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    if len(tagged) != 1:
        raise NotebookError(
            f"one cell must be tagged 'parameters', but {len(tagged)} are: "
            "in JupyterLab, set the tag in the property inspector (top right)"
        )
    return tagged[0]


def parameter_values(source: str) -> dict[str, Any]:
    """Return the names that a cell assigns and their literal values (else the code)."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                values[target.id] = literal(ast.unparse(node.value))
    return values


def literal(text: str) -> Any:
    """Read `text` as a Python literal; anything else is returned as the string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def override_parameters(nb: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """Return a copy of `nb` with a cell that assigns `values` after the parameters.

    Raises NotebookError when no cell is tagged, or when a name is not assigned in it:
    a misspelt override would otherwise change nothing, silently.
    """
    nb = deepcopy(nb)
    index = parameters_index(nb)
    known = parameter_values(nb.cells[index].source)
    if unknown := sorted(set(values) - set(known)):
        raise NotebookError(
            f"not in the parameters cell: {', '.join(unknown)} "
            f"(it assigns {', '.join(known) or 'nothing'})"
        )
    if values:
        lines = [f"{name} = {value!r}" for name, value in values.items()]
        cell = nbformat.v4.new_code_cell("# set by the runner\n" + "\n".join(lines))
        cell.metadata["tags"] = ["injected-parameters"]
        nb.cells.insert(index + 1, cell)
    return nb


def plan_run(
    notebooks: Mapping[str, NotebookNode], preset: str, settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return each notebook's overrides, so that every mistake shows before any run.

    PRESET goes to all; a setting goes to the notebooks that have it, at least one.
    """
    plan: dict[str, dict[str, Any]] = {}
    for name, nb in notebooks.items():
        try:
            known = parameter_values(nb.cells[parameters_index(nb)].source)
            values = {key: value for key, value in settings.items() if key in known}
            plan[name] = {"PRESET": preset} | values
            override_parameters(nb, plan[name])
        except NotebookError as problem:
            raise NotebookError(f"{name}: {problem}") from None
    for setting in settings:
        if not any(setting in values for values in plan.values()):
            raise NotebookError(f"no chosen notebook has a parameter {setting}")
    return plan


# --- executing one notebook


class OwnKernelManager(AsyncKernelManager):
    """Starts the running interpreter, whatever kernels the user has registered."""

    @default("kernel_spec_manager")
    def _own_python(self) -> KernelSpecManager:
        # No folders to search: `python3` is then ipykernel in `sys.executable`.
        return KernelSpecManager(parent=self, kernel_dirs=[])


class InterruptibleClient(NotebookClient):
    """Stops the kernel once, however it comes to that.

    At Ctrl-C nbclient stops the kernel, and again on leaving or when the kernel that
    was starting is found dead, where it then fails over what is no longer there.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._stopping = asyncio.Lock()

    async def _async_cleanup_kernel(self) -> None:
        async with self._stopping:
            if self.km is not None:
                await super()._async_cleanup_kernel()

    _cleanup_kernel = run_sync(_async_cleanup_kernel)  # called when Python exits


def available_cores() -> int:
    """Return the cores this process may use: CPU affinity and container quota."""
    try:
        cores = len(os.sched_getaffinity(0))
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, -(-int(quota) // int(period)))
    except AttributeError:  # macOS and Windows know no affinity
        return os.cpu_count() or 1
    except (OSError, ValueError):  # no container
        return cores


def kernel_environment() -> dict[str, str]:
    """Return the environment of a kernel: figures inline, no more threads than cores.

    Torch counts the machine's cores, not the container's share of them. Of several GPUs
    a kernel sees the first, for a single process trains on one.
    """
    environment = dict(os.environ, MPLBACKEND=INLINE_FIGURES)
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if available_cores() < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(available_cores()))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait by spinning for long starve whatever runs beside them, and then
    # each other; not spinning at all costs half the speed of an idle machine.
    environment.setdefault("GOMP_SPINCOUNT", "20000")
    return environment


def clear_outputs(nb: NotebookNode) -> None:
    """Empty all outputs in place: a failed run must not show an earlier one's."""
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def execute(
    nb: NotebookNode,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    on_cell: Callable[[int], None] = lambda number: None,
) -> None:
    """Execute `nb` in place in a new kernel working in `folder`.

    `on_cell` gets the number (from 1) of each code cell as it starts. Raises nbclient's
    CellExecutionError, or RuntimeError when the kernel does not start or dies; `nb`
    then holds the outputs made so far.
    """
    clear_outputs(nb)
    started = iter(range(1, len(nb.cells) + 1))
    client = InterruptibleClient(
        nb,
        timeout=None,
        kernel_name="python3",
        kernel_manager_class=OwnKernelManager,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        # Or kernels warn, between our progress lines, that they listen unencrypted.
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        on_cell_execute=lambda cell, cell_index: on_cell(next(started)),
    )
    try:
        client.execute(env=dict(environment or kernel_environment()))
    except asyncio.CancelledError:  # what waited for a starting kernel that was stopped
        raise RuntimeError("Kernel died") from None


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    """Return the code cells that hold code."""
    return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]


def failure_message(source: str, error: Exception) -> str:
    """Return what went wrong and the `source` of the cell that was running."""
    if isinstance(error, CellExecutionError):
        what = re.sub(r"\x1b\[[0-9;]*m", "", error.traceback)  # terminal colours
    else:
        what = f"{error} (interrupted, or out of memory?)"
    return f"in this cell:\n\n{source}\n\n{what}".rstrip()


def key_figures(nb: NotebookNode) -> dict[str, Any]:
    """Return the figures that the notebook's outputs carry; later ones win."""
    figures: dict[str, Any] = {}
    for cell in code_cells(nb):
        for output in cell.outputs:
            payload = output.get("data", {}).get(FIGURES_MIME)
            figures |= payload["figures"] if payload else {}
    return figures


class Progress:
    """A line that tells how far a notebook is; plain lines when not on a terminal."""

    def __init__(
        self, name: str, total: int, stream: TextIO | None = None, every: float = 30.0
    ) -> None:
        """Show `name` of `total` code cells; plain lines come `every` so many seconds.

        `stream` defaults to standard output.
        """
        self.name, self.total, self.stream = name, total, stream or sys.stdout
        self.live = self.stream.isatty()
        self.every = 0.5 if self.live else every
        self.number = 0
        self.start = time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._show("")
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._show("done" if kind is None else "FAILED", end="\n")

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def cell(self, number: int) -> None:
        """Note that code cell `number` (from 1) has started."""
        self.number = number

    def _repeat(self) -> None:
        while not self.stopped.wait(self.every):
            self._show("")

    def _show(self, state: str, end: str = "") -> None:
        cell, time_ = f"{self.number:>2}/{self.total}", f"{self.seconds:5.0f} s"
        begin, close = ("\r", end) if self.live else ("", "\n")
        line = f"{begin}{self.name:<16} cell {cell} {time_}  {state}".rstrip(" ")
        print(line, end=close, file=self.stream, flush=True)


def run_notebook(
    path: Path,
    overrides: Mapping[str, Any],
    out: Path,
    in_place: bool = False,
    budgets: Mapping[str, float] = BUDGETS,
) -> dict[str, Any]:
    """Execute one notebook, save it and its HTML copy in `out`, return its report.

    `in_place`: if all went well, the notebook itself gets the outputs as well.
    """
    nb = override_parameters(nbformat.read(path, as_version=4), overrides)
    source = nb.cells[parameters_index(nb)].source
    entry = {
        "notebook": path.stem,
        "parameters": parameter_values(source) | dict(overrides),
        "budget_seconds": 60 * budgets[path.stem] if path.stem in budgets else None,
    }
    error = None
    progress = Progress(path.stem, len(code_cells(nb)))
    try:
        with progress:
            execute(nb, out, on_cell=progress.cell)
    except (CellExecutionError, RuntimeError) as problem:
        sources = ["(the kernel did not start)"] + [c.source for c in code_cells(nb)]
        error = failure_message(sources[progress.number], problem)
    entry["seconds"] = round(progress.seconds, 1)
    save_notebook(nb, out / path.name)
    if in_place and not error:
        write_atomic(path, notebook_text(nb))
    entry["status"] = "failed" if error else "ok"
    return entry | {"error": error, "figures": key_figures(nb)}


# --- writing


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def notebook_text(nb: NotebookNode) -> str:
    """Return the notebook as the text of an .ipynb file."""
    return nbformat.writes(nb).rstrip("\n") + "\n"


def save_notebook(nb: NotebookNode, path: Path) -> None:
    """Write the notebook to `path` and an HTML copy beside it."""
    write_atomic(path, notebook_text(nb))
    html, _ = HTMLExporter().from_notebook_node(nb, {"metadata": {"name": path.stem}})
    write_atomic(path.with_suffix(".html"), html)


def new_run_folder(parent: Path, now: datetime) -> Path:
    """Make and return `parent/<timestamp>`, with a number when that one exists."""
    stamp = now.strftime("%Y-%m-%d_%H%M%S")
    for attempt in range(1, 100):
        folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{parent / stamp} and 98 more")


# --- the report


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory (GiB), GPU and the precision used."""
    import torch

    from starling_lib.models import precision

    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "precision": precision(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed versions, Python's first; missing packages are left out."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path) -> str | None:
    """Return the commit of `folder`, with `+changes` when files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True)

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+changes" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        return None


def format_figure(value: Any) -> str:
    """Return a figure for a table: floats with 4 digits, intervals in brackets."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and {"estimate", "low", "high"} <= set(value):
        low, high = format_figure(value["low"]), format_figure(value["high"])
        return f"{format_figure(value['estimate'])} [{low}, {high}]"
    if isinstance(value, list | tuple):
        return ", ".join(format_figure(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table padded so that it also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines
    )


def warnings_of(entry: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the report should know about a notebook that ran."""
    name, budget = entry["notebook"], entry.get("budget_seconds")
    warnings = []
    if budget and entry["seconds"] > budget:
        warnings.append(
            f"{name} took {entry['seconds']:.0f} s, more than its {budget:.0f} s."
        )
    if entry["status"] == "ok" and not entry["figures"]:
        warnings.append(f"{name} reported no key figures.")
    return warnings


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return `report.md`: key figures, times, warnings, machine, versions."""
    entries = report["notebooks"]
    figures = [
        [entry["notebook"], name, format_figure(value)]
        for entry in entries
        for name, value in entry.get("figures", {}).items()
    ]
    times = [
        [entry["notebook"], entry["status"], format_seconds(entry.get("seconds"))]
        + [format_seconds(entry.get("budget_seconds"))]
        for entry in entries
    ]
    facts = [f"{key}: {value}" for key, value in report["hardware"].items() if value]
    versions = [f"{name} {number}" for name, number in report["versions"].items()]
    seeds = sorted({str(seed) for seed in report["seeds"].values()})
    parts = [
        f"# Run of {report['started']}, preset {report['preset']}",
        markdown_table(["notebook", "figure", "value"], figures) if figures else "",
        markdown_table(["notebook", "status", "time", "budget"], times),
        "\n".join(f"Warning: {text}" for e in entries for text in warnings_of(e)),
        f"Seed: {', '.join(seeds) or 'none'}. Commit: {report['commit'] or 'unknown'}.",
        f"Machine: {', '.join(facts)}.",
        f"Versions: {', '.join(versions)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_seconds(seconds: float | None) -> str:
    """Return `seconds` as text, a dash for None."""
    return "-" if seconds is None else f"{seconds:.0f} s"


# --- the command


def read_setting(text: str) -> tuple[str, Any]:
    """Read `NAME=value`; the value is a Python literal, else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=value, not {text!r}")
    return name, literal(value)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small")
    add("--only", nargs="+", default=[], metavar="NN", help="notebooks, e.g. 01 02")
    add("--set", nargs="+", default=[], metavar="NAME=value", type=read_setting)
    add("--in-place", action="store_true", help="also write outputs into the notebooks")
    add(
        "--out", type=Path, default=FOLDER.parent / "runs", help="parent of run folders"
    )
    add("--notebooks", type=Path, default=FOLDER, help="folder of the notebooks")
    options = parser.parse_args(arguments)
    if options.in_place and (options.set or options.preset != "small"):
        parser.error("--in-place keeps the notebooks' parameters: no --preset or --set")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen notebooks; return 0, 1 (a notebook failed) or 2 (bad request)."""
    options = read_arguments(arguments)
    try:
        paths = select_notebooks(options.notebooks, options.only)
        notebooks = {path.stem: nbformat.read(path, as_version=4) for path in paths}
        plan = plan_run(notebooks, options.preset, dict(options.set))
        if options.in_place:
            plan = {name: {} for name in plan}
    except NotebookError as problem:
        print(f"run.py: {problem}", file=sys.stderr)
        return 2
    started = datetime.now()
    out = new_run_folder(options.out, started)
    print(f"{len(paths)} notebooks, preset {options.preset}, into {out}", flush=True)
    report: dict[str, Any] = {
        "started": started.isoformat(" ", "seconds"),
        "preset": options.preset,
        "commit": git_commit(FOLDER),
        "hardware": hardware(),
        "versions": package_versions(),
        "notebooks": [],
    }
    failed = run_all(paths, plan, out, report, options.in_place)
    print(f"\n{report_markdown(report)}", end="")
    return 1 if failed else 0


def run_all(
    paths: list[Path],
    plan: Mapping[str, Any],
    out: Path,
    report: dict[str, Any],
    in_place: bool = False,
) -> bool:
    """Run until one fails; return whether one did. `report` is on disk after each."""
    failed = False
    slow = report["hardware"].get("precision") == "fp32"
    budgets = SLOW_BUDGETS if slow else BUDGETS
    for path in paths:
        if failed:
            report["notebooks"].append({"notebook": path.stem, "status": "skipped"})
        else:
            entry = run_notebook(path, plan[path.stem], out, in_place, budgets)
            report["notebooks"].append(entry)
            failed = entry["status"] == "failed"
            if failed:
                print(f"\n{path.name} failed {entry['error']}\n", file=sys.stderr)
        write_report(report, out)
    return failed


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write `report.json` and `report.md`."""
    report["seeds"] = {
        entry["notebook"]: entry["parameters"]["SEED"]
        for entry in report["notebooks"]
        if "SEED" in entry.get("parameters", {})
    }
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    write_atomic(out / "report.md", report_markdown(report))


if __name__ == "__main__":
    sys.exit(main())
