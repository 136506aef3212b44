"""Which characters of a prompt may be cut, so that what is left is still a prompt of the template.

A prompt that is too long loses what people asked, from the left, and keeps everything that the template
wrote: system prompt and tools, the headers of all roles, the ends of turns. Where these stand is asked of the
template, as always: the history is rendered with a stand-in in the place of each question and each result of
a tool, and what is between the stand-ins has to be found in the prompt again, in order:

    stand-ins   <|system|>S<|end|><|user|> # <|end|><|bot|>
    prompt      <|system|>S<|end|><|user|> Why is the sky blue? <|end|><|bot|>
                                           -------------------- may be cut

Where a template rewrites a question (cuts or quotes it), only what stands before the first and behind the
last stand-in is told apart.
"""

from __future__ import annotations

from qlora_train.data.chat.stand_ins import free_stand_in, is_blank
from qlora_train.data.chat.template import ChatProblem, ChatTemplate, Messages, Span, Tools

_ASKS = ("user", "tool")


def places_to_cut(template: ChatTemplate, history: Messages, tools: Tools, prompt: str) -> list[Span]:
    """Spans of characters of `prompt`, what generation is handed behind the history; empty where the template
    does not tell. history: as the template is given it."""
    mark = free_stand_in(prompt)
    asked = [m["content"] for m in history if m["role"] in _ASKS and not is_blank(m.get("content"))]
    marked = [
        {**m, "content": mark} if m["role"] in _ASKS and not is_blank(m.get("content")) else m
        for m in history
    ]
    try:
        between = template.render(marked, tools, prompt=True).split(mark)
    except ChatProblem:  # a template that asks what a text says
        return []
    if len(between) < 2:
        return []
    if len(between) == len(asked) + 1:
        found = _in_order(asked, between, prompt)
        if found:
            return found
    head, header = between[0], between[-1]
    is_framed = prompt.startswith(head) and prompt.endswith(header)
    return [(len(head), len(prompt) - len(header))] if is_framed else []


def _in_order(asked: list[str], between: list[str], prompt: str) -> list[Span]:
    """Spans of the texts in the prompt, if the prompt is these between those, and nothing else."""
    spans: list[Span] = []
    at = 0
    for before, text in zip(between, asked, strict=False):
        start = at + len(before)
        said = next((t for t in (text, text.strip()) if prompt.startswith(before + t, at)), None)
        if said is None:
            return []
        at = start + len(said)
        spans.append((start, at))
    return spans if prompt[at:] == between[-1] else []
