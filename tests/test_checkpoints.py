"""Complete and incomplete checkpoints; runs that were killed and resumed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starling_lib.checkpoints import (
    MARKER,
    last_complete,
    machine_defaults,
    newest_complete,
    step_of,
    write_marker,
)
from starling_lib.reward import KwiseRewardConfig, KwiseRewardTrainer

TESTS = Path(__file__).parent


def make_folders(where: Path, complete: list[int], cut: list[int]) -> None:
    for step in complete + cut:
        (where / f"checkpoint-{step}").mkdir()
    for step in complete:
        write_marker(where / f"checkpoint-{step}")


def names(where: Path) -> set[str]:
    return {p.name for p in where.iterdir()}


# --- arguments


def test_machine_defaults_give_way_to_what_is_asked(fp32):
    ours = machine_defaults({"report_to": "tensorboard", "output_dir": "x"})
    assert ours["report_to"] == "tensorboard" and ours["output_dir"] == "x"
    assert ours["use_cpu"] is not torch.cuda.is_available()
    assert not ours["bf16"] and not ours["fp16"]


def test_the_defaults_train_on_this_machine(tmp_path):
    """TrainingArguments' own raise without a GPU, or report to every tracker."""
    args = KwiseRewardConfig.for_this_machine(output_dir=str(tmp_path))
    assert args.report_to == []
    assert not args.remove_unused_columns and not args.logging_nan_inf_filter


# --- the marker


def test_newest_complete_goes_by_number_not_by_name_or_time(tmp_path):
    make_folders(tmp_path, complete=[100, 20, 9], cut=[])
    (tmp_path / "checkpoint-notes").mkdir()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_asking_for_the_last_complete_one_touches_nothing(tmp_path):
    assert last_complete(tmp_path) is None
    make_folders(tmp_path, complete=[9, 20], cut=[100])
    before = names(tmp_path)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-20"
    assert names(tmp_path) == before


def test_newer_folders_without_a_marker_are_set_aside(tmp_path, capsys):
    make_folders(tmp_path, complete=[2, 4], cut=[6, 8, 3])
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    said = capsys.readouterr().out
    for step in (6, 8):
        aside = f"incomplete-checkpoint-{step}-{os.getpid()}"
        assert f"checkpoint-{step} was cut off" in said and aside in said
        assert aside in names(tmp_path)
    assert {"checkpoint-2", "checkpoint-3", "checkpoint-4"} <= names(tmp_path)


def test_a_folder_that_another_process_has_set_aside_is_passed_over(
    tmp_path, monkeypatch
):
    make_folders(tmp_path, complete=[2], cut=[4])
    monkeypatch.setattr(Path, "rename", lambda self, aside: os.rename("gone", aside))
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_nothing_complete_means_a_fresh_start(tmp_path):
    assert newest_complete(tmp_path / "missing") is None
    make_folders(tmp_path, complete=[], cut=[5])
    assert newest_complete(tmp_path) is None


def make_trainer(folder, model, tokenizer, rankings, **changes):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 5,
        "max_steps": 4,
        "save_steps": 1,
        "disable_tqdm": True,
    }
    args = KwiseRewardConfig.for_this_machine(**{**arguments, **changes})
    return KwiseRewardTrainer(
        model, args, rankings, processing_class=tokenizer, eval_dataset=None
    )


def test_a_checkpoint_is_marked_last(
    fp32, reward_model, tokenizer, toy_rankings, tmp_path
):
    """A failure at the end of writing leaves no marker, also not that of an old run."""
    arguments = (reward_model, tokenizer, toy_rankings)
    make_trainer(tmp_path, *arguments).train()
    trainer = make_trainer(tmp_path, *arguments)

    def full_disk(folder):
        if folder.name == "checkpoint-3":
            raise OSError("no space left on device")

    trainer.save_progress = full_disk
    with pytest.raises(OSError, match="no space left"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    marked = {p.parent.name for p in tmp_path.glob(f"*/{MARKER}")}
    assert marked == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}


def test_a_complete_checkpoint_survives_rotation(
    fp32, reward_model, tokenizer, toy_rankings, tmp_path
):
    """With a limit of two, the previous one stays until the new one is marked."""
    trainer = make_trainer(
        tmp_path, reward_model, tokenizer, toy_rankings, save_total_limit=2
    )
    complete = []
    trainer.save_progress = lambda folder: complete.append(
        {p.parent.name for p in tmp_path.glob(f"*/{MARKER}")}
    )
    trainer.train()
    assert complete[1:] == [{f"checkpoint-{n}"} for n in (1, 2, 3)]
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-4"}


