"""Studies: which runs count, the gains by hand, intervals that cover; scripts of both."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from starling_lib.journal import line_of, read_jsonl
from starling_lib.statistics import crossed_interval
from starling_lib.studies import gain, read_runs, summary


def run(method, rate=0.0, seed=0, proxy=(0.0, 0.0), gold=(0.0, 0.0)):
    figures = {"kl": 1.0 + seed, "length": 9.0, "eos_rate": 0.5, "distinct_2": 0.9}
    by_prompt = {"proxy": list(proxy), "gold": list(gold)}
    keys = {"method": method, "learning_rate": rate, "seed": seed}
    return {**keys, **figures, "by_prompt": by_prompt}


def broken(method, rate, seed):
    """As the study writes a run whose loss was not finite: no figures at all."""
    keys = {"method": method, "learning_rate": rate, "seed": seed}
    return {**keys, "failed": "loss is nan"}


RUNS = pd.DataFrame(
    [
        run("start", proxy=(1.0, 2.0), gold=(0.0, 1.0)),
        run("apa", 2e-5, 0, (2.0, 4.0), (1.0, 1.0)),
        run("apa", 2e-5, 1, (4.0, 4.0), (0.0, 2.0)),
        run("ppo", 1e-5, 0, (1.0, 3.0)),
        broken("ppo", 1e-5, 1),
        broken("awr", 1e-5, 0),
    ]
)


def test_gains_by_hand():
    assert gain(RUNS, "apa", "proxy").estimate == pytest.approx(3.5 - 1.5)
    assert gain(RUNS, "apa", "proxy", over="ppo").estimate == pytest.approx(3.5 - 2.0)
    # One run over the start: its prompts' gains are 0 and 1, and so are the extremes.
    assert gain(RUNS, "ppo", "proxy") == (0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="no finished run of 'awr'"):
        gain(RUNS, "awr", "proxy")


def test_a_run_that_broke_off_is_counted_and_takes_no_part_in_the_means():
    table = summary(RUNS)
    assert table["", "failed"].to_dict() == {"start": 0, "apa": 0, "ppo": 1, "awr": 1}
    assert table.loc["apa", ("", "rate")] == "2e-05"
    assert table["", "seeds"].to_dict() == {"start": 1, "apa": 2, "ppo": 2, "awr": 1}
    assert table.loc["ppo", ("", "kl")] == 1.0
    assert np.isnan(table.loc["awr", ("proxy", "estimate")])
    assert table.loc["start", ("gold", "estimate")] == 0.0


def test_lines_that_a_kill_cut_off_are_left_out_and_doubles_are_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    assert list(read_runs(path).columns) == ["method", "seed"]
    whole = json.dumps(run("apa"))
    path.write_text(f"{whole}\n{whole[:40]}")
    assert len(read_runs(path)) == 1
    path.write_text(f"{whole}\n{whole}\n")
    with pytest.raises(ValueError, match="method=apa, seed=0 stands twice"):
        read_runs(path)
    path.write_text('{"method": "apa"}\n')
    with pytest.raises(ValueError, match="runs.jsonl, line 1: no seed"):
        read_runs(path)


def test_samples_may_hold_what_other_readers_take_for_an_end_of_line(tmp_path):
    path, texts = tmp_path / "runs.jsonl", ["a\u2028b", "c\x85d", "e\x1cf\r\n"]
    rows = [run("apa", seed=i) | {"samples": [text]} for i, text in enumerate(texts)]
    path.write_bytes(b"".join(map(line_of, rows)))
    found = read_runs(path)
    assert [samples for (samples,) in found["samples"]] == texts


def test_only_a_last_line_may_be_torn_wherever_it_was_cut(tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = line_of(run("apa"))
    torn = b'{"method": "ppo", "samples": "print {x}'
    for end in (torn, torn + "é".encode()[:1], whole[:-2]):
        path.write_bytes(whole + end)
        assert list(read_runs(path)["method"]) == ["apa"]
        path.write_bytes(end + b"\n" + whole)
        with pytest.raises(ValueError, match="runs.jsonl, line 1: not JSON"):
            read_runs(path)
    path.write_bytes(whole[:-1])  # whole, but for its newline
    assert len(read_runs(path)) == 1
    path.write_bytes(whole + b"\n[]\n")
    with pytest.raises(ValueError, match="runs.jsonl, line 3: expected an object"):
        read_runs(path)


# --- the study that writes such files


@pytest.fixture
def script(monkeypatch):
    """A script of tests/benchmarks by its name, as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module


