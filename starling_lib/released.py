"""The released Starling reward models as they lie on disk.

Knows: their key layout and shards, the texts and the tokenizer settings they were used
with (starling.md §1.3 and §1.4). Does not know: how a score is read, data, training.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from starling_lib.chat import (
    LLAMA2_CARD_TEMPLATE,
    LLAMA2_TEMPLATE,
    Message,
    render,
)

# Where a score is read: at the last real token, or as the released code did, which
# padded to RELEASED_LENGTH and took the last position (its search for the pad token
# found BOS).
SCORE_POSITIONS = ("attention_mask", "released")
RELEASED_LENGTH = 2048
# Starling's policy code and the reward model's card wrote one conversation differently.
# The card's example has `<s>` in its text, to which its tokenizer adds BOS: two in all.
RELEASED_TEMPLATES = {
    "policy": LLAMA2_TEMPLATE,
    "card": LLAMA2_CARD_TEMPLATE,
    "card_two_bos": LLAMA2_CARD_TEMPLATE.replace(
        "{{ bos_token }}", "{{ bos_token }}<s>", 1
    ),
}
LLAMA2_CHAT = "meta-llama/Llama-2-7b-chat-hf"
# For a folder without config.json: the card takes the base model's.
LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PAD_ID = 0  # <unk>, in Llama 2 (RM-7B) and in Yi (RM-34B) alike
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_COMPUTED = "rotary_emb.inv_freq"  # follows from the config; old files carry it


class CheckpointError(ValueError):
    """The files are no released reward model, or not a whole one."""


def load_starling_rm(
    path: str | Path,
    config: LlamaConfig | None = None,
    dtype: torch.dtype = torch.float32,
    score_position: str = "attention_mask",
) -> LlamaForSequenceClassification:
    """Load a reward model released as `transformer.*` and `v_head.weight`.

    `path`: a weight file, a folder (one file or shards with their index; safetensors, or
    `.bin`, of which nothing but tensors is read) or a hub id. `config`: by default the
    folder's config.json, else Llama-2-7B's. `score_position` is kept in the model's
    config, where `score_responses` looks it up. Memory: the model and one shard.
    Raises CheckpointError with the names of missing, unexpected, repeated and misshapen
    tensors.
    """
    if score_position not in SCORE_POSITIONS:
        raise ValueError(
            f"score_position={score_position!r}: choose from {SCORE_POSITIONS}"
        )
    path = _local(path)
    config = _reward_config(config or _stored_config(path))
    config.starling_score_position = score_position
    model = _empty_model(config)
    _fill(model, _weight_files(path), dtype)
    return model.eval()


def load_starling_tokenizer(
    name: str | Path = LLAMA2_CHAT, style: str = "policy"
) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the settings the released models were used with.

    Padding is <unk>, on the right; long texts lose their beginning. The chat template
    writes BOS once and follows `style`: "policy" (`[INST] u [/INST] a</s>`) or "card"
    (`[INST] u </s> [/INST] a</s>`); "card_two_bos" is the card to the token, whose code
    gives a text that begins with `<s>` to a tokenizer that puts BOS (starling.md §1.3).
    Raises ValueError on another style or tokenizer.
    """
    template = _template(style)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.unk_token is None:
        raise ValueError(
            f"{name}: no <unk> token, which the released models are padded with; give "
            f"the tokenizer of their base model ({LLAMA2_CHAT})"
        )
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    tokenizer.chat_template = template
    return tokenizer


def released_text(messages: list[Message], style: str = "policy") -> str:
    """A conversation as the released models read it, for a tokenizer that puts BOS.

    The card's own example also has `<s>` in its text, and so two BOS: that is
    "card_two_bos", as in `load_starling_tokenizer`; elsewhere it is one.
    """
    return render(messages, _template(style), add_generation_prompt=False)


def _template(style: str) -> str:
    if style not in RELEASED_TEMPLATES:
        raise ValueError(f"style={style!r}: choose from {tuple(RELEASED_TEMPLATES)}")
    return RELEASED_TEMPLATES[style]


# --- the model


def _stored_config(path: Path) -> LlamaConfig:
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        return LlamaConfig.from_pretrained(folder)
    return LlamaConfig(**LLAMA2_7B)


