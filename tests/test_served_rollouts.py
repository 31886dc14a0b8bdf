"""Responses of servers, over real HTTP: what is kept, what is dropped and counted."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from chat_server import transformers_server
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from starling_lib.apa import APAConfig, APATrainer
from starling_lib.judges import JudgeError, Reply
from starling_lib.models import tiny_model
from starling_lib.rollouts import encode_prompt, sample, sequence_logprobs
from starling_lib.served_rollouts import (
    REASONS,
    ServedSampler,
    fault,
    sampling_fields,
    saved_weights,
)
from starling_lib.trunk import add_adapters

pytestmark = pytest.mark.usefixtures("fp32")

EOS = 2
PROMPTS = [[{"role": "user", "content": f"say {i}"}] for i in range(6)]


def completion(text, reason="stop", tokens=None, prompt_tokens=None):
    """(status, body) of a chat completion with the counts that are given."""
    usage = {"completion_tokens": tokens, "prompt_tokens": prompt_tokens}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": reason, "message": message}
    body = {
        "choices": [choice],
        "usage": {k: v for k, v in usage.items() if v is not None},
    }
    return 200, json.dumps(body).encode()


def asked(body) -> str:
    return body["messages"][-1]["content"]


def sampler(url, **options) -> ServedSampler:
    defaults = {"model": "policy", "timeout": 30, "max_retries": 0}
    return ServedSampler(url, **defaults | options)


def readable_policy(tokenizer, seed=0, only=None):
    """The tiny model with all weight on letters that are valid UTF-8 and on EOS.

    Plain tiny models say bytes that are no UTF-8. One hidden direction, the same for
    every token, is read by the output layer alone.
    """
    policy = tiny_model(seed)
    policy.config.tie_word_embeddings = False
    embedding = policy.model.embed_tokens.weight.data
    head = embedding.clone()
    embedding[:, 0] = 5.0
    letters = [i for i in range(3, 259) if tokenizer.decode([i]).isprintable()]
    letters = [i for i in letters if tokenizer.decode([i]).isascii()]
    head[:, 0] = -10.0
    head[letters if only is None else tokenizer(only)["input_ids"], 0] = 0.0
    head[EOS, 0] = 0.3
    policy.lm_head.weight = torch.nn.Parameter(head)
    return policy


def counts(**expected) -> dict:
    """`figures` without the share, zero where nothing is said."""
    return {f"dropped_{reason}": float(expected.get(reason, 0)) for reason in REASONS}


def counted(served) -> dict:
    return {k: v for k, v in served.figures.items() if k != "dropped_share"}


# --- what is kept


def test_a_server_of_the_policys_texts_gives_the_policys_rollout(serve, tokenizer):
    """Field by field what local sampling gave, cut responses and all."""
    policy = readable_policy(tokenizer)
    local = sample(policy, tokenizer, PROMPTS, max_new_tokens=12, samples=3, seed=1)
    assert 0 < local.finished.sum() < len(local)
    rows = zip(local.prompts, local.texts, local.finished, local.lengths, strict=True)
    by_prompt: dict[str, list] = {}
    for messages, text, ended, length in rows:
        reason = "stop" if ended else "length"
        said = completion(
            text, reason, int(length), len(encode_prompt(tokenizer, messages))
        )
        by_prompt.setdefault(messages[-1]["content"], []).append(said)
    # One request at a time: the n-th sample of a prompt is the n-th that it asks for.
    server = serve(lambda body, count: by_prompt[asked(body)][count - 1])
    served = sampler(server.url, concurrency=1)
    ours = served(policy, tokenizer, PROMPTS, max_new_tokens=12, samples=3)
    for name in ("prompt_ids", "prompt_mask", "response_ids", "response_mask"):
        assert torch.equal(getattr(ours, name), getattr(local, name)), name
    assert torch.equal(ours.finished, local.finished)
    assert (ours.prompts, ours.texts) == (local.prompts, local.texts)
    assert served.figures == {"dropped_share": 0.0, **counts()}
    expected = sequence_logprobs(policy, local)
    assert torch.equal(sequence_logprobs(policy, ours), expected)


def test_rows_keep_the_order_of_the_prompts(serve, tokenizer, policy):
    """The first prompt is answered last."""
    last, others = threading.Event(), []

    def say(body, count):
        if asked(body) == "say 0":
            assert last.wait(20)
        others.append(asked(body))
        if len(others) == 5:
            last.set()
        return f"{asked(body)}!"

    served = sampler(serve(say).url, concurrency=6)
    rollout = served(policy, tokenizer, PROMPTS)
    assert others[-1] == "say 0"
    assert rollout.texts == [f"say {i}!" for i in range(6)]
    assert rollout.prompts == PROMPTS


def test_eos_follows_what_ended_and_nothing_follows_what_was_cut(
    serve, tokenizer, policy
):
    said = {"say 0": ("ab", "stop", 3), "say 1": ("abcd", "length", 4)}
    said["say 2"] = ("", "stop", 1)
    said["say 3"] = ("abc", "stop", 4)  # with its EOS as long as is allowed
    server = serve(lambda body, count: completion(*said[asked(body)]))
    rollout = sampler(server.url)(policy, tokenizer, PROMPTS[:4], max_new_tokens=4)
    a, b, c, d = tokenizer("abcd")["input_ids"]
    responses = [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    assert responses == [[a, b, EOS], [a, b, c, d], [EOS], [a, b, c, EOS]]
    assert rollout.finished.tolist() == [True, False, True, True]
    assert rollout.texts == ["ab", "abcd", "", "abc"]


# --- what is dropped


@pytest.mark.parametrize(
    ("text", "reason", "tokens", "expected"),
    [
        ("abc", "stop", 4, None),
        ("abc", "stop", 0, None),  # not counted
        ("abcd", "length", 4, None),
        ("ä", "stop", 3, None),  # two bytes and EOS
        ("abc", "content_filter", 4, "ending"),
        ("abc", "tool_calls", 4, "ending"),
        ("abc", "stop", 3, "tokens"),
        ("abc", "stop", 5, "tokens"),
        ("abcd", "length", 5, "tokens"),
        ("abc", "length", 4, "tokens"),  # ended on the last token, called cut
        ("abc", "length", 0, "length"),
        ("abcde", "length", 5, "length"),
        ("abcd", "stop", 5, "length"),
        ("a<|im_end|>", "stop", 0, "round_trip"),
        ("\ufffd", "stop", 4, "round_trip"),  # these very bytes, or any broken one
    ],
)
def test_what_cannot_be_tokens_of_the_policy(tokenizer, text, reason, tokens, expected):
    reply = Reply(text, completion_tokens=tokens, finish_reason=reason)
    assert fault(tokenizer, reply, max_new_tokens=4) == expected


def test_a_tokenizer_that_changes_the_text_is_seen(tmp_path):
    """Lower-casing: "Ab" comes back as "ab"."""
    from tokenizers import normalizers

    from starling_lib.models import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert fault(tokenizer, Reply("Ab", completion_tokens=3), 4) == "round_trip"
    assert fault(tokenizer, Reply("ab", completion_tokens=3), 4) is None


def test_dropped_rows_are_counted_and_asked_for_again(serve, tokenizer, policy):
    """Each prompt's first replies have a fault of their own; the rows come in full."""
    lies = {
        "say 0": [completion("abc", "content_filter")],
        "say 1": [completion("a\ufffd", "stop", 4), completion("abc", "stop", 9)],
        "say 2": [completion("ab", "length")],
        "say 3": [(500, b"{}")],
    }

    def say(body, count):
        before = lies.get(asked(body), [])
        good = completion(asked(body)[-1], "stop", 2)
        return before[count - 1] if count <= len(before) else good

    server = serve(say)
    served = sampler(server.url)
    with pytest.warns(UserWarning, match="5 of 11 replies.*'round_trip': 1"):
        rollout = served(policy, tokenizer, PROMPTS)
    assert rollout.texts == [str(i) for i in range(6)]
    expected = counts(ending=1, round_trip=1, tokens=1, length=1, failed=1)
    assert counted(served) == expected
    assert served.figures["dropped_share"] == pytest.approx(5 / 11)
    assert len(server.bodies) == 11, "what was kept is not asked for again"


