"""Lower confidence bounds: the paper's bandit, covariances by hand, trainers."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from starling_lib import pessimism
from starling_lib.models import load_reward_model, load_tokenizer
from starling_lib.pessimism import (
    Coverage,
    PessimisticReward,
    confidence_radius,
    coverage,
    distance,
)
from starling_lib.scoring import response_features, score_responses

pytestmark = pytest.mark.usefixtures("fp32")

F64 = torch.float64


def normal(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=draw)


# --- the bandit of Theorem 3.9 (appendix B.3)

# Four actions, rewards −0.9, −1, 0, 0.1: the last is best. The data compare the first two
# n − 1 times, which teaches θ₂ well, and the second with the third once, which is all
# that is known of θ₁: with probability σ(−1) = 0.27 the worse one wins.
ACTIONS = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=F64)
THETA = torch.tensor([-1, 0.1, 0.9], dtype=F64)
RADIUS = 2.0  # the estimate is sought where ‖θ‖ ≤ 2 and Σθ = 0
REGRET = 0.1 - ACTIONS @ THETA
REPEATS = 1000


def maximum_likelihood(wins: torch.Tensor, upset: torch.Tensor, n: int) -> torch.Tensor:
    """(R, 3) estimates: θ₂ on a grid, and θ₁ as far as the ball allows.

    The likelihood is that of θ₂ times that of θ₁, and the one comparison that tells of θ₁
    wants it infinite. On the ball's surface θ₁² + θ₁θ₂ + θ₂² = 2.
    """
    second = torch.linspace(-1.6, 1.6, 3201, dtype=F64)
    half_width = (8 - 3 * second**2).clamp(min=0).sqrt() / 2
    first = torch.stack([-second / 2 - half_width, -second / 2 + half_width])
    often = wins[:, None] * F.logsigmoid(second)
    often = often + (n - 1 - wins)[:, None] * F.logsigmoid(-second)
    once = torch.stack([F.logsigmoid(-first[0]), F.logsigmoid(first[1])])
    best = (often + once[upset]).argmax(1)
    return torch.stack([first[upset, best], second[best], -first[upset, best]], 1)


def bandit(n: int) -> tuple[torch.Tensor, Coverage]:
    """(R, 4) estimated rewards of REPEATS data sets, and what those data cover."""
    draw = np.random.default_rng(n)
    wins = torch.tensor(draw.binomial(n - 1, 1 / (1 + np.exp(-0.1)), REPEATS)).double()
    upset = torch.tensor(draw.binomial(1, 1 / (1 + np.e), REPEATS))
    estimates = maximum_likelihood(wins, upset, n) @ ACTIONS.T
    matrix = torch.diag(torch.tensor([1, n - 1, 0], dtype=F64)) / n
    center = (ACTIONS[0] * (n - 1) + ACTIONS[1] * n + ACTIONS[2]) / (2 * n)
    return estimates, Coverage(matrix, center, n)


def test_the_bandits_coverage_is_that_of_its_comparisons():
    _, known = bandit(20)
    counted = coverage([ACTIONS[[0, 1]]] * 19 + [ACTIONS[[1, 2]]])
    assert torch.allclose(counted.covariance, known.covariance)
    assert torch.allclose(counted.center, known.center) and counted.rankings == 20


@pytest.mark.parametrize("n", [10, 100, 1000, 10_000, 100_000])
def test_greedy_stays_suboptimal_for_every_n_and_pessimism_does_not(n):
    estimates, known = bandit(n)
    greedy = REGRET[estimates.argmax(1)]
    assert greedy.mean() > 0.2  # the paper promises 0.1
    assert 0.2 < (greedy > 0.5).double().mean() < 0.35  # as often as the upset

    unsure = distance(ACTIONS, torch.zeros(3), known.root(1e-9))
    bounds = estimates - confidence_radius(n, dimension=3) * unsure
    cautious = REGRET[bounds.argmax(1)]
    assert cautious.max() < 0.1 + 1e-9 and cautious.mean() < 0.095
    if n >= 10_000:
        assert cautious.max() < 1e-9


def test_pessimism_needs_a_reference_from_which_good_actions_are_covered():
    """From the data's own mean, the two bad actions of the data look safest."""
    estimates, known = bandit(10_000)
    unsure = distance(ACTIONS, known.center, known.root(1e-9))
    bounds = estimates - confidence_radius(10_000, dimension=3) * unsure
    assert set(bounds.argmax(1).tolist()) <= {0, 1}


