"""Presets as YAML, and the artefacts that the notebooks hand to each other.

Knows: which sizes a preset runs at on this machine; how to make, keep and find a reward
model or a tuned policy. Does not know: how any of it works inside.
"""

import dataclasses
import hashlib
import html
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ProgressCallback, Trainer
from transformers.utils.notebook import NotebookProgressCallback

from starling_lib import models
from starling_lib.apa import APAConfig, APATrainer
from starling_lib.checkpoints import MARKER, write_marker
from starling_lib.command_recipes import merged, read_preset
from starling_lib.journal import write_atomically
from starling_lib.publish import KNOWN_DATA, report_figures, save_reward_card
from starling_lib.rankings import data_path, load_rankings
from starling_lib.reports import reward_report
from starling_lib.reward import (
    KwiseRewardConfig,
    KwiseRewardTrainer,
    several_responses,
)

# Modules whose code decides the weights: a change in one makes artefacts anew.
TRAINING_CODE = [
    *("chat", "rankings", "models", "trunk", "prefix", "vocabulary", "generation"),
    *("arranged", "rollouts", "losses", "scoring", "reward", "objectives"),
    *("actor_critic", "policy_rewards", "apa"),
]
FIGURES_MIME = "application/vnd.starling.figures+json"


@dataclass(frozen=True)
class Settings:
    """One preset on this machine: what to load, and arguments for each stage."""

    preset: str
    model: str
    data: str
    seed: int
    reward: dict[str, Any]
    apa: dict[str, Any]
    evaluation: dict[str, Any]
    rows: int | None = None  # only the first rows of the training split
    half: str | None = None  # of the training split; the other one teaches `gold_model`
    gflops: float = field(default=0.0, compare=False)  # what the probe measured
    reduced: bool = field(default=False, compare=False)  # sizes of the slow machine

    def rankings(self, split: str):
        """The preset's rankings, cut to `rows` where the preset says so."""
        half = self.half if split == "train" else None
        return first_rankings(self.data, split, self.rows, half)

    def reward_config(self, output_dir: Path | str, **overrides) -> KwiseRewardConfig:
        """Arguments of the reward trainer, writing to `output_dir`."""
        return reward_config(output_dir, self.seed, {**self.reward, **overrides})

    def apa_config(self, output_dir: Path | str, **overrides) -> APAConfig:
        """Arguments of the policy trainer, writing to `output_dir`."""
        arguments = {**self.apa, **overrides}
        base = arguments.pop("base")
        return apa_config(output_dir, self.seed, base, arguments)

    def fingerprint(self, stage: str) -> str:
        """Digest of model, data, code, precision and the settings up to `stage`.

        Files are covered by their content, a hub id by its name.
        """
        stages = {"reward_model": ["reward"], "tuned_policy": ["reward", "apa"]}[stage]
        code = Path(__file__).parent
        parts = {
            "stage": stage,
            "model": self.model,
            "seed": self.seed,
            "rows": self.rows,
            "half": self.half,
            "precision": models.precision(),
            "settings": {name: getattr(self, name) for name in stages},
            "model_files": _digest(_files(Path(self.model))),
            "data": [self.data, _digest(_data_files(self.data))],
            "code": _digest([code / f"{name}.py" for name in TRAINING_CODE]),
        }
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_rankings(
    data: str, split: str, rows: int | None = None, half: str | None = None
) -> Dataset:
    """The first `rows` rankings (None: all) of a split, or of one half of it.

    Raises ValueError for fewer than one row.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows}: give a number above 0, or leave it out for all")
    with warnings.catch_warnings():
        # Said once, by whoever loads the set to look at it (notebook 01).
        warnings.filterwarnings("ignore", ".*identical answers")
        dataset = load_rankings(data, split, half=half)
    return dataset if rows is None else dataset.take(min(rows, len(dataset)))


def reward_config(
    output_dir: Path | str, seed: int, arguments: Mapping[str, Any]
) -> KwiseRewardConfig:
    """A config for this machine that saves often enough to survive a kill."""
    ours = {"seed": seed, "save_steps": 25, "save_total_limit": 2}
    ours |= {"eval_strategy": "no", "output_dir": str(output_dir)}
    return KwiseRewardConfig.for_this_machine(**{**ours, **arguments})


def apa_config(
    output_dir: Path | str, seed: int, base: str, arguments: Mapping[str, Any]
) -> APAConfig:
    """The same for a policy; `base` is what `arguments` change: starling or paper."""
    if base not in ("starling", "paper"):
        raise ValueError(f"apa.base={base!r}: choose 'starling' or 'paper'")
    ours = {"seed": seed, "save_steps": 20, "save_total_limit": 2}
    ours |= {"output_dir": str(output_dir)}
    return getattr(APAConfig, base)(**{**ours, **arguments})


def _data_files(source: str) -> list[Path]:
    path = data_path(source) if source == "nectar_mini" else Path(source)
    kinds = (".jsonl", ".jsonl.gz", ".parquet")
    return [p for p in _files(path) if p == path or p.name.endswith(kinds)]


def _files(path: Path) -> list[Path]:
    """The file, those of the folder, or none where the name is of neither."""
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.is_file())
    return [path] if path.is_file() else []


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{models.file_digest(path)}".encode())
    return digest.hexdigest()


def load_settings(preset: str = "small", seed: int = 0, **overrides) -> Settings:
    """Read `recipes/<preset>.yaml` (or a YAML file) and fit its sizes to this machine.

    `overrides` replace whole top-level fields, or single keys by `stage={"key": value}`.
    Raises ValueError for an unknown preset or field, or a value of the wrong type.
    """
    plain = read_preset(preset)
    gflops = models.matmul_gflops() if plain.slow else 0.0
    reduced = bool(plain.slow) and gflops < plain.slow_below
    changes = merged(plain.slow, overrides) if reduced else overrides
    chosen = dataclasses.asdict(read_preset(preset, **changes))
    known = {one.name for one in dataclasses.fields(Settings)}
    fields = {name: value for name, value in chosen.items() if name in known}
    return Settings(
        Path(preset).stem, seed=seed, gflops=gflops, reduced=reduced, **fields
    )


# --- artefacts


def keep(
    stage: str,
    settings: Settings,
    build: Callable[[Path], None],
    expected: str = "",
    fresh: bool = False,
) -> Path:
    """Return the folder of an artefact, calling `build(folder)` only if it is missing.

    The folder's name holds the fingerprint of everything that decides its content. A
    `build` that is killed finds what it left in the same folder and may resume. `fresh`
    makes it anew; `expected` says in words how long that takes.
    """
    from filelock import FileLock

    folder = models.cache_dir() / "artefacts" / f"{stage}-{settings.fingerprint(stage)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    with FileLock(folder.with_name(folder.name + ".lock")):
        if fresh:
            for old in (folder, partial):
                shutil.rmtree(old, ignore_errors=True)
        if (partial / MARKER).exists():  # a kill came between mark and name
            _put_in_place(partial, folder)
        if (folder / MARKER).exists():
            print(f"{stage}: re-using {folder.name}, made with the same settings")
            return folder
        why = "resuming" if partial.exists() else "none yet for these settings"
        print(f"{stage}: {why}: making it {expected}".rstrip(), flush=True)
        partial.mkdir(exist_ok=True)
        spent = partial / "seconds.json"
        before = json.loads(spent.read_text()) if spent.exists() else 0.0
        start = time.perf_counter()
        try:
            build(partial)
        finally:  # a stretch that was interrupted counts as well
            seconds = before + time.perf_counter() - start
            write_atomically(spent, json.dumps(seconds).encode())
        write_marker(partial)
        _put_in_place(partial, folder)
    return folder


def _put_in_place(built: Path, folder: Path) -> None:
    """Give what was built and marked its name, without what only its training needed."""
    for scratch in [*built.glob("checkpoint-*"), *built.glob("trunk-cache")]:
        shutil.rmtree(scratch)
    built.rename(folder)


def save_trained(trainer, folder: Path) -> None:
    """Save a trained model with the curves of its training.

    Adapters are saved apart and merged into the model, which then loads without peft;
    the trainer is of no more use after that.
    """
    adapted = trainer.peft_model is not None
    trainer.save_model(str(folder / "adapters" if adapted else folder))
    if not trainer.is_world_process_zero():
        return
    if adapted:
        with models.quiet():
            trainer.peft_model.merge_and_unload().save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    (folder / "log_history.json").write_text(json.dumps(trainer.state.log_history))


def log_history(folder: Path) -> list[dict[str, float]]:
    """The curves that `save_trained` kept: one dict a log, with `step`."""
    return json.loads((folder / "log_history.json").read_text())


def reward_model(settings: Settings, fresh: bool = False) -> Path:
    """Folder of the preset's reward model, trained as in notebook 02 if missing."""

    def build(folder: Path) -> None:
        trainer = reward_trainer(settings, folder)
        trainer.train(resume_from_checkpoint=True)
        evaluate_reward_model(trainer, settings, folder)
        save_trained(trainer, folder)

    return keep(
        "reward_model", settings, build, "(about 6 minutes; 3 with fast bf16)", fresh
    )


