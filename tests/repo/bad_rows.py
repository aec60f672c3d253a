"""Rows that are valid JSON and no prompt, demonstration, ranking or document. Each stands in line 2."""

from __future__ import annotations

from typing import Any

from bad_bench import GOOD, Bench, Case, case

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PROMPT = "a b"


def row(kind: str, name: str, bad: Any, *says: str) -> Case:
    def arguments(bench: Bench) -> list[str]:
        return bench.fit(kind, bench.rows(GOOD[kind], bad))

    return case(f"row-{kind}-{name}", arguments, r"bad\.jsonl, line 2: ", *says)


def ranking(name: str, bad: dict[str, Any], *says: str) -> Case:
    return row("reward", name, {"prompt": PROMPT} | bad, *says)


PROMPTS = [
    row("ppo", "list", [1], "found a JSON list"),
    row("ppo", "text", "a", "found a JSON str"),
    row("ppo", "number", 7, "found a JSON int"),
    row("ppo", "null", None, "found a JSON NoneType"),
    row("ppo", "empty", {}, "no key `prompt`"),
    row("ppo", "other-key", {"question": "a"}, "no key `prompt`", "columns.prompt"),
    row("ppo", "upper-case-key", {"Prompt": "a"}, "no key `prompt`"),
    row("ppo", "number-as-prompt", {"prompt": 3}, "`prompt` must be a text or a list of messages", "found int"),
    row("ppo", "truth-as-prompt", {"prompt": True}, "found bool"),
    row("ppo", "null-as-prompt", {"prompt": None}, "found NoneType"),
    row("ppo", "object-as-prompt", {"prompt": {"text": "a"}}, "found dict"),
    row("ppo", "empty-prompt", {"prompt": ""}, "has no tokens", "remove the row"),
    row("ppo", "blank-prompt", {"prompt": " \n\t"}, "has no tokens"),
    row("ppo", "no-messages", {"prompt": []}, "found an empty list"),
    row("ppo", "texts-as-messages", {"prompt": ["a", "b"]}, r"`prompt`\[0\] must be a message"),
    row("ppo", "nested-messages", {"prompt": [[USER]]}, r"`prompt`\[0\] must be a message"),
    row("ppo", "message-without-role", {"prompt": [{"content": "a"}]}, "needs a text under 'role'"),
    row("ppo", "message-without-content", {"prompt": [{"role": "user"}]}, "needs a text under 'content'"),
    row("ppo", "number-as-role", {"prompt": [{"role": 1, "content": "a"}]}, "needs a text under 'role'"),
    row("ppo", "empty-role", {"prompt": [{"role": " ", "content": "a"}]}, "empty role"),
    row("ppo", "parts-as-content", {"prompt": [{"role": "user", "content": [{"text": "a"}]}]}, "under 'content'"),
    row("ppo", "null-content", {"prompt": [{"role": "user", "content": None}]}, "under 'content'"),
    row("ppo", "assistant-last", {"prompt": [USER, ASSISTANT]}, "ends with an assistant message"),
    row("ppo", "second-message-bad", {"prompt": [USER, 3]}, r"`prompt`\[1\] must be a message"),
]
DEMONSTRATIONS = [
    row("sft", "no-prompt", {"response": "a"}, "no key `prompt`"),
    row("sft", "no-response", {"prompt": "a"}, "no key `response`"),
    row("sft", "null-response", {"prompt": "a", "response": None}, "`response` must be", "NoneType"),
    row("sft", "number-response", {"prompt": "a", "response": 1.5}, "found float"),
    row("sft", "list-of-numbers", {"prompt": "a", "response": [1]}, r"`response`\[0\]"),
    row("sft", "no-messages", {"prompt": "a", "response": []}, "found an empty list"),
    row("sft", "user-answers", {"prompt": "a", "response": [USER]}, "role 'assistant', found role 'user'"),
    row("sft", "lost-context", {"prompt": "z", "response": [USER, ASSISTANT]}, "are not the prompt and would be lost"),
    row("sft", "empty-prompt", {"prompt": "", "response": "a"}, "has no tokens"),
    row("sft", "assistant-asks", {"prompt": [ASSISTANT], "response": "a"}, "ends with an assistant message"),
]
RANKINGS = [
    row("reward", "nothing", {"prompt": "a"}, "no ranking found"),
    row("reward", "only-chosen", {"prompt": "a", "chosen": "b"}, "no key `rejected`"),
    row("reward", "only-rejected", {"prompt": "a", "rejected": "b"}, "no key `chosen`"),
    row("reward", "nothing-in-common", {"chosen": "b", "rejected": "c"}, "no common beginning"),
    row("reward", "number-chosen", {"prompt": "a", "chosen": 1, "rejected": "c"}, "`chosen` must be"),
    row("reward", "two-kinds", {"chosen": "b", "rejected": [ASSISTANT]}, "`chosen` must be"),
    row("reward", "two-dialogues", {"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT]}, "not one dialogue"),
    ranking("margin-text", {"chosen": "b", "rejected": "c", "margin": "big"}, "`margin` must hold finite numbers"),
    ranking("margin-negative", {"chosen": "b", "rejected": "c", "margin": -1}, "`margin` must be at least 0"),
    ranking("margin-truth", {"chosen": "b", "rejected": "c", "margin": True}, "`margin` must hold finite numbers"),
    ranking("no-scores", {"responses": ["b", "c"]}, "no key `scores`"),
    ranking("scores-and-ranks", {"responses": ["b", "c"], "scores": [1, 2], "ranks": [1, 2]}, "both `scores`"),
    ranking("too-few-scores", {"responses": ["b", "c"], "scores": [1]}, "lists of equal length"),
    ranking("one-response", {"responses": ["b"], "scores": [1]}, "at least 2 responses"),
    ranking("no-responses", {"responses": [], "scores": []}, "at least 2 responses"),
    ranking("responses-as-text", {"responses": "b c", "scores": [1, 2]}, "lists of equal length"),
    ranking("scores-as-number", {"responses": ["b", "c"], "scores": 1}, "lists of equal length"),
    ranking("null-score", {"responses": ["b", "c"], "scores": [1, None]}, "must hold finite numbers"),
    ranking("text-score", {"responses": ["b", "c"], "scores": ["1", "2"]}, "must hold finite numbers"),
    ranking("truth-score", {"responses": ["b", "c"], "scores": [True, False]}, "must hold finite numbers"),
    ranking("nested-score", {"responses": ["b", "c"], "scores": [[1], [2]]}, "must hold finite numbers"),
    ranking("too-few-systems", {"responses": ["b", "c"], "scores": [1, 2], "systems": ["x"]}, "a list of 2 names"),
    ranking("null-system", {"responses": ["b", "c"], "scores": [1, 2], "systems": ["x", None]}, "a list of 2 names"),
    ranking("null-response", {"responses": ["b", None], "scores": [1, 2]}, "`responses` must be"),
    row("reward", "completions-number", {"context": "a", "completions": 1}, "`completions` must be a list"),
    row("reward", "completions-texts", {"context": "a", "completions": ["b", "c"]}, "`completions` must be a list"),
    row("reward", "completions-no-context", {"completions": [{"rank": 0, "completion": "b"}] * 2}, "no key `context`"),
    row("reward", "completions-no-rank", {"context": "a", "completions": [{"completion": "b"}] * 2}, "no key `rank`"),
]
TEXTS = [
    row("text", "no-text", {"prompt": "a"}, "no key `text`"),
    row("text", "number", {"text": 5}, "`text` must be a text, found int"),
    row("text", "null", {"text": None}, "found NoneType"),
    row("text", "messages", {"text": [USER]}, "found list"),
]
CASES = [*PROMPTS, *DEMONSTRATIONS, *RANKINGS, *TEXTS]