@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_the_defaults_are_pessimistic_enough_for_the_bandit(n):
    """Two features, as the paper counts them, and |θ₁| ≤ 2: the upset weighs more."""
    estimates, known = bandit(n)
    theta = torch.stack([2 * estimates[:, 1].sign(), estimates[:, 3]], 1)
    estimates = theta @ ACTIONS[:, :2].T
    two = Coverage(known.covariance[:2, :2], known.center[:2], n)
    reward = PessimisticReward(None, None, two, beta=confidence_radius(n, 2))
    unsure = reward.uncertainty(ACTIONS[:, :2])
    by_hand = [n + n / (n - 1), n, 0, n / (n - 1)]  # without λ
    assert np.allclose(unsure**2, by_hand, rtol=1 / n)
    cautious = REGRET[(estimates - reward.beta * unsure).argmax(1)]
    assert REGRET[estimates.argmax(1)].mean() > 0.2 and cautious.max() < 0.1 + 1e-9
    if n >= 10_000:
        assert cautious.max() < 1e-9


def test_the_confidence_radius_shrinks_with_the_data():
    assert confidence_radius(100, 3) == pytest.approx(2 * confidence_radius(400, 3))
    assert confidence_radius(100, 3, scale=5) == 5 * confidence_radius(100, 3)
    assert confidence_radius(100, 3, delta=0.01) > confidence_radius(100, 3)


# --- coverage


def test_coverage_is_the_papers_covariance():
    """Σ = 2 / (n K (K − 1)) · Σ_i Σ_{j<k} (φ_j − φ_k)(φ_j − φ_k)ᵀ, by loops."""
    features = normal(6, 4, 3)
    expected = np.zeros((3, 3))
    for ranking in features.numpy():
        for a, b in itertools.combinations(ranking, 2):
            expected += 2 / (6 * 4 * 3) * np.outer(a - b, a - b)
    found = coverage(features)
    assert np.allclose(found.covariance, expected, atol=1e-12)
    assert torch.allclose(found.center, features.mean((0, 1)))
    # Of one ranking it is twice the sample covariance of its responses.
    assert np.allclose(coverage(features[:1]).covariance, 2 * np.cov(features[0].T))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_order_offset_and_repetition_do_not_change_coverage(sizes, seed):
    rankings = [normal(k, 3, seed=seed + i) for i, k in enumerate(sizes)]
    known = coverage(rankings).covariance
    turned = [r.flip(0) + i for i, r in enumerate(rankings)]  # a prompt's own offset
    assert torch.allclose(coverage(turned).covariance, known)
    assert torch.allclose(coverage(rankings * 3).covariance, known)
    assert torch.linalg.eigvalsh(known).min() > -1e-9


def test_responses_of_equal_rank_were_not_compared():
    ranking = normal(3, 2)
    found = coverage([ranking], [[1, 2.5, 2.5]]).covariance
    pairs = [ranking[0] - ranking[1], ranking[0] - ranking[2]]
    assert torch.allclose(found, sum(torch.outer(d, d) for d in pairs) / 2)
    all_tied = coverage([normal(3, 2, seed=1), ranking], [[1, 1, 1], [1, 2.5, 2.5]])
    assert torch.allclose(all_tied.covariance, found) and all_tied.rankings == 1
    with pytest.raises(ValueError, match="no ranking with two responses"):
        coverage([ranking, normal(1, 2)], [[1, 1, 1], [1]])


def test_a_feature_that_is_not_finite_is_named():
    broken = normal(2, 3)
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match="ranking 1: a feature is not finite"):
        coverage([normal(2, 3), broken])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.floats(0.1, 10))
def test_distance_is_the_norm_under_the_inverse(seed, stretch):
    known = coverage(normal(20, 3, 4, seed=seed))
    features, reference = normal(5, 4, seed=seed + 1), known.center
    found = distance(features, reference, known.root(0.01))
    damped = known.covariance + 0.01 * known.covariance.trace() / 4 * torch.eye(4)
    offsets = features - reference
    squares = (offsets @ torch.linalg.inv(damped) * offsets).sum(1)
    assert torch.allclose(found, squares.sqrt())
    far = distance(reference + stretch * offsets, reference, known.root(0.01))
    assert torch.allclose(far, stretch * found)