def gold_model(settings: Settings, fresh: bool = False) -> Path:
    """Folder of a second reward model, which no policy is trained against.

    It learns from the other half of the rankings with another seed. Raises ValueError
    where the preset names no half: a judge from the same rankings would share its errors.
    """
    if settings.half is None:
        raise ValueError("gold_model: the preset has no `half`; set it to A or B")
    other = {"A": "B", "B": "A"}[settings.half]
    return reward_model(
        dataclasses.replace(settings, half=other, seed=settings.seed + 1), fresh
    )


def reward_trainer(settings: Settings, folder: Path) -> KwiseRewardTrainer:
    """The trainer of notebook 02."""
    trainer = KwiseRewardTrainer(
        model=settings.model,
        args=settings.reward_config(folder),
        train_dataset=settings.rankings("train"),
        eval_dataset=settings.rankings("test"),
    )
    show_bar_only(trainer)
    return trainer


def show_bar_only(trainer: Trainer) -> None:
    """A bar where Trainer would add a line for every logged step: a curve shows those."""
    shown = (NotebookProgressCallback, ProgressCallback)
    if any(trainer.pop_callback(one) for one in shown):
        trainer.add_callback(_Bar())


class _Bar(ProgressCallback):
    def on_log(self, *args, **kwargs):
        pass


