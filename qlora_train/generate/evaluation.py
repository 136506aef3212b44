"""Evaluates a model on held-out rows: the loss of their answers, and how close generated answers come.

The rows are read, cut and tokenised as training reads them, so that a prompt is exactly what the model was
trained to continue. The loss is the mean over all supervised tokens; perplexity is its exponential. A row's
last answer is also generated, greedily, from everything before it, and compared as text: equal or not (outer
whitespace aside), ROUGE (Lin 2004, rouge-score) and BLEU (Papineni et al. 2002; Post 2018, sacrebleu).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_train.data.dataset import PackedDataset
from qlora_train.data.documents import Document
from qlora_train.errors import UserError
from qlora_train.generate.model_folder import LoadedModel
from qlora_train.generate.sampling import Sampling
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.walk.evaluate import loss_sum


@dataclass(frozen=True)
class Question:
    """The last answer of a document. prompt: the tokens before it. reference: its text."""

    prompt: list[int]
    reference: str


@dataclass(frozen=True)
class Scores:
    """loss: nats per supervised token, of num_tokens. answers: generated, of as many questions. metrics: by
    name, percentages."""

    loss: float
    num_tokens: int
    answers: list[str]
    metrics: dict[str, float]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def questions_of(
    data: PackedDataset, stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The questions of all documents that have a prompt before their last answer. stop_ids: tokens that end
    answers."""
    found = (_question(data.document(i), stop_ids, tokenizer) for i in range(len(data.lengths)))
    return [question for question in found if question is not None]


def _question(
    document: Document, stop_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> Question | None:
    supervised = np.flatnonzero(document.supervised)
    if not len(supervised):
        return None
    gaps = np.flatnonzero(np.diff(supervised) > 1)
    start = int(supervised[gaps[-1] + 1] if len(gaps) else supervised[0])
    answer = document.token_ids[start : supervised[-1] + 1].tolist()
    if answer[-1] in stop_ids:
        answer.pop()
    if start < 2 or not answer:  # a text without a prompt; an empty answer
        return None
    reference = str(tokenizer.decode(answer, skip_special_tokens=True))
    return Question(document.token_ids[:start].tolist(), reference)


def evaluate(
    model: LoadedModel,
    data: PackedDataset,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Scores:
    """Scores of the model with the adapter that it has now."""
    device = model.decoder.device.torch
    batches = (PackedTokens.from_host(data.micro_batch([i]), device) for i in range(data.num_bins))
    num_tokens = data.num_supervised(range(data.num_bins))
    total = loss_sum(model.decoder, batches, group_size=model.plan.evaluation_group)
    loss = float(total) / num_tokens
    prompts = [question.prompt for question in questions]
    answers = list(model.answers(prompts, Sampling(max_new_tokens), batch_size))
    return Scores(loss, num_tokens, answers, text_metrics(answers, [q.reference for q in questions]))


def text_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match, ROUGE-1, -2 and -L (F1, means) and BLEU in percent; empty without answers."""
    if not answers:
        return {}
    rouge_scorer, sacrebleu = _libraries()
    pairs = list(zip(references, answers, strict=True))
    exact = np.mean([reference.strip() == answer.strip() for reference, answer in pairs])
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(reference, answer) for reference, answer in pairs]
    metrics = {"exact match": 100 * float(exact)}
    for name, title in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L")):
        metrics[title] = 100 * float(np.mean([score[name].fmeasure for score in scores]))
    metrics["BLEU"] = float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)
    return metrics


def _libraries():  # type: ignore[no-untyped-def]  # two modules
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            f"answers are compared by rouge-score and sacrebleu, and {error.name} is not installed: "
            "pip install 'qlora-train[eval]', or take --num-answers 0 for the loss alone"
        ) from error
    return rouge_scorer, sacrebleu