def test_directions_that_were_never_compared_are_unsure():
    """Rankings that differ along the first axis only leave the second open."""
    rankings = normal(50, 2, 2) * torch.tensor([1.0, 0.0])
    axes = torch.eye(2)
    known = coverage(rankings)
    along, across = distance(axes, torch.zeros(2), known.root(0.001))
    assert along < 1.2 and across > 10 * along


def test_the_default_ridge_shrinks_with_the_square_of_the_rankings():
    matrix, center = (
        torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=F64)),
        normal(4),
    )
    for n, ridge in ((1, 1.0), (20, 1 / 400), (1000, 1e-6), (10**8, 1e-9)):
        known = Coverage(matrix, center, n)
        assert torch.allclose(known.root(), known.root(ridge), rtol=1e-12)
        assert known.root()[3, 3] == pytest.approx((1.5 * ridge) ** 0.5)
    everywhere = Coverage(torch.ones(64, 64, dtype=F64), normal(64), 10**8)
    assert everywhere.root().isfinite().all()  # one direction, known very well


def test_rankings_of_identical_features_are_refused():
    known = coverage([torch.ones(3, 4)] * 5)
    for ridge in (None, 0.01):
        with pytest.raises(
            ValueError, match="all have the same features.*texts differ"
        ):
            known.root(ridge)


# --- a reward model


@pytest.fixture
def pessimistic(reward_model, tokenizer, toy_rankings):
    reward = PessimisticReward(reward_model, tokenizer, beta=0.3)
    return reward.fit(toy_rankings, progress=False)


def conversations(rankings):
    prompts = [p for p in rankings["prompt"] for _ in range(4)]
    completions = [
        [{"role": "assistant", "content": r}]
        for row in rankings
        for r in row["responses"]
    ]
    return prompts, completions


def test_fit_reads_the_rankings_as_they_were_scored(
    pessimistic, reward_model, tokenizer, toy_rankings
):
    """Cut responses without EOS, one covariance over all prompts."""
    features = [
        response_features(
            reward_model,
            tokenizer,
            [row["prompt"]] * 4,
            row["responses"],
            row["finished"],
        )
        for row in toy_rankings
    ]
    expected = coverage(features)
    found = pessimistic.coverage
    assert torch.allclose(found.covariance, expected.covariance, atol=1e-6)
    assert torch.allclose(found.center, torch.cat(features).double().mean(0), atol=1e-6)
    assert found.rankings == 10
    ended = toy_rankings.remove_columns("finished")
    other = PessimisticReward(reward_model, tokenizer, beta=0.3).fit(ended, False)
    assert not torch.allclose(other.coverage.covariance, found.covariance, atol=1e-6)


def test_fit_holds_a_few_rankings_at_once(
    pessimistic, reward_model, tokenizer, toy_rankings, monkeypatch
):
    """Three of ten, with the same result; ranks stay those of their row."""
    ranked = toy_rankings.add_column(
        "ranks", [[1.0, 2.0, 3.0, 3.0]] * 5 + [[1.0] * 4] * 5
    )
    read, counts = pessimism.response_features, []

    def one_by_one(model, tokenizer, prompts, texts, finished, batch_size, progress):
        counts.append(len(texts))
        return read(model, tokenizer, prompts, texts, finished, 1, progress)

    monkeypatch.setattr(pessimism, "response_features", one_by_one)
    found = []
    for at_once in (10, 3):
        monkeypatch.setattr(pessimism, "AT_ONCE", at_once)
        found.append(pessimistic.fit(ranked, False).coverage)
    assert counts == [40, 12, 12, 12, 4]
    assert torch.equal(found[0].covariance, found[1].covariance)
    assert torch.equal(found[0].center, found[1].center)
    assert found[0].rankings == found[1].rankings == 5


def test_tied_ranks_of_the_rows_count(reward_model, tokenizer, toy_rankings):
    tied = toy_rankings.add_column("ranks", [[1.0, 2.0, 3.5, 3.5]] * 10)
    plain, with_ties = (
        PessimisticReward(reward_model, tokenizer, beta=1.0).fit(rows, False).coverage
        for rows in (toy_rankings, tied)
    )
    assert not torch.allclose(plain.covariance, with_ties.covariance, atol=1e-6)


