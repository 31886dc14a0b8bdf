"""Studies: which runs count, the gains by hand, intervals that cover; scripts of both."""

import argparse
import importlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t, ttest_ind, ttest_rel

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
    # One run over the start: its prompts' gains are 0 and 1, one degree of freedom.
    half = t.ppf(0.975, 1) / 2
    assert gain(RUNS, "ppo", "proxy") == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    with pytest.raises(ValueError, match="no finished run of 'awr'"):
        gain(RUNS, "awr", "proxy")


def test_a_run_that_broke_off_is_counted_and_takes_no_part_in_the_means():
    table = summary(RUNS)
    assert table["", "failed"].to_dict() == {"start": 0, "apa": 0, "ppo": 1, "awr": 1}
    assert table.loc["apa", ("", "rate")] == "2e-05"
    assert table["", "seeds"].to_dict() == {"start": 1, "apa": 2, "ppo": 2, "awr": 1}
    assert table.loc["ppo", ("", "kl")] == 1.0
    assert np.isnan(table.loc["awr", ("proxy", "estimate")])
    assert table.loc["start", "gold"].tolist() == [0.0, 0.0, 0.0]


def test_a_table_without_the_start_has_no_gains_yet():
    known, table = summary(RUNS), summary(RUNS[RUNS["method"] != "start"])
    assert table[["proxy", "gold"]].isna().all(axis=None)
    assert list(table) == list(known)
    assert table.loc["apa", ("", "kl")] == known.loc["apa", ("", "kl")]


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


def test_the_start_comes_first_over_which_all_gains_are(study):
    first = next(study.stages(["ppo", "sft"], seeds=3))
    assert [job[0] for job in first] == ["start", "sft", "ppo"]


@pytest.mark.parametrize("name", ["study_apa", "study_reward"])
def test_a_table_of_no_runs_says_how_to_make_them(script, monkeypatch, tmp_path, name):
    study, words = script(name), ["losses"] if name == "study_reward" else []
    monkeypatch.setattr(study, "RESULTS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--table"])
    with pytest.raises(SystemExit, match="runs.jsonl yet: leave out --table to make"):
        study.main()


class Saved:
    """A model that is slow to save, and as transformers writes its config first."""

    def __init__(self, breaks=False):
        self.breaks, self.saves = breaks, 0

    def save_pretrained(self, folder):
        self.saves += 1
        folder.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        time.sleep(0.05)
        if self.breaks:
            raise KeyboardInterrupt
        (folder / "weights").touch()


def test_no_worker_reads_a_start_that_another_has_half_written(
    study, monkeypatch, tmp_path
):
    monkeypatch.setenv("STARLING_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        study.start_folder(Saved(breaks=True), Saved())
    policy, together = Saved(), threading.Barrier(2)

    def worker(_):
        together.wait()
        return (study.start_folder(policy, Saved()) / "weights").exists()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(worker, range(2))) == [True, True]
    assert policy.saves == 1


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


def runs_of_losses(*pairs):
    """Accuracies of (K-wise, pairs) by seed; the other metrics are the same in both."""
    rest = dict.fromkeys(("top1", "kendall_tau", "nll", "ece"), 0.5)
    rows = [
        {"fraction": 1.0, "reading": "eos", "loss": loss, "seed": seed, "accuracy": x}
        for seed, pair in enumerate(pairs)
        for loss, x in zip(("kwise", "pairwise"), pair, strict=False)
    ]
    return pd.DataFrame([row | rest for row in rows])


def test_losses_are_compared_seed_by_seed_with_students_interval(script):
    compare = script("study_reward").compare_losses
    pairs = [
        (0.7, 0.6),
        (0.8, 0.6),
        (0.8, 0.5),
        (0.9,),
    ]  # the last one's is yet to come
    row = compare(runs_of_losses(*pairs)).set_index("metric").loc["accuracy"]
    half = t.ppf(0.975, 2) * 0.1 / 3**0.5
    figures = row[["seeds", "difference", "low", "high"]].tolist()
    assert figures == pytest.approx([3, 0.2, 0.2 - half, 0.2 + half])
    assert compare(runs_of_losses((0.7,))).empty


def test_a_part_of_a_ranking_keeps_all_that_belongs_to_its_responses(script):
    row = {
        "id": "x",
        "responses": ["a", "b", "c"],
        "models": ["A", "B", "C"],
        "finished": [True, False, True],
        "ranks": [1.0, 2.0, 3.0],
    }
    assert script("study_reward").part(row, ended=True) == {
        "id": "x",
        "responses": ["a", "c"],
        "models": ["A", "C"],
        "finished": [True, True],
        "ranks": [1.0, 3.0],
    }


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


def test_a_crossed_interval_of_one_run_is_students_over_items():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 40))
    expected = ttest_rel(ours, theirs).confidence_interval(0.9)
    found = crossed_interval(ours, theirs, level=0.9)
    assert found == pytest.approx((np.mean(ours - theirs), *expected))
    with pytest.raises(ValueError, match="items must be the same"):
        crossed_interval(ours, ours[:3])


def test_a_crossed_interval_of_equal_items_is_welchs_over_runs():
    a, b = np.random.default_rng(1).normal(size=5), np.array([0.1, 0.3, 2.0])
    expected = ttest_ind(a, b, equal_var=False).confidence_interval()
    found = crossed_interval(*(np.repeat(x[:, None], 7, axis=1) for x in (a, b)))
    assert found == pytest.approx((a.mean() - b.mean(), *expected))


def test_noise_of_runs_is_not_counted_among_the_items_again():
    """Runs' means 1.5 and 4.5: 4.5/2. Items' 2 and 4: (2 − residual 1/2)/2."""
    runs, items = 2.25, 0.75
    half = t.ppf(0.975, (runs + items) ** 2 / (runs**2 + items**2)) * 3**0.5
    found = crossed_interval([[1, 2], [3, 6]], [[0, 0]])
    assert found == pytest.approx((3.0, 3 - half, 3 + half))


def test_items_that_differ_less_than_their_noise_count_as_none():
    """Runs' means 1 and −1, items' 0 and 0: without a floor the items would be at −2."""
    found = crossed_interval([[3, -1], [-3, 1]], [[0, 0]])
    assert found.high == pytest.approx(t.ppf(0.975, 1))


def test_one_item_shows_no_spread():
    found = crossed_interval([[1.0], [3.0]], [[1.0]])
    assert found.estimate == 1 and np.isnan(found[1:]).all()


def test_what_both_methods_share_on_an_item_cancels():
    rng = np.random.default_rng(1)
    hard = 100 * rng.normal(size=30)  # prompts differ far more than methods
    a, b = (hard + shift + 0.1 * rng.normal(size=(5, 30)) for shift in (1.0, 0.0))
    found = crossed_interval(a, b)
    assert 0.9 < found.low < found.estimate < found.high < 1.1


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_runs", "of_items"), [(0.3, 0.4), (0.0, 0.0)])
def test_crossed_intervals_cover_the_truth_as_often_as_they_say(
    seeds, of_runs, of_items
):
    """Where runs differ 1.96 in place of t holds it in 0.89; where nothing but noise
    does, counting that twice would in 0.99 and more."""
    normal, hits = np.random.default_rng(2).normal, 0
    for _ in range(800):
        runs, items = normal(size=(2, seeds, 1)), normal(size=(2, 1, 37))
        noise = 0.5 * normal(size=(2, seeds, 37))
        found = crossed_interval(*(of_runs * runs + of_items * items + noise))
        hits += found.low <= 0.0 <= found.high
    assert 0.93 < hits / 800 < 0.975
