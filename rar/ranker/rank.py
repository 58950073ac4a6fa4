"""The MLLM ranker: one contract, (image, candidates, their exemplar pictures) -> Ranking, and five ways to come by it.

`letters` labels the candidates A, B, ... and reads the label logits after one forward pass, so the answer is a permutation by
construction and has scores; permutations > 1 averages log-probabilities over rotations of the list, and a label prior is
divided out, both against the models' liking for certain labels. `yes_no` asks about one candidate at a time. `likelihood` asks
once and compares the names as replies, by mean log-probability a token, so that long names do not lose for being long.
`generate` is the paper's free text (3.2), decoded greedily, read by `reply.parse`. `first` asks the same and decodes nothing:
it compares how likely the sorted list is to begin with each name (as FIRST, 2406.15657, does with identifiers), so that no name
can be written that is not listed. What several questions have in common, the picture above all, is computed once (`prefix`),
except where the candidates' own pictures stand in their midst.

A row of one candidate costs no call. A row whose prompt is beyond the model's window is a FALLBACK with calls = 0, where a
reply that nobody can read is a FALLBACK with calls = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rar.config import Ranker
from rar.device import LANES, Lanes, SharedClock
from rar.ranker import naming, prefix
from rar.ranker.debias import Prior, label_prior, log_softmax, prior_of
from rar.ranker.labels import Read, judged, together
from rar.ranker.mllm import Mllm, Prompt
from rar.ranker.prompt import generate_prompt, letters_prompt, likelihood_prompt, yes_no_prompt
from rar.ranker.reply import parse
from rar.ranker.wording import load_wording
from rar.schema import Ranking, RankStatus, UserError

Found = dict[tuple[int, int], tuple[np.ndarray, int]]  # (row, place of the question) -> (log-probabilities, prompt tokens)
Labels = dict[tuple[int, int], tuple[Read, int]]  # the same, read as labels


class Question(NamedTuple):
    """A row to rank: its picture, its candidates' harmless names, and the exemplar pictures of each candidate."""

    image: np.ndarray
    names: list[str]
    exemplars: list[list[np.ndarray]]

    def turned(self, shift: int) -> Question:
        """With the candidates rotated by some places."""
        return Question(self.image, self.names[shift:] + self.names[:shift], self.exemplars[shift:] + self.exemplars[:shift])

    @property
    def images(self) -> list[np.ndarray]:
        return [self.image, *(image for images in self.exemplars for image in images)]

    @property
    def counts(self) -> list[int]:
        return [len(images) for images in self.exemplars]