def test_without_beta_it_is_the_reward_model(
    pessimistic, reward_model, tokenizer, toy_rankings
):
    prompts, completions = conversations(toy_rankings)
    texts = [c[0]["content"] for c in completions]
    plain = score_responses(reward_model, tokenizer, prompts, texts)
    pessimistic.beta = 0.0
    assert pessimistic(prompts, completions) == pytest.approx(plain.tolist(), abs=1e-5)
    pessimistic.beta = 2.0
    lower = torch.tensor(pessimistic(prompts, completions), dtype=F64)
    features = response_features(reward_model, tokenizer, prompts, texts)
    unsure = pessimistic.uncertainty(features)
    assert torch.allclose(lower, plain.double() - 2 * unsure, atol=1e-4)
    assert unsure.min() > 0 and unsure.std() > 0.1


def test_the_callers_model_stays_as_it_was(reward_model, tokenizer, toy_rankings):
    """Trainable and in training mode; the lower bounds themselves carry no gradient."""
    reward_model.train().requires_grad_(True)
    reward = PessimisticReward(reward_model, tokenizer, beta=0.3).fit(
        toy_rankings, False
    )
    features = reward.features(toy_rankings["prompt"], ["aa"] * 10)
    bounds = reward.lower_bounds(toy_rankings["prompt"], ["aa"] * 10)
    for found in (features, reward.scores(features), bounds):
        assert not found.requires_grad
    assert reward_model.training
    assert all(p.requires_grad for p in reward_model.parameters())


def test_what_was_never_ranked_is_trusted_less(pessimistic, toy_rankings):
    prompts, completions = conversations(toy_rankings)
    texts = [c[0]["content"] for c in completions]
    pessimistic.reference = "mean"  # from zero, what all texts share hides the rest
    strange = ["\x01\x02\x03 ZZZ {}"] * len(texts)
    known, unknown = (
        pessimistic.uncertainty(pessimistic.features(prompts, each)).mean()
        for each in (texts, strange)
    )
    assert unknown > 1.5 * known


def test_references(pessimistic, toy_rankings):
    features = pessimistic.features(toy_rankings["prompt"], ["aa"] * 10)
    own = {"mean": pessimistic.coverage.center, "zero": torch.zeros(64)}
    for name, vector in own.items():
        pessimistic.reference = name
        by_name = pessimistic.uncertainty(features)
        pessimistic.reference = vector
        assert torch.allclose(pessimistic.uncertainty(features), by_name)
    pessimistic.reference = features[3]
    assert pessimistic.uncertainty(features)[3] == 0


def test_cut_completions_and_earlier_turns(
    pessimistic, reward_model, tokenizer, toy_rankings
):
    prompts, completions = conversations(toy_rankings)
    finished = [i % 2 == 0 for i in range(len(prompts))]
    columns = {"finished": [[True] * 4] * len(prompts), "source": ["x"] * len(prompts)}
    pessimistic.beta = 0.0
    found = pessimistic(
        prompts=prompts,
        completions=completions,
        completion_finished=finished,
        completion_ids=[[1]] * len(prompts),
        **columns,
    )
    texts = [c[0]["content"] for c in completions]
    expected = score_responses(reward_model, tokenizer, prompts, texts, finished)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)

    longer = [[*prompts[0], *completions[0], {"role": "user", "content": "?"}]]
    split = [*completions[0], {"role": "user", "content": "?"}, *completions[1]]
    one = pessimistic(longer, [completions[1]])
    assert pessimistic([prompts[0]], [split]) == pytest.approx(one, abs=1e-6)


def test_a_new_fit_replaces_the_old_one(pessimistic, toy_rankings):
    features = pessimistic.features(toy_rankings["prompt"], ["aa"] * 10)
    before = pessimistic.uncertainty(features)
    pessimistic.fit(toy_rankings.select(range(2)), progress=False)
    assert not torch.allclose(pessimistic.uncertainty(features), before)