def test_resuming_without_a_checkpoint_starts_from_the_beginning(
    fp32, reward_model, tokenizer, toy_rankings, tmp_path
):
    trainer = make_trainer(tmp_path, reward_model, tokenizer, toy_rankings, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1


# --- killed runs and several processes


def run(output_dir, *options, processes=1) -> subprocess.CompletedProcess:
    """One run of training_process.py in fp32, in as many processes as asked."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "STARLING_PRECISION": "fp32",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, str(TESTS / "training_process.py"), str(output_dir)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command[1:1] = [*launcher, str(processes)]
    command += [str(option) for option in options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def finished_weights(output_dir, *options, processes=1) -> dict[str, torch.Tensor]:
    result = run(output_dir, *options, processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    (weights,) = output_dir.glob("*model.safetensors")  # or the adapters'
    return load_file(weights)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finished_weights(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_a_run_killed_in_training_resumes_to_the_same_weights(uninterrupted, tmp_path):
    killed = run(tmp_path, "--save-steps", 2, "--die-in", "step", "--at", 5)
    assert killed.returncode == -9
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    assert equal(finished_weights(tmp_path, "--save-steps", 2), uninterrupted)


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(
    uninterrupted, tmp_path
):
    killed = run(tmp_path, "--save-steps", 2, "--die-in", "saving", "--at", 4)
    assert killed.returncode == -9
    half = tmp_path / "checkpoint-4"
    assert (half / "model.safetensors").exists() and not (half / MARKER).exists()
    assert equal(finished_weights(tmp_path, "--save-steps", 2), uninterrupted)
    assert any(name.startswith("incomplete-checkpoint-4") for name in names(tmp_path))
    assert (half / MARKER).exists()  # written again, whole this time


@pytest.mark.slow
def test_apa_killed_at_every_stage_ends_with_the_same_weights(tmp_path):
    """Five iterations of four updates; the run dies four times, then a disk is full."""
    options = ("--trainer", "apa", "--steps", 20, "--save-steps", 3)
    whole = finished_weights(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    newest = []
    for stage, step in (
        ("sampling", 8),
        ("scoring", 8),
        ("update", 10),
        ("saving", 12),
        ("disk", 14),
    ):
        died = run(broken, *options, "--die-in", stage, "--at", step)
        assert died.returncode == (1 if stage == "disk" else -9), died.stderr[-3000:]
        marked = [step_of(p.parent) for p in broken.glob(f"checkpoint-*/{MARKER}")]
        newest.append(max(marked))
    assert newest == [6, 6, 9, 9, 12]
    assert "File too large" in died.stderr
    assert equal(finished_weights(broken, *options), whole)
    lines = (broken / "samples.jsonl").read_text().splitlines()
    assert lines == (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_two_processes_resume_together(tmp_path):
    """Both ask for the newest checkpoint; one of them sets the broken one aside."""
    make_folders(tmp_path, complete=[], cut=[3])
    finished_weights(tmp_path, "--steps", 1, "--batch", 1, processes=2)
    assert len([n for n in names(tmp_path) if n.startswith("incomplete-")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--layers", 1), ("--lora",)])
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, way):
    """One ranking each a step; the first gradient, and the weights after three epochs.

    All layers: `test_distributed`, from a stream.
    """
    options = (*way, "--steps", 6, "--first-gradient", "--batch")
    one = finished_weights(tmp_path / "one", *options, 2)
    two = finished_weights(tmp_path / "two", *options, 1, processes=2)
    alone = load_file(tmp_path / "one" / "gradient.safetensors")
    together = load_file(tmp_path / "two" / "gradient.safetensors")
    largest = max(g.abs().max().item() for g in alone.values())
    assert alone.keys() == together.keys() and largest > 0.1
    for name, gradient in alone.items():
        # fp32, sums in another order: 1e-6 of the largest entry
        assert torch.allclose(gradient, together[name], atol=1e-6 * largest), name
    # Adam divides by |g|: rounding grows where a gradient is near 0. Six steps of 1e-3.
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 3e-4


@pytest.mark.slow
def test_apa_on_two_processes_averages_over_all_response_tokens(tmp_path):
    """Whitening, masked means and gradients, recomputed from both ranks' experience."""
    from test_apa import apa_gradient_by_hand

    finished_weights(
        tmp_path,
        *("--trainer", "apa", "--steps", 1, "--batch", 2, "--first-gradient"),
        processes=2,
    )
    ranks = [load_file(tmp_path / f"experience-{rank}.safetensors") for rank in (0, 1)]
    assert not torch.equal(ranks[0]["response_ids"], ranks[1]["response_ids"])
    white = torch.cat([e["advantages"][e["response_mask"]] for e in ranks])
    assert white.mean().item() == pytest.approx(0, abs=1e-4)
    assert white.std().item() == pytest.approx(1, abs=0.05)
    found = load_file(tmp_path / "gradient.safetensors")
    expected = apa_gradient_by_hand(ranks)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name