@pytest.fixture
def study(script, monkeypatch, tmp_path):
    study_apa = script("study_apa")
    monkeypatch.setattr(study_apa, "RESULTS", tmp_path / "policies.jsonl")
    return study_apa


def test_an_ablation_without_its_base_says_what_to_run_first(study):
    with pytest.raises(SystemExit, match="^whitened: .* policies.jsonl .*apa-small"):
        study.check_start(["whitened", "ppo"])
    study.check_start(["whitened", "apa-small"])
    study.check_start(["ppo"])
    study.RESULTS.write_bytes(line_of(run("apa-small", 4e-5)))
    study.check_start(["whitened"])
    *_, ablation = study.stages(["whitened"], seeds=1)
    assert [(job[0], job[2]) for job in ablation] == [("whitened", (4e-5,))]


def test_the_papers_ppo_differs_from_its_apa_in_the_loss_alone(study):
    settings, rates = study.METHODS["apa-paper"]
    assert study.METHODS["ppo-paper"] == ({**settings, "loss_type": "ppo"}, rates)


def test_rloos_kl_is_one_of_whole_responses(study):
    """Two responses, 10 and 30 tokens: log-ratios sum to 1 and 5, 0.15 a token."""
    log = {"reward": 0.5, "kl": 6 / 40, "completions/mean_length": 20.0}
    others = [{"loss": 0.1, "num_tokens": 9.0}, {"train_runtime": 1.0}]
    assert study.rloo_curve([log, *others]) == [{"reward": 0.5, "kl": 3.0}]


# --- the study of reward models


def test_a_study_goes_on_after_a_kill_that_tore_a_line(script, monkeypatch, tmp_path):
    study, path, made = script("study_reward"), tmp_path / "runs.jsonl", []
    names = ("accuracy", *(f"accuracy_{kind}" for kind in study.KINDS), "nll", "ece")

    def train(options, *run):
        made.append(run[2])
        return dict.fromkeys(names, 0.5) | {"nll": None}

    monkeypatch.setattr(study, "RESULTS", path)
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(sys, "argv", ["study_reward.py", "endings"])
    study.main()
    path.write_bytes(path.read_bytes()[:-20])
    study.main()
    study.main()
    assert made == ["eos", "text", "apart", "apart"]
    assert [row["reading"] for row in read_jsonl(path)] == ["eos", "text", "apart"]


def test_what_is_no_number_is_kept_as_none(script, monkeypatch):
    """Of the first prompt's three pairs two are right; the second has no scores."""
    from starling_lib import metrics

    study, count, asked = script("study_reward"), metrics.reward_metrics, []
    monkeypatch.setattr(
        metrics, "reward_metrics", lambda x: asked.append(x) or count(x)
    )
    scores = np.array([[3.0, 1.0, 2.0], [np.nan] * 3])
    test = {"finished": [[True, True, False], [False, False, True]]}
    found = study.held_out(scores, test)
    assert len(asked) == 1
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["accuracy_both_ended"], found["accuracy_both_cut"]) == (1.0, None)
    line_of(found)  # raises at NaN


# --- benchmarks: measurements in processes of their own

WORKER = """
import json, os, sys
print("what libraries print")
if "ill" in sys.argv:
    sys.exit("no memory")
print(json.dumps({"pid": os.getpid(), "given": sys.argv[1:]}))
"""


def test_a_worker_is_a_process_whose_last_line_counts(script, tmp_path):
    turns, path = script("turns"), tmp_path / "worker.py"
    path.write_text(WORKER)
    found = turns.run_worker(str(path), "ours", "--prompts", 4)
    assert found["given"] == ["--worker", "ours", "--prompts", "4"]
    assert found["pid"] != os.getpid()
    with pytest.raises(SystemExit, match="^ill failed:\nno memory"):
        turns.run_worker(str(path), "ill")


def test_variants_take_turns_and_all_is_kept_after_each(script, capsys):
    turns, kept = script("turns"), []
    runs = {"a": [{"seconds": 9.0}], "c": []}

    def keep():
        kept.append("".join(name * len(each) for name, each in runs.items()))

    turns.take_turns(runs, "ab", 2, lambda _: {"seconds": 1.25}, keep, "{seconds} s")
    assert kept == ["ab", "aab", "aabb"]
    assert runs["a"][0] == {"seconds": 9.0} and runs["c"] == []
    told = ["1/2 b: 1.25 s", "2/2 a: 1.25 s", "2/2 b: 1.25 s"]
    assert capsys.readouterr().out.splitlines() == told