@pytest.mark.parametrize(
    ("reference", "ridge"), [("zero", None), ("mean", 0.01), ("tensor", 0.1)]
)
def test_saved_and_read_again(pessimistic, toy_rankings, tmp_path, reference, ridge):
    given = torch.linspace(0, 1, 64) if reference == "tensor" else reference
    pessimistic.reference, pessimistic.ridge = given, ridge
    pessimistic.save(tmp_path)
    prompts, completions = conversations(toy_rankings)
    again = PessimisticReward.load(tmp_path)
    expected = pessimistic(prompts, completions)
    assert again(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert (again.beta, again.ridge, again.coverage.rankings) == (0.3, ridge, 10)
    assert PessimisticReward.load(tmp_path, beta=0.0).beta == 0.0
    assert not list(tmp_path.glob("*.tmp"))
    plain = load_reward_model(tmp_path)  # still an ordinary reward model
    texts = [c[0]["content"] for c in completions]
    scores = score_responses(plain, load_tokenizer(tmp_path), prompts, texts)
    pessimistic.beta = 0.0
    assert pessimistic(prompts, completions) == pytest.approx(scores.tolist(), abs=1e-5)


def test_what_cannot_be(reward_model, tokenizer, tmp_path):
    for wrong in ({"beta": -1.0}, {"beta": 1.0, "ridge": 0.0}):
        with pytest.raises(ValueError, match="need beta ≥ 0 and ridge > 0"):
            PessimisticReward(reward_model, tokenizer, **wrong)
    with pytest.raises(ValueError, match="reference='median': 'mean', 'zero' or a"):
        PessimisticReward(reward_model, tokenizer, beta=1.0, reference="median")
    unfitted = PessimisticReward(reward_model, tokenizer, beta=1.0)
    messages = [[{"role": "user", "content": "hi"}]]
    with pytest.raises(ValueError, match=r"call fit\(rankings\)"):
        unfitted(messages, messages)
    with pytest.raises(ValueError, match="nothing to save before fit"):
        unfitted.save(tmp_path)
    with pytest.raises(
        ValueError, match=r"completions\[0\]: expected messages, got 'ho'"
    ):
        unfitted(messages, ["ho"])
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected messages, got 'hi'"):
        unfitted(["hi"], messages)


# --- in the place of the reward


def test_apa_trains_on_it(pessimistic, tokenizer, policy, tmp_path):
    from starling_lib.apa import APAConfig, APATrainer
    from starling_lib.rollouts import sample

    prompts = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"go {i}"}]} for i in range(4)]
    )
    args = APAConfig.starling(
        output_dir=str(tmp_path),
        rollout_batch_size=4,
        per_device_train_batch_size=4,
        num_epochs_per_rollout=1,
        num_layers_unfrozen=1,
        max_new_tokens=4,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = APATrainer(policy, pessimistic, args, prompts, processing_class=tokenizer)
    rollout = sample(policy, tokenizer, prompts["prompt"], max_new_tokens=4)
    rollout.finished = torch.arange(4) % 2 == 0  # what was cut must be told
    texts = [[{"role": "assistant", "content": text}] for text in rollout.texts]
    rewards = trainer.rewards(prompts, rollout)
    asked = (prompts["prompt"], texts)
    expected = pessimistic(*asked, completion_finished=[True, False, True, False])
    assert rewards.tolist() == pytest.approx(expected)
    assert expected != pytest.approx(pessimistic(*asked))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/0_pessimistic_reward"] == pytest.approx(logged["reward"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_trl_takes_it_and_the_saved_reward_model(
    algorithm, pessimistic, reward_model, tokenizer, policy, tmp_path
):
    """One step, both as rewards: the model by its folder and our wrapper by itself."""
    import trl

    model_folder, policy_folder = tmp_path / "reward", tmp_path / "policy"
    pessimistic.beta = 0.0
    pessimistic.save(model_folder)
    policy.save_pretrained(policy_folder)
    tokenizer.save_pretrained(policy_folder)
    seen = []

    class Spy(getattr(trl, f"{algorithm}Trainer")):
        def _calculate_rewards(self, inputs, prompts, completions, ids):
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
            seen.append((prompts, completions, rewards))
            return rewards

    args = getattr(trl, f"{algorithm}Config")(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    prompts = [{"prompt": [{"role": "user", "content": f"go {i}"}]} for i in range(4)]
    trainer = Spy(
        model=str(policy_folder),
        reward_funcs=[str(model_folder), pessimistic],
        args=args,
        train_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    assert trainer.reward_func_names[1] == "pessimistic_reward"
    asked, completions, rewards = seen[0]
    texts = [c[-1]["content"] for c in completions]
    expected = score_responses(reward_model, tokenizer, asked, texts)
    assert expected.std() > 0.01
    assert torch.allclose(rewards[:, 0].cpu(), expected, atol=1e-4)
    assert torch.allclose(rewards[:, 1].cpu(), expected, atol=1e-4)
