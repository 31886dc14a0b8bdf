"""Starling cookbook: rankings, K-wise reward models, APA and their evaluation.

The way of the data is the order of the modules: `rankings` → `reward` → `apa` →
`evaluation`; each module's docstring says what it knows and what it does not. The names
in `PUBLIC` are the stable face of the library; they can be imported from here, too:

    from starling_lib import kwise_loss, load_rankings

A module is loaded when one of its names is first asked for, so that judging works without
torch.
"""

import importlib

__version__ = "0.1.0"

PUBLIC = {
    "statistics": ("bootstrap_interval", "paired_difference", "kendall_tau"),
    "chat": (
        *("transcript_to_messages", "messages_to_transcript", "render"),
        *("OPENCHAT_TEMPLATE", "LLAMA2_TEMPLATE"),
    ),
    "audit": ("position_bias", "repeat_agreement", "length_bias", "model_ratings"),
    "win_rates": (
        *("pairwise_table", "swap_consistency", "position_bias_test"),
        *("bradley_terry", "length_controlled_win_rate"),
    ),
    "agreement": ("agreement_table", "votes_from_scores", "verbosity_attack"),
    "rankings": ("load_rankings", "split_by_prompt", "to_preference_pairs"),
    "released": ("load_starling_rm",),
    "models": ("load_policy", "load_reward_model", "load_tokenizer", "ValueHead"),
    "trunk": ("split_trunk", "TrunkCache"),
    "prefix": ("pack_ranking", "RankingScorer"),
    "rollouts": ("sample", "Rollout"),
    "losses": ("kwise_loss", "pairwise_loss", "best_worst_loss"),
    "metrics": ("reward_metrics", "calibration", "rewardbench_scores"),
    "scoring": ("score_responses", "score_rewardbench"),
    "pessimism": ("PessimisticReward",),
    "reward": ("KwiseRewardConfig", "KwiseRewardTrainer"),
    "vote_panel": ("VoteSession", "VotePanel"),
    "judges": (
        *("OpenAIJudge", "LocalJudge", "RewardJudge", "RecordedJudge"),
        "JudgeError",
    ),
    "served_rollouts": ("ServedSampler",),
    "ranking_prompt": ("parse_ranking",),
    "labeling": ("sample_responses", "rank_responses", "to_rankings"),
    "mt_bench": (
        *("read_questions", "read_judgments", "score_table", "score_intervals"),
        *("answer_questions", "judge_answers", "judge_pairs", "parse_rating"),
    ),
    "objectives": (
        *("apa_loss", "awr_loss", "ppo_loss", "value_loss", "gae"),
        *("masked_mean", "masked_whiten", "kl_k1", "kl_k2", "kl_k3"),
    ),
    "apa": ("APAConfig", "APATrainer", "ActorCritic"),
    "evaluation": ("evaluate_policy", "compare_policies", "win_rate", "compare"),
}
_MODULE_OF = {name: module for module, names in PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
