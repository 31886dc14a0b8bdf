"""Which layers are trained, and what to do with the frozen ones below them.

A frozen trunk gives the same hidden states every time: run it apart from the trained top
(`split_trunk`) and keep what it gave (`TrunkCache`). Knows: the layers of a model, files
of hidden states. Does not know: losses, text, trainers.
"""

import contextlib
import copy
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def freeze_below(model: PreTrainedModel, num_layers_unfrozen: int | None) -> int:
    """Freeze the embeddings and all but the last N layers; return how many are frozen.

    The final norm and a head that is not tied to the embeddings stay trainable. None
    trains everything. Raises ValueError outside 1 … L.
    """
    if num_layers_unfrozen is None:
        return 0
    frozen = _layers_below(model, num_layers_unfrozen)
    for module in (model.get_input_embeddings(), *model.base_model.layers[:frozen]):
        module.requires_grad_(False)
    return frozen


def _layers_below(model: PreTrainedModel, num_layers_unfrozen: int) -> int:
    """How many layers stand below the last N; ValueError outside 1 … L."""
    layers = len(model.base_model.layers)
    if not 1 <= num_layers_unfrozen <= layers:
        raise ValueError(
            f"num_layers_unfrozen={num_layers_unfrozen}: this model has {layers} "
            "layers; give 1 to that many, or None for all parameters"
        )
    return layers - num_layers_unfrozen


