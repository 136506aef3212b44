"""Every kind of template by every kind of conversation: right values written down by hand."""

from __future__ import annotations

import pytest
from chat_kinds import CONVERSATIONS, RESULT, TEMPLATES, bot, call, prompts, user, write

from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.notes import Note, lost

ONE, TWO = "One.<|end|>", "Two.<|end|>"
SPACED = ["\n One. \n<|end|>", "  Two.\n<|end|>"]
EMPTY_THOUGHT = "(thought)(/thought)"
LOOK = '<|call|>{"name": "look", "arguments": {"k": "v"}}<|end|>'
INLINE = ["(thought)warm(/thought)One.<|end|>", "(thought)cold(/thought)Two.<|end|>"]

# kind: {conversation: what each answer must say, or the complaint of a refusal}
RIGHT: dict[str, dict[str, list[str] | str]] = {
    "plain": {
        "two turns": [ONE, TWO],
        "system": [ONE, TWO],
        "white space": SPACED,
        "equal": ["x<|end|>"] * 2,
        "empty": ["<|end|>", TWO],
        "field": [ONE, TWO],
        "inline": INLINE,
        "call": "does not show the tool_calls of message 2",
    },
    "line behind the end": {"two turns": [ONE, TWO], "white space": SPACED, "equal": ["x<|end|>"] * 2},
    "trims, with a space before": {
        "two turns": [" " + ONE, " " + TWO],
        "white space": [" " + ONE, " " + TWO],
        "empty": [" <|end|>", " " + TWO],
    },
    "channel header": {"two turns": ["<|channel|>final<|message|>" + text for text in (ONE, TWO)]},
    "eos when closed": {"two turns": [ONE, TWO], "system": [ONE, TWO], "white space": SPACED},
    "always asks": {"two turns": [ONE, TWO], "white space": SPACED, "equal": ["x<|end|>"] * 2},
    "end between turns only": {"two turns": [ONE, TWO], "white space": SPACED, "empty": ["<|end|>", TWO]},
    "next role stops": {
        "two turns": ["One.<|user|>", "Two.<|user|>"],
        "white space": ["\n One. \n<|user|>", "  Two.\n<|user|>"],
    },
    "no control token": {
        "two turns": [" One.<|eos|>", " Two.<|eos|>"],
        "white space": [" \n One.<|eos|>", "   Two.<|eos|>"],
        "equal": [" x<|eos|>"] * 2,
    },
    "other end in history": {"two turns": ["One.<|return|>", "Two.<|return|>"]},
    "closers before the end": {"two turns": ["[One.]<|message|><|end|>", "[Two.]<|message|><|end|>"]},
    "empty thought in the last turn": {
        "two turns": [EMPTY_THOUGHT + ONE, EMPTY_THOUGHT + TWO],
        "white space": [EMPTY_THOUGHT + text for text in SPACED],
        "equal": [EMPTY_THOUGHT + "x<|end|>"] * 2,
    },
    "opens a thought, turns lose it": {
        "two turns": ["(/thought)\n\n" + ONE, "(/thought)\n\n" + TWO],
        "inline": ["warm(/thought)" + ONE, "cold(/thought)" + TWO],
        "field": ["warm\n(/thought)\n\n" + ONE, "cold\n(/thought)\n\n" + TWO],
        "empty": ["(/thought)\n\n<|end|>", "(/thought)\n\n" + TWO],
        "white space": ["(/thought)\n\n" + text for text in SPACED],
    },
    "opens a thought, turns close it": {
        "two turns": ["(/thought)" + ONE, "(/thought)" + TWO],
        "equal": ["(/thought)x<|end|>"] * 2,
    },
    "opens a thought, reads the field": {
        "field": ["warm\n(/thought)\n\n" + ONE, "cold\n(/thought)\n\n" + TWO],
        "inline": ["warm\n(/thought)\n\n" + ONE, "cold\n(/thought)\n\n" + TWO],
        "two turns": ["(/thought)\n\n" + ONE, "(/thought)\n\n" + TWO],
        "white space": ["(/thought)\n\n" + text for text in SPACED],
    },
    "closes the thought, turns lose it": {"two turns": [ONE, TWO], "white space": SPACED},
    "closes the thought, reads the field": {
        "two turns": [ONE, TWO],
        "field": "ends the thought before the answer",
        "inline": "ends the thought before the answer",
    },
    "thoughts of the last turn": {"inline": INLINE, "two turns": [ONE, TWO]},
    "white space apart": {"two turns": ["(/thought)" + ONE, "(/thought)" + TWO]},
    "system in the last question": {"two turns": [ONE, TWO], "system": [ONE, TWO]},
    "calls": {
        "call": [LOOK, TWO],
        "words beside a call": ["Wait." + LOOK, TWO],
        "call of a number": [LOOK.replace('"v"', "5"), TWO],
        "two turns": [ONE, TWO],
    },
    "calls as text": {"call": ['<|call|>look {"k": "v"}<|end|>', TWO]},
    "drops words beside calls": {"words beside a call": [LOOK, TWO]},
    "drops arguments": {
        "call": "does not show the tool_calls of message 2",
        "call of a number": "does not show the tool_calls of message 2",
        "two turns": [ONE, TWO],
    },
    "drops tool messages": {"call": r"does not show message 3 \(tool\)"},
    "drops the system message": {"system": r"does not show message 1 \(system\)", "two turns": [ONE, TWO]},
    "leaves out empty answers": {"empty": "leaves out message 2, an empty answer", "two turns": [ONE, TWO]},
    "counts messages": {"two turns": [ONE, TWO]},
}
STOPS = {"next role stops": ("<|user|>", "<|tool|>"), "other end in history": ("<|return|>",)}
CASES = [(kind, name) for kind, right in RIGHT.items() for name in right]
TEXTS_OF_THEIR_OWN = {
    *("no control token", "other end in history", "empty thought in the last turn", "white space apart"),
    *(
        "opens a thought, turns lose it",
        "opens a thought, turns close it",
        "opens a thought, reads the field",
    ),
    *("closes the thought, turns lose it", "closes the thought, reads the field", "counts messages"),
}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_each_answer_behind_what_generation_sees(kind: str, name: str) -> None:
    source, messages, right = TEMPLATES[kind], CONVERSATIONS[name], RIGHT[kind][name]
    stops = STOPS.get(kind, ("<|end|>",))
    if isinstance(right, str):
        with pytest.raises(ChatProblem, match=right):
            write(source, messages, stops)
        return
    pieces, _ = write(source, messages, stops)
    assert [piece.answer + "<|eos|>" * piece.adds_eos for piece in pieces] == right
    if name != "inline" and kind != "calls as text":  # there examples are given to the template otherwise
        assert [piece.prompt for piece in pieces] == prompts(source, messages)