def _reward_config(config: LlamaConfig) -> LlamaConfig:
    """A copy for one score; stored pad ids vary (some say −1) and do not count."""
    settings = {"problem_type": "regression", "pad_token_id": PAD_ID}
    label = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return LlamaConfig.from_dict({**config.to_dict(), **settings, **label})


def _empty_model(config: LlamaConfig) -> LlamaForSequenceClassification:
    """A model whose parameters take no memory yet; its computed buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return LlamaForSequenceClassification(config)


def _fill(
    model: LlamaForSequenceClassification, files: list[Path], dtype: torch.dtype
) -> None:
    """Put the tensors of all files in place, one file in memory at a time."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    seen: set[str] = set()
    problems = []
    for file in tqdm(files, "loading shards", disable=len(files) == 1):
        fitting = {}
        for key, tensor in _read(file).items():
            name = _our_name(key)
            if name not in expected:
                if not key.endswith(_COMPUTED):
                    problems.append(f"unexpected: {key}")
                continue
            if name in seen:
                problems.append(f"repeated: {key} in {file.name}")
            if tensor.shape != expected[name]:
                sizes = f"{tuple(tensor.shape)}, by the config {expected[name]}"
                problems.append(f"misshapen: {key} is {sizes}")
            else:
                fitting[name] = tensor.to(dtype)
            seen.add(name)
        model.load_state_dict(fitting, strict=False, assign=True)
    problems += [f"missing: {_their_name(n)}" for n in expected if n not in seen]
    if problems:
        raise CheckpointError(_explain(files[0].parent, problems))


def _our_name(key: str) -> str | None:
    """`transformer.norm.weight` → `model.norm.weight`; None outside their layout."""
    if key == "v_head.weight":
        return "score.weight"
    prefix, _, rest = key.partition(".")
    return f"model.{rest}" if prefix == "transformer" else None


def _their_name(name: str) -> str:
    if name == "score.weight":
        return "v_head.weight"
    return "transformer." + name.removeprefix("model.")


def _explain(folder: Path, problems: list[str], shown: int = 12) -> str:
    rest = len(problems) - shown
    listed = problems[:shown] + ([f"and {rest} more"] if rest > 0 else [])
    return (
        f"{folder} does not hold a released reward model ({len(problems)} problems):\n  "
        + "\n  ".join(listed)
        + "\nExpected are `transformer.*` and `v_head.weight`. Download the folder again, "
        "or give the config of the base model as `config`; a reward model of this library "
        "is read by load_reward_model"
    )


# --- the files


def _local(path: str | Path) -> Path:
    """The path itself, or where the hub's copy of that name lies."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.json", "*.safetensors", "*model*.bin"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path}: no such file or folder here, and the hub did not give it ({reason})."
            " Download it where the hub is reachable and give that folder"
        ) from None


def _weight_files(path: Path) -> list[Path]:
    """The weight files of a folder: all of an index, else the single one."""
    if path.is_file():
        return [path]
    for name in _INDEX:
        if (path / name).is_file():
            return _indexed(path / name)
    for name in _SINGLE:
        if (path / name).is_file():
            return [path / name]
    raise CheckpointError(
        f"{path}: no weights. Expected one of {', '.join((*_INDEX, *_SINGLE))}, or give "
        "the weight file itself"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{index}: no `weight_map` from tensors to files in it; download it again"
        ) from None
    for name in names:
        # A name with a folder in it could point anywhere on this machine.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.name} names {name!r}, which is not in {index.parent}; "
                "download that file into it"
            )
    return [index.parent / name for name in names]


def _read(file: Path) -> dict[str, Tensor]:
    """Tensors of one file by name. A `.bin` is a pickle: only tensors are let out of it."""
    broken = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Zipped files are mapped: what is in use, not the whole, comes into memory.
        mapped = zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except broken as error:
        # torch's own message would advise to read the pickle without this guard.
        raise CheckpointError(
            f"{file}: not a file of tensors, or damaged ({type(error).__name__}), and "
            "nothing in it was run. Download it again"
        ) from None
    return dict(_tensors(weights, file))


def _tensors(weights: object, file: Path) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(weights, dict):
        raise CheckpointError(f"{file}: expected tensors by name, got {type(weights)}")
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {key!r} is no tensor but {type(value)}")
        yield key, value
