"""Presets that fit the machine, and artefacts that are made once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_layers import MODULES, PACKAGE, own_imports
from transformers import ProgressCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils.notebook import NotebookProgressCallback

from starling_lib import models, recipes
from starling_lib.checkpoints import MARKER
from starling_lib.recipes import KeyFigures, keep, load_settings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a machine of known speed."""
    monkeypatch.setenv("STARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "matmul_gflops", lambda: 1000.0)
    return tmp_path / "cache"


# --- presets


def test_a_slow_machine_gets_the_smaller_sizes_and_nothing_else(monkeypatch):
    fast = load_settings("small")
    monkeypatch.setattr(models, "matmul_gflops", lambda: 50.0)
    slow = load_settings("small")
    assert (fast.reduced, slow.reduced) == (False, True)
    assert slow.gflops == 50
    assert slow.apa["rollout_batch_size"] < fast.apa["rollout_batch_size"]
    assert slow.apa["learning_rate"] == fast.apa["learning_rate"]
    assert slow.model == fast.model


def test_overrides_replace_single_keys_of_a_stage():
    plain, changed = load_settings("tiny"), load_settings("tiny", apa={"apa_lambda": 9})
    assert changed.apa == plain.apa | {"apa_lambda": 9}
    assert load_settings("tiny", data="somewhere").data == "somewhere"


def test_mistakes_in_presets_are_named(tmp_path):
    with pytest.raises(ValueError, match="no preset 'smal': choose from small, tiny"):
        load_settings("smal")
    with pytest.raises(ValueError, match="modell: no such key; did you mean 'model'"):
        load_settings("tiny", modell="x")
    with pytest.raises(ValueError, match="apa.base='trl': choose 'starling' or"):
        load_settings("tiny", apa={"base": "trl"}).apa_config(tmp_path)


def test_the_fingerprint_covers_what_decides_the_weights(monkeypatch, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("one")
    base = {"data": str(data)}
    first = load_settings("tiny", **base)
    same = load_settings("tiny", **base, evaluation={"samples": 99})
    assert first.fingerprint("tuned_policy") == same.fingerprint("tuned_policy")
    policy_only = load_settings("tiny", **base, apa={"apa_lambda": 7})
    assert first.fingerprint("reward_model") == policy_only.fingerprint("reward_model")
    others = [
        policy_only,
        load_settings("tiny", seed=1, **base),
        load_settings("tiny", half="B", **base),
        load_settings("tiny", **base, model="other"),
        load_settings("tiny", **base, rows=3),
        load_settings("tiny", **base, reward={"learning_rate": 1}),
    ]
    marks = {settings.fingerprint("tuned_policy") for settings in [first, *others]}
    monkeypatch.setenv("STARLING_PRECISION", "fp16")
    marks.add(first.fingerprint("tuned_policy"))
    data.write_text("two")
    marks.add(first.fingerprint("tuned_policy"))
    assert len(marks) == len(others) + 3


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.parquet"])
def test_the_fingerprint_covers_every_kind_of_file_in_a_folder(tmp_path, name):
    marks = set()
    for content in ("one", "two"):
        (tmp_path / name).write_text(content)
        settings = load_settings("tiny", data=str(tmp_path))
        marks.add(settings.fingerprint("reward_model"))
    assert len(marks) == 2


def test_the_fingerprint_tells_hub_ids_and_retrained_folders_apart(tmp_path):
    sets = [load_settings("tiny", data=name) for name in ("one/set", "other/set")]
    assert len({settings.fingerprint("reward_model") for settings in sets}) == 2
    model, marks = load_settings("tiny", model=str(tmp_path)), set()
    for content in ("before", "after"):
        (tmp_path / "chat_template.jinja").write_text(content)
        marks.add(model.fingerprint("reward_model"))
    assert len(marks) == 2


# What modules of TRAINING_CODE import that decides no weights of a preset.
BESIDE_TRAINING = {
    "audit": "statistics of rankings, which `rankings` hands on",
    "checkpoints": "saves and resumes what others compute",
    "journal": "reads and writes files",
    "metrics": "figures that are logged",
    "pessimism": "a reward that no preset trains on, which `reward` hands on",
    "released": "reads the released models, which no preset begins from",
    "sharding": "FSDP, which presets do not use",
}


def test_the_fingerprint_covers_all_code_that_trains():
    code = set(recipes.TRAINING_CODE)
    sources = [(PACKAGE / f"{name}.py").read_text("utf-8") for name in code]
    imported = set().union(*map(own_imports, sources)) & set(MODULES)
    assert imported - code == set(BESIDE_TRAINING)


@pytest.mark.parametrize("rows", [0, -1])
def test_rankings_of_no_rows_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows={rows}: give a number above 0"):
        recipes.first_rankings("nectar_mini", "train", rows)
    assert len(recipes.first_rankings("nectar_mini", "train", 2)) == 2


# --- artefacts


def builder(calls, fail=False):
    def build(folder):
        calls.append(sorted(path.name for path in folder.iterdir()))
        (folder / "weights").write_text("w")
        (folder / "checkpoint-3").mkdir(exist_ok=True)
        if fail:
            raise KeyboardInterrupt

    return build


def test_an_artefact_is_made_once_and_its_checkpoints_go(capsys):
    settings, calls = load_settings("tiny"), []
    folder = keep("reward_model", settings, builder(calls), "(a minute)")
    assert (
        "none yet for these settings: making it (a minute)" in capsys.readouterr().out
    )
    assert keep("reward_model", settings, builder(calls)) == folder
    assert "re-using" in capsys.readouterr().out
    assert calls == [[]]
    names = {path.name for path in folder.iterdir()}
    assert names == {"weights", "seconds.json", MARKER}
    keep("reward_model", load_settings("tiny", seed=5), builder(calls))
    assert len(calls) == 2
    keep("reward_model", settings, builder(calls), fresh=True)
    assert calls[2] == []


def test_an_interrupted_build_goes_on_in_its_folder(capsys):
    settings, calls = load_settings("tiny"), []
    with pytest.raises(KeyboardInterrupt):
        keep("reward_model", settings, builder(calls, fail=True))
    capsys.readouterr()
    folder = keep("reward_model", settings, builder(calls))
    assert "resuming" in capsys.readouterr().out
    assert calls == [[], ["checkpoint-3", "seconds.json", "weights"]]
    assert (folder / MARKER).exists()


@pytest.mark.parametrize("left", ["checkpoint-3", "trunk-cache", None])
def test_a_build_killed_before_it_has_its_name_is_not_made_again(monkeypatch, left):
    settings, calls = load_settings("tiny"), []
    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep("reward_model", settings, builder(calls))
    (partial,) = models.cache_dir().glob("artefacts/*.partial")
    if left:  # the kill came while what is not needed was deleted
        (partial / left).mkdir()
    folder = keep("reward_model", settings, builder(calls))
    assert calls == [[]] and not partial.exists()
    names = {path.name for path in folder.iterdir()}
    assert names == {"weights", "seconds.json", MARKER}


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_the_seconds_of_an_interrupted_stretch_count(monkeypatch):
    settings, clock = load_settings("tiny"), iter([10.0, 13.0, 100.0, 102.0])
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(recipes, "time", fake)
    with pytest.raises(KeyboardInterrupt):
        keep("reward_model", settings, builder([], fail=True))
    folder = keep("reward_model", settings, builder([]))
    assert json.loads((folder / "seconds.json").read_text()) == 5.0


def test_fresh_means_without_what_a_kill_left():
    settings, calls = load_settings("tiny"), []
    with pytest.raises(KeyboardInterrupt):
        keep("reward_model", settings, builder(calls, fail=True))
    keep("reward_model", settings, builder(calls), fresh=True)
    assert calls == [[], []]


@pytest.mark.slow
def test_a_reward_model_comes_with_a_report_and_a_card():
    folder = recipes.reward_model(load_settings("tiny"))
    report = json.loads((folder / "reward_report.json").read_text())
    assert 0 <= report["metrics"]["accuracy"]["low"] <= 1
    assert (folder / "reward_report.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "nectar_mini" in card
    logged = [e for e in recipes.log_history(folder) if "eval_accuracy" in e]
    accuracy = report["metrics"]["accuracy"]["estimate"]
    assert logged[-1]["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_key_figures_are_shown_and_machine_readable():
    import numpy as np

    figures = KeyFigures("n", {"share": np.float32(0.25), "<b>": "text"})
    bundle = figures._repr_mimebundle_()
    assert bundle["text/plain"] == "share: 0.25\n<b>: text"
    assert "&lt;b&gt;" in bundle["text/html"]
    plain = bundle[recipes.FIGURES_MIME]
    assert json.loads(json.dumps(plain))["figures"]["share"] == 0.25


def test_the_gold_model_learns_from_the_other_half_with_another_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(recipes, "reward_model", lambda *a: asked.append(a))
    settings = load_settings("small", seed=3)
    recipes.gold_model(settings)
    (gold, fresh), own = asked[0], set(settings.rankings("train")["id"])
    assert (gold.half, gold.seed, fresh) == ("B", 4, False)
    assert own.isdisjoint(gold.rankings("train")["id"]) and own
    assert gold.rankings("test")["id"] == settings.rankings("test")["id"]
    assert gold.fingerprint("reward_model") != settings.fingerprint("reward_model")
    with pytest.raises(ValueError, match="no `half`; set it to A or B"):
        recipes.gold_model(load_settings("small", half=None))


# --- training in a notebook


@pytest.mark.parametrize("shown", [ProgressCallback, NotebookProgressCallback])
def test_a_bar_takes_the_place_of_a_line_for_every_step(shown, capsys):
    handler = CallbackHandler([shown()], None, None, None, None)
    trainer = SimpleNamespace(
        pop_callback=handler.pop_callback, add_callback=handler.add_callback
    )
    recipes.show_bar_only(trainer)
    (bar,) = handler.callbacks
    assert isinstance(bar, ProgressCallback)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=2, global_step=2)
    bar.on_train_begin(None, state, None)
    bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.25})
    bar.on_train_end(None, state, None)
    told = "".join(capsys.readouterr())
    assert "2/2" in told and "1.25" not in told


def test_without_progress_there_is_no_bar_either():
    handler = CallbackHandler([], None, None, None, None)
    trainer = SimpleNamespace(
        pop_callback=handler.pop_callback, add_callback=handler.add_callback
    )
    recipes.show_bar_only(trainer)
    assert handler.callbacks == []
