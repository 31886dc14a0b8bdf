"""The notebook runner, on small hand-made notebooks with real kernels."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import nbformat
import psutil
import pytest
import run
from nbclient.exceptions import CellExecutionError

PARAMETERS = 'PRESET = "small"\nSEED = 0\nSTEPS: int = 3'
FIGURES = """\
class Figures:
    def _repr_mimebundle_(self, include=None, exclude=None):
        figures = {"preset": PRESET, "twice_steps": 2 * STEPS}
        payload = {"notebook": "here", "figures": figures}
        return {"text/plain": "figures", MIME: payload}

Figures()""".replace("MIME", repr(run.FIGURES_MIME))


def notebook(
    *sources: str, parameters: str | None = PARAMETERS
) -> nbformat.NotebookNode:
    """A notebook of a heading, a parameters cell (unless None) and code cells."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# By hand")])
    if parameters is not None:
        nb.cells.append(nbformat.v4.new_code_cell(parameters))
        nb.cells[-1].metadata["tags"] = ["parameters"]
    nb.cells += [nbformat.v4.new_code_cell(source) for source in sources]
    return nb


def write(folder: Path, name: str, *sources: str, **kwargs) -> Path:
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook(*sources, **kwargs), path)
    return path


@pytest.fixture
def machine(monkeypatch):
    """Hardware without loading torch."""
    facts = {"cpu": "Abacus 2", "cores": 2, "gpu": None, "precision": "fp32"}
    monkeypatch.setattr(run, "hardware", lambda: facts)


def the_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


# --- choosing notebooks and parameters


def test_notebooks_come_in_order_and_without_a_sixth(tmp_path):
    for name in ("03_c", "01_a", "06_more", "02_b", "05_e", "04_d"):
        write(tmp_path, name)
    names = [path.stem for path in run.select_notebooks(tmp_path)]
    assert names == ["01_a", "02_b", "03_c", "04_d", "05_e"]
    assert [p.stem for p in run.select_notebooks(tmp_path, ["06", "01"])] == [
        "01_a",
        "06_more",
    ]
    with pytest.raises(run.NotebookError, match=r"no notebook 07_\*\.ipynb"):
        run.select_notebooks(tmp_path, ["07"])


def test_parameter_values_reads_literals_and_keeps_other_code():
    source = (
        '"""Settings."""\nPRESET = "small"\nA = B = -1\nC: list = [1]\nD = f(2)\nE: int'
    )
    assert run.parameter_values(source) == {
        "PRESET": "small",
        "A": -1,
        "B": -1,
        "C": [1],
        "D": "f(2)",
    }


def test_override_inserts_a_cell_right_after_the_parameters_and_copies():
    nb = notebook("print(STEPS)")
    changed = run.override_parameters(nb, {"PRESET": "tiny", "STEPS": 5})
    assert [cell.source for cell in changed.cells[2:]] == [
        "# set by the runner\nPRESET = 'tiny'\nSTEPS = 5",
        "print(STEPS)",
    ]
    assert len(nb.cells) == 3
    nbformat.validate(changed)
    assert run.override_parameters(nb, {}) == nb


@pytest.mark.parametrize(
    ("nb", "values", "message"),
    [
        (notebook(parameters=None), {}, "tagged 'parameters', but 0 are"),
        (
            notebook(),
            {"STEP": 1},
            "not in the parameters cell: STEP .*PRESET, SEED, STEPS",
        ),
        (notebook(parameters="# none"), {"SEED": 1}, "it assigns nothing"),
    ],
)
def test_override_refuses_what_would_change_nothing(nb, values, message):
    with pytest.raises(run.NotebookError, match=message):
        run.override_parameters(nb, values)


def test_override_refuses_two_tagged_cells():
    nb = notebook("SEED = 1")
    nb.cells[-1].metadata["tags"] = ["parameters"]
    with pytest.raises(run.NotebookError, match="but 2 are"):
        run.override_parameters(nb, {"SEED": 2})


