"""Faults that users of gpt-oss servers reported, by the numbers of our catalogue, and the tests of each.

The numbers have gaps on purpose. P1 to P3 are the laws that cover many of them: the parser takes any tokens,
a stream may be cut anywhere, what we put out is taken back. A case without a test says what it waits for.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CHAT = "server/test_chat_faults.py"
MALFORMED_CHAT = f"{CHAT}::test_malformed_turn_is_shown_as_it_was_meant"
RESPONSES = "server/test_responses_faults.py"
MALFORMED_RESPONSES = f"{RESPONSES}::test_fault_is_answered_as_the_catalogue_says"
SAME_STREAMED = f"{RESPONSES}::test_stream_adds_up_to_the_response_of_the_same_request"
MALFORMED_MESSAGES = "server/test_messages_faults.py::test_malformed_turn_is_shown_as_it_was_meant"
MALFORMED = (MALFORMED_CHAT, MALFORMED_RESPONSES, MALFORMED_MESSAGES)
OTHER = "server/test_fault_variations.py"
PROMPT = "server/test_prompt_variations.py"
GRAMMAR = "server/test_grammar_variations.py"
CHAT_GRAMMAR = "server/test_chat_grammar.py"
RENDER = "harmony/test_render.py"

LAWS = {
    "P1": (
        "harmony/test_parse_properties.py::test_laws_hold_on_random_and_mutated_streams",
        "server/test_chat_properties.py::test_any_tokens_give_200_and_the_same_streamed_as_whole",
        "server/test_messages_random.py::test_any_tokens_give_the_same_streamed_as_whole",
    ),
    "P2": ("server/test_responses_events.py::test_any_tokens_make_a_lawful_stream", SAME_STREAMED),
    "P3": (
        "harmony/test_parse.py::test_well_formed_turn_replays_to_the_tokens_the_model_wrote",
        f"{CHAT}::test_our_own_message_fed_back_renders_what_the_model_wrote",
        f"{RESPONSES}::test_own_output_is_accepted_back_verbatim",
        "server/test_messages.py::test_own_answer_fed_back_renders_what_the_model_wrote",
    ),
}

PARSING = {
    "B01": (*MALFORMED, f"{OTHER}::test_b01_b16_name_of_a_call_is_clean_wherever_the_recipient_stands",
            "harmony/test_chat_history.py::test_name_that_another_server_soiled_is_replayed_clean"),
    "B02": (f"{RENDER}::test_call_in_history_has_the_order_in_which_the_model_writes",
            f"{OTHER}::test_b01_b02_call_is_replayed_with_a_clean_name"),
    "B03": (*MALFORMED[:2], f"{CHAT}::test_b03_other_author_is_no_tool_and_is_reported",
            f"{OTHER}::test_b03_strange_role_before_a_final_costs_nothing",
            f"{OTHER}::test_b03_b27_words_of_somebody_else_are_no_answer_and_no_call"),
    "B05": (*MALFORMED, f"{OTHER}::test_b05_text_without_a_channel_is_reasoning_and_never_lost"),
    "B06": (*MALFORMED[:2], f"{CHAT}::test_b06_turn_without_a_message_is_reported_as_malformed",
            f"{OTHER}::test_b06_b14_turn_that_says_nothing_is_an_answer_that_says_so"),
    "B07": (*MALFORMED, f"{OTHER}::test_b07_nothing_counts_after_a_call_whatever_stops_the_client_adds",
            "test_chat.py::test_engine_gets_harmony_prompt_and_both_stop_tokens_besides_ours"),
    "B09": (MALFORMED_CHAT, f"{RESPONSES}::test_garbage_header_costs_nothing_that_follows",
            f"{OTHER}::test_b09_garbage_header_costs_nothing_that_follows"),
    "B10": (*MALFORMED, f"{OTHER}::test_b10_b25_preambles_are_content_and_the_call_is_a_call"),
    "B11": (*MALFORMED, f"{OTHER}::test_b11_reasoning_after_a_final_is_still_reasoning"),
    "B13": MALFORMED,
    "B14": (*MALFORMED, f"{OTHER}::test_b14_b18_b67_cut_at_any_token_is_length_and_keeps_what_there_is",
            "harmony/test_parse.py::test_stream_that_ends_in_a_header_says_so"),
    "B16": (*MALFORMED, f"{CHAT}::test_unknown_tool_is_a_call_where_the_client_can_answer_it"),
    "B18": (*MALFORMED, f"{OTHER}::test_b14_b18_b67_cut_at_any_token_is_length_and_keeps_what_there_is"),
    "B19": (*MALFORMED, f"{OTHER}::test_b19_arguments_come_as_they_were_written",
            f"{RESPONSES}::test_large_source_file_survives_as_an_argument",
            "harmony/test_grammar.py::test_long_source_file_is_a_legal_argument"),
    "B20": (f"{CHAT}::test_b20_failure_on_the_way_is_an_error_object_in_the_stream",
            f"{OTHER}::test_b20_b63_b66_failure_is_a_500_or_the_last_event_of_a_stream",
            "server/test_messages_faults.py::test_b20_failure_on_the_way_is_an_error_event"),
    "B21": (f"{CHAT}::test_b21_builtin_tool_that_nobody_offered_is_told_and_not_called",
            f"{CHAT}::test_b21_prompt_speaks_of_calls_only_where_functions_exist",
            f"{RESPONSES}::test_undeclared_tool_is_shown_as_a_call_that_is_not_to_be_made",
            f"{OTHER}::test_b21_tool_that_nobody_offered_is_never_finish_tool_calls"),
    "B23": (*MALFORMED, f"{OTHER}::test_b23_special_words_as_plain_text_are_text"),
    "B24": (SAME_STREAMED, "test_chat.py::test_stream_adds_up_to_the_same_result_for_any_chunking"),
    "B25": (f"{OTHER}::test_b10_b25_preambles_are_content_and_the_call_is_a_call",),
    "B27": (MALFORMED_CHAT, "test_chat.py::test_turn_ends_at_the_first_call_whatever_the_engine_sends",
            f"{OTHER}::test_b03_b27_words_of_somebody_else_are_no_answer_and_no_call"),
}  # fmt: skip

PROMPTS = {
    "B30": (f"{CHAT}::test_b30_b35_b70_reasoning_text_and_call_of_one_message_are_all_rendered",
            f"{PROMPT}::test_b30_b35_b70_history_of_an_assistant_is_read_in_every_spelling"),
    "B32": (f"{CHAT}::test_b32_empty_tool_calls_are_none",
            f"{PROMPT}::test_b32_empty_fields_of_a_message_are_as_if_absent",
            f"{PROMPT}::test_b32_call_without_text_may_have_any_empty_content"),
    "B34": ("server/test_responses_items.py::test_history_with_ids_status_and_empty_fields_is_read",
            f"{RESPONSES}::test_own_output_is_accepted_back_verbatim",
            f"{PROMPT}::test_b34_items_are_taken_back_with_or_without_what_servers_add"),
    "B35": (f"{PROMPT}::test_b35_b36_reasoning_is_kept_behind_the_last_final_only",
            "harmony/test_chat_history.py::test_reasoning_between_the_calls_of_a_turn_stays"),
    "B36": (f"{CHAT}::test_b36_reasoning_before_the_last_answer_is_dropped",
            f"{RENDER}::test_reasoning_before_the_last_final_is_dropped_and_after_it_kept",
            f"{RENDER}::test_library_keeps_reasoning_between_finals_and_we_do_not"),
    "B37": (f"{RENDER}::test_final_in_history_ends_in_end_and_in_a_target_in_return",
            f"{PROMPT}::test_b37_answers_in_the_history_end_in_end"),
    "B38": (f"{RENDER}::test_constrain_is_one_special_token_behind_a_blank",
            f"{PROMPT}::test_b38_constrain_is_one_special_token_behind_a_blank_in_history"),
    "B39": (f"{CHAT}::test_b39_no_system_or_developer_message_is_lost",
            f"{PROMPT}::test_b39_every_instruction_is_there_once_and_in_order",
            f"{PROMPT}::test_b39_no_developer_message_without_instructions_and_tools"),
    "B40": (f"{CHAT}::test_b40_system_text_is_rendered_whole",
            f"{PROMPT}::test_b40_instructions_arrive_byte_for_byte"),
    "B41": (f"{CHAT}::test_b41_template_arguments_are_honored_or_refused",),
    "B42": (f"{CHAT}::test_b42_effort_reaches_the_prompt",
            "server/test_responses.py::test_every_effort_is_told_to_the_model",
            f"{PROMPT}::test_b42_effort_is_told_whichever_field_has_it"),
    "B44": (f"{CHAT}::test_b44_special_tokens_in_any_text_are_letters",
            f"{PROMPT}::test_b44_special_tokens_in_any_field_are_letters",
            f"{PROMPT}::test_b44_name_of_a_tool_is_letters_too_and_comes_back_whole",
            "server/test_messages_faults.py::test_b44_special_tokens_in_any_text_are_letters"),
    "B45": ("harmony/test_typescript.py::test_reported_schema_renders_every_part",
            "harmony/test_typescript.py::test_recursive_type_is_named_where_it_begins",
            "harmony/test_typescript.py::test_random_schemas_match_the_library",
            f"{PROMPT}::test_b45_b47_schemas_are_types_and_not_any"),
    "B47": (f"{CHAT}::test_b47_tools_of_every_kind_are_declared",
            f"{PROMPT}::test_b45_b47_schemas_are_types_and_not_any"),
    "B48": (f"{CHAT}::test_b48_tool_results_and_arguments_are_rendered_raw",
            f"{PROMPT}::test_b48_results_and_arguments_are_never_escaped_again",
            "server/test_responses_items.py::test_arguments_and_results_are_not_escaped_again"),
    "B49": (f"{CHAT}::test_b49_date_is_today_in_utc_or_pinned",
            "server/test_responses.py::test_date_is_pinned_for_a_conversation"),
    "B51": (f"{CHAT}::test_b51_each_message_of_a_turn_has_its_own_start",),
}  # fmt: skip

GRAMMARS = {
    "B52": (f"{CHAT_GRAMMAR}::test_b52_b53_b54_answer_follows_the_schema_and_reasoning_stays_free",
            f"{GRAMMAR}::test_b52_b53_b54_b60_answer_follows_the_schema_and_reasoning_stays_free"),
    "B53": (f"{CHAT_GRAMMAR}::test_b52_b53_b54_answer_follows_the_schema_and_reasoning_stays_free",
            f"{GRAMMAR}::test_b52_b53_b54_b60_answer_follows_the_schema_and_reasoning_stays_free"),
    "B54": (f"{CHAT_GRAMMAR}::test_b52_b53_b54_answer_follows_the_schema_and_reasoning_stays_free",
            "harmony/test_grammar.py::test_malformed_turns_cannot_be_written"),
    "B56": ("test_chat_grammar.py::test_random_weights_write_a_legal_turn_with_a_valid_answer",
            "test_llm.py::test_every_argument_of_chat_reaches_the_prompt"),
    "B57": (f"{CHAT_GRAMMAR}::test_b57_b58_tool_choice_holds", f"{GRAMMAR}::test_b57_b58_tool_choice_holds",
            "server/test_responses_grammar.py::test_demanded_tool_is_called_with_valid_arguments"),
    "B58": (f"{CHAT_GRAMMAR}::test_b58_none_without_tools_is_fine",
            f"{GRAMMAR}::test_b57_b58_tool_choice_holds"),
    "B59": (f"{CHAT_GRAMMAR}::test_b59_several_calls_only_when_the_request_says_so",
            f"{GRAMMAR}::test_b59_a_second_call_only_when_the_request_says_so"),
    "B60": ("server/test_responses_grammar.py::test_answer_follows_its_schema_with_reasoning_before_it",
            f"{GRAMMAR}::test_b52_b53_b54_b60_answer_follows_the_schema_and_reasoning_stays_free"),
    "B61": (f"{CHAT_GRAMMAR}::test_b61_schema_tools_and_reasoning_hold_together",
            f"{GRAMMAR}::test_b61_schema_tools_and_reasoning_hold_together"),
}  # fmt: skip

SERVING = {
    "B62": ("server/test_responses.py::test_preamble_reasoning_and_call_stream_in_the_api_order",
            "server/test_responses_events.py::test_any_tokens_make_a_lawful_stream"),
    "B63": (f"{RESPONSES}::test_cut_at_any_token_gives_one_terminal_event", SAME_STREAMED,
            f"{OTHER}::test_b20_b63_b66_failure_is_a_500_or_the_last_event_of_a_stream"),
    "B65": (f"{CHAT}::test_b65_usage_counts_everything_and_the_reasoning_apart",
            f"{OTHER}::test_b65_usage_is_the_same_in_every_api",
            "server/test_tiny_model.py::test_real_engine_serves_chat_completions_and_scores"),
    "B66": (f"{OTHER}::test_b66_bad_request_is_never_a_200",
            f"{OTHER}::test_b20_b63_b66_failure_is_a_500_or_the_last_event_of_a_stream",
            "server/test_security.py::test_nonsense_is_a_400_that_says_what"),
    "B67": (f"{CHAT}::test_b67_cut_in_the_reasoning_is_length_with_what_there_is",
            f"{OTHER}::test_b14_b18_b67_cut_at_any_token_is_length_and_keeps_what_there_is",
            f"{RESPONSES}::test_answer_that_is_cut_in_its_reasoning_is_incomplete"),
    "B69": ("server/test_responses.py::test_conversation_continues_with_reasoning_until_a_final",
            "server/test_responses.py::test_unstored_response_cannot_be_fetched_or_continued",
            "server/test_store.py::test_memory_is_bounded_and_the_least_recently_used_goes_first",
            "server/test_store.py::test_deleting_a_response_in_the_middle_keeps_the_conversation_whole"),
    "B70": (f"{PROMPT}::test_b30_b35_b70_history_of_an_assistant_is_read_in_every_spelling",
            f"{PROMPT}::test_b70_reasoning_has_the_name_that_the_server_was_told"),
    "B71": ("server/test_disconnect.py::test_client_that_leaves_frees_slot_and_request",
            "server/test_disconnect.py::test_leaving_in_queue_prefill_and_decode_gives_every_block_back",
            "server/test_responses_client.py::test_client_that_leaves_a_stream_frees_the_slot",
            "engine/test_create.py::test_storm_of_cancels_on_the_real_runner_gives_every_block_back"),
    "B72": (f"{CHAT_GRAMMAR}::test_b72_reasoning_budget_closes_an_endless_analysis",
            f"{GRAMMAR}::test_b72_endless_reasoning_is_closed_at_its_budget"),
    "B73": ("clients/test_codex.py::test_command_edits_a_file",
            "clients/test_codex.py::test_patch_is_applied_from_free_text",
            "server/test_responses_tools.py::test_tools_of_codex_are_declared_flattened_or_left_out",
            "server/test_responses_tools.py::test_custom_call_carries_its_text_unchanged"),
    "B74": ("clients/test_gpt_oss_suite.py::test_every_case_passes",
            "clients/test_tool_arguments.py::test_tool_gets_the_arguments_that_the_model_wrote",
            "clients/test_openai_agents.py::test_agent_calls_its_tool_and_answers",
            "clients/test_langchain.py::test_tool_loop_ends_in_an_answer"),
}  # fmt: skip

ENGINE = {
    "B78": ("model/test_rope.py"
            "::test_released_config_has_the_published_correction_range_and_attention_factor",),
    "B79": ("checkpoint/test_config_json.py::test_all_spellings_give_one_config",
            "checkpoint/test_config_json.py::test_a_config_that_we_cannot_compute_is_refused_by_name",
            "model/test_native.py::test_logits_agree_with_transformers_past_the_original_context",
            "model/test_reference.py::test_window_layers_see_exactly_their_window"),
    "B80": ("model/test_reference.py::test_swiglu_clamps_the_gate_above_and_the_up_part_on_both_sides",
            "kernels/test_matmul.py::test_swiglu_clamps_gate_above_and_up_on_both_sides",
            "kernels/test_matmul.py::test_experts_are_the_specification",
            "checkpoint/test_mxfp4.py::test_low_nibble_comes_first"),
    "B82": ("model/test_memory.py::test_weights_of_20b_are_counted_as_they_lie",
            "model/test_memory.py::test_refusal_gives_what_is_needed_and_what_there_is",
            "engine/test_create.py::test_plan_that_does_not_fit_is_refused_with_the_numbers"),
    "B83": ("server/test_vllm.py::test_b83_parallel_sizes_that_divide_the_heads_are_passed_on",
            "server/test_vllm.py::test_b83_other_sizes_are_refused_before_anything_starts"),
    "B84": ("engine/test_drafts.py::test_answer_is_the_same_with_right_and_wrong_guesses",
            "engine/test_drafts.py::test_stop_token_inside_a_true_guess_ends_the_answer",
            "engine/test_drafts.py::test_constraint_holds_behind_every_guess"),
    "B85": ("test_package.py::test_model_answers_where_there_is_no_network",
            "harmony/test_vocabulary.py::test_ranks_are_those_that_openai_publishes",
            "harmony/test_tokenizer_json.py::test_file_that_disagrees_is_refused_with_token_and_both_ids"),
    "B88": ("evals/test_command.py::test_malformed_streams_fail_no_request",
            "evals/test_command.py::test_each_malformed_stream_is_judged"),
    "B89": ("finetune/test_lora.py::test_every_target_has_a_gradient_and_changes_the_logits",
            "finetune/test_lora.py::test_saved_and_loaded_adapters_give_the_same_logits",
            "finetune/test_merge.py::test_every_weight_is_base_plus_adapter_rounded_once",
            "finetune/test_data.py::test_the_loss_is_on_what_the_model_writes_and_its_stop_token"),
    "B90": ("finetune/test_lora.py::test_the_file_that_the_native_engine_reads_means_the_same_matrices",
            "model/test_lora_torch.py::test_what_was_learned_is_served_and_the_base_beside_it_knows_nothing",
            "finetune/test_merge.py::test_merged_bf16_experts_give_the_adapters_logits",
            "server/test_adapters.py::test_every_api_chooses_the_adapter_by_the_models_name"),
    "B76": ("model/test_attention.py::test_auto_finds_one_that_runs_and_says_why",
            "model/test_attention.py::test_forced_one_runs_or_names_what_is_missing",
            "model/test_torch_backends.py::test_each_counts_the_sink_as_the_plain_formula_does",
            "model/test_torch_backends.py::test_correction_is_exact_for_any_sink"),
    "B77": ("model/test_attention.py::test_golden_table",),
    "B86": ("engine/test_local.py::test_chat_whose_reasoning_is_dropped_resumes_near_the_first_difference",
            "engine/test_local.py::test_window_blocks_in_use_stay_bounded"),
}  # fmt: skip

FAULTS = {**PARSING, **PROMPTS, **GRAMMARS, **SERVING, **ENGINE}

WAITING = {}

CATALOG = frozenset(
    f"B{number:02}"
    for number in (
        *(1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 16, 18, 19, 20, 21, 23, 24, 25, 27),
        *(30, 32, 34, 35, 36, 37, 38, 39, 40, 41, 42, 44, 45, 47, 48, 49, 51),
        *(52, 53, 54, 56, 57, 58, 59, 60, 61, 62, 63, 65, 66, 67, 69, 70, 71, 72, 73, 74),
        *(76, 77, 78, 79, 80, 82, 83, 84, 85, 86, 88, 89, 90),
    )
)


@cache
def names_in(path: Path) -> frozenset[str]:
    """The test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, functions))


@pytest.mark.parametrize("case", [*LAWS, *FAULTS])
def test_tests_of_a_fault_exist(case: str) -> None:
    tests = {**LAWS, **FAULTS}[case]
    assert tests
    for test in tests:
        path, name = test.split("::")
        assert name.startswith("test_") and name in names_in(TESTS / path), f"{case}: there is no {test}"


def test_every_fault_has_its_tests_or_a_reason() -> None:
    assert FAULTS.keys() | WAITING.keys() == CATALOG
    assert not FAULTS.keys() & WAITING.keys()
    assert all(WAITING.values())
