"""APA and PPO as they were released, written out plainly, beside ours on the same tensors.

Where the released code computes what its paper says, ours must give the same number.
Where it has a defect (whitening over padding, EOS masked out, reward a step late, mask
off by one), the defect is shown to matter here and to be absent from ours.
"""

import pytest
import torch
from datasets import Dataset

from starling_lib import objectives
from starling_lib.models import tiny_model
from starling_lib.policy_rewards import token_rewards
from starling_lib.rollouts import predicting_states, sequence_logprobs


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two responses of 5 and 3 tokens (EOS last) in 5 columns, float64."""
    draw = torch.Generator().manual_seed(0)
    names = ("logprobs", "old", "ref", "values", "old_values", "advantages")
    tensors = {n: torch.randn(2, 5, generator=draw).double() for n in names}
    tensors["mask"] = torch.arange(5) < torch.tensor([[5], [3]])
    return tensors


# --- the formulas


def test_the_papers_code_on_the_same_tensors(batch):
    """Σ((log π − c·A − log π_init)·mask)² / Σ mask with c = 10; ½ Σ(V − R)²·mask / n."""
    mask, returns = batch["mask"], batch["advantages"] + batch["old_values"]
    error = (batch["logprobs"] - 10 * batch["advantages"] - batch["ref"]) * mask
    value_error = (batch["values"] - returns) ** 2 * mask
    policy = objectives.apa_loss(
        batch["logprobs"], batch["ref"], batch["advantages"], mask, apa_lambda=0.1
    )
    value = objectives.value_loss(batch["values"], batch["old_values"], returns, mask)
    assert policy.item() == pytest.approx((error**2).sum().item() / 8, abs=1e-12)
    assert value.item() == pytest.approx(value_error.sum().item() / 16, abs=1e-12)


def test_starlings_code_on_the_same_tensors(batch):
    """c = 1 against the rollout policy; the larger of two value errors, clipped at 0.2."""
    mask, returns = batch["mask"], batch["advantages"] + batch["old_values"]
    error = (batch["logprobs"] - batch["advantages"] - batch["old"]) * mask
    low, high = batch["old_values"] - 0.2, batch["old_values"] + 0.2
    clipped = batch["values"].clamp(low, high)
    larger = torch.max((batch["values"] - returns) ** 2, (clipped - returns) ** 2)
    policy = objectives.apa_loss(
        batch["logprobs"], batch["old"], batch["advantages"], mask, apa_lambda=1.0
    )
    value = objectives.value_loss(
        batch["values"], batch["old_values"], returns, mask, cliprange=0.2
    )
    assert policy.item() == pytest.approx((error**2).sum().item() / 8, abs=1e-12)
    assert value.item() == pytest.approx((larger * mask).sum().item() / 16, abs=1e-12)


def test_the_papers_awr_on_the_same_tensors(batch):
    """−Σ log π · exp(c·A) · mask / n with c = 0.5, which is λ = 2."""
    weights = (0.5 * batch["advantages"]).exp()
    expected = -(batch["logprobs"] * weights * batch["mask"]).sum() / 8
    found = objectives.awr_loss(
        batch["logprobs"], batch["advantages"], batch["mask"], 2
    )
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_carperais_ppo_on_the_same_tensors(batch):
    """Losses, not gains: the worse of −A·ratio and −A·(ratio clipped at 0.2).

    And the worse of two squared value errors, the second with V held within 0.2 of V_old.
    """
    batch["logprobs"].requires_grad_()
    batch["values"].requires_grad_()
    mask, advantages, old_values = (
        batch["mask"],
        batch["advantages"],
        batch["old_values"],
    )
    returns = advantages + old_values
    ratio = ((batch["logprobs"] - batch["old"]) * mask).exp()
    worse = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    held = torch.clamp(batch["values"], old_values - 0.2, old_values + 0.2)
    error = torch.max((batch["values"] - returns) ** 2, (held - returns) ** 2)
    theirs = (worse * mask).sum() / 8, 0.5 * (error * mask).sum() / 8
    ours = (
        objectives.ppo_loss(batch["logprobs"], batch["old"], advantages, mask, 0.2),
        objectives.value_loss(batch["values"], old_values, returns, mask, 0.2),
    )
    assert 0 < ((ratio - 1).abs() > 0.2)[mask].sum() < 8  # both cases occur
    for found, expected, name in zip(ours, theirs, ("logprobs", "values"), strict=True):
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
        slope, right = (
            torch.autograd.grad(x, batch[name])[0] for x in (found, expected)
        )
        assert torch.allclose(slope, right, atol=1e-12)


@pytest.mark.parametrize(("size", "gated"), [(1.0, True), (0.1, False)])
def test_starlings_gate_on_the_same_tensors(batch, tokenizer, tmp_path, size, gated):
    """Above 1 the value loss is all of the loss, else the policy's is added to it."""
    from starling_lib.apa import APAConfig, APATrainer

    mask, advantages = batch["mask"], size * batch["advantages"]
    old_values = batch["old_values"]
    values = old_values + size * batch["values"]
    returns, logprobs = advantages + old_values, batch["logprobs"].requires_grad_()
    held = values.clamp(old_values - 0.2, old_values + 0.2)
    error = torch.max((values - returns) ** 2, (held - returns) ** 2)
    vf_loss = 0.5 * (error * mask).sum() / 8
    policy_loss = (((logprobs - advantages - batch["old"]) * mask) ** 2).sum() / 8
    theirs = vf_loss if vf_loss > 1 else policy_loss + vf_loss
    assert (vf_loss > 1).item() == gated

    trainer = APATrainer(
        tiny_model(),
        lambda completions, **columns: [0.0] * len(completions),
        APAConfig.starling(
            output_dir=str(tmp_path), num_layers_unfrozen=1, max_steps=1
        ),
        Dataset.from_list([{"prompt": [{"role": "user", "content": "go"}]}] * 64),
        processing_class=tokenizer,
    )
    inputs = {
        "logprobs": batch["old"],
        "ref_logprobs": batch["ref"],
        "returns": returns,
    }
    inputs |= {"values": old_values, "advantages": advantages, "response_mask": mask}
    ours = trainer.compute_loss(
        lambda **rows: {"logprobs": logprobs, "values": values},
        {**inputs, "count": mask.sum()},
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(ours, logprobs)
    assert (slope[mask] == 0).all() if gated else (slope[mask] != 0).all()


# --- the defects


def whiten_everything(advantages: torch.Tensor) -> torch.Tensor:
    """The released whitening: padding counts as advantages of 0."""
    variance = advantages.var(unbiased=False)
    return (advantages - advantages.mean()) * torch.rsqrt(variance + 1e-8)


def test_whitening_does_not_depend_on_padding(batch):
    mask = batch["mask"]
    advantages = torch.where(mask, batch["advantages"], 0)
    wider = torch.nn.functional.pad(advantages, (0, 20))
    more = torch.nn.functional.pad(mask, (0, 20))
    ours = objectives.masked_whiten(advantages, mask)
    assert torch.allclose(objectives.masked_whiten(wider, more)[more], ours[mask])
    # The original's advantages grow with the padding, and λ with them shrinks.
    theirs = whiten_everything(advantages)[mask]
    theirs_wider = whiten_everything(wider)[more]
    assert theirs_wider.abs().mean() > 1.5 * theirs.abs().mean()
    assert ours[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_eos_is_learnt(batch):
    """With pad = EOS the original masks every EOS: nobody learns to stop."""
    logprobs = batch["logprobs"].requires_grad_()
    ids = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 2, 2, 2]])  # 2: EOS, and pad
    without_pads = ids != 2
    last = torch.tensor([4, 2])
    arguments = (batch["ref"], batch["advantages"])
    for mask, learnt in ((batch["mask"], True), (without_pads, False)):
        loss = objectives.apa_loss(logprobs, *arguments, mask, 1.0)
        (slope,) = torch.autograd.grad(loss, logprobs)
        assert (slope[torch.arange(2), last] != 0).tolist() == [learnt] * 2