@pytest.mark.parametrize("kind", [kind for kind, right in RIGHT.items() if "two turns" in right])
def test_one_text_where_the_template_allows_it(kind: str) -> None:
    pieces, _ = write(TEMPLATES[kind], CONVERSATIONS["two turns"], STOPS.get(kind, ("<|end|>",)))
    is_shared = pieces[1].text.startswith(pieces[0].text) and not pieces[0].adds_eos
    assert is_shared == (kind not in TEXTS_OF_THEIR_OWN)


@pytest.mark.parametrize(
    ("kind", "name", "field", "number"),
    [
        ("plain", "field", "reasoning_content", 2),
        ("drops words beside calls", "words beside a call", "content", 1),
        ("plain", "two turns", "reasoning_content", 0),
        ("opens a thought, turns lose it", "field", "reasoning_content", 0),
    ],
)
def test_what_a_template_drops_is_counted(kind: str, name: str, field: str, number: int) -> None:
    _, notes = write(TEMPLATES[kind], CONVERSATIONS[name])
    assert notes[lost(field)] == number


def test_tools_that_no_prompt_names_are_counted() -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "Looks."}}]
    _, notes = write(TEMPLATES["calls"], CONVERSATIONS["two turns"], tools=tools)
    assert notes[lost("tools")] == 1
    shown = "{{ tools | tojson if tools else '' }}" + TEMPLATES["calls"]
    pieces, notes = write(shown, CONVERSATIONS["two turns"], tools=tools)
    assert notes[lost("tools")] == 0
    assert [piece.prompt for piece in pieces] == prompts(shown, CONVERSATIONS["two turns"], tools)


