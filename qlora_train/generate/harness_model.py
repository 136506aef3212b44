"""A model of ours for EleutherAI's lm-evaluation-harness (lm-eval): log-likelihoods and answers by our walk.

Texts become tokens, contexts are cut and answers are ended as lm-eval's own model class for transformers
(HFLM) has it, so that the figures are those that it has for the same weights. What differs: answers also end
at the tokens that end them in `generate`, chats are written by the model's template as in training, and of
the model's generation_config.json only repetition_penalty changes answers; what else would change greedy ones
in transformers is logged.

The model is loaded when the first request comes, as only then all are known, and memory is planned for the
largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.chat.pieces import ChatWriter
from qlora_train.data.chat.template import ChatProblem
from qlora_train.data.tokenizer import read_generation_config
from qlora_train.errors import BaseModelError, DataError, UserError
from qlora_train.generate.model_folder import LoadedModel, ModelSource
from qlora_train.generate.sampling import Sampling
from qlora_train.generate.scoring import Continuation, score
from qlora_train.model.base import read_config
from qlora_train.plan.planned_walk import GenerateSize

_ROW_TOKENS = 2048  # packed together, unless a text is longer
_DEFAULT_NEW_TOKENS = 256  # HFLM's
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_UNHEEDED: Mapping[str, int | None] = {
    **dict.fromkeys(("num_beams", "guidance_scale"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("max_new_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config")),
}
"""Settings of generation_config.json that change greedy answers in transformers alone, with the value, beside
None, that changes none."""


class HarnessModel(TemplateLM):
    """A model of ours in lm-eval. num_cut: texts so far that were longer than the model's positions and lost
    their beginning."""

    def __init__(
        self,
        source: ModelSource,
        instances: Callable[[], Iterable[Instance]],
        *,
        batch_size: int,
        vram_bytes: int | None,
        log: Callable[[str], None],
    ) -> None:
        """instances: all requests there will be, once the first has come. batch_size: that are answered
        together."""
        super().__init__()
        if source.tokenizer.eos_token_id is None:
            raise BaseModelError(
                f"{source.folder}: the tokenizer names no eos_token, which tasks end texts by"
            )
        self.tokenizer: PreTrainedTokenizerBase = source.tokenizer
        self.num_cut = 0
        self._source, self._instances, self._batch_size = source, instances, batch_size
        self._vram_bytes, self._log = vram_bytes, log
        self.max_length = resolve_max_length(read_config(source.folder), self.tokenizer)
        self._generation_config = read_generation_config(str(source.folder))

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, in memory for the largest requests."""
        return self._source.load(self._size, vram_bytes=self._vram_bytes, log=self._log)

    @cached_property
    def _size(self) -> GenerateSize:
        """The largest batch to answer, and the tokens of a row to score."""
        instances = list(self._instances())
        answered = [i.args for i in instances for _ in range(i.repeats) if i.request_type == "generate_until"]
        scored = ["".join(i.args) for i in instances if i.request_type != "generate_until"]
        if answered:
            self._log_unheeded()
        settings = [self._settings(options) for _, options in answered]
        prompts = [
            self._prompt(context, sampling.max_new_tokens)[0]
            for (context, _), (sampling, _) in zip(answered, settings, strict=True)
        ]
        lengths = sorted(map(len, prompts), reverse=True)[: self._batch_size]
        new_tokens = max((sampling.max_new_tokens for sampling, _ in settings), default=1)
        longest = max((len(self.tok_encode(text)) for text in scored), default=0)
        row_tokens = max(_ROW_TOKENS, min(longest, self.max_length)) if scored else 0
        return GenerateSize(tuple(lengths) or (1,), new_tokens, row_tokens)

    def close(self) -> None:
        """Release the threads and files of streamed weights."""
        if "loaded" in self.__dict__:
            self.loaded.decoder.close()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.tokenizer.bos_token_id
        return self.eot_token_id if bos_id is None else int(bos_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, behind what the tokenizer puts there unless the text has it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation that the assistant is to continue: behind its own beginning, the last
        message, without add_generation_prompt."""
        messages = [dict(message) for message in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        try:
            return self._writer.render(messages, prompt=True) + begun
        except ChatProblem as problem:
            raise DataError(f"A task's prompt cannot be written as a conversation: {problem}") from problem

    @cached_property
    def _writer(self) -> ChatWriter:
        options = {} if self._source.data is None else self._source.data.chat_template_kwargs
        return ChatFormat(self.tokenizer, (), options=options).writer(with_tools=False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([self._continuation(*request) for request in requests], disable_tqdm)

    def _continuation(self, texts: tuple[str, str], context: list[int], scored: list[int]) -> Continuation:
        if not 0 < len(scored) <= self.max_length:
            raise DataError(
                f"A task's answer {texts[1][:80]!r} has {len(scored)} tokens of its own, and the model can "
                f"score 1 to {self.max_length}. Leave the row out of the task."
            )
        self.num_cut += len(context) + len(scored) > self.max_length + 1
        return Continuation((context + scored)[-self.max_length - 1 :], len(scored))

    def _score(self, continuations: list[Continuation], disable_tqdm: bool) -> list[tuple[float, bool]]:
        decoder = self.loaded.decoder
        total = sum(continuation.num_scored for continuation in continuations)
        with tqdm(total=total, desc="Scoring", unit="token", disable=disable_tqdm) as bar:
            return score(
                decoder,
                continuations,
                self._size.evaluated_tokens,
                bar.update,
                group_size=self.loaded.plan.evaluation_group,
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; of one that is longer than the model's positions, piece by piece,
        a token of context before each."""
        pieces, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, scored in map(make_disjoint_window, windows):
                pieces.append(Continuation(context + scored, len(scored)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._score(pieces, disable_tqdm), strict=True):
            sums[i] += log_likelihood
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers to prompts, each up to its first stop text."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Answering", disable=disable_tqdm) as bar:
            for members in groups.values():
                sampling, stops = self._settings(requests[members[0]].args[1])
                prompts = {}
                for i in members:
                    prompts[i], is_cut = self._prompt(requests[i].args[0], sampling.max_new_tokens)
                    self.num_cut += is_cut
                by_length = dict(sorted(prompts.items(), key=lambda item: -len(item[1])))
                found = self.loaded.answers(
                    list(by_length.values()), sampling, self._batch_size, self._ends_in(stops)
                )
                for i, answer in zip(by_length, found, strict=True):
                    answers[i] = _before(stops, answer)
                    bar.update()
        return answers

    def _prompt(self, context: str, new_tokens: int) -> tuple[list[int], bool]:
        """(the last tokens of a prompt that leave room for new ones, whether there are more)."""
        if new_tokens >= self.max_length:
            raise UserError(
                f"a task asks for {new_tokens} new tokens (max_gen_toks), and the model has only "
                f"{self.max_length} positions for prompt and answer; set a smaller max_gen_toks in the task"
            )
        token_ids, room = self.tok_encode(context), self.max_length - new_tokens
        return token_ids[-room:], len(token_ids) > room

    def _settings(self, options: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
        """(decoding, stop texts) of a task's generation_kwargs."""
        given = dict(normalize_gen_kwargs(dict(options), _DEFAULT_NEW_TOKENS))
        new_tokens, is_sampled = int(given.pop("max_gen_toks")), given.pop("do_sample")
        stops = [*given.pop("until"), str(self.tokenizer.decode(self.eot_token_id))]
        sampling: dict[str, Any] = {"repetition_penalty": self._repetition_penalty}
        sampling |= {name: given.pop(name) for name in _SAMPLING if name in given}
        if given:
            raise UserError(
                f"a task's generation_kwargs have {', '.join(sorted(given))}, which decoding here does not "
                f"know; it knows until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
            )
        decoding = sampling if is_sampled else sampling | {"temperature": 0.0}
        return Sampling(new_tokens, **decoding), [stop for stop in stops if stop]

    @cached_property
    def _repetition_penalty(self) -> float:
        """That of generation_config.json, which transformers applies to greedy answers too."""
        penalty = self._generation_config.get("repetition_penalty")
        if penalty is None:
            return 1.0
        if not (isinstance(penalty, int | float) and penalty > 0):
            file = self._source.folder / "generation_config.json"
            raise BaseModelError(f"{file}: repetition_penalty is {penalty!r}; it is a number above 0.")
        return float(penalty)

    def _log_unheeded(self) -> None:
        values = {name: self._generation_config.get(name) for name in _UNHEEDED}
        names = [name for name, value in values.items() if value not in (None, _UNHEEDED[name])]
        if names:
            self._log(
                f"generation_config.json has {', '.join(names)}, which decoding here does not know: answers "
                "may differ from those of transformers"
            )

    def _ends_in(self, stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether an answer's last tokens hold a stop text: a token is at least a byte, and the first of a
        text may lose the space before it."""
        most = max(len(stop.encode()) for stop in stops) + 1
        return lambda answer: any(stop in self.tokenizer.decode(list(answer[-most:])) for stop in stops)


def _before(stops: Sequence[str], answer: str) -> str:
    """An answer up to the first stop text."""
    for stop in stops:
        answer = answer.split(stop)[0]
    return answer
