"""Texts to tokens to scores of a reward model.

Knows: how a response is written down for a reward model and where its score is read. Does
not know: rankings' meaning, training.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.generation import right_pad
from starling_lib.metrics import check_subsets, rewardbench_scores
from starling_lib.models import inference, reward_head, without_wrapper
from starling_lib.prefix import pack_ranking
from starling_lib.released import RELEASED_LENGTH, SCORE_POSITIONS
from starling_lib.rollouts import Messages, encode_prompt

_REWARD_TEMPLATE = (
    "{{%- set text -%}}{policy_template}{{%- endset -%}}"
    "{{%- if add_generation_prompt -%}}{{{{ text }}}}"
    "{{%- else -%}}{{{{ text.rstrip('\\n') }}}}{{%- endif -%}}"
)


def reward_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose chat template ends at the last message's EOS, padding on the right.

    Chat templates often put a newline after EOS; a reward model read at the last token
    would then be read at that newline by `pipeline` and TRL, and at EOS by its trainer.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    template = tokenizer.chat_template
    if not template:
        raise ValueError(
            "the tokenizer has no chat template: set one (starling_lib.chat)"
        )
    if not template.startswith("{%- set text -%}"):
        tokenizer.chat_template = _REWARD_TEMPLATE.format(policy_template=template)
    return tokenizer


def encode_response(
    tokenizer: PreTrainedTokenizerBase, text: str, finished: bool, max_length: int = 0
) -> list[int]:
    """Token ids of a response; EOS follows only where it ended by itself.

    Over `max_length` tokens (0: no limit) the response is cut, and then has no EOS.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] if finished or not ids else []
    return ids[:max_length] if max_length else ids


def encode_ranking(
    row: dict, tokenizer: PreTrainedTokenizerBase, max_length: int = 0
) -> dict[str, list[int]]:
    """A row of `load_rankings` as a packed row, plus response `lengths` in characters.

    With `max_length`, responses keep at most three quarters of it and the prompt loses
    its oldest tokens so that prompt and longest response fit.
    """
    finished = row.get("finished") or [True] * len(row["responses"])
    limit = max_length * 3 // 4
    responses = [
        encode_response(tokenizer, text, ended, limit)
        for text, ended in zip(row["responses"], finished, strict=True)
    ]
    room = max_length - max(map(len, responses)) if max_length else None
    packed = pack_ranking(encode_prompt(tokenizer, row["prompt"], room), responses)
    return {**packed, "lengths": [len(text) for text in row["responses"]]}


def score_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    finished: Sequence[bool] | None = None,
    batch_size: int = 16,
    progress: bool = False,
    score_position: str | None = None,
) -> Tensor:
    """(N,) float32 rewards, one for each prompt (messages) and response (text).

    Read at the last real token by the attention mask, so the padding side and the
    neighbours in a batch do not matter. `finished=None` takes every response as ended.
    `score_position="released"` reads where the released Starling code did, see
    `released_inputs`; None asks the model's config (`load_starling_rm` writes it there).
    Raises ValueError if the lists differ in length.
    """
    model = without_wrapper(model)
    read = partial(reward_head, model)
    rows = (tokenizer, prompts, responses, finished)
    return _read_responses(model, rows, read, batch_size, progress, score_position)


def score_rewardbench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: pd.DataFrame | Iterable[Mapping],
    batch_size: int = 16,
    progress: bool = False,
    score_position: str | None = None,
) -> pd.DataFrame:
    """The table of `rewardbench_scores` for a model, from RewardBench's own rows.

    `rows` (arXiv 2403.13787; allenai/reward-bench): `prompt` (a text, or messages that
    the responses answer), `chosen` and `rejected` (texts), `subset`; other fields are
    ignored. The rest is as in `score_responses`. Raises ValueError, naming row and
    field, before anything is scored.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    prompts = _check_pairs(frame)
    sides = [list(frame[name]) for name in ("chosen", "rejected")]
    options = {"batch_size": batch_size, "progress": progress}
    options |= {"score_position": score_position}
    scores = score_responses(model, tokenizer, prompts * 2, sum(sides, []), **options)
    chosen, rejected = scores[: len(frame)], scores[len(frame) :]
    scored = {"chosen_score": chosen.numpy(), "rejected_score": rejected.numpy()}
    return rewardbench_scores(frame[["subset"]].assign(**scored))


def _check_pairs(frame: pd.DataFrame) -> list[Messages]:
    """The prompts of RewardBench's rows as messages; ValueError on a malformed field."""
    for name in ("prompt", "chosen", "rejected", "subset"):
        if name not in frame:
            found = ", ".join(map(str, frame.columns)) or "none"
            raise ValueError(f"no field {name!r} in the rows, which have {found}")
    check_subsets(frame["subset"])
    for name in ("chosen", "rejected"):
        for row, text in frame[name].items():
            if not isinstance(text, str):
                raise ValueError(f"row {row!r}: {name!r} is {text!r}, expected a text")
    return [_as_messages(row, prompt) for row, prompt in frame["prompt"].items()]