def test_figures_are_of_the_last_call(serve, tokenizer, policy):
    server = serve(lambda body, count: "b" if count > 1 else completion("", "odd"))
    served = sampler(server.url)
    with pytest.warns(UserWarning, match="6 of 12"):
        served(policy, tokenizer, PROMPTS)
    served(policy, tokenizer, PROMPTS)
    assert served.figures == {"dropped_share": 0.0, **counts()}


@pytest.mark.filterwarnings("error")
def test_a_sampler_warns_once(serve, tokenizer, policy):
    server = serve(lambda body, count: "b" if count % 2 else completion("", "odd"))
    served = sampler(server.url, concurrency=1)
    served(policy, tokenizer, PROMPTS)
    with pytest.warns(UserWarning, match="6 of 12"):
        served(policy, tokenizer, PROMPTS)
    served(policy, tokenizer, PROMPTS)
    assert served.figures["dropped_share"] == 0.5


@pytest.mark.filterwarnings("ignore:.*replies of transformers were dropped")
@pytest.mark.parametrize(("rows", "requests"), [(31, 4 * 31), (32, 32)])
def test_a_server_of_which_nothing_can_be_kept_is_left_early(
    serve, tokenizer, policy, rows, requests
):
    server = serve(lambda body, count: completion("abc", "stop", 9))
    served = sampler(server.url, attempts=4)
    with pytest.raises(JudgeError, match=f"{rows} of {rows}.*'tokens': {requests}"):
        served(policy, tokenizer, PROMPTS[:1], samples=rows)
    assert len(server.bodies) == requests


