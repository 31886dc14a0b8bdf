"""What a run takes before it is started: memory a device, FLOPs, hours, money.

Memory is counted from what training keeps: parameters, gradients, Adam's two moments, the
low-precision copies that autocast makes, activations kept for the backward pass, the
vocabulary's logits, frozen copies. Formulas in one place each, with their sources:

    weights, gradients, optimiser   ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, §3)
    activations                     counted for a Llama layer, after Korthikanti et al.
                                    (2022, arXiv 2205.05198, §4)
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
# What is split over the devices of a run: ZeRO's stages; FSDP2 with full sharding is 3.
SHARDED = {
    "none": frozenset(),
    "zero1": frozenset({"optimiser"}),
    "zero2": frozenset({"optimiser", "gradients"}),
    "zero3": frozenset({"optimiser", "gradients", "weights"}),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like decoder that memory and FLOPs depend on."""

    layers: int
    hidden: int
    intermediate: int
    attention: int  # query heads × their width
    key_value: int  # key heads × their width
    vocabulary: int
    tied: bool  # one matrix is embedding and head

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a transformers config with Llama's names of its fields."""
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            attention=config.num_attention_heads * width,
            key_value=config.num_key_value_heads * width,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
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

        `head`: with all layers, the vocabulary's matrix trains, too.
        """
        if last is None:
            return self.parameters if head else self.trunk_parameters
        return min(last, self.layers) * self.layer_parameters + self.hidden


@dataclass(frozen=True)
class Load:
    """What one device computes at once, and how its state is held."""

    rows: int  # of a forward and backward pass
    tokens: int  # of them together, padding included
    trained_layers: int | None = None
    response_tokens: int = 0  # whose logits are kept: 0 for a reward model
    bytes_parameter: int = 4  # of the weights that are optimised
    bytes_compute: int = 2  # bf16 autocast; 4 without
    checkpointing: bool = False
    sharding: str = "none"
    devices: int = 1


def activation_bytes(shape: Shape, load: Load) -> float:
    """Kept for the backward pass of the trained layers.

    A layer and token: the layer's input and the sums after attention in float32 (norms
    compute in it), queries, keys and values before and after rotation, the attention's
    output, three feed-forward vectors and the product, and the four inputs of matrices.
    Attention itself is recomputed (flash). With checkpointing one layer is held whole
    and of the others only the input.
    """
    wide = 4 * 4 * shape.hidden  # in float32: two inputs and two outputs of norms
    narrow = 3 * shape.hidden + 2 * shape.attention + 4 * shape.key_value
    narrow += shape.attention + 4 * shape.intermediate
    layer = load.tokens * (wide + load.bytes_compute * narrow)
    layers = shape.layers if load.trained_layers is None else load.trained_layers
    if load.checkpointing:
        return layer + layers * load.tokens * shape.hidden * load.bytes_compute
    return layers * layer


def logit_bytes(shape: Shape, load: Load) -> float:
    """Logits of the response tokens: as computed, in float32, and their gradient."""
    return load.response_tokens * shape.vocabulary * (load.bytes_compute + 4 + 4)


def training_memory(shape: Shape, load: Load, head: bool = True) -> dict[str, float]:
    """Bytes on one device by what they are for, at the fullest moment of a step.

    `head`: the model has a vocabulary head (a policy); a reward model has one number.
    Raises ValueError on an unknown kind of sharding.
    """
    if load.sharding not in SHARDED:
        raise ValueError(
            f"sharding={load.sharding!r}: choose from {', '.join(SHARDED)}"
        )
    split = SHARDED[load.sharding]
    total = shape.parameters if head else shape.trunk_parameters
    trained = shape.trained(load.trained_layers, head)
    shares = {
        name: load.devices if name in split else 1
        for name in ("weights", "gradients", "optimiser")
    }
    autocast = load.bytes_compute < load.bytes_parameter
    return {
        "weights": total * load.bytes_parameter / shares["weights"],
        "gradients": trained * load.bytes_parameter / shares["gradients"],
        "optimiser": 8 * trained / shares["optimiser"],
        # Autocast keeps a copy of each weight that trains until the step ends.
        "autocast copies": trained * load.bytes_compute if autocast else 0,
        "activations": activation_bytes(shape, load),
        "logits": logit_bytes(shape, load) if head else 0,
    }


def apa_memory(
    policy: Shape,
    reward: Shape,
    load: Load,
    separate_critic: bool = False,
    rollout: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """`training_memory` of the policy, and what stands beside it.

    The reference is a frozen copy of the trained layers (the trunk is shared), and so is
    a separate critic, which trains; the reward model is held whole. `rollout`: `rows`
    and `tokens` (prompt and response) that an iteration keeps trunk states for.
    """
    parts = training_memory(policy, load)
    layers = policy.trained(load.trained_layers, head=load.trained_layers is None)
    parts["reference"] = layers * load.bytes_parameter
    if separate_critic:
        parts["critic"] = layers * (2 * load.bytes_parameter + 8)
    parts["reward model"] = reward.trunk_parameters * load.bytes_parameter
    if rollout and load.trained_layers is not None:
        kept = rollout["rows"] * rollout["tokens"] * policy.hidden
        parts["trunk states"] = kept * load.bytes_parameter
    return parts


def training_flops(shape: Shape, load: Load, head: bool = True) -> float:
    """Of one forward and backward pass of `load` on one device."""
    layers = shape.layers if load.trained_layers is None else load.trained_layers
    frozen = shape.layers - layers
    recomputed = 2 if load.checkpointing else 0
    flops = load.tokens * shape.layer_parameters * (2 * frozen)
    flops += load.tokens * shape.layer_parameters * layers * (6 + recomputed)
    if head:
        flops += load.response_tokens * shape.embedding_parameters * 6
    return flops


def generation_flops(shape: Shape, rows: int, prompt: int, response: int) -> float:
    """Of sampling: each token of prompt and response once, a logit a response token."""
    trunk = shape.layers * shape.layer_parameters
    return (
        2 * rows * ((prompt + response) * trunk + response * shape.embedding_parameters)
    )


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
