"""Chat models as judges over a fake endpoint: scores, tries, limits, the cache, and what becomes of the key."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import socket
import time
from email.utils import formatdate

import pytest
from fake_chat import chatting

from lightning_rlhf.core.settings import described
from lightning_rlhf.evaluation import WinRate
from lightning_rlhf.evaluation.win_rate import judged
from lightning_rlhf.rewards import ChatModel, Judge, PairwiseJudge, TimedReward, WeightedReward, chat
from lightning_rlhf.rewards.answer_store import AnswerStore

pytest.importorskip("httpx")
PROMPTS = [f"question {i}" for i in range(8)]
RESPONSES = [f"response {i}" for i in range(8)]
KEY = "sk-very-secret"


def number_of(message):
    return int(re.findall(r"response (\d)", message)[-1])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(chat, "PAUSE", 0.02)
    with chatting(lambda message, body: f"Good. <score>{number_of(message)}</score>") as server:
        yield server


@pytest.fixture
def judge(fake):
    """A `Judge` of the fake server; settings of its chat model by keyword."""

    def build(given=None, **settings):
        return Judge(ChatModel(**{"url": fake.url, "model": "m", "patience": 5.0} | settings), **given or {})

    return build


@pytest.fixture
def rollout(make_rollout):
    return make_rollout([[10], [11]], [[13, 0], [14, 0]])


# Requests and scores


def test_request_is_that_of_the_protocol(fake, judge):
    assert judge().score(PROMPTS[:1], RESPONSES[:1]) == [0.0]
    [body] = fake.bodies
    [message] = body.pop("messages")
    assert fake.paths == ["/v1/chat/completions"]
    assert body == {"model": "m", "temperature": 0.0, "max_tokens": 1024, "seed": 0}
    assert message["role"] == "user"
    for text in ("question 0", "response 0", "from 0 (", "to 10 (", "<score>number</score>"):
        assert text in message["content"]
    assert "Authorization" not in fake.headers[0]


def test_fields_are_added_and_left_out(fake, judge):
    fields = {"max_tokens": None, "max_completion_tokens": 5, "messages": [{"role": "user", "content": "response 3"}]}
    assert judge(fields=fields).score(PROMPTS[:1], RESPONSES[:1]) == [3.0]
    assert fake.bodies[0]["max_completion_tokens"] == 5
    assert "max_tokens" not in fake.bodies[0]


def test_half_a_surrogate_pair_is_sent(fake, judge):
    assert judge().score(["\ud800"], ["response 2"]) == [2.0]
    assert "\ud800" in fake.bodies[0]["messages"][0]["content"]


def test_wall_time_is_that_of_the_slowest_and_the_order_that_of_the_responses(fake, judge):
    fake.fault = lambda n, body: 0.4 - 0.02 * number_of(body["messages"][0]["content"])
    start = time.monotonic()
    assert judge().score(PROMPTS, RESPONSES) == [float(i) for i in range(8)]
    assert 0.35 < time.monotonic() - start < 1.6  # one by one: 2.6 s
    assert fake.busiest > 4


def test_no_more_than_concurrency_are_asked_at_once(fake, judge):
    fake.fault = lambda n, body: 0.05
    judge(concurrency=3).score(PROMPTS, RESPONSES)
    assert fake.busiest == 3


@pytest.mark.parametrize(
    ("answer", "tagged", "score"),
    [
        ("<score>7</score>", True, 7.0),
        ("<score> 7.5 / 10 </score>", True, 7.5),
        ("<score>1</score> no: <SCORE>2</SCORE>", True, 2.0),
        ("7", True, None),  # a number in the reasons is no score
        ("It has 3 faults", True, None),
        ("<score>11</score>", True, None),
        ("<score>-1</score>", True, None),
        ("", True, None),
        ("7", False, 7.0),
        ("2 faults, so 8/10.", False, 8.0),
        ("8 out of 10", False, 8.0),
        ("Score: .5", False, 0.5),
        ("11", False, None),
        ("none", False, None),
    ],
)
def test_score_is_read_from_the_answer(answer, tagged, score):
    template = "{response}: <score>" if tagged else "{response}"
    assert Judge(ChatModel(url="http://localhost/v1", model="m"), template)._read(answer) == score


def test_score_is_read_by_the_users_pattern_and_rescaled(fake, judge):
    fake.reply = lambda message, body: f"[[{number_of(message)}]] of 9"
    given = {"parse": r"\[\[(\d)\]\]", "lowest": -1.0, "highest": 7.0, "rescale": True}
    assert judge(given).score(PROMPTS[:4], RESPONSES[:4]) == [0.125, 0.25, 0.375, 0.5]


def test_template_is_filled_once(fake, judge):
    """Braces of a response stay, also where they look like a field; JSON in the template too."""
    seen = []
    fake.reply = lambda message, body: seen.append(message) or "1"
    given = {"template": '{"score": {}} {prompt}|{response}|{topic}|{highest}'}
    dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    prompts = [dialogue, dialogue[:1], "{topic}"]
    assert judge(given).score(prompts, ["{prompt}"] * 3, topic=["x", "y", "{response}"]) == [1.0] * 3
    end = "|{prompt}|%s|10"
    expected = ["user: hi\n\nassistant: ho" + end % "x", "hi" + end % "y", "{topic}" + end % "{response}"]
    assert sorted(seen) == sorted('{"score": {}} ' + text for text in expected)


def test_rows_without_a_column_of_the_template_are_not_its_task(fake, judge, rollout, toy_tokenizer):
    fake.reply = lambda message, body: "4"
    reward = judge({"template": "{response} {answer}"})
    reward.check_columns({"prompt", "answer"})
    with pytest.raises(ValueError, match=r"reads \{answer\}, but the rows have prompt, topic"):
        reward.check_columns({"prompt", "topic"})
    reward.prepare(toy_tokenizer)
    scores = reward.scored(rollout, [{"answer": "d"}, {"answer": None}])
    assert scores.answered.tolist() == [True, False]
    assert (scores.total[0], scores.parts) == (4.0, {})
    assert [body["messages"][0]["content"] for body in fake.bodies] == ["d d"]


# Answers that say nothing


def test_answer_that_says_nothing_is_asked_again_with_another_seed(fake, judge):
    fake.reply = lambda message, body: "<score>5</score>" if body["seed"] == 9 else "well"
    assert judge(seed=7).score(PROMPTS[:1], RESPONSES[:1]) == [5.0]
    assert [(body["seed"], body["temperature"]) for body in fake.bodies] == [(7, 0.0), (8, 1.0), (9, 1.0)]
    fake.bodies.clear()
    judge(seed=7, temperature=0.3).score(PROMPTS[:1], RESPONSES[:1])
    assert [body["temperature"] for body in fake.bodies] == [0.3] * 3


def test_answer_that_never_says_anything_is_an_error_with_row_and_answer(fake, judge):
    fake.reply = lambda message, body: "I can't say" if number_of(message) == 2 else "<score>1</score>"
    said = "no answer of m holds a number from 0 to 10 for response 2.*'question 2', in 2 attempts.*\"I can't say\""
    with pytest.raises(RuntimeError, match=said):
        judge(attempts=2).score(PROMPTS, RESPONSES)


def test_answer_that_never_says_anything_scores_unparsed_and_is_counted(fake, judge, rollout, toy_tokenizer):
    fake.reply = lambda message, body: "" if "\nd\n" in message else "<score>1</score>"
    reward = judge({"unparsed": 2.5, "rescale": True})
    reward.prepare(toy_tokenizer)
    scores = reward.scored(rollout, [{}, {}])
    assert scores.total.tolist() == pytest.approx([2.5, 0.1])
    assert scores.parts["unparsed"].tolist() == [1.0, 0.0]


# Failures


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "drop", (429, {"Retry-After": "0"})])
def test_failure_that_may_pass_is_tried_again(fake, judge, fault):
    fake.fault = lambda n, body: fault if n < 2 else None
    assert judge().score(PROMPTS[:1], RESPONSES[:1]) == [0.0]
    assert len(fake.bodies) == 3
    assert fake.bodies[0] == fake.bodies[2]


def test_late_answer_is_asked_for_again(fake, judge):
    fake.fault = lambda n, body: 3.0 if n == 0 else None
    start = time.monotonic()
    assert judge(timeout=0.3).score(PROMPTS[:1], RESPONSES[:1]) == [0.0]
    assert time.monotonic() - start < 2.5
    assert len(fake.bodies) == 2


@pytest.mark.parametrize("form", [lambda: "0.6", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_wished_pause_is_kept(fake, judge, form):
    """A date has whole seconds: between 1 and 2."""
    fake.fault = lambda n, body: (429, {"Retry-After": form()}) if n == 0 else None
    start = time.monotonic()
    judge().score(PROMPTS[:1], RESPONSES[:1])
    assert time.monotonic() - start > 0.55


def test_wish_for_more_than_patience_is_no_wait(fake, judge):
    fake.fault = lambda n, body: (429, {"Retry-After": "3600"})
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="status 429.*wants a pause of 3600 s"):
        judge().score(PROMPTS[:1], RESPONSES[:1])
    assert time.monotonic() - start < 3
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (400, "refuses the request \\(status 400"),
        (401, "wants another key.*`key_from`"),
        (404, "has no model 'm' or no chat there.*/v1"),
        (302, "refuses the request \\(status 302"),
        ("html", "something else than a chat: <html>"),
    ],
)
def test_refusal_is_not_tried_again(fake, judge, fault, words):
    fake.fault = lambda n, body: fault
    with pytest.raises(RuntimeError, match=f"the reward Judge failed for response 0.*{words}"):
        judge().score(PROMPTS[:1], RESPONSES[:1])
    assert len(fake.bodies) == 1


def test_server_that_is_down_is_one_sentence_after_patience(fake, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=f"server at {url} cannot be reached.*resume the run") as raised:
            Judge(ChatModel(url=url, model="m", patience=0.3)).score(PROMPTS, RESPONSES)
    assert time.monotonic() - start < 5
    assert "\n" not in str(raised.value)
    assert "trying again in" in caplog.text


def test_server_that_comes_back_within_patience_is_no_error(fake, judge):
    began = time.monotonic()
    fake.fault = lambda n, body: 503 if time.monotonic() < began + 0.5 else None
    assert judge().score(PROMPTS, RESPONSES) == [float(i) for i in range(8)]


def test_timed_reward_around_it_ends_it(fake, judge, rollout, toy_tokenizer):
    fake.fault = lambda n, body: 3.0
    timed = TimedReward(WeightedReward({"judge": judge()}), seconds=0.5)
    timed.prepare(toy_tokenizer)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        timed.scored(rollout, [{}, {}])
    assert time.monotonic() - start < 2.5


# The key


def test_key_is_sent_and_stands_nowhere_else(fake, judge, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    reward = judge(key_from="MY_KEY", cache=str(tmp_path))
    fake.fault = lambda n, body: 503 if n == 0 else None  # the server repeats the key
    reward.score(PROMPTS, RESPONSES)
    assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}
    fake.fault = lambda n, body: 401
    with pytest.raises(RuntimeError, match="see the key in MY_KEY") as raised:
        reward.score(["new"], ["response 1"])
    files = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert len(files) > 100
    everywhere = [caplog.text, str(raised.value), repr(raised.getrepr(chain=True)), files, repr(vars(reward))]
    assert not [text for text in [*everywhere, repr(described(reward))] if KEY in text]
    assert "on purpose, with Bearer …" in caplog.text


def test_missing_key_is_told_before_the_run(judge, toy_tokenizer, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="MY_KEY is not set"):
        judge(key_from="MY_KEY").prepare(toy_tokenizer)
    monkeypatch.setenv("MY_KEY", f"{KEY}\nx")
    with pytest.raises(ValueError, match="key in MY_KEY holds a space") as raised:
        judge(key_from="MY_KEY").prepare(toy_tokenizer)
    assert KEY not in str(raised.value)


def test_key_in_the_place_of_its_name_is_refused_without_showing_it(judge):
    with pytest.raises(ValueError, match="name of an environment variable") as raised:
        judge(key_from=KEY)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": f"http://user:{KEY}@127.0.0.1/v1"}, "must hold no name, password"),
        ({"url": f"http://127.0.0.1/v1?key={KEY}"}, "must hold no name, password"),
        ({"url": "127.0.0.1:8000"}, "is no address of a server"),
        ({"url": "http://10.0.0.2/v1", "key_from": "MY_KEY"}, "plain HTTP to another machine"),
        ({"timeout": 0.0}, "`timeout`"),
        ({"patience": -1.0}, "`patience`"),
        ({"attempts": 0}, "`attempts`"),
        ({"concurrency": 0}, "`concurrency`"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"temperature": -1.0}, "`temperature`"),
    ],
)
def test_wrong_settings_are_refused(judge, settings, words):
    with pytest.raises(ValueError, match=words) as raised:
        judge(**settings)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"template": "{prompt}"}, r"must hold \{response\}"),
        ({"parse": r"\d"}, "must have a group"),
        ({"lowest": 1.0, "highest": 1.0}, "`lowest` must be below"),
        ({"highest": float("inf")}, "`highest` must be a finite"),
    ],
)
def test_wrong_judges_are_refused(judge, given, words):
    with pytest.raises(ValueError, match=words):
        judge(given)


# The cache


def test_nothing_is_asked_twice(fake, judge, tmp_path):
    reward = judge(cache=str(tmp_path))
    first = reward.score(PROMPTS, RESPONSES)
    asked = len(fake.bodies)
    assert judge(cache=str(tmp_path)).score(PROMPTS, RESPONSES) == first  # as after a restart
    assert (asked, len(fake.bodies)) == (8, 8)
    judge().score(PROMPTS, RESPONSES)
    assert len(fake.bodies) == 16


@pytest.mark.parametrize(
    "changed",
    [{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"seed": 1}, {"fields": {"top_p": 0.5}}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_decides_an_answer_is_in_its_name(fake, judge, tmp_path, changed):
    judge(cache=str(tmp_path)).score(PROMPTS[:1], RESPONSES[:1])
    judge(cache=str(tmp_path), **changed).score(PROMPTS[:1], RESPONSES[:1])
    assert len(fake.bodies) == 2
    other = {"url": fake.url.replace("127.0.0.1", "localhost"), "timeout": 9.0, "concurrency": 1, "attempts": 1}
    judge(cache=str(tmp_path), **other).score(PROMPTS[:1], RESPONSES[:1])
    assert len(fake.bodies) == 2


def test_answers_are_kept_although_the_run_fails(fake, judge, tmp_path):
    fake.fault = lambda n, body: 400 if n == 5 else None
    with pytest.raises(RuntimeError):
        judge(cache=str(tmp_path), concurrency=1).score(PROMPTS, RESPONSES)
    fake.fault = lambda n, body: None
    judge(cache=str(tmp_path)).score(PROMPTS, RESPONSES)
    assert len(fake.bodies) == 6 + 3


def test_answers_that_say_nothing_are_asked_for_again(fake, judge, tmp_path):
    fake.reply = lambda message, body: "well"
    for _ in range(2):
        judge({"unparsed": 0.0}, cache=str(tmp_path), attempts=2).score(PROMPTS[:1], RESPONSES[:1])
    assert len(fake.bodies) == 4
    fake.reply = lambda message, body: "well" if body["seed"] == 0 else "<score>1</score>"
    judge(cache=str(tmp_path)).score(PROMPTS[:1], RESPONSES[:1])
    judge(cache=str(tmp_path)).score(PROMPTS[:1], RESPONSES[:1])
    assert len(fake.bodies) == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"request": {}, "answer": "<score>9</score>"}', '{"answer": 1}'])
def test_damaged_file_is_written_anew(fake, judge, tmp_path, text):
    reward = judge(cache=str(tmp_path))
    reward.score(PROMPTS[1:2], RESPONSES[1:2])
    [file] = tmp_path.rglob("*.json")
    file.write_text(text)
    assert reward.score(PROMPTS[1:2], RESPONSES[1:2]) == [1.0]
    assert json.loads(file.read_text())["answer"] == "Good. <score>1</score>"
    assert len(fake.bodies) == 2


def test_folder_that_cannot_be_written_is_told(judge, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="`cache`: an answer can't be kept in"):
        judge(cache=str(tmp_path / "file")).score(PROMPTS, RESPONSES)


def write_and_read(folder, texts, faults):
    store = AnswerStore(folder)
    for _ in range(150):
        for text in texts:
            store.put({"message": "m"}, text)
            answer = store.get({"message": "m"})
            if answer is None or len(set(answer)) != 1 or len(answer) not in (40_000, 50_000):
                faults.put(str(answer)[:50])


def test_processes_that_write_one_answer_read_it_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    faults = context.SimpleQueue()
    texts = [["a" * 40_000], ["b" * 50_000], ["c" * 40_000]]
    processes = [context.Process(target=write_and_read, args=(tmp_path, mine, faults)) for mine in texts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert faults.empty()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_identity_is_what_decides_the_scores(judge, monkeypatch):
    same = [judge(), judge(patience=1.0, timeout=1.0, concurrency=1, cache="x", key_from="K", url="https://b.org/v1")]
    assert described(same[0]) == described(same[1])
    assert described(same[0]) != described(judge(seed=1))
    assert described(same[0]) != described(judge({"highest": 5.0}))


# Pairs


def verdict(message):
    """Of a judge that likes a higher number, and what stands first if they are equal."""
    one, other = (int(n) for n in re.findall(r"response (\d)", message))
    return f"<better>{'A' if one >= other else 'B'}</better>"


@pytest.fixture
def pairs(fake):
    fake.reply = lambda message, body: verdict(message)
    return PairwiseJudge(ChatModel(url=fake.url, model="m"))


def test_win_rate_asks_a_pairwise_judge_in_both_orders(fake, pairs):
    rows = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    answers = judged(
        pairs, rows, ["response 1", "response 2", "response 3"], ["response 2", "response 1", "response 3"]
    )
    assert answers.tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]
    assert answers.mean(0).tolist() == [0.0, 1.0, 0.5]
    assert len(fake.bodies) == 6


@pytest.mark.parametrize(
    ("answer", "value"),
    [("<better>a</better>", 1.0), ("<better>B</better>", 0.0), ("<better> Tie </better>", 0.5), ("A", None)],
)
def test_verdicts(pairs, answer, value):
    assert pairs._read(answer) == value


def test_pair_without_a_verdict_is_told_or_has_the_given_probability(fake, pairs):
    fake.reply = lambda message, body: "both"
    asked = (PROMPTS[:1], RESPONSES[:1], RESPONSES[1:2])
    with pytest.raises(RuntimeError, match="holds A, B or tie for response 0.*'both'"):
        pairs(*asked)
    assert PairwiseJudge(pairs.chat, unparsed=0.5)(*asked) == [0.5]


def test_pairwise_judge_tells_which_columns_it_reads(fake, pairs):
    fake.reply = lambda message, body: "<better>A</better>" if "gold 1" in message else "<better>B</better>"
    judge = PairwiseJudge(pairs.chat, "{prompt} {first} {second} gold {answer}")
    WinRate(judge=judge).check_columns({"prompt", "answer"})
    with pytest.raises(ValueError, match="the judge of `win_rate` needs answer"):
        WinRate(judge=judge).check_columns({"prompt", "topic"})
    rows = [{"prompt": "p", "answer": 1, "topic": "x"}, {"prompt": "p", "answer": 2, "topic": "x"}]
    assert judged(judge, rows, ["a", "b"], ["c", "d"])[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given", "words"), [({"template": "{first}"}, r"\{second\}"), ({"unparsed": 2.0}, "unparsed")]
)
def test_wrong_pairwise_judges_are_refused(pairs, given, words):
    with pytest.raises(ValueError, match=words):
        PairwiseJudge(pairs.chat, **given)
