"""The exact properties that an RLHF library must have, and which tests prove each: an index that cannot go stale."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROPERTIES = {
    "1 training reaches pi* and J* = beta log Z": (
        ["test_bandit_training_reaches_beta_log_z", "test_training_reaches_beta_log_z"],
        ["test_bandit_training_on_flipped_scores_moves_away", "test_bandit_training_without_reference_kl_collapses"],
    ),
    "2 the score-function identity gives grad J, 0 at pi*": (
        [
            "test_detached_kl_reward_gives_the_gradient_of_the_objective",
            "test_gradient_is_zero_at_the_optimum_and_only_there",
            "test_advantages_are_constant_and_the_gradient_zero_at_the_optimum",
            "test_the_gradient_vanishes_at_the_optimum",
        ],
        ["test_a_wrong_kl_does_not_give_the_gradient_of_the_objective"],
    ),
    "3 every surrogate has grad J at pi_old; KLPEN's penalty has none there": (
        [
            "test_surrogate_gradient_at_the_old_policy_is_that_of_the_objective",
            "test_penalty_has_no_gradient_at_the_old_policy_and_that_of_kl_old_elsewhere",
            "test_surrogate_at_the_old_policy_is_the_gradient_of_the_objective",
        ],
        ["test_wrong_settings_do_not_have_the_gradient_of_the_objective"],
    ),
    "4 constants and f(x) in the reward": (
        ["test_a_constant_in_the_reward_changes_nothing", "test_a_number_per_prompt_in_the_reward_changes_nothing"],
        ["test_centring_over_the_batch_keeps_a_number_per_prompt"],
    ),
    "5 scaling of r and beta": (
        ["test_reward_and_beta_scaled_together_", "test_beta_moves_the_optimum_"],
        ["test_beta_moves_the_optimum_"],
    ),
    "6 response against reward-to-go": (
        [
            "test_reward_to_go_and_the_spread_total_have_the_same_expected_gradient",
            "test_single_responses_agree_when_the_reward_is_spread_and_not_with_reward_to_go",
        ],
        ["test_reward_to_go_and_the_spread_total_differ_sample_by_sample"],
    ),
    "7 GAE's limits": (
        [
            "test_gae_without_discount_is_reward_to_go_less_value",
            "test_gae_at_lambda_zero_is_the_one_step_error",
            "test_gae_of_a_final_reward_without_value_is_a_power_of_lambda",
            "test_gae_at_lambda_one_is_unbiased_with_any_value",
        ],
        ["test_lambda_below_one_and_a_discount_are_biased"],
    ),
    "8 the first minibatch has ratio 1": (
        ["test_first_minibatch_has_ratio_one", "test_first_ratio_is_one"],
        ["test_later_ratios_are_not_one"],
    ),
    "9 the ranking loss ignores a constant; the bias puts demonstrations at 0": (
        [
            "test_loss_of_differences_ignores_a_shift_and_its_gradient_sums_to_zero",
            "test_bias_is_idempotent_and_leaves_the_ranking",
            "test_validation_puts_demonstrations_at_zero",
        ],
        ["test_centered_loss_sees_a_shift", "test_filler_demonstrations_do_not_count"],
    ),
    "10 the K-wise loss is a loop over pairs": (
        [
            "test_ranking_loss_equals_a_naive_pair_loop_with_its_gradient",
            "test_loss_and_gradient_equal_a_loop_over_pairs",
            "test_two_responses_are_bradley_terry",
            "test_plackett_luce_of_two_is_bradley_terry",
            "test_loss_is_unmoved_by_permutation",
            "test_ties_are_dropped_from_sum_and_count",
        ],
        ["test_loss_of_the_first_pair_alone_is_another", "test_pairs_of_a_ranking_are_no_distribution_over_rankings"],
    ),
    "11 gamma = 0 is no stream; the ptx gradient is linear in gamma": (
        ["test_ptx_coef_zero_is_bit_identical_to_no_stream", "test_ptx_gradient_is_linear_in_the_coefficient"],
        ["test_ptx_step_descends_the_mean_over_all_text_tokens"],
    ),
    "12 microbatches and processes change nothing": (
        ["test_microbatches_change_no_weight", "test_two_ranks_with_the_steps_count_equal_one"],
        ["test_means_of_microbatches_are_not_the_mean", "test_the_mean_of_microbatch_means_is_another_number"],
    ),
    "13 padding and what follows the end change nothing": (
        ["test_garbage_after_the_end_changes_no_gradient", "test_extra_left_padding_changes_no_weight"],
        ["test_mask_matters"],
    ),
    "14 the order of rows changes nothing; ids define groups": (
        ["test_permuting_the_rows_changes_no_gradient", "test_group_ids_and_not_positions_define_groups"],
        ["test_group_statistics_follow_ids_and_not_positions"],
    ),
    "15 whitening": (
        ["test_whiten_equals_hand_values", "test_whitened_entries_have_mean_zero_and_variance_one"],
        ["test_whiten_without_mask_is_another_number", "test_whiten_adds_epsilon_to_the_variance"],
    ),
    "16 RLOO, GRPO and group centring": (
        [
            "test_leave_one_out_advantages_sum_to_zero_and_are_stretched_centered_rewards",
            "test_baselines_that_do_not_know_the_response_are_unbiased",
            "test_the_groups_mean_shrinks_the_gradient_by_one_over_k",
            "test_many_groups_in_one_call_are_as_many_calls",
            "test_group_std_advantage_forgets_scale_and_shift_up_to_its_guard",
            "test_a_group_of_equal_rewards_gives_exactly_zero",
        ],
        [
            "test_unbiased_baselines_give_the_gradient_and_not_another",
            "test_group_std_is_not_the_gradient_where_spreads_differ",
        ],
    ),
    "17 the table of KL estimators": (
        ["test_estimators_of_whole_responses_have_the_published_values_and_gradients"],
        ["test_k2_and_k3_in_the_reward_are_wrong", "test_k2_of_tokens_is_not_the_gradient_of_the_objective"],
    ),
    "18 KLPEN's fixed point is pi*, reached for b above beta/2": (
        ["test_kl_penalty_iterated_reaches_the_optimum_where_b_is_above_half_of_beta"],
        [
            "test_kl_penalty_iterated_misses_the_optimum_where_b_is_below_half_of_beta",
            "test_kl_penalty_does_not_stand_in_for_the_kl_to_sft",
        ],
    ),
    "19 limits of GSPO, CISPO, CLIP and the dual clip": (
        [
            "test_one_token_responses_have_one_gradient_at_every_level",
            "test_cispo_without_bounds_has_the_gradient_of_the_plain_ratio",
            "test_clip_is_never_above_the_plain_objective_and_ends_with_epsilon",
            "test_dual_clip_equals_hand_values",
        ],
        ["test_geometric_level_is_not_the_gradient_of_the_objective"],
    ),
    "20 controllers, the over-long penalty, EMA": (
        [
            "test_adaptive_kl_at_its_target_keeps_beta",
            "test_penalty_halves_doubles_or_stays_at_the_thresholds_of_ppo",
            "test_soft_overlong_equals_hand_values",
            "test_average_has_its_closed_form",
        ],
        ["test_adaptive_kl_moves_by_its_formula"],
    ),
    "21 best-of-n": (
        ["test_expected_best_equals_the_mean_over_all_subsets", "test_expected_best_is_unbiased_for_best_of_n"],
        ["test_expected_best_refuses_more_than_there_are"],
    ),
    "22 interrupted = uninterrupted; one process = two": (
        ["test_resumed_training_equals_uninterrupted", "test_two_processes_train_the_weights_of_one"],
        ["test_checkpoint_of_another_controller_is_refused"],
    ),
    "23 the trainer's log-probs are the sampler's": (
        ["test_captured_logprobs_equal_a_forward_pass", "test_sampling_equals_a_loop_without_cache"],
        ["test_low_precision_sampler_is_seen_and_weighed"],
    ),
}
"""Property: tests that prove it, and controls: a neighboring claim that must fail, or a value that must differ."""


@pytest.fixture(scope="module")
def written() -> set[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("number", range(1, 24))
def test_property_has_a_proof_and_a_control(number, written):
    (name,) = [name for name in PROPERTIES if name.startswith(f"{number} ")]
    proofs, controls = PROPERTIES[name]
    for test in (*proofs, *controls):
        found = test in written or (test.endswith("_") and any(other.startswith(test) for other in written))
        assert found, f"property {name}: {test} is gone; name the test that took its place"
    assert proofs
    assert controls
