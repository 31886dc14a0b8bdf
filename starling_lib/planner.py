"""What a run takes before it is started: memory a device, FLOPs, hours, money.

Memory is counted from what training keeps: parameters, gradients, Adam's two moments, the
low-precision copies that autocast makes, activations kept for the backward pass, the
vocabulary's logits, frozen copies. Formulas in one place each, with their sources:

    weights, gradients, optimiser   ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, §3)
    activations                     counted for a Llama layer, after Korthikanti et al.
                                    (2022, arXiv 2205.05198, §4), and held by a test
                                    against the tensors that autograd keeps
    FLOPs                           6 a trained parameter and token, 2 a frozen one
                                    (Kaplan et al. 2020, arXiv 2001.08361, §2.1)

Knows: architectures as shapes, batch sizes, how state is sharded. Does not know: data,
weights, what any of it is for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GIB = 2**30
# What is split over the devices of a run: ZeRO's stages by DeepSpeed, and FSDP2.
SHARDED = {
    "none": frozenset(),
    "zero1": frozenset({"optimiser"}),
    "zero2": frozenset({"optimiser", "gradients"}),
    "zero3": frozenset({"optimiser", "gradients", "weights"}),
    "fsdp2": frozenset({"optimiser", "gradients", "weights"}),
}
# DeepSpeed computes in weights of low precision and keeps a float32 copy to update; all
# else here keeps float32 weights and lets autocast make copies.
_LOW_PRECISION_WEIGHTS = ("zero1", "zero2", "zero3")
_WORDS = 2048  # of the vocabulary at a time: `vocabulary.WORDS`
_GATHERED_LAYERS = 2  # whole at a time where weights are split: one and the next


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder that memory and FLOPs depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    attention: int  # query heads × their width
    key_value: int  # key heads × their width
    vocabulary: int
    tied: bool  # one matrix is embedding and head
    windowed: bool = False  # attention reaches over a sliding window only

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a transformers config with Llama's names of its fields.

        Raises ValueError for one that lacks some of them.
        """
        wanted = ("num_hidden_layers", "hidden_size", "intermediate_size")
        wanted += ("num_attention_heads", "num_key_value_heads", "vocab_size")
        if missing := [name for name in wanted if getattr(config, name, None) is None]:
            raise ValueError(
                f"the planner counts decoders of Llama's kind; this config has no "
                f"{', '.join(missing)}"
            )
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            attention=config.num_attention_heads * width,
            key_value=config.num_key_value_heads * width,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            windowed=getattr(config, "sliding_window", None) is not None,
        )

    @property
    def layer_parameters(self) -> int:
        """Attention, gated feed-forward and two norms; no biases."""
        attention = self.hidden * (2 * self.attention + 2 * self.key_value)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def trunk_parameters(self) -> int:
        """All but the head: embedding, layers, final norm."""
        layers = self.layers * self.layer_parameters
        return self.embedding_parameters + layers + self.hidden

    @property
    def parameters(self) -> int:
        """Of the language model."""
        return self.trunk_parameters + (0 if self.tied else self.embedding_parameters)

    def trained(self, last: int | None, head: bool) -> int:
        """Parameters that train: all, or the last N layers and the final norm.

        `head`: there is a vocabulary's matrix, which trains unless it is the frozen
        embedding.
        """
        if last is None:
            return self.parameters if head else self.trunk_parameters
        own_head = self.embedding_parameters if head and not self.tied else 0
        return min(last, self.layers) * self.layer_parameters + self.hidden + own_head

    @property
    def value_head_parameters(self) -> int:
        """Of a critic's two layers, hidden → 2 hidden → 1, with biases."""
        return 2 * self.hidden**2 + 4 * self.hidden + 1