def test_further_fields_of_a_message_that_are_not_shown_are_counted() -> None:
    messages = [user("Q1?"), {"role": "assistant", "content": "One.", "mood": "cheerful"}]
    assert +write(TEMPLATES["plain"], messages)[1] == {lost("mood"): 1}
    named = [{**user("Q1? Bob"), "name": "Bob"}, bot("One.", name="Ann"), {**user("Q2?"), "name": "Bob"}]
    assert +write(TEMPLATES["plain"], named)[1] == {lost("name"): 2, Note.UNANSWERED: 1}
    shown = TEMPLATES["plain"].replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    assert +write(shown, named)[1] == {Note.UNANSWERED: 1}
    assert not +write(TEMPLATES["calls"], CONVERSATIONS["call"])[1]  # a result's name is its call's


def test_developers_are_written_as_the_system_and_counted() -> None:
    chat = [{"role": "developer", "content": "Short."}, user("Q1?"), bot("One.")]
    (piece,), notes = write(TEMPLATES["plain"], chat)
    assert piece.prompt.startswith("<|system|>Short.<|end|>") and +notes == {Note.DEVELOPER: 1}


@pytest.mark.parametrize("beside", [{}, {"content": None}, {"content": ""}])
def test_a_call_is_named_where_a_template_wants_a_content_and_shows_no_calls(beside: dict) -> None:
    plain = TEMPLATES["plain"].replace("{{ m.content }}", "{{ '' + m['content'] }}")
    for call_of_it in (call({"k": "v"}, None), call({}, None)):
        chat = [user("Q1?"), {**call_of_it, **beside}, RESULT, bot("Two.")]
        with pytest.raises(ChatProblem, match="does not show the tool_calls of message 2"):
            write(plain, chat)


def test_a_thought_that_the_prompt_opens_is_closed_or_refused() -> None:
    source, messages = TEMPLATES["opens a thought, turns lose it"], CONVERSATIONS["two turns"]
    assert write(source, messages)[1][Note.THOUGHT_CLOSED] == 2
    with pytest.raises(ChatProblem, match="open_thought: refuse"):
        write(source, messages, open_thought="refuse")
    assert write(source, CONVERSATIONS["inline"], open_thought="refuse")[1][Note.THOUGHT_FILLED] == 2


def test_options_reach_the_template() -> None:
    source = TEMPLATES["plain"].replace(
        "<|bot|>{% endif %}", "<|bot|>{{ '(thought)' if think else '(thought)(/thought)' }}{% endif %}"
    )
    (first, _), _ = write(source, CONVERSATIONS["inline"], options={"think": True})
    assert first.prompt.endswith("<|bot|>(thought)")
    assert first.answer == "warm(/thought)" + ONE


@pytest.mark.parametrize(
    "text", ["It is <|end|> here.", "<|end|> too", "ends in <|end|>", "<|user|>", "\ue010\ue100"]
)
def test_an_answer_may_hold_what_ends_it_or_what_stands_in(text: str) -> None:
    for kind in ("plain", "opens a thought, turns lose it", "eos when closed", "channel header"):
        pieces, _ = write(TEMPLATES[kind], [user(text), {"role": "assistant", "content": text}])
        assert pieces[0].answer.endswith(f"{text}<|end|>")
        assert pieces[0].answer.count("<|end|>") == text.count("<|end|>") + 1