def split_trunk(
    model: PreTrainedModel, num_layers_unfrozen: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two halves of a model's trunk: upper(inputs_embeds=lower(ids)) = the whole trunk.

    Both halves share the original's layers (training one trains the other). Keep them out
    of registered submodules, or their parameters would be saved twice. Raises ValueError
    for an architecture whose halves do not reproduce the whole.
    """
    trunk = model.base_model
    cut = len(trunk.layers) - num_layers_unfrozen
    lower = _half(trunk, slice(0, cut), norm=nn.Identity())
    upper = _half(trunk, slice(cut, None), embed_tokens=nn.Identity())
    _verify_split(trunk, lower, upper)
    return lower, upper


def _half(trunk: PreTrainedModel, part: slice, **replaced: nn.Module):
    """A shallow copy of `trunk`: only the layers of `part`, some modules replaced."""
    half = copy.copy(trunk)
    layers = nn.ModuleList(trunk.layers[part])
    # A shallow copy shares this dict: changing it in place would cut the original.
    half._modules = {**trunk._modules, **replaced, "layers": layers}
    half.config = copy.deepcopy(trunk.config)
    half.config.num_hidden_layers = len(half.layers)
    half.config.use_cache = False
    if getattr(trunk.config, "layer_types", None):
        half.config.layer_types = trunk.config.layer_types[part]
    return half


def _verify_split(trunk, lower, upper) -> None:
    """Raise ValueError unless the halves give the hidden states of the whole."""
    models = (trunk, lower, upper)
    was_training = trunk.training
    device = trunk.get_input_embeddings().weight.device
    ids = torch.arange(12, device=device)[None] % trunk.config.vocab_size
    for model in models:
        model.eval()
    with torch.no_grad(), _narrow_windows([model.config for model in models], 8):
        whole = trunk(ids, use_cache=False).last_hidden_state
        middle = lower(ids).last_hidden_state
        halves = upper(inputs_embeds=middle).last_hidden_state
    for model in models:
        model.train(was_training)
    if not torch.allclose(whole, halves, rtol=1e-3, atol=1e-4):
        gap = (whole - halves).abs().max().item()
        raise ValueError(
            f"{type(trunk).__name__} cannot be split into a frozen trunk and a top "
            f"(hidden states differ by {gap:.2g})"
        )


@contextlib.contextmanager
def _narrow_windows(configs: list, width: int) -> Iterator[None]:
    """Make sliding windows so short that a few tokens show how a model treats them."""
    windowed = [c for c in configs if getattr(c, "sliding_window", None)]
    before = [config.sliding_window for config in windowed]
    for config in windowed:
        config.sliding_window = width
    try:
        yield
    finally:
        for config, window in zip(windowed, before, strict=True):
            config.sliding_window = window


def try_split_trunk(model: PreTrainedModel, num_layers_unfrozen: int | None):
    """`split_trunk`, or None where there is nothing to split or no way to.

    Warns where the architecture does not allow it or something below is trained.
    """
    if num_layers_unfrozen is None:
        return None
    try:
        if num_layers_unfrozen >= len(model.base_model.layers):
            return None
        lower, upper = split_trunk(model, num_layers_unfrozen)
    except (ValueError, AttributeError) as error:
        warnings.warn(f"no frozen-trunk split: {error}", stacklevel=2)
        return None
    if any(p.requires_grad for p in lower.parameters()):
        warnings.warn(
            f"no frozen-trunk split: parameters below the last {num_layers_unfrozen} "
            "layers are trained (LoRA without layers_to_transform?)",
            stacklevel=2,
        )
        return None
    return lower, upper


# What decides, beside the weights, which states a layer gives.
_SAME_STATES = (
    *("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "sliding_window"),
)


def _equal(p: Tensor, q: Tensor) -> bool:
    """`torch.equal`, and False where types or devices differ, which it refuses."""
    return (p.dtype, p.device) == (q.dtype, q.device) and torch.equal(p, q)


def shared_layers(a: PreTrainedModel, b: PreTrainedModel) -> int:
    """How many layers two trunks have in common, from the embeddings up; 0: none."""

    def same(x: nn.Module, y: nn.Module) -> bool:
        weights = [dict(m.named_parameters()) for m in (x, y)]
        if weights[0].keys() != weights[1].keys():  # biases in one alone, say
            return False
        pairs = zip(weights[0].values(), weights[1].values(), strict=True)
        # Empty: ZeRO-3 keeps them elsewhere, and nothing can be said of them.
        return all(p.numel() and _equal(p, q) for p, q in pairs)

    configs = [[getattr(m.config, name, None) for name in _SAME_STATES] for m in (a, b)]
    embeddings = a.get_input_embeddings(), b.get_input_embeddings()
    if type(a) is not type(b) or configs[0] != configs[1] or not same(*embeddings):
        return 0
    count = 0
    for x, y in zip(a.layers, b.layers, strict=False):
        if not same(x, y):
            break
        count += 1
    return count


@contextlib.contextmanager
def tapped(
    trunk: PreTrainedModel, layers: Sequence[int]
) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward of `trunk` leaves its states after so many layers in a dict.

    Keys are the numbers given (1 … L), values (N, T, H), those of the last forward.
    """
    states: dict[int, Tensor] = {}

    def keep(number: int):
        def hook(module, args, output) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [trunk.layers[n - 1].register_forward_hook(keep(n)) for n in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def add_adapters(
    model: PreTrainedModel,
    peft_config: "PeftConfig",
    num_layers_unfrozen: int | None = None,
) -> "PeftModel":
    """Put LoRA adapters (or another of peft's kinds) into `model`, in place.

    With `num_layers_unfrozen`, only into the last N layers unless the config names some.
    A reward model's head is trained and saved with them (task type SEQ_CLS, which a
    config without one gets). Returns peft's wrapper, whose `save_pretrained` writes the
    adapters alone. Raises ValueError on N outside 1 … L, and on another task type for a
    reward model.
    """
    from peft import get_peft_model

    config = copy.deepcopy(peft_config)
    if hasattr(model, "score"):
        _include_head(config)
    if num_layers_unfrozen is not None:
        below = _layers_below(model, num_layers_unfrozen)
        if getattr(config, "layers_to_transform", 0) is None:
            layers = range(below, below + num_layers_unfrozen)
            config.layers_to_transform = list(layers)
    return get_peft_model(model, config)


def _include_head(config: "PeftConfig") -> None:
    """Have peft train and save the head: without the task type it does neither."""
    config.task_type = config.task_type or "SEQ_CLS"
    if config.task_type != "SEQ_CLS":
        raise ValueError(
            f"peft_config has task_type={config.task_type}, with which a reward model's "
            "head is neither trained nor saved: give task_type='SEQ_CLS'"
        )


# --- the cache


class TrunkCache:
    """Hidden states below the trained layers, on disk: one memory-mapped file a row.

    Files are found by the tokens of their row, in a folder named after the frozen
    layers and the number format they compute in, so that another model never reads them.
    Memory stays flat however many rows there are.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        lower: PreTrainedModel,
        max_gb: float = 20.0,
        number_format: str = "fp32",
    ):
        self.folder = Path(folder) / f"{trunk_digest(lower)}-{number_format}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hidden_size, self.max_gb = lower.config.hidden_size, max_gb

    def check_size(self, tokens: int) -> None:
        """Raise ValueError if the states of that many tokens exceed the limit."""
        size = tokens * self.hidden_size * torch.finfo(torch.float32).bits / 8 / 1e9
        if size > self.max_gb:
            raise ValueError(
                f"the trunk cache of {tokens:,} tokens would take {size:,.1f} GB, more "
                f"than trunk_cache_gb={self.max_gb}: train without it "
                "(cache_trunk=False), on fewer rows, or raise the limit"
            )

    def _path(self, row: dict[str, Sequence[int]]) -> Path:
        tokens = torch.tensor([row["input_ids"], row["segment_ids"]], dtype=torch.int32)
        name = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def get(self, row: dict[str, Sequence[int]]) -> Tensor | None:
        """(T, H) states of a packed row of T tokens, or None."""
        path = self._path(row)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("states")

    def put(self, row: dict[str, Sequence[int]], states: Tensor) -> None:
        """Keep (T, H) states of a packed row; a kill leaves no half-written file."""
        path = self._path(row)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        save_file({"states": states.detach().cpu().contiguous()}, str(partial))
        partial.replace(path)


def trunk_digest(model: PreTrainedModel) -> str:
    """Digest of what decides a trunk's states: all parameters, and rope, norms, heads."""
    settings = [repr(getattr(model.config, name, None)) for name in _SAME_STATES]
    digest = hashlib.sha256("\n".join(settings).encode())
    for name, parameter in model.named_parameters():
        data = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(name.encode() + b"\0" + data.numpy().tobytes())
    return digest.hexdigest()[:16]