@dataclass(frozen=True)
class Load:
    """What one device computes at once, and how its state is held."""

    tokens: int  # of a forward and backward pass, all rows together
    # Tokens of keys and values as attention reads them: with K responses in one row, a
    # prompt stands before each of them.
    keys: int = 0
    pairs: int = 0  # of a query and a key, summed over the rows, for one head
    response_tokens: int = 0  # whose logits are kept: 0 for a reward model
    trained_layers: int | None = None
    separate_critic: bool = False  # values are learnt by a copy of the trained layers
    bytes_parameter: int = 4  # of the weights that are optimised
    bytes_compute: int = 2  # bf16 or fp16; 4 without
    checkpointing: bool = False
    on_cpu: bool = False  # where this library's attention keeps its weights
    accumulates: bool = True  # gradients are held while activations are
    sharding: str = "none"
    devices: int = 1

    @classmethod
    def of_rankings(cls, rows: int, prompt: int, response: int, k: int, **state):
        """Rows of one prompt and K responses behind it (`prefix.pack_ranking`)."""
        span = prompt + response
        return cls(
            tokens=rows * (prompt + k * response),
            keys=rows * (prompt + k * span),
            pairs=rows * (prompt**2 + k * response * span),
            **state,
        )

    @classmethod
    def of_responses(cls, rows: int, prompt: int, response: int, **state):
        """Rows of one prompt and one response, whose log-probabilities are asked for."""
        words = {"response_tokens": rows * response}
        return cls.of_rankings(rows, prompt, response, 1, **words, **state)

    @property
    def low_precision(self) -> bool:
        """Whether the weights themselves are kept in the format of computing."""
        return self.sharding in _LOW_PRECISION_WEIGHTS and self.bytes_compute < 4

    @property
    def autocast(self) -> bool:
        return self.bytes_compute < self.bytes_parameter and not self.low_precision

    @property
    def tops(self) -> int:
        """Stacks of trained layers that a token passes: the policy's, a critic's own."""
        return 1 + self.separate_critic

    @property
    def copy_samples(self) -> bool:
        """Whether a low-precision copy samples (`rollouts.half_precision_copy`)."""
        return self.on_cpu and self.autocast

    @property
    def weight_bytes(self) -> int:
        return self.bytes_compute if self.low_precision else self.bytes_parameter

    def trains_head(self, shape: Shape) -> bool:
        """Whether the vocabulary's matrix trains: not where it is a frozen embedding."""
        return self.trained_layers is None or not shape.tied

    def layers_of(self, shape: Shape) -> int:
        """How many layers train."""
        wanted = self.trained_layers
        return shape.layers if wanted is None else min(wanted, shape.layers)


# --- memory


def attention_bytes(shape: Shape, load: Load) -> float:
    """What attention keeps in one layer, beside the inputs of the four matrices.

    On a CPU queries, keys, values and the softmax, in float32 and as cast. On a GPU
    (torch's fused kernels) no softmax, but its own output, a mask, and keys and values
    repeated for every query head.
    """
    size = load.bytes_compute
    if load.on_cpu:
        softmax = 4 if size == 4 else 4 + size
        kept = size * (load.tokens * shape.attention + 2 * load.keys * shape.key_value)
        return kept + softmax * load.pairs * shape.heads
    kept = 2 * load.tokens * shape.attention + 2 * load.keys * shape.attention
    return size * (kept + load.pairs)


def layer_bytes(shape: Shape, load: Load) -> float:
    """Kept for the backward pass of one trained layer.

    Two norms keep their input and what it is before the weight, in float32. The first of
    these is, in float32, also what a matrix reads; autocast casts it anew for each of
    the five matrices behind a norm. Behind the matrices: the attention's output, and of
    the feed-forward network gate, its activation, the other branch and their product.
    """
    hidden, size = load.tokens * shape.hidden, load.bytes_compute
    if load.autocast:
        norms = 4 * 4 * hidden + 5 * size * hidden
    elif load.low_precision:  # input in float32, the rest as computed
        norms = 2 * (4 + size + size) * hidden
    else:
        norms = 6 * size * hidden
    rest = load.tokens * (shape.attention + 4 * shape.intermediate)
    return norms + size * rest + attention_bytes(shape, load)


def activation_bytes(shape: Shape, load: Load) -> float:
    """Kept for the backward pass of the trained layers and the final norm.

    With checkpointing one layer is held whole and of each only the input.
    """
    layer, layers = layer_bytes(shape, load), load.tops * load.layers_of(shape)
    hidden = load.tokens * shape.hidden
    norm = load.tops * 2 * 4 * hidden
    if load.checkpointing:
        kept = load.bytes_compute if load.low_precision else 4
        return layer + norm + layers * hidden * kept
    return layers * layer + norm


def logit_bytes(shape: Shape, load: Load) -> float:
    """Logits of the response tokens in float32, and three times as much beside them.

    The backward pass of logsumexp is grad · exp(logits − result), whose three
    intermediate results live side by side. Through a frozen head the vocabulary passes in
    pieces (`vocabulary`): two of those, and a mean word, a chosen one and a slope a token.
    """
    if load.trains_head(shape):
        return 4 * 4 * load.response_tokens * shape.vocabulary
    words = min(_WORDS, shape.vocabulary)
    return 4 * load.response_tokens * (2 * words + 3 * shape.hidden)