def test_calls_are_written_as_the_template_wants_them() -> None:
    """Arguments as objects or as the text OpenAI sends, nulls kept, whatever stands beside the call."""
    for arguments in ({"k": "ä", "n": None}, '{"k": "ä", "n": null}'):
        for content in ("", None):
            messages = [user("Q?"), call(arguments, content)]
            shown = '<|call|>{"name": "look", "arguments": {"k": "ä", "n": null}}<|end|>'
            assert write(TEMPLATES["calls"], messages)[0][0].answer == shown
            shown = '<|call|>look {"k": "ä", "n": null}<|end|>'
            assert write(TEMPLATES["calls as text"], messages)[0][0].answer == shown
    assert write(TEMPLATES["calls"], [user("Q?"), call("")])[0][0].answer.endswith('"arguments": {}}<|end|>')
    for wrong in ("[1]", "{no", 3):
        with pytest.raises(ChatProblem, match="arguments of a call in message 2"):
            write(TEMPLATES["calls"], [user("Q?"), call(wrong)])
    for wrong in (float("inf"), 3, True, "x", {"name": "look"}):
        with pytest.raises(ChatProblem, match=r"tool_calls of message 2 are not a list"):
            write(TEMPLATES["calls"], [user("Q?"), {**call("{}"), "tool_calls": wrong}])


def test_calls_that_are_shown_only_where_nothing_stands_beside_them() -> None:
    source = TEMPLATES["calls"].replace(
        "m.tool_calls or []", "(m.tool_calls if m.content is none else []) or []"
    )
    assert write(source, CONVERSATIONS["call"])[0][0].answer == LOOK


def test_a_turn_that_runs_into_the_next_one_is_refused() -> None:
    source = loop_without_end_of_calls()
    assert [piece.answer for piece in write(source, CONVERSATIONS["two turns"])[0]] == [ONE, TWO]
    with pytest.raises(ChatProblem, match=r"does not end message 2 before '<\|user\|>' begins another turn"):
        write(source, CONVERSATIONS["call"])


def loop_without_end_of_calls() -> str:
    return TEMPLATES["calls"].replace(
        "{% endfor %}<|end|>", "{% endfor %}{{ '<|user|>(go on)' if m.tool_calls }}<|end|>"
    )


def test_marks_count_only_where_nothing_else_tells() -> None:
    """The prompt opens what no turn shows. Marks tell where the answer is; its end is the stop token, whether
    it stands inside them or behind."""
    for answer in (
        "<|bot|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}",
        "<|bot|>{% generation %}{{ m.content }}{% endgeneration %}<|end|>",
    ):
        source = TEMPLATES["plain"].replace("<|bot|>{{ m.content }}<|end|>", answer)
        opening = source.replace("<|bot|>{% endif %}", "<|bot|>(x){% endif %}")
        pieces, notes = write(opening, CONVERSATIONS["two turns"])
        assert [piece.answer for piece in pieces] == [ONE, TWO]
        assert pieces[1].text == "<|user|>Q1?<|end|><|bot|>One.<|end|><|user|>Q2?<|end|><|bot|>Two.<|end|>"
        assert notes[Note.BY_MARKS] == 2
        assert write(source, CONVERSATIONS["two turns"])[1][Note.BY_MARKS] == 0
    unmarked = TEMPLATES["plain"].replace("<|bot|>{% endif %}", "<|bot|>(x){% endif %}")
    with pytest.raises(
        ChatProblem, match=r"ends the prompt with '\(x\)'.*\{% generation %\}.*supervise: all"
    ):
        write(unmarked, CONVERSATIONS["two turns"])


def test_a_template_may_ask_what_texts_say() -> None:
    source = (
        "{% if messages[0].content[:1] != 'Q' %}{{ raise_exception('no question') }}{% endif %}"
        + TEMPLATES["plain"]
    )
    pieces, _ = write(source, CONVERSATIONS["two turns"])
    assert [piece.answer for piece in pieces] == [ONE, TWO]
    with pytest.raises(ChatProblem, match="no question"):
        write(source, CONVERSATIONS["system"])