def test_a_setting_goes_to_the_notebooks_that_have_it():
    notebooks = {"01": notebook(), "02": notebook(parameters='PRESET = "small"')}
    assert run.plan_run(notebooks, "tiny", {"STEPS": 1}) == {
        "01": {"PRESET": "tiny", "STEPS": 1},
        "02": {"PRESET": "tiny"},
    }
    with pytest.raises(
        run.NotebookError, match="no chosen notebook has a parameter STEP$"
    ):
        run.plan_run(notebooks, "tiny", {"STEP": 1})


def test_settings_are_python_literals_or_strings():
    settings = run.read_arguments(["--set", "A=1e-5", "B=[1, 2]", "C=a=b"]).set
    assert settings == [("A", 1e-5), ("B", [1, 2]), ("C", "a=b")]


@pytest.mark.parametrize("text", ["A", "=1", "a b=1"])
def test_a_setting_without_a_name_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        run.read_arguments(["--set", text])
    assert "expected NAME=value" in capsys.readouterr().err


# --- executing


def test_the_kernel_is_this_python_in_the_given_folder(tmp_path, monkeypatch):
    # A user's own kernel of the same name must not be picked up.
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    bad = {"argv": ["false"], "display_name": "bad", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(bad))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    nb = notebook(
        "import os, sys\n(sys.executable, os.getcwd(), os.environ['MPLBACKEND'])"
    )
    run.execute(nb, tmp_path)
    shown = nb.cells[-1].outputs[0].data["text/plain"]
    assert eval(shown) == (sys.executable, str(tmp_path), run.INLINE_FIGURES)


def test_a_failing_notebook_keeps_what_it_did_and_loses_what_was_there(tmp_path):
    nb = notebook("print('before')", "1 / 0", "print('after')")
    nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text="of an earlier run")]
    nb.cells[-1].execution_count = 7
    cells = []
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run.execute(nb, tmp_path, on_cell=cells.append)
    assert cells == [1, 2, 3]
    assert nb.cells[2].outputs[0].text == "before\n"
    assert nb.cells[3].outputs[0].ename == "ZeroDivisionError"
    assert nb.cells[4].outputs == []
    assert nb.cells[4].execution_count is None


def test_a_dead_kernel_is_an_error_not_a_hang(tmp_path):
    path = write(tmp_path, "01_a", "x = 1", "import os; os._exit(1)")
    entry = run.run_notebook(path, {}, tmp_path)
    assert entry["status"] == "failed"
    assert "import os; os._exit(1)" in entry["error"]
    assert "out of memory?" in entry["error"]


def test_threads_follow_a_restricted_machine_only(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run, "available_cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert run.kernel_environment()["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert "OMP_NUM_THREADS" not in run.kernel_environment()
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run.kernel_environment()["OMP_NUM_THREADS"] == "1"


def test_of_several_gpus_a_kernel_sees_the_first_or_those_chosen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.kernel_environment()["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run.kernel_environment()["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("9900000 100000", 8)]
)
def test_cores_respect_the_container_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert run.available_cores() == cores


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_one_line_on_a_terminal():
    stream = Terminal()
    with run.Progress("01_a", 3, stream) as progress:
        progress.cell(3)
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert re.search(r"\r01_a +cell +0/3 +0 s\r01_a +cell +3/3 +0 s  done\n$", text)


def test_progress_prints_plain_lines_elsewhere_and_tells_of_failure():
    stream = io.StringIO()
    with (
        pytest.raises(KeyError),
        run.Progress("01_a", 3, stream, every=0.01) as progress,
    ):
        progress.cell(2)
        progress.stopped.wait(0.2)
        raise KeyError
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert len(lines) > 3
    assert lines[0].endswith("0/3     0 s")
    assert lines[-1].endswith("2/3     0 s  FAILED")


# --- reports