def workspace_bytes(shape: Shape, load: Load) -> float:
    """What the backward pass of the topmost layer holds beyond what was kept for it.

    In the feed-forward network two gradients of its width; in attention, where the
    softmax is kept, two of its size, when the feed-forward network's part is gone.
    """
    wide = load.tokens * shape.intermediate * load.bytes_compute
    softmax = 4 * load.pairs * shape.heads if load.on_cpu else 0
    return max(2 * wide, 2 * softmax - 4 * wide)


def critic_parameters(shape: Shape, load: Load) -> int:
    """Of a critic: its head and, if separate, its copy of what trains below the head."""
    layers = shape.trained(load.trained_layers, head=False)
    return shape.value_head_parameters + load.separate_critic * layers


def state_bytes(
    shape: Shape, load: Load, head: bool, critic: int = 0
) -> dict[str, float]:
    """Weights, gradients, optimiser and working copies on one device.

    `critic`: parameters of one in the same module, which are split as the policy's. Its
    gradients are among the others; its weights and moments are a part of their own.
    Gradients without sharding stand twice on several devices: DDP sends them in buckets
    of its own. Working copies are those that autocast makes of weights that train until
    the forward pass ends, and layers put together where weights are split.
    """
    split = SHARDED[load.sharding]
    share = {
        name: load.devices if name in split else 1
        for name in ("weights", "gradients", "optimiser")
    }
    total = shape.parameters if head else shape.trunk_parameters
    trained = shape.trained(load.trained_layers, head)
    copies = 0
    if load.autocast:
        matrices = load.tops * load.layers_of(shape) * shape.layer_parameters
        own_head = head and load.trains_head(shape)
        matrices += shape.embedding_parameters if own_head else 0
        copies += matrices * load.bytes_compute
    if "weights" in split and load.devices > 1:
        copies += _GATHERED_LAYERS * shape.layer_parameters * load.weight_bytes
    buckets = load.sharding == "none" and load.devices > 1
    gradients = (trained + critic) * load.weight_bytes * (2 if buckets else 1)
    weight = load.weight_bytes / share["weights"]
    moments = (12 if load.low_precision else 8) / share["optimiser"]
    state = {
        "weights": total * weight,
        "gradients": gradients / share["gradients"],
        "optimiser": trained * moments,
        "working copies": copies,
    }
    return state | ({"critic": critic * (weight + moments)} if critic else {})


def training_memory(
    shape: Shape, load: Load, head: bool = True, critic: int = 0
) -> dict[str, float]:
    """Bytes on one device by what they are for, at the fullest moment of a step.

    `head`: the model has a vocabulary head (a policy); a reward model has one number.
    `critic`: parameters of one that trains with it.
    Where no gradients are held while activations are, they take their place during the
    backward pass: only what they need beyond it counts.
    Raises ValueError on an unknown kind of sharding.
    """
    if load.sharding not in SHARDED:
        raise ValueError(
            f"sharding={load.sharding!r}: choose from {', '.join(SHARDED)}"
        )
    logits = logit_bytes(shape, load) if head else 0
    passing = {
        "activations": activation_bytes(shape, load),
        "logits": logits,
        "workspace": max(0.0, workspace_bytes(shape, load) - logits),
    }
    state = state_bytes(shape, load, head, critic)
    if load.autocast and load.checkpointing:
        # All copies are there when the forward pass ends, and gone when the backward pass
        # computes its first layer again, which then is in their place.
        again = (
            layer_bytes(shape, load) + sum(passing.values()) - passing["activations"]
        )
        layer = shape.layer_parameters * load.bytes_compute
        state["working copies"] = max(layer, state["working copies"] - again)
    if not load.accumulates:
        state["gradients"] = max(0.0, state["gradients"] - sum(passing.values()))
    return {**state, **passing}


def beside_policy(policy: Shape, reward: Shape, load: Load) -> dict[str, float]:
    """Bytes of what stands beside a policy that is tuned, all the time and unsharded.

    The reference is a frozen copy of what trains (the trunk is shared). The reward model
    is held whole.
    """
    layers = policy.trained(load.trained_layers, head=False)
    head = policy.embedding_parameters if load.trains_head(policy) else 0
    return {
        "reference": 4 * (layers + head),
        "reward model": (reward.trunk_parameters + reward.hidden) * 4,
    }