def test_results_of_another_machine_or_size_are_not_replaced(
    script, monkeypatch, tmp_path
):
    turns, path = script("turns"), tmp_path / "studies" / "speed.json"
    runs = {"a": [{"seconds": 1.0}], "b": []}
    assert turns.earlier_results(path, False, size=4) == {}
    turns.write_results(path, "make it", {"size": 4}, rows=[], runs=runs)
    before = turns.earlier_results(path, False, size=4)
    assert list(before) == [
        *("date", "command", "machine", "precision", "size", "rows", "runs")
    ]
    assert before["runs"] == runs
    with pytest.raises(SystemExit, match="with size 4, this is 8: --fresh replaces"):
        turns.earlier_results(path, False, size=8)
    monkeypatch.setattr(turns, "machine", lambda: "a laptop")
    with pytest.raises(SystemExit, match="this is a laptop: --fresh replaces"):
        turns.earlier_results(path, False, size=4)
    assert turns.earlier_results(path, True, size=4) == {}


def test_a_machine_is_named_with_what_makes_bf16_fast(script, monkeypatch):
    turns = script("turns")
    able = {"avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert turns.machine().endswith(" cores, avx512_bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert turns.machine().endswith(" cores")


def test_a_table_is_markdown(script):
    found = script("turns").markdown(["what", "GiB"], [("ours", "1.5"), ("theirs", "")])
    assert found == "| what | GiB |\n| --- | --- |\n| ours | 1.5 |\n| theirs |  |"


@pytest.mark.parametrize(
    "name, size, figure",
    [
        ("bench_reward", "prompts", "prompts_per_second"),
        ("bench_rollout", "responses", "seconds"),
    ],
)
def test_both_benchmarks_keep_each_precision_apart(
    script, monkeypatch, tmp_path, name, size, figure
):
    bench, of_all = script(name), ("gflops", "matmul_gflops", "samples_per_second")
    monkeypatch.setattr(script("turns"), "RESULTS", tmp_path)
    options = argparse.Namespace(fresh=False, learn=0, data="toy", **{size: 16})
    variant = next(iter(bench.VARIANTS))
    rest = ({},) if size == "prompts" else ()
    for seconds, precision in enumerate(("fp32", "bf16"), 2):
        monkeypatch.setenv("STARLING_PRECISION", precision)
        one = dict.fromkeys((figure, "peak_gib", *of_all), float(seconds))
        bench.write(options, {variant: [one]}, *rest)
        found = bench.measured(options)
        assert (found[0] if rest else found) == {variant: [one]}
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setenv("STARLING_PRECISION", "fp32")
    found = bench.measured(options)
    assert (found[0] if rest else found)[variant][0][figure] == 2


def test_a_profile_of_trls_variant_is_of_trls_trainer(script, monkeypatch):
    bench, asked = script("bench_reward"), []

    class Trainer:
        def train(self):
            pass

    def make(variant, *rest, **changes):
        asked.append(variant)
        return Trainer()

    monkeypatch.setattr(bench, "trl_trainer", make)
    assert bench.maker("shared-4") is bench.our_trainer
    assert bench.profile("trl-6", "nectar_mini", 1).startswith("| operation |")
    assert asked == ["trl-6"]


def test_all_that_a_profile_times_is_there(script):
    for owner, name, _ in script("bench_rollout").parts():
        assert callable(getattr(owner, name))


# --- crossed intervals


def test_a_crossed_interval_of_one_run_is_the_bootstrap_over_items():
    items = np.random.default_rng(0).normal(size=40)
    found = crossed_interval(items, np.zeros(40), resamples=20_000)
    spread = items.std() / np.sqrt(40)
    assert found.estimate == pytest.approx(items.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    with pytest.raises(ValueError, match="items must be the same"):
        crossed_interval(items, items[:3])


def test_what_both_methods_share_on_an_item_cancels():
    rng = np.random.default_rng(1)
    hard = 100 * rng.normal(size=30)  # prompts differ far more than methods
    a, b = (hard + shift + 0.1 * rng.normal(size=(5, 30)) for shift in (1.0, 0.0))
    found = crossed_interval(a, b)
    assert 0.9 < found.low < found.estimate < found.high < 1.1


def test_intervals_cover_the_truth_when_seeds_and_items_both_vary():
    rng, hits, trials = np.random.default_rng(2), 0, 200
    for trial in range(trials):
        runs, items = rng.normal(size=(8, 1)), rng.normal(size=(1, 30))
        values = runs + items + rng.normal(size=(8, 30))
        found = crossed_interval(values, np.zeros((1, 30)), resamples=300, seed=trial)
        hits += found.low <= 0.0 <= found.high
    # A bootstrap over items alone covers about half of the time here.
    assert 0.87 <= hits / trials <= 1.0
