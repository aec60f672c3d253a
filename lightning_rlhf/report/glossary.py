"""Glossary of the numbers that a run logs: key, formula and unit."""

from __future__ import annotations

import re
from typing import NamedTuple


class Entry(NamedTuple):
    """One logged key with its meaning and unit.

    Attributes:
        key: as in the logger; words in capitals stand for what differs: a name, a number, bounds in percent.
        meaning: its formula, or what it is.
        unit: of the number; `1` for shares, ratios and what has none.
    """

    key: str
    meaning: str
    unit: str

    def matches(self, key: str) -> bool:
        """Return True if this entry describes a logged key; a `test` key counts as its validation key."""
        pattern = re.sub(r"[A-Z]+", lambda match: PLACEHOLDERS[match[0]], re.escape(self.key))
        return re.fullmatch(pattern, re.sub("^test/", "eval/", key)) is not None


PLACEHOLDERS = {"NAME": ".+", "N": r"\d+", "BIN": r"\d+_\d+"}

TRAINING = (
    Entry("epoch", "passes over the training data, from 0", "1"),
    Entry("lr", "learning rate; in the RL stage that of the policy", "1"),
    Entry(
        "train/loss",
        "stages 1 and 2: mean −log π(token) of the step; mean ranking loss of the step's prompts, or that of `loss`",
        "nats",
    ),
    Entry("train/chosen_logprob", "preference stage: mean log π(y∣x) of the batch's best or good responses", "nats"),
    Entry("train/rejected_logprob", "the same of its worst or bad responses", "nats"),
    Entry("train/chosen_reward", "mean β·log π/π_ref of the batch's best or good responses", "reward"),
    Entry("train/rejected_reward", "the same of its worst or bad responses", "reward"),
    Entry("train/kl", "KTO: max(0, mean log π/π_ref) of responses to other prompts of the batch", "nats"),
)
OBJECTIVE = (
    Entry("episode", "responses trained on so far, of all processes", "1"),
    Entry("objective/scores", "mean r(x, y), after the shaping rules", "reward"),
    Entry("objective/raw_scores", "mean r(x, y), before the shaping rules", "reward"),
    Entry("objective/raw_scores_std", "their standard deviation over the rollout", "reward"),
    Entry("objective/scores/NAME", "mean of a part of `WeightedReward` or `EnsembleReward`, before weights", "reward"),
    Entry("objective/kl", "mean Σ_t log π_old − log π_ref of a response: KL(π_old‖π_ref)", "nats"),
    Entry("objective/kl_coef", "β of this rollout", "reward/nat"),
    Entry("objective/entropy_coef", "price of the entropy bonus in this rollout; with one", "reward/nat"),
    Entry("objective/non_score_reward", "mean −β·KL; 0 where the KL is in the loss", "reward"),
    Entry("objective/rlhf_reward", "`objective/scores` + `objective/non_score_reward`", "reward"),
    Entry("objective/entropy", "mean −log π_old(y∣x) of a response", "nats"),
    Entry("objective/response_length", "mean tokens of a response, its end token included", "tokens"),
    Entry("objective/eos_rate", "share of responses that ended", "1"),
    Entry("objective/turns", "mean turns of the policy in an episode, with an environment", "1"),
    Entry("objective/failed", "share of episodes whose environment failed; they are not learned from", "1"),
    Entry("objective/uncounted", "`masks`: share of responses that a mask took out of all losses", "1"),
    Entry("objective/flat_groups", "share of responses whose group all scored the same; 0 without groups", "1"),
)
FILTER = (
    Entry("filter/pass_rate", "share of drawn groups that are learned from; dynamic sampling and `Curriculum`", "1"),
    Entry("filter/batches", "batches of prompts drawn for this rollout", "1"),
    Entry("filter/tokens", "response tokens drawn for this rollout, of all processes", "tokens"),
    Entry("filter/tokens_per_response", "`filter/tokens` over the responses that are learned from", "tokens"),
    Entry("filter/raw_scores", "mean r(x, y) of everything drawn, before the shaping rules", "reward"),
    Entry("filter/resting", "prompts that rest in the next rollout; with a `Curriculum`", "1"),
)
UPDATE = (
    Entry("loss/policy_avg", "mean surrogate loss of an action", "reward"),
    Entry("loss/kl_avg", "mean β·KL of an action where `kl_term` puts it into the loss, else 0", "reward"),
    Entry("loss/entropy_avg", "mean −coef·H of an action; with an entropy bonus", "reward"),
    Entry("loss/value_avg", "mean value loss of an action; with a value network", "reward²"),
    Entry("ptx/loss", "mean −log π(token) of the pretraining texts, before γ", "nats/token"),
    Entry("policy/approxkl_avg", "mean ½(log ρ)² of an action: KL(π_old‖π) to second order", "nats"),
    Entry("policy/clipfrac_avg", "share of actions whose ratio or weight was clipped; surrogates that clip", "1"),
    Entry("policy/entropy_avg", "mean entropy of the next token, under the weights that sample", "nats"),
    Entry("policy/grad_norm", "mean norm of the gradient of an optimizer step, before clipping", "1"),
    Entry(
        "policy/rl_grad_norm",
        "`GradientNorms`: in the first step, norm of the policy's gradient without texts",
        "1",
    ),
    Entry("ptx/grad_norm", "`GradientNorms`: in the first step, norm of the gradient of γ · text loss", "1"),
    Entry("ptx/grad_norm_ratio", "`ptx/grad_norm` over `policy/rl_grad_norm`", "1"),
    Entry("policy/kl_old", "KLPEN: mean k3 estimate of KL(π_old‖π) of an action, after the update", "nats"),
    Entry("policy/kl_penalty", "KLPEN: mean b·KL(π_old‖π) of an action during the update", "reward"),
    Entry("policy/kl_sampler", "mean k3 estimate of KL(π_sampler‖π_old) of a token: what low precision costs", "nats"),
    Entry(
        "policy/sampler_ess",
        "effective sample size as a share: (mean w)² / mean w² over actions, w = π_old/π_sampler before a correction",
        "1",
    ),
    Entry("policy/sampler_weight", "mean weight of an action's loss, after the correction for the sampler", "1"),
    Entry("policy/sampler_truncated", "share of actions whose w the correction changed; 0 without one", "1"),
    Entry("policy/masked", "`masks`: share of the actions in the losses whose policy loss a mask made 0", "1"),
    Entry("surrogate/coef", "KLPEN: b of this rollout", "reward/nat"),
    Entry("policy/ratio", "mean ρ = π/π_old of an action: 1 on the first minibatch", "1"),
    Entry("policy/ratio_var", "variance of ρ", "1"),
    Entry("value/clipfrac_avg", "share of actions whose clipped value was further off; with a value network", "1"),
)
COST = (
    Entry("time/generate", "sampling, or waiting for what was drawn ahead; times are wall time of rank 0", "s"),
    Entry("time/sync", "weights to an engine outside, with the check that they arrived", "s"),
    Entry("time/reference", "log π_ref", "s"),
    Entry("time/old_logprobs", "log π_old", "s"),
    Entry("time/values", "V; with a value network", "s"),
    Entry("time/reward", "the reward", "s"),
    Entry("time/update", "all minibatches, forwards, backwards and optimizer steps", "s"),
    Entry("time/optimizer", "of these the optimizer steps", "s"),
    Entry("time/kl_old", "KLPEN: the measurement of `policy/kl_old`", "s"),
    Entry("sync/seconds", "the transfer of weights itself; 0 in a step without one", "s"),
    Entry("sync/gib", "weights that were sent, to all servers alike", "GiB"),
    Entry("sync/canary", "mean ∣log π_server − log π∣ of a fixed text after the transfer", "nats"),
    Entry("sync/gap", "mean ∣log π_sampler − log π∣ of a rollout's tokens; with `overlap` π is one update on", "nats"),
    Entry("time/step", "the whole rollout with its update", "s"),
    Entry("throughput/tokens_per_second", "response tokens of all processes over `time/step`", "tokens/s"),
    Entry("memory/peak_gib", "most memory the process has held: of its GPU where it has one, else resident", "GiB"),
)
HELD_OUT = (
    Entry("eval/reward", "as `objective/scores`", "reward"),
    Entry("eval/reward/NAME", "as `objective/scores/NAME`", "reward"),
    Entry("eval/kl", "as `objective/kl`, of the policy as it is", "nats"),
    Entry("eval/entropy", "as `objective/entropy`", "nats"),
    Entry("eval/response_length", "as `objective/response_length`", "tokens"),
    Entry("eval/eos_rate", "as `objective/eos_rate`", "1"),
    Entry("eval/turns", "as `objective/turns`", "1"),
    Entry("eval/failed", "as `objective/failed`", "1"),
    Entry("eval/ptx_loss", "mean −log π(token) of the held-out texts", "nats/token"),
)
EVALUATIONS = (
    Entry("eval/pass_at_N", "share of prompts that one of N responses solves", "1"),
    Entry("eval/pass_at_N_se", "its standard error over prompts", "1"),
    Entry("eval/majority_at_N", "share of prompts that the answer of most of N responses solves", "1"),
    Entry("eval/majority_at_N_se", "its standard error over prompts", "1"),
    Entry("eval/win_rate", "share of responses preferred to the reference's, ties ½", "1"),
    Entry("eval/win_rate_se", "its standard error over prompts", "1"),
    Entry("eval/win_rate_length_controlled", "the same at equal lengths, by a logistic regression", "1"),
    Entry("eval/win_rate_length_difference", "mean length less the reference's", "tokens"),
    Entry("eval/win_rate_first", "a judge's mean probability for what stands first", "1"),
    Entry("eval/best_of_N/reward", "mean score of the best of N responses of the reference", "reward"),
    Entry("eval/best_of_N/reward_se", "its standard error over prompts", "reward"),
    Entry("eval/best_of_N/kl", "log N − (N − 1)/N", "nats"),
    Entry("eval/best_of_n/equivalent", "n at which log n − (n − 1)/n is the policy's KL", "1"),
    Entry("eval/best_of_n/reward_at_equal_kl", "score of the best of that n; up to the largest N", "reward"),
    Entry("eval/best_of_n/lead", "`eval/reward` less that", "reward"),
    Entry("eval/best_of_n/lead_se", "its standard error over prompts", "reward"),
    Entry("eval/best_of_n/kl_at_equal_reward", "KL at which best of n has the policy's reward; up to N", "nats"),
    Entry("eval/gold/reward", "mean gold reward of the policy", "gold"),
    Entry("eval/gold/reference_reward", "mean gold reward of the reference", "gold"),
    Entry("eval/gold/gain", "gold reward of the policy less the reference's", "gold"),
    Entry("eval/gold/gain_se", "its standard error over prompts", "gold"),
    Entry("eval/gold/proxy_gain", "score of the policy less the reference's", "reward"),
    Entry("eval/gold/correlation", "Pearson's, of gold reward and score over the policy's responses", "1"),
    Entry("eval/gold/since_best", "mean gold reward less that of the run's best evaluation, or the reference", "gold"),
    Entry("eval/gold/since_best_se", "its standard error over prompts", "gold"),
    Entry("eval/gold/proxy_since_best", "score less that of the run's best evaluation, or the reference", "reward"),
    Entry("eval/gold/overoptimized", "1 where the score rose and gold fell by over 2 standard errors, else 0", "1"),
    Entry("eval/ptx_loss_reference", "`eval/ptx_loss` of the reference", "nats/token"),
    Entry("eval/alignment_tax", "`eval/ptx_loss` less `eval/ptx_loss_reference`", "nats/token"),
    Entry("eval/alignment_tax_se", "its standard error over texts", "nats/token"),
)
PREFERENCES = (
    Entry("eval/loss", "stages 1 and 2: mean −log π(token); mean ranking loss of a prompt, or that of `loss`", "nats"),
    Entry("eval/accuracy", "share of pairs whose preferred response scores higher", "1"),
    Entry("eval/margin", "mean r_w − r_l of a pair", "reward"),
    Entry("eval/chosen_logprob", "preference stage: mean log π(y∣x) of best or good responses", "nats"),
    Entry("eval/rejected_logprob", "the same of worst or bad responses", "nats"),
    Entry("eval/chosen_reward", "mean implicit reward β·log π/π_ref of best or good responses", "reward"),
    Entry("eval/rejected_reward", "the same of worst or bad responses", "reward"),
    Entry("eval/demonstrations", "mean score of the demonstrations, before their bias moves", "reward"),
    Entry("eval/demonstration_bias", "what is added to every score, so that demonstrations have mean 0", "reward"),
    Entry("eval/accuracy_confidence_BIN", "accuracy where σ(∣r_w − r_l∣) is in the bin", "1"),
    Entry("eval/mean_confidence_BIN", "mean σ(∣r_w − r_l∣) of the bin", "1"),
    Entry("eval/pairs_confidence_BIN", "pairs in the bin", "1"),
    Entry("eval/calibration_error", "Σ_bins pairs of the bin / pairs · ∣accuracy − mean confidence∣", "1"),
    Entry("eval/accuracy_longer", "accuracy where the preferred response is more than 10 tokens longer", "1"),
    Entry("eval/accuracy_similar", "accuracy where lengths differ by 10 tokens at most", "1"),
    Entry("eval/accuracy_shorter", "accuracy where the preferred response is more than 10 tokens shorter", "1"),
    Entry("eval/pairs_longer", "pairs whose preferred response is more than 10 tokens longer", "1"),
    Entry("eval/pairs_similar", "pairs whose lengths differ by 10 tokens at most", "1"),
    Entry("eval/pairs_shorter", "pairs whose preferred response is more than 10 tokens shorter", "1"),
    Entry("eval/longer_wins", "accuracy of preferring the longer response, equal lengths ½: beat it and 1 − it", "1"),
    Entry("eval/accuracy/NAME", "accuracy over the pairs with a response of a system that the rows name", "1"),
    Entry("eval/longer_wins/NAME", "`eval/longer_wins` over these pairs", "1"),
    Entry("eval/pairs/NAME", "pairs with a response of a system that the rows name", "1"),
    Entry("eval/score_length_correlation", "Pearson's, of score and length over responses", "1"),
    Entry(
        "eval/score_length_correlation_within_prompt",
        "Pearson's, of score and length, each less the prompt's mean",
        "1",
    ),
)
GLOSSARY = (*TRAINING, *OBJECTIVE, *FILTER, *UPDATE, *COST, *HELD_OUT, *EVALUATIONS, *PREFERENCES)
"""All entries, in the order in which a run logs them."""


def find(key: str) -> Entry | None:
    """Return the entry of a logged key; returns None if the library does not log it.

    `eval@NAME/…` is of the held-out set NAME and has the entry of `eval/…`.
    """
    key = re.sub(r"^(eval|test)@[\w.-]+/", r"\1/", key)
    return next((entry for entry in GLOSSARY if entry.matches(key)), None)


def meaning(key: str) -> str:
    """Return what a logged key measures, after following "as KEY"; empty if the library does not log it."""
    entry = find(key)
    if entry is None:
        return ""
    same = re.match(r"as `([\w/]+)`(.*)", entry.meaning)
    return meaning(same[1]) + same[2] if same else entry.meaning.replace("`", "")


def table() -> str:
    """Return the glossary as a Markdown table."""
    lines = [f"| `{entry.key}` | {entry.meaning} | {entry.unit} |" for entry in GLOSSARY]
    return "\n".join(["| key | what | unit |", "|---|---|---|", *lines])