def apa_memory(
    policy: Shape,
    reward: Shape,
    load: Load,
    rollout: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """`training_memory` of policy and critic while they are updated, and what is beside.

    `rollout`: `rows` and `tokens` (prompt and response) that an iteration keeps trunk
    states for, of which a minibatch is copied.
    """
    parts = training_memory(policy, load, critic=critic_parameters(policy, load))
    parts |= beside_policy(policy, reward, load)
    if rollout and load.layers_of(policy) < policy.layers:
        kept = rollout["rows"] * rollout["tokens"] + load.tokens
        parts["trunk states"] = kept * policy.hidden * 4
    return parts


def sampling_memory(
    policy: Shape,
    reward: Shape,
    load: Load,
    rows: int,
    prompt: int,
    response: int,
) -> dict[str, float]:
    """Bytes on one device while an iteration's responses are sampled.

    Nothing is kept for a backward pass, and gradients are given back after each step, but
    for DDP's buckets. The cache holds keys (float32 where autocast casts, because rotation
    is; those of a low-precision copy are as it computes) and values of all rows to their
    end, or, while prompts are read, those twice. On a CPU an arranged copy of the weights
    samples (`arranged`), under autocast that of a copy in low precision.
    `logits`: of one token a row, in float32 and float64, as they are sampled from.
    `trunk states`, where they are kept (`keeps_states`), in the cache, by row and as one
    tensor.
    """
    critic = critic_parameters(policy, load)
    state = state_bytes(policy, load, head=True, critic=critic)
    buckets = load.sharding == "none" and load.devices > 1
    state["gradients"] *= 0.5 if buckets else 0
    if load.on_cpu:
        copies = 2 if load.autocast else 1
        state["working copies"] = copies * policy.parameters * load.bytes_compute
    casts = load.autocast and not load.copy_samples
    uncast = load.bytes_parameter if casts else load.bytes_compute
    token = policy.layers * policy.key_value * (uncast + load.bytes_compute)
    reading = 2 * rows * prompt * token
    kept = {}
    if load.layers_of(policy) < policy.layers and keeps_states(policy, load):
        kept["trunk states"] = 3 * rows * (prompt + response) * policy.hidden * uncast
    return {
        **state,
        **kept,
        **beside_policy(policy, reward, load),
        "key-value cache": max(reading, rows * (prompt + response) * token),
        "logits": rows * policy.vocabulary * (load.bytes_compute + 4 * 4 + 8),
    }


def keeps_states(shape: Shape, load: Load) -> bool:
    """Whether sampling hands the frozen trunk's states on (`rollouts.sample`).

    Not where a low-precision copy samples, nor where attention has windows.
    """
    return not (load.copy_samples or shape.windowed)


# --- work


def training_flops(shape: Shape, load: Load, head: bool = True) -> float:
    """Of one forward and backward pass of `load` on one device.

    A frozen head takes 4 a parameter and token: logits and, still in the forward pass,
    the slope of the states (`vocabulary`). Attention's own products are left out: with 7B
    and 2,048 tokens they are 4 %.
    """
    layers = load.layers_of(shape)
    frozen = shape.layers - layers
    passes = 2 * frozen + load.tops * layers * (8 if load.checkpointing else 6)
    flops = load.tokens * shape.layer_parameters * passes
    if head:
        each = 6 if load.trains_head(shape) else 4
        flops += load.response_tokens * shape.embedding_parameters * each
    return flops


def generation_flops(shape: Shape, rows: int, prompt: int, response: int) -> float:
    """Of sampling: each token of prompt and response once, a logit a response token."""
    trunk = shape.layers * shape.layer_parameters
    return (
        2 * rows * ((prompt + response) * trunk + response * shape.embedding_parameters)
    )


def generation_bytes(
    shape: Shape, rows: int, prompt: int, response: int, size: int
) -> float:
    """Read from memory to sample: for each token all weights and the cache so far."""
    cache = rows * 2 * shape.layers * shape.key_value * (prompt + response / 2)
    return response * size * (shape.parameters + cache)


def hours(flops: float, devices: int, tflops: float, utilisation: float) -> float:
    """Wall time on devices of so many peak TFLOP/s, of which a share is reached."""
    return flops / (devices * tflops * 1e12 * utilisation) / 3600


def judging_cost(
    requests: int,
    prompt_tokens: int,
    completion_tokens: int,
    prices: tuple[float, float],
) -> float:
    """Dollars for requests at so much a million prompt and completion tokens."""
    return requests * (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6


def fits(memory: Mapping[str, float], gib: float) -> int:
    """Whole percent of a device's memory that a plan takes; above 100 it does not fit."""
    return math.ceil(100 * sum(memory.values()) / (gib * GIB))
