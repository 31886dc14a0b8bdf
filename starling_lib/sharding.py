"""Models that FSDP2 sharded at loading: `from_pretrained(…, distributed_config=…)`.

Knows: when the pieces of such a model are put together, so that a module around it can
run it and its first weights can come back for a moment. Does not know: trainers, losses.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What `Trainer` asks of a sharded model; it will ask the module around it.
_ASKED_BY_TRAINER = (
    "is_distributed_loading_by_transformers",
    "_is_fsdp_managed_module",
    "set_requires_gradient_sync",
    "set_requires_all_reduce",
)


def is_sharded(model: nn.Module) -> bool:
    """Whether transformers sharded this model when it loaded it."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


def forward_through(module: nn.Module, model: PreTrainedModel) -> None:
    """Make a forward of `module` one of the sharded `model` inside it.

    FSDP2 gathers weights in hooks of the model's own forward, which a module that calls
    its parts goes round. Raises ValueError where training would go wrong in silence.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    check_tied_head(model, model.config.distributed_config.fsdp_size)
    model.forward_around = module.forward
    register_fsdp_forward_method(model, "forward_around")
    inside = model.forward_around
    # A plain function: accelerate would bind a method of `model` to `module`.
    module.forward = lambda *args, **kwargs: inside(*args, **kwargs)
    for name in _ASKED_BY_TRAINER:
        setattr(module, name, getattr(model, name))


def check_tied_head(model: PreTrainedModel, pieces: int) -> None:
    """Raise ValueError for a trained head that is tied and does not divide evenly.

    FSDP2 keeps it twice, once as embeddings and once as head. Both are the same memory
    unless a piece has to be padded: then the optimiser moves one of them only.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    rows = head.weight.shape[0]
    if head.weight.requires_grad and rows % pieces:
        raise ValueError(
            f"the embeddings, tied to the head, have {rows} rows, which {pieces} processes "
            "cannot share evenly: FSDP2 would train one and not the other. Pad them "
            f"(`resize_token_embeddings(pad_to_multiple_of={pieces})`) and save the model "
            "before it is sharded, or freeze them (num_layers_unfrozen)"
        )


def free_whole_weights(model: nn.Module) -> None:
    """Let go of gathered weights, so that the next forward gathers them anew.

    FSDP2 keeps those of the last layers until a backward, which inference never has.
    """
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class FirstShards:
    """This process's pieces of the weights to be trained, as they are now."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.first = {
            p: _shard(p).clone() for p in model.parameters() if p.requires_grad
        }

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put them into the model for the enclosed lines; all processes together."""
        now = {p: _shard(p).clone() for p in self.first}
        self._write(self.first)
        try:
            yield
        finally:
            self._write(now)

    def _write(self, shards: dict[nn.Parameter, Tensor]) -> None:
        free_whole_weights(self.model)
        for parameter, values in shards.items():
            _shard(parameter).copy_(values)


@torch.no_grad()
def _shard(parameter: nn.Parameter) -> Tensor:
    """The piece itself: what is written to it is written to the parameter."""
    return parameter.to_local().detach()