@pytest.mark.filterwarnings("ignore:.*replies of transformers were dropped")
def test_rows_that_never_come_are_an_error_after_so_many_attempts(
    serve, tokenizer, policy
):
    def say(body, count):
        return completion("abc", "stop", 9) if asked(body) == "say 4" else "good"

    server = serve(say)
    served = sampler(server.url, attempts=3)
    with pytest.raises(JudgeError, match="1 of 6.*after 3.*row 4.*'tokens': 3"):
        served(policy, tokenizer, PROMPTS)
    assert len(server.bodies) == 6 + 2
    assert counted(served) == counts(tokens=3)


@pytest.mark.filterwarnings("ignore:.*replies of transformers were dropped")
def test_a_server_that_stalls_or_hangs_up_costs_one_attempt(serve, tokenizer, policy):
    def say(body, count):
        if count == 1 and asked(body) == "say 1":
            time.sleep(3)
        if count == 1 and asked(body) == "say 2":
            return b"torn"  # shorter than its length says
        return "good"

    served = sampler(serve(say).url, timeout=0.8)
    begun = time.monotonic()
    assert served(policy, tokenizer, PROMPTS[:3]).texts == ["good"] * 3
    assert counted(served) == counts(failed=2)
    assert time.monotonic() - begun < 3


@pytest.mark.filterwarnings("ignore:.*replies of transformers were dropped")
def test_a_server_that_is_not_there_is_named(tokenizer, policy):
    served = sampler("http://127.0.0.1:9/v1", concurrency=2, attempts=2)
    with pytest.raises(JudgeError, match="127.0.0.1:9"):
        served(policy, tokenizer, PROMPTS)


def test_a_refused_key_stops_at_once_and_is_not_shown(
    serve, tokenizer, policy, monkeypatch
):
    monkeypatch.setenv("SERVER_KEY", "sk-secret-secret-secret")
    server = serve(lambda body, count: (401, b"no: sk-secret-secret-secret"))
    served = sampler(server.url, concurrency=1, api_key_env="SERVER_KEY")
    with pytest.raises(JudgeError, match="401.*SERVER_KEY") as error:
        served(policy, tokenizer, PROMPTS)
    assert "secret" not in f"{error.value!r} {served!r} {server.bodies}"
    assert len(server.bodies) <= 2


def test_a_server_that_reads_other_prompts_is_an_error(serve, tokenizer, policy):
    length = len(encode_prompt(tokenizer, PROMPTS[0]))
    server = serve(lambda body, count: completion("a", "stop", 2, length + 1))
    with pytest.raises(ValueError, match=f"row 0.*{length + 1} tokens.*{length}:"):
        sampler(server.url)(policy, tokenizer, PROMPTS[:1])


def test_a_prompt_that_would_have_to_be_cut_is_an_error(serve, tokenizer, policy):
    server = serve(lambda body, count: "a")
    length = len(encode_prompt(tokenizer, PROMPTS[0]))
    served = sampler(server.url)
    served(policy, tokenizer, PROMPTS, max_prompt_length=length)
    with pytest.raises(ValueError, match=f"row 0.*{length} tokens.*leave it out"):
        served(policy, tokenizer, PROMPTS, max_prompt_length=length - 1)
    assert len(server.bodies) == 6


# --- what is asked