class MllmRanker:
    """Ranks candidates by a local MLLM. Raises UserError for a model that cannot be loaded or asked in the configured way."""

    def __init__(self, config: Ranker, model_path: str) -> None:
        """model_path: a local folder or a hub name (config.model may be 'miniature', which the caller resolves)."""
        self.config = config
        self.wording = load_wording(config.prompts)
        self.mllm = Mllm(config, model_path)
        alone = self.mllm.keeps_positions is not None or config.trust_remote_code  # foreign code may keep anything on a model
        self.lanes = Lanes(self.mllm.device, most=1 if alone else LANES)
        self.clock = SharedClock()
        if config.method == "letters":
            self.label_forms = self._labels()
        if config.method == "yes_no":
            self.yes_ids, self.no_ids = self._yes_and_no()
        if config.exemplars:
            self._check_exemplars()

    def rank(
        self,
        images: Sequence[np.ndarray],
        names: Sequence[Sequence[str]],
        exemplars: Sequence[Sequence[Sequence[np.ndarray]]] | None = None,
        prior: Prior | None = None,
    ) -> list[Ranking]:
        """Rank the candidates of each image.

        images: (H, W, 3) uint8 RGB, any sizes. names: the candidates' names of each image in retrieval order; rows may differ
        in number. exemplars: of each image and candidate, its pictures (H, W, 3) uint8; the first `ranker.exemplars` are shown.
        prior: of `estimate_prior`; needed with ranker.debias 'prior'.

        Returns one Ranking a row. All but `generate` give one score a candidate, a log-probability among the candidates; order
        sorts it, ties in retrieval order; `letters` also tells the labels' mass, which decides the status (`labels.judged`).
        `letters` gives one output token a call (a call a rotation), `yes_no` a call a candidate, `likelihood` and `first` one
        call whose output tokens are those of the names; prompt tokens that questions share count once. With none_of_these, the
        response tells that answer's probability. Rows of one candidate are RANKED without a call.
        Raises UserError where `letters` has more candidates than the model has labels.
        """
        asked = [row for row, listed in enumerate(names) if len(listed) > 1]
        with self.clock.turn() as taken:
            questions = [self._question(images[row], names[row], exemplars[row] if exemplars else None) for row in asked]
            if self.config.method == "letters":
                answers = self._letters(questions) if self._plain() else self._varied_letters(questions, self._needed(prior))
            elif self.config.method == "yes_no":
                answers = self._yes_no(questions)
            elif self.config.method in ("likelihood", "first"):
                answers = self._named(questions)
            else:
                answers = self._generate(questions)
            each = taken() / max(len(asked), 1)
        rankings = {row: replace(answer, seconds=each) for row, answer in zip(asked, answers, strict=True)}
        return [rankings.get(row) or self._trivial(len(listed)) for row, listed in enumerate(names)]

    def estimate_prior(
        self, images: Sequence[np.ndarray], names: Sequence[Sequence[str]], counts: Sequence[int] | None = None
    ) -> dict[str, list[float]]:
        """The label prior of `letters`, for JSON. No truth is needed; a few dozen images are enough.

        counts: lengths of lists that will be asked (a list is cut to a length, rotated through all its places); default: the
        lengths in `names`. Deterministic for equal images in equal order. Images with fewer names than a count are left out.
        """
        counts = sorted({len(listed) for listed in names} if counts is None else set(counts))
        prior = {}
        for count in counts:
            used = [row for row, listed in enumerate(names) if count > 1 and len(listed) >= count]
            questions = [self._question(images[row], names[row][:count], None) for row in used]
            read = self._label_logits(questions, [list(range(count))] * len(used))
            keys = [[(row, shift) for shift in range(count)] for row in range(len(used))]
            observed = [
                np.stack([log_softmax(read[key][0].logprobs[:count]) for key in listed]) for listed in keys if listed[0] in read
            ]
            if observed:
                prior[str(count)] = label_prior(observed)
        return prior

    def _question(self, image: np.ndarray, names: Sequence[str], exemplars: Sequence[Sequence[np.ndarray]] | None) -> Question:
        shown = [list(images[: self.config.exemplars]) for images in exemplars] if exemplars else [[] for _ in names]
        return Question(image, [self.mllm.harmless(name) for name in names], shown)

    def _trivial(self, count: int) -> Ranking:
        scores = () if self.config.method == "generate" else (0.0,) * count  # the one candidate has probability 1
        return Ranking(tuple(range(count)), RankStatus.RANKED, scores)

    def _needed(self, prior: Prior | None) -> Prior | None:
        if self.config.debias == "none":
            return None
        if prior is None:
            raise UserError("ranker.debias 'prior' needs a label prior, which calibration estimates; set it to 'none'")
        return prior

    # letters ------------------------------------------------------------------------------------------------------------------

    def _letters(self, questions: list[Question]) -> list[Ranking]:
        """The plain way: the names labelled in the order given, one forward pass a row, and of it the labels' logits.

        The label of each candidate is one token of the reply, so the answer is a permutation, and its scores are the
        log-probabilities of the labels among themselves (one token a picture where the paper's free text, 3.2, takes dozens).
        A row beyond the model's window is not asked: a FALLBACK. With several rotations, exemplars, a prior or
        none_of_these: `_varied_letters`.
        """
        self._check_label_count(max((len(question.names) for question in questions), default=0))
        texts = self.mllm.render([letters_prompt(question.names, self.wording) for question in questions])
        prompts = [
            Prompt(row, 0, [question.image], text) for row, (question, text) in enumerate(zip(questions, texts, strict=True))
        ]
        rankings = [_unasked(len(question.names)) for question in questions]
        for prompt, logs, tokens in self.mllm.next_logits(prompts, [token for forms in self.label_forms for token in forms]):
            forms = self.label_forms[: len(questions[prompt.row].names)]
            read = together(logs[: sum(map(len, forms))], forms, logs[-1])
            ranking = _scored(log_softmax(read.logprobs), "", calls=1, prompt_tokens=tokens, output_tokens=1)
            rankings[prompt.row] = judged(ranking, [read])
        return rankings

    def _plain(self) -> bool:
        config = self.config
        return config.permutations == 1 and not config.exemplars and config.debias == "none" and not config.none_of_these

    def _varied_letters(self, questions: list[Question], prior: Prior | None) -> list[Ranking]:
        """The same over rotations of the list, with the candidates' own pictures, without the prior, or with a way out."""
        shifts = [rotations(len(question.names), self.config.permutations) for question in questions]
        read = self._label_logits(questions, shifts)
        return [
            self._averaged(
                len(question.names),
                {shift: read[row, shift] for shift in shifts[row] if (row, shift) in read},
                shifts[row],
                prior,
            )
            for row, question in enumerate(questions)
        ]

    def _averaged(self, count: int, read: dict[int, tuple[Read, int]], shifts: list[int], prior: Prior | None) -> Ranking:
        """A row's rotations as one Ranking. read: by rotation, (labels, prompt tokens); those too long are missing."""
        if len(read) < len(shifts):
            return _unasked(count)
        total, none = np.zeros(count), 0.0
        for shift, (one, _) in read.items():
            logits = one.logprobs
            logits = logits - np.pad(prior_of(prior, count), (0, len(logits) - count)) if prior is not None else logits
            total += np.roll(log_softmax(logits[:count]), shift)
            none += float(np.exp(log_softmax(logits)[count:]).sum()) / len(shifts)
        response = f"{self.wording.none_of_these}: {none:.6f}" if self.config.none_of_these else ""
        scores = total / len(shifts)
        if prior is not None or len(shifts) > 1:
            scores = log_softmax(scores)
        ranking = _scored(scores, response, len(shifts), sum(tokens for _, tokens in read.values()), len(shifts))
        return judged(ranking, [one for one, _ in read.values()])

    def _label_logits(self, questions: list[Question], shifts: list[list[int]]) -> Labels:
        """The labels (n,) of each question under each of its rotations; (n + 1,) with none_of_these."""
        extra = [self.wording.none_of_these] if self.config.none_of_these else []
        self._check_label_count(max((len(question.names) for question in questions), default=0))
        turned = [
            [(shift, question.turned(shift)) for shift in listed] for question, listed in zip(questions, shifts, strict=True)
        ]
        texts = self.mllm.render(
            [
                letters_prompt([*one.names, *extra], self.wording, [*one.counts, *[0] * len(extra)])
                for listed in turned
                for _, one in listed
            ]
        )
        text = iter(texts)
        prompts = [[Prompt(row, shift, one.images, next(text)) for shift, one in listed] for row, listed in enumerate(turned)]
        read = {}
        for key, (logs, tokens) in self._read(prompts, [token for forms in self.label_forms for token in forms]).items():
            shown = self.label_forms[: len(questions[key[0]].names) + len(extra)]
            read[key] = (together(logs[: sum(map(len, shown))], shown, logs[-1]), tokens)
        return read

    def _labels(self) -> list[tuple[int, ...]]:
        forms = self.mllm.label_forms()
        if len(forms) < 2:
            raise UserError(
                "this model's tokenizer has no single tokens for the labels A, B, ...; set ranker.method to 'generate'"
            )
        return forms

    def _check_label_count(self, count: int) -> None:
        extra = int(self.config.none_of_these)
        if count + extra > len(self.label_forms):
            raise UserError(
                f"ranker.method 'letters' can label {len(self.label_forms) - extra} candidates with {self.mllm.model_path!r}, "
                f"not {count}: lower retriever.top_k or set ranker.method to 'likelihood'"
            )

    # yes_no, likelihood, first, generate --------------------------------------------------------------------------------------

    def _yes_no(self, questions: list[Question]) -> list[Ranking]:
        """score = log p(yes) - log p(no), as logits of a softmax over the candidates."""
        asked = [
            (row, place, yes_no_prompt(name, self.wording, question.counts[place]))
            for row, question in enumerate(questions)
            for place, name in enumerate(question.names)
        ]
        prompts: list[list[Prompt]] = [[] for _ in questions]
        for (row, place, _), text in zip(asked, self.mllm.render([text for *_, text in asked]), strict=True):
            images = [questions[row].image, *questions[row].exemplars[place]]
            prompts[row].append(Prompt(row, place, images, text))
        read, rankings, yes = self._read(prompts, self.yes_ids + self.no_ids), [], len(self.yes_ids)
        for row, question in enumerate(questions):
            answers = [read[row, place] for place in range(len(question.names)) if (row, place) in read]
            if len(answers) < len(question.names):
                rankings.append(_unasked(len(question.names)))
                continue
            odds = [np.logaddexp.reduce(logs[:yes]) - np.logaddexp.reduce(logs[yes:-1]) for logs, _ in answers]
            tokens = sum(tokens for _, tokens in answers)
            rankings.append(_scored(log_softmax(np.array(odds)), "", len(answers), tokens, len(answers)))
        return rankings

    def _yes_and_no(self) -> tuple[list[int], list[int]]:
        words = (self.wording.yes_no.affirm, self.wording.yes_no.deny)
        yes, no = (self.mllm.first_ids(word) for word in words)
        if not yes or not no or set(yes) & set(no):
            raise UserError(
                f"this model's tokenizer does not tell {words[0]!r} from {words[1]!r}; set ranker.method to 'letters'"
            )
        return yes, no

    def _named(self, questions: list[Question]) -> list[Ranking]:
        """By how likely each name is: `likelihood` as the whole reply, `first` as the first of the sorted list."""
        first = self.config.method == "first"
        prompt_of, replies_of = (generate_prompt, naming.beginnings) if first else (likelihood_prompt, naming.replies)
        texts = self.mllm.render([prompt_of(one.names, self.wording, one.counts) for one in questions])
        prompts = [Prompt(row, 0, one.images, text) for row, (one, text) in enumerate(zip(questions, texts, strict=True))]
        ids = replies_of(self.mllm, texts, [question.names for question in questions])
        rankings = [_unasked(len(question.names)) for question in questions]
        for prompt, found, read, said in prefix.scores(self.mllm, prompts, ids, mean=not first):
            rankings[prompt.row] = _scored(log_softmax(found), "", 1, read, said)
        return rankings

    def _generate(self, questions: list[Question]) -> list[Ranking]:
        texts = self.mllm.render([generate_prompt(one.names, self.wording, one.counts) for one in questions])
        prompts = [Prompt(row, 0, one.images, text) for row, (one, text) in enumerate(zip(questions, texts, strict=True))]
        rankings = [_unasked(len(question.names)) for question in questions]
        for prompt, response, written, length in self.mllm.write(prompts):
            order, status = parse(response, questions[prompt.row].names)
            rankings[prompt.row] = Ranking(order, status, (), response, 1, length, written)
        return rankings

    def _read(self, prompts: list[list[Prompt]], ids: list[int]) -> Found:
        """`mllm.of_ids` of the first token of the reply to each prompt; prompts beyond the window are missing."""
        several = [row for row in prompts if len(row) > 1 and all(len(prompt.images) == 1 for prompt in row)]
        shared = {prompt.row for row in several for prompt in row}
        single = [prompt for row in prompts for prompt in row if prompt.row not in shared]
        answers = [*self.mllm.next_logits(single, ids), *prefix.next_logits(self.mllm, several, ids)]
        return {(prompt.row, prompt.place): (logits, tokens) for prompt, logits, tokens in answers}

    def _check_exemplars(self) -> None:
        """Raises UserError for a template without a place for the pictures, and for a model that takes one picture alone."""
        template = getattr(self.wording, "generate" if self.config.method == "first" else self.config.method)
        if "{pictures}" not in template.candidate or "{candidates}" not in template.ask:
            raise UserError(
                f"ranker.exemplars: the template of {self.config.method!r} has no place for them; give it {{candidates}} and "
                "{pictures} in ranker.prompts, or set ranker.exemplars to 0"
            )
        self.mllm.check_many_pictures()


def rotations(count: int, permutations: int) -> list[int]:
    """Evenly spaced rotations of `count` candidates, the given order first: rotations(5, 2) = [0, 2]."""
    used = min(count, permutations)
    return [turn * count // used for turn in range(used)]


def _scored(scores: np.ndarray, response: str, calls: int, prompt_tokens: int, output_tokens: int) -> Ranking:
    """By score, best first. Scores that are no numbers (a half-precision overflow) rank nothing."""
    if not np.isfinite(scores).all():
        return Ranking(tuple(range(len(scores))), RankStatus.FALLBACK, (), "", calls, prompt_tokens, output_tokens)
    order = tuple(np.argsort(-scores, kind="stable").tolist())
    return Ranking(order, RankStatus.RANKED, tuple(scores.tolist()), response, calls, prompt_tokens, output_tokens)


def _unasked(count: int) -> Ranking:
    return Ranking(tuple(range(count)), RankStatus.FALLBACK)