def _as_messages(row: object, prompt: object) -> Messages:
    """A prompt, a text or messages, as messages; ValueError on anything else."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    fields = ("role", "content")
    messages = list(prompt) if isinstance(prompt, Iterable) else []
    whole = all(
        isinstance(message, Mapping)
        and all(isinstance(message.get(field), str) for field in fields)
        for message in messages
    )
    if not messages or not whole:
        raise ValueError(
            f"row {row!r}: 'prompt' is {prompt!r}, expected a text or messages "
            "{'role': …, 'content': …}"
        )
    return messages


def response_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    finished: Sequence[bool] | None = None,
    batch_size: int = 16,
    progress: bool = False,
    score_position: str | None = None,
) -> Tensor:
    """(N, hidden) float32 states that `score_responses` puts its head on."""
    model, rows = without_wrapper(model), (tokenizer, prompts, responses, finished)
    return _read_responses(
        model, rows, Tensor.float, batch_size, progress, score_position
    )


def _position(model: PreTrainedModel, wanted: str | None) -> str:
    position = wanted or _stored_position(model) or "attention_mask"
    if position not in SCORE_POSITIONS:
        raise ValueError(f"score_position={position!r}: choose from {SCORE_POSITIONS}")
    attention = model.config._attn_implementation
    if position == "released" and "flash" in attention:
        # It leaves padding out of the computation, and this score is read in padding.
        raise ValueError(
            f"attention {attention!r} gives no state at padding, where a score is read "
            "with score_position='released': load with attn_implementation='sdpa'"
        )
    return position


def reads_last_token(model: PreTrainedModel) -> bool:
    """Is a score read at the last token of a prompt and response encoded one by one?"""
    return _stored_position(model) is None


def _stored_position(model: PreTrainedModel) -> str | None:
    return getattr(model.config, "starling_score_position", None)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    finished: Sequence[bool] | None,
    as_released: bool,
) -> list[list[int]]:
    """Token rows; the released models read a conversation tokenised as one text."""
    finished = [True] * len(responses) if finished is None else list(finished)
    rows = []
    for prompt, text, ended in zip(prompts, responses, finished, strict=True):
        if as_released:
            messages = [*prompt, {"role": "assistant", "content": text}]
            rows.append(encode_as_released(tokenizer, messages, bool(ended)))
        else:
            response = encode_response(tokenizer, text, bool(ended))
            rows.append(encode_prompt(tokenizer, prompt) + response)
    return rows


def encode_as_released(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, finished: bool = True
) -> list[int]:
    """Token ids of a whole conversation, rendered and tokenised in one piece.

    At most 2048: BOS and the newest tokens stay. The released code always closed the
    response with EOS; here a cut response goes without it.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not finished and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    opening = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    excess = max(len(ids) - RELEASED_LENGTH, 0)
    return ids if not excess else opening + ids[excess + len(opening) :]


def _read_responses(
    model: PreTrainedModel,
    texts: tuple,
    read: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: bool,
    score_position: str | None,
) -> Tensor:
    """`read` of the (B, hidden) states where scores are read, for all rows in order."""
    position = _position(model, score_position)
    # A released model reads the same tokens wherever its score is read.
    as_released = position == "released" or _stored_position(model) is not None
    rows = _encode(*texts, as_released)
    build = released_inputs if position == "released" else masked_inputs
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    starts = range(0, len(order), batch_size)
    parts = []
    with inference(model):
        for i in tqdm(starts, "scoring", disable=not progress, leave=False):
            some = [rows[j] for j in order[i : i + batch_size]]
            inputs, last = build(some, model.config.pad_token_id or 0)
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            states = model.base_model(**inputs, use_cache=False).last_hidden_state
            states = states[torch.arange(len(some)), last.to(model.device)]
            parts.append(read(states).cpu())
        if not parts:
            nothing = torch.zeros(0, model.config.hidden_size, device=model.device)
            return read(nothing).cpu()
    return torch.cat(parts)[torch.tensor(order).argsort()]


def masked_inputs(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded `input_ids` and `attention_mask` (B, T), and each row's last token."""
    ids, mask = right_pad(rows, pad_id)
    return {"input_ids": ids, "attention_mask": mask.long()}, mask.sum(1) - 1


def released_inputs(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What index −1 of rows padded to 2048 tokens sees, without computing the padding.

    A masked pad token attends to the real tokens only, never to other padding. So one of
    them, told that it stands at position 2047, has the state of the last of 2048 − T.
    """
    inputs, last = masked_inputs([[*row, pad_id] for row in rows], pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    steps = torch.arange(inputs["input_ids"].shape[1])
    inputs["attention_mask"] = (steps < lengths[:, None]).long()
    positions = steps.expand(len(rows), -1).clone()
    positions[torch.arange(len(rows)), last] = RELEASED_LENGTH - 1
    # A row that fills all 2048 is read at its own last token.
    last = torch.where(lengths < RELEASED_LENGTH, last, lengths - 1)
    return {**inputs, "position_ids": positions}, last