def test_the_whole_distribution_is_asked_for(serve, tokenizer, policy):
    server = serve(lambda body, count: "a")
    sampler(server.url)(policy, tokenizer, PROMPTS[:1], max_new_tokens=7)
    (body,) = server.bodies
    settings = GenerationConfig(**json.loads(body.pop("generation_config")))
    assert body == {"model": "policy", "messages": PROMPTS[0]}
    assert (settings.do_sample, settings.temperature) == (True, 1.0)
    assert (settings.top_k, settings.top_p, settings.min_p) == (0, 1.0, 0.0)
    assert (settings.max_new_tokens, settings.eos_token_id) == (7, EOS)
    settings.validate()


def test_vllm_gets_its_own_fields(serve, tokenizer, policy):
    server = serve(lambda body, count: "a")
    served = sampler(server.url, server="vllm")
    served(policy, tokenizer, PROMPTS[:1], max_new_tokens=7, temperature=0.5)
    (body,) = server.bodies
    assert body == {
        "model": "policy",
        "messages": PROMPTS[0],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def test_temperature_zero_is_greedy(tokenizer):
    fields = sampling_fields("transformers", tokenizer, 5, temperature=0)
    settings = json.loads(fields["generation_config"])
    assert settings["do_sample"] is False and settings["temperature"] == 1.0
    assert sampling_fields("vllm", tokenizer, 5, 0)["temperature"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": "tgi"}, "server='tgi'.*'vllm'"),
        ({"model": None}, "either `model`"),
        ({"weights_dir": "weights"}, "either `model`"),
        ({"model": None, "weights_dir": "w", "server": "vllm"}, "loads no model"),
        ({"attempts": 0}, "attempts=0"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        sampler("http://127.0.0.1:9/v1", **options)


# --- the policy's weights


def test_each_call_serves_the_weights_of_its_moment(serve, tokenizer, policy, tmp_path):
    seen = []

    def say(body, count):
        folder = Path(body["model"])
        seen.append((folder, load_file(folder / "model.safetensors")))
        assert not GenerationConfig.from_pretrained(folder).top_k
        assert AutoTokenizer.from_pretrained(folder)("ab") == tokenizer("ab")
        return "a"

    policy.generation_config.top_k = 3
    served = sampler(serve(say).url, model=None, weights_dir=tmp_path / "weights")
    name = "model.norm.weight"
    for value in (1.0, 2.0):
        policy.model.norm.weight.data.fill_(value)
        served(policy, tokenizer, PROMPTS[:1])
        assert torch.equal(seen[-1][1][name], policy.model.norm.weight)
    assert seen[0][0] != seen[1][0] and seen[0][0].is_absolute()
    assert list((tmp_path / "weights").iterdir()) == [], "nothing is left behind"
    assert policy.generation_config.top_k == 3


def test_no_weights_are_left_behind_by_an_error(serve, tokenizer, policy, tmp_path):
    server = serve(lambda body, count: (404, b"{}"))
    served = sampler(server.url, model=None, weights_dir=tmp_path)
    with pytest.raises(JudgeError, match="404"):
        served(policy, tokenizer, PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_adapters_and_revisions_are_refused(tokenizer, policy, tmp_path):
    with (
        pytest.raises(ValueError, match="holds '@'"),
        saved_weights(policy, tokenizer, tmp_path / "a@b"),
    ):
        pass
    add_adapters(policy, LoraConfig(r=2, target_modules=["q_proj"]), 1)
    with (
        pytest.raises(ValueError, match="adapters"),
        saved_weights(policy, tokenizer, tmp_path / "ab"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


# --- the trainer


def lower_case(prompts, completions, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in texts]


def trainer(folder, tokenizer, served, policy, **changes):
    args = {
        "output_dir": str(folder),
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 4,
        "num_layers_unfrozen": 1,
        "max_new_tokens": 6,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "value_gate": None,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    return APATrainer(
        policy,
        lower_case,
        APAConfig.starling(**args | changes),
        prompts,
        prompts,
        processing_class=tokenizer,
        sampler=served,
    )


@pytest.mark.filterwarnings("ignore:.*replies of transformers were dropped")
def test_apa_learns_from_what_the_server_said(serve, tokenizer, policy, tmp_path):
    """Texts, log-probabilities by the policy itself, and the counts in the log."""
    server = serve(lambda body, count: "Ab" if count % 2 else completion("a", "odd"))
    run = trainer(tmp_path, tokenizer, sampler(server.url, concurrency=1), policy)
    collected = []
    collect = run.collect
    run.collect = lambda *args: collected.append(collect(*args)) or collected[-1]
    before = tiny_model()
    run.train()
    assert len(collected) == 2, "two iterations"
    a, b = tokenizer("Ab")["input_ids"]
    assert collected[0]["response_ids"].tolist() == [[a, b, EOS]] * 8
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    tokens = {name: collected[0][name] for name in names}
    expected = before(
        torch.cat([tokens["prompt_ids"], tokens["response_ids"]], 1)[:1],
        attention_mask=torch.cat([tokens["prompt_mask"], tokens["response_mask"]], 1)[
            :1
        ].long(),
    ).logits[0, -4:-1]
    expected = expected.log_softmax(-1)[range(3), [a, b, EOS]]
    torch.testing.assert_close(
        collected[0]["logprobs"][0], expected.detach(), atol=1e-4, rtol=0
    )
    logs = [row for row in run.state.log_history if "reward" in row]
    assert [row["reward"] for row in logs] == [0.5, 0.5]
    assert all(0 < row["dropped_share"] < 1 and row["dropped_ending"] for row in logs)
    moved = run.model.policy.model.norm.weight - before.model.norm.weight
    assert moved.abs().max() > 1e-4
    assert run.evaluate()["eval_reward"] == 0.5


# --- transformers' own server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL and log of `transformers serve`."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    log = tmp_path_factory.mktemp("served") / "server.log"
    with transformers_server(log, "--model-timeout", "60") as url:
        yield url, log


@pytest.mark.slow
def test_transformers_server_samples_the_whole_distribution(
    server, tokenizer, tmp_path
):
    """First tokens as often as the policy says, whatever settings are published."""
    policy = readable_policy(tokenizer)
    policy.generation_config.update(do_sample=True, top_k=3, repetition_penalty=1.5)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    served = sampler(server[0], timeout=300, model=str(tmp_path))
    rollout = served(policy, tokenizer, PROMPTS[:1], max_new_tokens=3, samples=400)
    ids = torch.tensor([encode_prompt(tokenizer, PROMPTS[0])])
    probabilities = policy(ids).logits[0, -1].double().softmax(-1).detach()
    found = torch.bincount(rollout.response_ids[:, 0], minlength=259)
    assert found[probabilities < 1e-6].sum() == 0
    # Random groups of some 20 expected responses each; EOS is one of its own.
    order = torch.randperm(259, generator=torch.Generator().manual_seed(0)).tolist()
    groups = [[EOS]] + [[i for i in order[k::12] if i != EOS] for k in range(12)]
    counts = [int(found[group].sum()) for group in groups]
    shares = torch.stack([probabilities[group].sum() for group in groups])
    expected = shares / shares.sum() * len(rollout)
    assert stats.chisquare(counts, expected.numpy()).pvalue > 1e-4
    assert (found > 0).sum() > 50, "not the likeliest few"


@pytest.mark.slow
def test_transformers_server_follows_the_weights(server, tokenizer, tmp_path):
    served = sampler(server[0], timeout=300, model=None, weights_dir=tmp_path)
    for letters in ("ab", "xyz"):
        policy = readable_policy(tokenizer, only=letters)
        rollout = served(policy, tokenizer, PROMPTS, max_new_tokens=8, samples=8)
        said = set("".join(rollout.texts))  # which of the letters is up to chance
        assert said and said <= set(letters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_apa_trains_on_transformers_server(server, tokenizer, tmp_path):
    """Two iterations: each asks for the weights of its moment, then learns."""
    url, log = server
    begun = len(log.read_text())
    policy, first = readable_policy(tokenizer), readable_policy(tokenizer)
    served = sampler(url, model=None, weights_dir=tmp_path / "weights")
    run = trainer(tmp_path / "run", tokenizer, served, policy)
    run.train()
    loaded = [
        line for line in log.read_text()[begun:].splitlines() if "Loading /" in line
    ]
    assert len(loaded) == len(set(loaded)) == 2, loaded
    rows = [row for row in run.state.log_history if "reward" in row]
    assert len(rows) == 2 and all(0 <= row["dropped_share"] < 0.5 for row in rows)
    assert all(0 < row["log_ratio"] < 5 for row in rows)
    run.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    moved = again.model.norm.weight - first.model.norm.weight
    assert moved.abs().max() > 1e-4