def test_the_reward_sits_on_the_last_token_of_each_row(batch):
    """The original adds it at the batch's longest row's end: late, and discounted away."""
    mask, zeros = batch["mask"], torch.zeros(2, 5).double()
    scores = torch.tensor([1.0, 2.0]).double()
    ours = token_rewards(scores, zeros, zeros, mask, kl_coef=0.0)
    assert ours.tolist() == [[0, 0, 0, 0, 1], [0, 0, 2, 0, 0]]
    late = zeros.clone()
    late[:, -1] = scores
    gae = {"values": zeros, "mask": mask, "gamma": 1.0, "gae_lambda": 0.95}
    assert objectives.gae(ours, **gae)[0][1, 2].item() == 2
    assert objectives.gae(late, **gae)[0][1].abs().sum().item() == 0  # never seen


def test_logprobs_belong_to_the_tokens_they_are_masked_with(fp32, policy, tokenizer):
    """Token t is predicted one position before it stands; the early mask is off by one."""
    from starling_lib.rollouts import sample

    prompts = [[{"role": "user", "content": text}] for text in ("a", "a longer one")]
    rollout = sample(policy, tokenizer, prompts, max_new_tokens=6)
    found = sequence_logprobs(policy, rollout)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        response = rollout.response_ids[i][rollout.response_mask[i]]
        with torch.no_grad():
            logits = policy(input_ids=torch.cat([prompt, response])[None]).logits[0]
        every = logits.float().log_softmax(-1)
        n, here = len(prompt), torch.arange(len(response))
        expected = every[n - 1 : -1][here, response]
        assert torch.allclose(found[i][rollout.response_mask[i]], expected, atol=1e-4)
        early = every[n - 2 : -2][here, response]
        assert not torch.allclose(expected, early, atol=1e-2)


def test_states_that_predict_a_response_begin_at_the_prompts_last_token():
    hidden = torch.arange(12.0).view(1, 6, 2)  # P = 4, R = 2
    states = predicting_states(hidden, torch.ones(1, 2, dtype=torch.bool))
    assert states.tolist() == hidden[0, 3:5].tolist()
