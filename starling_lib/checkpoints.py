"""Checkpoints that survive a kill, for trainers whose module wraps the saved model.

Knows: what a checkpoint folder holds, when it is complete, how to resume from it. Does
not know: what is trained.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from starling_lib.models import precision_arguments, quiet
from starling_lib.sharding import forward_through, is_sharded

if TYPE_CHECKING:
    from peft import PeftModel

MARKER = "COMPLETE"
LOW_PRECISION = {torch.bfloat16, torch.float16}


def machine_defaults(arguments: dict) -> dict:
    """Keyword arguments for a `TrainingArguments` subclass that run on this machine.

    The library's own defaults ask for bf16 and report to every tracker installed, and
    raise on a laptop; anything in `arguments` wins.
    """
    ours = {
        **precision_arguments(),
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return {**ours, **arguments}


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for settings under which a kill or a second GPU loses work."""
    if args.save_total_limit == 1:
        raise ValueError(
            "save_total_limit=1 deletes the last complete checkpoint before the next one "
            "is complete: use 2 or more, or None"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible in one process, which Trainer would wrap in "
            "DataParallel: start with `accelerate launch` or `torchrun`, or set "
            "CUDA_VISIBLE_DEVICES to one GPU"
        )


def step_of(folder: Path) -> int:
    """The optimiser step in a name such as `checkpoint-40`."""
    return int(folder.name.rpartition("-")[2])


def _newest_first(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoint folders, complete or not."""
    pattern = f"{PREFIX_CHECKPOINT_DIR}-*"
    folders = [p for p in Path(output_dir).glob(pattern) if p.name[-1].isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def last_complete(output_dir: str | os.PathLike) -> Path | None:
    """Newest checkpoint with a marker; nothing is touched."""
    marked = [p for p in _newest_first(output_dir) if (p / MARKER).exists()]
    return marked[0] if marked else None


def newest_complete(output_dir: str | os.PathLike) -> Path | None:
    """Newest checkpoint with a marker; newer ones without are set aside with a message."""
    for folder in _newest_first(output_dir):
        if (folder / MARKER).exists():
            return folder
        aside = folder.with_name(f"incomplete-{folder.name}-{os.getpid()}")
        try:
            folder.rename(aside)
        except FileNotFoundError:  # another process of this node did it
            continue
        print(
            f"{folder.name} was cut off while being written: set aside as {aside.name}"
        )
    return None


def write_marker(folder: Path) -> None:
    """Flush everything in `folder` to disk, then mark it complete."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    with (folder / MARKER).open("w") as marker:
        marker.write("every file of this checkpoint was written\n")
        marker.flush()
        os.fsync(marker.fileno())


def load_adapters(model: "PeftModel", folder: Path) -> None:
    """Load saved adapters into a model that has the same ones already."""
    from peft import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), "cpu"))
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: adapters of another shape: {result.unexpected_keys}"
        )


class WrappedModelTrainer(Trainer):
    """A `Trainer` of a module that wraps the model to be saved.

    Checkpoints hold the inner model by `save_pretrained` at their root, so that plain
    `from_pretrained` reads them; plain `_save` raises on tied embeddings. The inner model
    may have been sharded at loading; then there is no resuming, says `Trainer`.
    """

    def __init__(self, model: nn.Module, **kwargs):
        for part in filter(is_sharded, model.children()):
            forward_through(model, part)
        self._warn_of_low_precision(model)
        super().__init__(model, **kwargs)

    @staticmethod
    def _warn_of_low_precision(model: nn.Module) -> None:
        """bf16 weights look as if they trained: small updates are rounded away."""
        low = {p.dtype for p in model.parameters() if p.requires_grad} & LOW_PRECISION
        if low:
            warnings.warn(
                f"the weights that train are {', '.join(map(str, low))}: an update below a "
                "256th of a weight changes nothing. Load the model with "
                "dtype=torch.float32, or take a far larger learning rate",
                stacklevel=4,
            )

    def inner_model(self) -> PreTrainedModel:
        """The model that users load later; subclasses say where it sits."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, nn.Module]:
        """Modules saved beside the inner model, by file name; none by default."""
        return {}

    def check_update(self) -> None:
        """Raise for weights that must not be saved, in all processes alike; never here."""

    def save_progress(self, folder: Path) -> None:
        """Write what a checkpoint needs beyond model and optimiser; nothing by default."""

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train; `resume_from_checkpoint=True` takes the newest complete checkpoint.

        Raises what `check_update` raises, also after the last update.
        """
        if resume_from_checkpoint is True:
            # One process sets folders aside; the others then find them gone.
            with self.accelerator.main_process_first():
                found = newest_complete(self.args.output_dir)
            resume_from_checkpoint = str(found) if found else None
        if resume_from_checkpoint and is_sharded(self.inner_model()):
            raise ValueError(
                f"{resume_from_checkpoint}: transformers does not resume a model sharded "
                "at loading. Load the checkpoint as the model of a new run instead, with "
                "another output_dir"
            )
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        # The best model, where it was loaded in the end, was checked when it was saved.
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        if not best:
            self.check_update()
        return result

    def _save(self, output_dir=None, state_dict=None):
        """Save; `state_dict` is given where an engine has gathered the module's weights."""
        from safetensors.torch import save_file, save_model

        inner = self.inner_model()
        # All processes gather a sharded model, one writes it.
        if not self.args.should_save and not is_sharded(inner):
            return
        output_dir = Path(output_dir or self.args.output_dir)
        gathered = {}
        if state_dict is not None:
            gathered["state_dict"] = self._part(state_dict, inner)
        with quiet():
            inner.save_pretrained(
                output_dir, is_main_process=self.args.should_save, **gathered
            )
        if not self.args.should_save:
            return
        for name, module in self.extra_state().items():
            path = str(output_dir / f"{name}.safetensors")
            if state_dict is None:
                save_model(module, path)
            else:
                save_file(self._part(state_dict, module), path)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _part(
        self, state_dict: dict[str, Tensor], part: nn.Module
    ) -> dict[str, Tensor]:
        """What of the whole module's `state_dict` belongs to `part`, by its names."""
        before = ""
        if hasattr(part, "peft_config"):  # peft's wrapper is not inside our module
            part, before = part.get_base_model(), "base_model.model."
        whole = self.accelerator.unwrap_model(self.model)
        (name,) = [name for name, module in whole.named_modules() if module is part]
        mine = {k: v for k, v in state_dict.items() if k.startswith(f"{name}.")}
        return {before + k.removeprefix(f"{name}."): v for k, v in mine.items()}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        from safetensors.torch import load_model

        if self.is_fsdp_enabled:  # accelerate wrote the pieces, and reads them
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder, inner = Path(resume_from_checkpoint), self.inner_model()
        if hasattr(inner, "peft_config"):
            load_adapters(inner, folder)
        else:
            with quiet():
                loaded = type(inner).from_pretrained(folder, dtype=inner.dtype)
            inner.load_state_dict(loaded.state_dict())
        for name, module in self.extra_state().items():
            load_model(module, str(folder / f"{name}.safetensors"))

    def _load_best_model(self):
        # Trainer's own loads with strict=False: no key of the inner model would match.
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial):
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self.args.output_dir) / name
        if self.args.should_save:  # a folder of an earlier run is no longer complete
            (folder / MARKER).unlink(missing_ok=True)
        self.check_update()
        super()._save_checkpoint(model, trial)
        self.save_progress(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_marker(folder)
