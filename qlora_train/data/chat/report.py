"""What became of conversations on their way through the template, in numbers and lines."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ChatCounts:
    """Counts over all conversations of a data set. `dropped`: by field, answers whose field the template does
    not show. `notes`: said once, however often they occur."""

    num_chats: int = 0
    num_texts: int = 0
    num_tokens: int = 0
    num_tokens_of_longest: int = 0  # of each conversation's longest text: what they would be in one text each
    num_answers_first: int = 0
    num_messages_behind: int = 0
    num_thoughts_closed: int = 0
    num_thoughts_filled: int = 0
    num_thoughts_moved: int = 0
    num_answers_rewritten: int = 0
    num_by_marks: int = 0
    num_without_stop_token: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)

    def note(self, line: str) -> None:
        self.notes[line] = None

    def lines(self) -> list[str]:
        """One line for each thing that a user may want to change, or to know."""
        lines = list(self.notes)
        if self.num_texts > self.num_chats and self.num_tokens > self.num_tokens_of_longest > 0:
            lines.append(
                f"{self.num_chats:,} conversations -> {self.num_texts:,} texts, {self._growth:.2f} times the "
                "tokens: the chat template writes earlier turns otherwise than generation meets them, so "
                "these answers have a text of their own (data.supervise: last_turn makes one a conversation)"
            )
        lines += [
            f"{number:,} answers lose {name!r}: the chat template does not show it"
            for name, number in sorted(self.dropped.items())
            if number
        ]
        counted = {
            "answers are not in their texts word for word: the chat template cuts or rewrites them": (
                self.num_answers_rewritten
            ),
            "answers without a thought, where the prompt opens one: an empty thought is trained "
            "(data.open_thought: refuse stops there)": self.num_thoughts_closed,
            "answers whose thought follows the one that the prompt opens": self.num_thoughts_filled,
            "answers with their thought inside, given to the chat template as 'reasoning_content'": (
                self.num_thoughts_moved
            ),
            "conversations begin with the assistant: that message is context only, as nothing asks for it": (
                self.num_answers_first
            ),
            "messages behind the last answer left out: nothing answers them": self.num_messages_behind,
            "answers found by the template's {% generation %} marks: their context is not what generation "
            "sees": self.num_by_marks,
            "answers end in EOS, which the chat template does not write: it has no token behind an answer": (
                self.num_without_stop_token
            ),
        }
        for line, number in counted.items():
            if number:
                lines.append(f"{number:,} {line}")
        return lines

    def add(self, other: ChatCounts) -> None:
        """Adds the counts of other conversations."""
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, int):
                setattr(self, name, mine + theirs)
            else:
                mine.update(theirs)

    @property
    def _growth(self) -> float:
        return self.num_tokens / self.num_tokens_of_longest