def evaluate_reward_model(
    trainer: KwiseRewardTrainer, settings: Settings, folder: Path
) -> None:
    """Log the held-out metrics as `trainer.evaluate` does; from the same scores, write
    `reward_report.json` and `.png` and, where the licences are known, a model card.
    """
    report = report_reward_model(trainer, settings.rankings("test"), folder)
    if settings.data not in KNOWN_DATA or settings.model not in models.LICENSES:
        return  # whose licence is not known, nothing can be said of
    license, figures = models.LICENSES[settings.model], report_figures(report)
    rows = len(trainer.train_dataset)
    save_reward_card(folder, settings.model, settings.data, license, figures, rows=rows)


def report_reward_model(
    trainer: KwiseRewardTrainer, rankings: Dataset, folder: Path
) -> dict[str, Any] | None:
    """Log and report on the trainer's held-out rows, which `rankings` were before.

    Returns the report; None in every process but the main one, which writes it.
    """
    held_out = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    trainer.log(held_out.metrics)
    if not trainer.is_world_process_zero():
        return None
    lengths, ranks = held_out.label_ids
    sources = rankings.select(several_responses(rankings))["source"]
    return reward_report(held_out.predictions, lengths, sources, folder, ranks)


def tuned_policy(settings: Settings, fresh: bool = False) -> Path:
    """Folder of the preset's tuned policy, trained as in notebook 03 if missing."""

    def build(folder: Path) -> None:
        trainer = apa_trainer(settings, folder)
        trainer.train(resume_from_checkpoint=True)
        save_trained(trainer, folder)

    return keep("tuned_policy", settings, build, "(about 3 minutes)", fresh)


def apa_trainer(settings: Settings, folder: Path) -> APATrainer:
    """The trainer of notebook 03, with the reward model of notebook 02."""
    reward_dir = reward_model(settings)
    return APATrainer(
        model=settings.model,
        reward_funcs=models.load_reward_model(reward_dir),
        args=settings.apa_config(folder),
        train_dataset=settings.rankings("train"),
        reward_processing_classes=[models.load_tokenizer(reward_dir)],
    )


# --- figures for the report


class KeyFigures:
    """A notebook's key figures: a table for readers, JSON for the run's report."""

    def __init__(self, notebook: str, figures: dict[str, Any]):
        self.notebook = notebook
        self.figures = {name: _plain(value) for name, value in figures.items()}

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(_show(value))}</td></tr>"
            for name, value in self.figures.items()
        )
        lines = [f"{name}: {_show(value)}" for name, value in self.figures.items()]
        return {
            "text/plain": "\n".join(lines),
            "text/html": f"<table>{rows}</table>",
            FIGURES_MIME: {"notebook": self.notebook, "figures": self.figures},
        }


def _plain(value: Any) -> Any:
    """numpy and torch scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