def test_write_atomic_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "report.md"
    run.write_atomic(path, "λ = 1\n")
    assert path.read_text(encoding="utf-8") == "λ = 1\n"
    with pytest.raises(UnicodeEncodeError):
        run.write_atomic(path, "new\ud800")
    assert path.read_text(encoding="utf-8") == "λ = 1\n"
    assert os.listdir(tmp_path) == ["report.md"]


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    now = datetime(2024, 3, 1, 12, 30, 5)
    names = [run.new_run_folder(tmp_path / "runs", now).name for _ in range(3)]
    assert names == [f"2024-03-01_123005{number}" for number in ("", "-2", "-3")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.81234, "0.8123"),
        (12, "12"),
        (True, "True"),
        ("a|b", "a\\|b"),
        ({"estimate": 1.0, "low": 0.51239, "high": 2.0}, "1 [0.5124, 2]"),
        ([0.5, 2], "0.5, 2"),
    ],
)
def test_figures_read_well(value, shown):
    assert run.format_figure(value) == shown


def test_report_names_figures_times_and_overruns():
    ok = {"status": "ok", "budget_seconds": 90, "figures": {"tau": 0.92}}
    report = {
        "started": "2024-03-01 12:30:05",
        "preset": "tiny",
        "commit": None,
        "seeds": {"01_nectar": 0, "02_b": 0},
        "hardware": {"cpu": "Abacus 2", "gpu": None},
        "versions": {"python": "3.11.7"},
        "notebooks": [
            {"notebook": "01_nectar", "seconds": 91.0} | ok,
            {"notebook": "02_b", "seconds": 89.0} | ok | {"figures": {}},
            {"notebook": "03_c", "status": "skipped"},
        ],
    }
    text = run.report_markdown(report)
    assert "| 01_nectar | tau    | 0.92  |" in text
    assert "| 01_nectar | ok      | 91 s | 90 s   |" in text
    assert "| 03_c      | skipped | -    | -      |" in text
    assert "Warning: 01_nectar took 91 s, more than its 90 s." in text
    assert "Warning: 02_b reported no key figures." in text
    assert "02_b took" not in text
    assert "Seed: 0. Commit: unknown." in text
    assert "cpu: Abacus 2." in text


def test_versions_start_with_python_and_skip_what_is_missing():
    versions = run.package_versions(["nbformat", "no-such-package"])
    assert list(versions) == ["python", "nbformat"]
    assert versions["nbformat"] == nbformat.__version__


def test_commit_outside_a_clone_is_none(tmp_path):
    assert run.git_commit(tmp_path) is None


# --- the command


def test_a_run_leaves_notebooks_pages_and_reports(tmp_path, machine, capsys):
    write(tmp_path, "01_a", FIGURES)
    write(tmp_path, "02_b", FIGURES, parameters='PRESET = "small"\nSTEPS = 3')
    places = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "runs")]
    chosen = ["--only", "01", "02", "--set", "STEPS=21", "SEED=4"]
    assert run.main([*places, *chosen, "--preset", "tiny"]) == 0
    out = the_run(tmp_path)
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{kind}" for name in ("01_a", "02_b") for kind in ("ipynb", "html")
    } | {"report.json", "report.md"}
    report = json.loads((out / "report.json").read_text())
    first, second = report["notebooks"]
    assert first["figures"] == {"preset": "tiny", "twice_steps": 42}
    assert first["parameters"] == {"PRESET": "tiny", "SEED": 4, "STEPS": 21}
    assert second["parameters"] == {"PRESET": "tiny", "STEPS": 21}
    assert report["seeds"] == {"01_a": 4}
    assert report["hardware"]["cpu"] == "Abacus 2"
    assert "twice_steps" in (out / "02_b.html").read_text()
    printed = capsys.readouterr().out
    assert (out / "report.md").read_text() in printed
    assert re.search(r"^02_b +cell +3/3 .*done$", printed, flags=re.MULTILINE)


