"""Texts to tokens to scores of a reward model.

Knows: how a response is written down for a reward model and where its score is read. Does
not know: rankings' meaning, training.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from starling_lib.models import inference, reward_head
from starling_lib.prefix import pack_ranking
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
) -> Tensor:
    """(N,) float32 rewards, one for each prompt (messages) and response (text).

    Read at the last real token by the attention mask, so the padding side and the
    neighbours in a batch do not matter. `finished=None` takes every response as ended.
    Raises ValueError if the lists differ in length.
    """
    finished = [True] * len(responses) if finished is None else list(finished)
    rows = [
        encode_prompt(tokenizer, prompt) + encode_response(tokenizer, text, bool(ended))
        for prompt, text, ended in zip(prompts, responses, finished, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = torch.zeros(len(rows))
    with inference(model):
        for i in tqdm(
            range(0, len(order), batch_size),
            "scoring",
            disable=not progress,
            leave=False,
        ):
            part = order[i : i + batch_size]
            out[part] = _score_batch(model, [rows[j] for j in part]).cpu()
    return out


def _score_batch(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(B,) scores of token rows, right-padded, read at each row's last token."""
    tensors = [torch.tensor(row, device=model.device) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(t) for t in tensors], True)
    ids = pad(tensors, True, padding_value=model.config.pad_token_id or 0)
    trunk = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    last = trunk.last_hidden_state[torch.arange(len(rows)), mask.sum(1) - 1]
    return reward_head(model, last)