def test_a_machine_without_fast_bf16_has_more_time(tmp_path, machine, monkeypatch):
    times = {}

    def note(path, overrides, out, in_place, budgets):
        times[path.stem] = budgets
        return {"notebook": path.stem, "status": "ok", "seconds": 1, "figures": {}}

    monkeypatch.setattr(run, "run_notebook", note)
    places = ["--out", str(tmp_path / "runs"), "--only", "02"]
    assert run.main(places) == 0
    assert times["02_reward_model"] == run.SLOW_BUDGETS != run.BUDGETS  # it is fp32
    assert sum(run.SLOW_BUDGETS.values()) <= 36 and sum(run.BUDGETS.values()) <= 20


def test_a_run_stops_at_the_first_failure_and_says_so(tmp_path, machine, capsys):
    write(tmp_path, "01_a", FIGURES, "raise SystemError('lost')")
    write(tmp_path, "02_b", FIGURES)
    places = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert run.main([*places, "--only", "01", "02"]) == 1
    out = the_run(tmp_path)
    saved = nbformat.read(out / "01_a.ipynb", as_version=4)
    assert run.key_figures(saved) == {"preset": "small", "twice_steps": 6}
    assert not (out / "02_b.ipynb").exists()
    statuses = [
        (entry["notebook"], entry["status"])
        for entry in json.loads((out / "report.json").read_text())["notebooks"]
    ]
    assert statuses == [("01_a", "failed"), ("02_b", "skipped")]
    printed = capsys.readouterr()
    assert "01_a.ipynb failed in this cell:\n\nraise SystemError('lost')" in printed.err
    assert "\x1b" not in printed.err
    assert re.search(r"02_b +\| skipped", printed.out)


def test_in_place_writes_outputs_without_an_extra_cell(tmp_path, machine):
    path = write(tmp_path, "01_a", FIGURES)
    before = nbformat.read(path, as_version=4)
    places = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert run.main([*places, "--only", "01", "--in-place"]) == 0
    after = nbformat.read(path, as_version=4)
    assert [cell.source for cell in after.cells] == [c.source for c in before.cells]
    assert run.key_figures(after) == {"preset": "small", "twice_steps": 6}


@pytest.mark.parametrize("also", [["--set", "SEED=1"], ["--preset", "tiny"]])
def test_in_place_refuses_overrides(also, capsys):
    with pytest.raises(SystemExit):
        run.read_arguments(["--in-place", *also])
    assert "--in-place keeps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--set", "STEP=1"], "no chosen notebook has a parameter STEP"),
        (["--only", "02"], "02_b: not in the parameters cell: PRESET"),
        (["--only", "01", "03"], "no notebook 03_"),
    ],
)
def test_a_bad_request_runs_nothing(tmp_path, settings, message, capsys):
    write(tmp_path, "01_a")
    write(tmp_path, "02_b", parameters="SEED = 0")
    places = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert run.main([*places, "--only", "01", *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_reports_and_leaves_no_kernel(tmp_path, stop):
    started = "import os, time\nopen('started', 'w').write(str(os.getpid()))"
    write(tmp_path, "01_a", FIGURES, f"{started}\ntime.sleep(600)")
    command = [sys.executable, run.__file__, "--notebooks", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--only", "01"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (marks := list(tmp_path.glob("runs/*/started"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(stop)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Kernel died (interrupted, or out of memory?)" in error
    assert "Traceback" not in error
    (entry,) = json.loads((marks[0].parent / "report.json").read_text())["notebooks"]
    assert entry["status"] == "failed"
    assert entry["figures"] == {"preset": "small", "twice_steps": 6}
    assert not psutil.pid_exists(int(marks[0].read_text()))


@pytest.mark.slow
def test_a_run_stopped_while_its_kernel_starts_says_so(tmp_path):
    write(tmp_path, "01_a", FIGURES)
    mark = tmp_path / "started"
    # Imported by every Python that starts; kernels stop here before they answer.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "if 'ipykernel_launcher' in sys.orig_argv:\n"
        f"    open({str(mark)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, run.__file__, "--notebooks", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--only", "01"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )
    deadline = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "(the kernel did not start)" in error
    assert "Kernel died (interrupted, or out of memory?)" in error
    assert "nbclient" not in error
    assert not psutil.pid_exists(int(mark.read_text()))
