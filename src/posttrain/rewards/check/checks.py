"""The checks, one function each, with what they report when a reward fails them.

Gold answers must earn the most. Everything else is compared with a plainly wrong answer in the right form: text without
the right answer, or with many answers, may earn no more than that (plus 1 % of the difference between right and wrong).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from posttrain.rewards.check import texts
from posttrain.rewards.check.bench import FULL, SLACK, Bench, Probe, as_number
from posttrain.rewards.rubric import Rubric

OK, FAIL, NOTE = "ok", "FAIL", "note"  # a note is worth knowing, but not a fault
COINCIDENCE = 0.2  # fraction of rows where a prompt may happen to contain its answer
SLOW = 2.0  # seconds for one text, at the better of two tries


@dataclass(frozen=True)
class CheckFinding:
    name: str
    verdict: str  # OK, FAIL or NOTE
    detail: str


@dataclass(frozen=True)
class CheckReport:
    findings: list[CheckFinding]
    form: str  # that gold answers were written in
    rows: int

    @property
    def passed(self) -> bool:
        return all(finding.verdict != FAIL for finding in self.findings)

    @property
    def failed(self) -> list[str]:
        return [finding.name for finding in self.findings if finding.verdict == FAIL]


def check_reward(rubric: Rubric, rows: Sequence[dict[str, Any]] | None = None, *, form: str | None = None, patience: float = 10.0) -> CheckReport:
    """Runs all checks. rows: dicts with `prompt`, `answer` and the columns that the rewards read; default:
    texts.SAMPLES. form: of a good completion, with {answer} and {reasoning}; default: the one of texts.FORMS in which
    gold answers earn most. Raises UserError."""
    bench = Bench(rubric, rows, form=form, patience=patience)
    findings = [CheckFinding(name, *check(bench)) for name, check in CHECKS.items()]
    return CheckReport(findings, bench.form, len(bench))


Verdict = tuple[str, str]


def gold(bench: Bench) -> Verdict:
    """Every gold answer, in its form, earns the maximum."""
    if None in bench.gold:
        row = bench.gold.index(None)
        return FAIL, f"the gold answer {_short(bench.golds[row])} could not be scored"
    scores = [score for score in bench.gold if score is not None]
    ends = bench.rubric.range
    if ends is None or ends[1] == float("inf"):
        return NOTE, f"gold answers earn {min(scores):g} to {max(scores):g}; declare the range of every reward to have the maximum checked"
    top = ends[1] - FULL * (ends[1] - max(ends[0], min(scores) - 1.0))
    low = [row for row, score in enumerate(scores) if score < top]
    if not low:
        return OK, f"{len(scores)} of {len(scores)} earn {ends[1]:g}"
    row = min(low, key=lambda index: scores[index])
    missing = [
        f"{name} {score:g} of {reward.range[1]:g}"
        for (name, score), reward in zip(bench.parts((row, bench.write(row, bench.golds[row]))).items(), bench.rubric.rewards, strict=True)
        if score is not None and reward.range is not None and score < reward.range[1]
    ]
    return FAIL, f"{_short(bench.golds[row])} earns {scores[row]:g} of {ends[1]:g} in the best form found ({', '.join(missing)})"


def several_lines(bench: Bench) -> Verdict:
    """Reasoning of several lines, or with signs, earns what one line earns."""
    if not bench.has_reasoning:
        return NOTE, "not asked: its form has no reasoning"
    for kind, reasoning in texts.SEVERAL_LINES.items():
        probes = bench.each(lambda row, reasoning=reasoning: bench.write(row, bench.golds[row], reasoning))
        found = _less_than_gold(bench, probes)
        if found:
            return FAIL, f"reasoning with {kind} earns {found[1]:g} instead of {found[2]:g}"
    return OK, ""


def last_line_break(bench: Bench) -> Verdict:
    """A line break at the very end is not needed (few models write one before they stop), nor does one more matter."""
    if bench.form.endswith("\n"):
        found = _less_than_gold(bench, bench.each(lambda row: bench.write(row, bench.golds[row])[:-1]))
        return (FAIL, f"without it a gold answer earns {found[1]:g} instead of {found[2]:g}") if found else (OK, "")
    found = _less_than_gold(bench, bench.each(lambda row: bench.write(row, bench.golds[row]) + "\n"))
    return (NOTE, f"with one a gold answer earns {found[1]:g} instead of {found[2]:g}") if found else (OK, "")


def wrong(bench: Bench) -> Verdict:
    """Wrong answers earn less than the gold one: another value, a refusal, many words."""
    refused = bench.score(bench.each(lambda row: bench.write(row, "none of these")))
    if not bench.reads_the_answer:
        said = "a wrong answer earns what the gold one earns"
        if bench.rubric.can_decide():
            return FAIL, said
        if bench.rubric.columns_needed() and refused == bench.gold:
            return FAIL, f"every answer earns what the gold one earns, although it reads '{bench.rubric.columns_needed()[0]}'"
        return NOTE, said + ": it judges the form; stack it with a reward that reads the answer"
    rows = list(zip(bench.gold, bench.wrong, refused, strict=True))
    scored = [(right, max((score for score in scores if score is not None), default=right)) for right, *scores in rows if right is not None]
    same = sum(score >= right for right, score in scored)
    return (FAIL, f"in {same} of {len(scored)} rows one earns as much") if same else (OK, f"at most {max(score for _, score in scored):g}")


def constant(bench: Bench) -> Verdict:
    """One text for every row: phrases earn no more than a wrong answer; an answer is right only where it is the gold
    one."""
    found = _more_than_wrong(bench, [(row, text) for row, text in _every_row(bench, texts.NON_ANSWERS) if not _states(text, bench.golds[row])])
    if found[0] != OK:
        return found
    answers = [(row, text) for row, text in _every_row(bench, texts.CONSTANTS) if not _same(text, bench.golds[row])]
    return _as_much_as_gold(bench, answers + [(row, bench.write(row, text)) for row, text in answers])


def echo(bench: Bench) -> Verdict:
    """The prompt itself earns nothing."""
    probes = [*bench.each(bench.prompt), *bench.each(lambda row: bench.write(row, bench.prompt(row)))]
    return _more_than_wrong(bench, probes, tolerated=COINCIDENCE)


def every_answer(bench: Bench) -> Verdict:
    """A list of all answers, the same for every row, as text, in the form, and each in a form of its own."""
    candidates = list(dict.fromkeys([*map(str, range(101)), *bench.golds]))
    if any(as_number(answer) is None for answer in bench.golds):
        candidates = list(dict.fromkeys(bench.golds))
    listed = ["-987654321", *candidates, "987654321"]
    joined = [", ".join(listed), "\n".join(listed), " or ".join(listed)]
    probes = [
        probe for text in joined for probe in (*bench.each(lambda row, text=text: text), *bench.each(lambda row, text=text: bench.write(row, text)))
    ]
    return _more_than_wrong(bench, probes + bench.each(lambda row: "".join(bench.write(row, answer) for answer in listed)))


def two_answers(bench: Bench) -> Verdict:
    """Naming a right and a wrong answer must not be credited in both orders: then any list of guesses is."""
    if not bench.reads_the_answer or not bench.is_short:
        return NOTE, "not asked: there is no short answer to be right or wrong"
    one = bench.score(bench.each(lambda row: bench.write(row, f"{bench.golds[row]} or {bench.wrong_answer(row)}")))
    two = bench.score(bench.each(lambda row: bench.write(row, f"{bench.wrong_answer(row)} or {bench.golds[row]}")))
    for row, pair in enumerate(zip(one, two, strict=True)):
        if all(score is not None and score > bench.limit(row) for score in pair):
            return FAIL, f"'{_short(bench.golds[row])} or {bench.wrong_answer(row)}' earns {pair[0]:g}, and {pair[1]:g} the other way round"
    return OK, ""


def empty_form(bench: Bench) -> Verdict:
    """The form without content earns no more than a wrong answer in it."""
    if bench.form == "{answer}":
        return NOTE, "not asked: its form is the answer alone"
    return _more_than_wrong(bench, [(row, bench.write(row, said, why)) for why, said in texts.EMPTY_CONTENT for row in range(len(bench))])


def substring(bench: Bench) -> Verdict:
    """A wrong answer that contains the right one ("14" for "4") earns no more than one that does not and is nearer."""
    if not bench.reads_the_answer or not bench.is_short:
        return NOTE, "not asked: there is no short answer to be right or wrong"
    for row, answer in enumerate(bench.golds):
        for attack, control in _containing(answer):
            scores = bench.score([(row, bench.write(row, attack)), (row, bench.write(row, control))])
            gap = (bench.gold[row] or 0.0) - (bench.wrong[row] or 0.0)
            slack = SLACK if as_number(answer) is not None else 0.25
            if scores[0] is not None and scores[1] is not None and gap > 0 and scores[0] > scores[1] + slack * gap:
                return FAIL, f"'{_short(attack)}' for '{_short(answer)}' earns {scores[0]:g} where '{_short(control)}' earns {scores[1]:g}"
    return OK, ""


def not_finite(bench: Bench) -> Verdict:
    """inf, nan and the like earn nothing. A reward that should read the answer and does not is asked too: there they
    may not earn what gold earns."""
    probes = _bare_and_in_form(bench, texts.NOT_FINITE)
    if bench.reads_the_answer or not bench.should_read:
        return _more_than_wrong(bench, probes, strict=True)
    lowest = 0.0 if bench.rubric.range is None else bench.rubric.range[0]
    for (row, text), score in zip(probes, bench.score(probes), strict=True):
        right = bench.gold[row]
        if score is not None and right is not None and score >= right > lowest:
            return FAIL, f"{_short(text)} earns {score:g}, as the gold answer {_short(bench.golds[row])} does"
    return OK, ""


def huge_numbers(bench: Bench) -> Verdict:
    """Numbers of hundreds of digits are wrong, not special."""
    return _more_than_wrong(bench, _bare_and_in_form(bench, texts.HUGE_NUMBERS), strict=True)


def hidden(bench: Bench) -> Verdict:
    """The right answer in the reasoning does not help a wrong answer."""
    if not bench.has_reasoning:
        return NOTE, "not asked: its form has no reasoning"
    return _more_than_wrong(bench, bench.each(lambda row: bench.write(row, bench.wrong_answer(row), f"The answer is {bench.golds[row]}.")))


def injected_tags(bench: Bench) -> Verdict:
    """Tags, nested forms and special tokens around a wrong answer."""

    def around(row: int, tag: str) -> list[str]:
        said = bench.wrong_answer(row)
        return [bench.write(row, tag + said), bench.write(row, said + tag), bench.write(row, said, tag), tag + bench.write(row, said)]

    probes = [(row, text) for row in range(len(bench)) for tag in texts.INJECTED for text in around(row, tag)]
    return _more_than_wrong(bench, probes + bench.each(lambda row: bench.write(row, bench.write(row, bench.wrong_answer(row)))))


def judge_injection(bench: Bench) -> Verdict:
    """Text that speaks to a judge."""
    spoken = [(row, said) for row, said in _every_row(bench, texts.JUDGED) if not _states(said, bench.golds[row])]
    in_form = [(row, bench.write(row, text)) for row, said in spoken for text in (said, f"{bench.wrong_answer(row)} {said}")]
    return _more_than_wrong(bench, spoken + in_form)


def any_text(bench: Bench) -> Verdict:
    """Empty, huge and strange text earns no more than a wrong answer, and each is scored within a second."""
    slowest = (0.0, "")
    for kind, make in texts.HOSTILE.items():
        probe = (0, make())
        score, seconds = bench.timed(probe)
        if seconds > SLOW / 2:  # the machine may have been busy
            seconds = min(seconds, bench.timed(probe)[1])
        slowest = max(slowest, (seconds, kind))
        if bench.reads_the_answer and score is not None and score > bench.limit(0) and not _states(probe[1], bench.golds[0]):
            return FAIL, f"{kind}: earns {score:g}; a wrong answer {bench.wrong[0]:g}"
    return (FAIL if slowest[0] > SLOW else OK), f"the slowest took {1000 * slowest[0]:.0f} ms ({slowest[1]})"


def deterministic(bench: Bench) -> Verdict:
    """The same text earns the same twice."""
    probes = _mixed(bench)
    first, second = bench.score(probes), bench.score(probes)
    changed = [index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
    return (FAIL, f"{_short(probes[changed[0]][1])}: {_said(first[changed[0]])}, then {_said(second[changed[0]])}") if changed else (OK, "")


def alone_or_together(bench: Bench) -> Verdict:
    """A score does not depend on the other completions of a batch or their order. (Each is alone in its group.)"""
    probes = _mixed(bench)
    together = bench.score(probes)
    order = list(range(len(probes)))
    random.Random(0).shuffle(order)
    shuffled = dict(zip(order, bench.score([probes[index] for index in order]), strict=True))
    for index, probe in enumerate(probes):
        [alone] = bench.score([probe])
        if not together[index] == shuffled[index] == alone:
            return FAIL, f"{_short(probe[1])}: {_said(together[index])} in one order, {_said(shuffled[index])} in another, {_said(alone)} alone"
    return OK, ""


def no_exceptions(bench: Bench) -> Verdict:
    """None of the texts above made it raise, hang or return something that is not a score. Asked last."""
    if not bench.errors:
        return OK, ""
    text, said = bench.errors[0]
    return FAIL, f"{len(bench.errors)} text{'s' if len(bench.errors) > 1 else ''}, such as {_short(text)}: {said}"


CHECKS: dict[str, Callable[[Bench], Verdict]] = {
    "gold answers": gold,
    "reasoning in lines": several_lines,
    "last line break": last_line_break,
    "wrong answers": wrong,
    "constant answers": constant,
    "echo of the prompt": echo,
    "list of all answers": every_answer,
    "two answers": two_answers,
    "form without content": empty_form,
    "substrings": substring,
    "inf and nan": not_finite,
    "huge numbers": huge_numbers,
    "answer in the reasoning": hidden,
    "injected tags": injected_tags,
    "judge injection": judge_injection,
    "any text, quickly": any_text,
    "the same twice": deterministic,
    "order and company": alone_or_together,
    "exceptions": no_exceptions,
}


def _more_than_wrong(bench: Bench, probes: list[Probe], *, tolerated: float = 0.0, strict: bool = False) -> Verdict:
    """FAIL where probes earn more than they may in more than the fraction `tolerated` of the rows."""
    scores = bench.score(probes)
    if not bench.reads_the_answer:
        return NOTE, "not asked: it does not read the answer"
    caught = [
        (row, text, score) for (row, text), score in zip(probes, scores, strict=True) if score is not None and score > bench.limit(row, strict=strict)
    ]
    if len({row for row, _, _ in caught}) <= tolerated * len(bench):
        return OK, ""
    row, text, score = max(caught, key=lambda found: found[2])
    return FAIL, f"{_short(text)} earns {score:g} where the answer is {_short(bench.golds[row])}; a wrong answer earns {bench.wrong[row]:g}"


def _as_much_as_gold(bench: Bench, probes: list[Probe]) -> Verdict:
    scores = bench.score(probes)
    if not bench.reads_the_answer:
        return NOTE, "not asked: it does not read the answer"
    for (row, text), score in zip(probes, scores, strict=True):
        right, low = bench.gold[row], bench.wrong[row]
        if score is not None and right is not None and low is not None and low < right <= score:
            return FAIL, f"{_short(text)} earns {score:g} where the answer is {_short(bench.golds[row])}"
    return OK, ""


def _less_than_gold(bench: Bench, probes: list[Probe]) -> tuple[int, float, float] | None:
    """(row, score, what the gold answer earned), of the first that earns less."""
    for (row, _), score in zip(probes, bench.score(probes), strict=True):
        right = bench.gold[row]
        if score is not None and right is not None and score < right - FULL * max(abs(right), 1e-9):
            return row, score, right
    return None


def _bare_and_in_form(bench: Bench, said: Sequence[str]) -> list[Probe]:
    return [(row, text) for row, answer in _every_row(bench, said) for text in (answer, bench.write(row, answer))]


def _every_row(bench: Bench, said: Sequence[str]) -> list[Probe]:
    return [(row, text) for text in said for row in range(len(bench))]


def _states(text: str, answer: str) -> bool:
    """Whether the text happens to contain the answer, so that earning its reward would be no fault."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def _mixed(bench: Bench) -> list[Probe]:
    """Right, wrong and empty, of every row."""
    return [
        *bench.each(lambda row: bench.write(row, bench.golds[row])),
        *bench.each(lambda row: bench.write(row, bench.wrong_answer(row))),
        *bench.each(bench.prompt),
        *bench.each(lambda row: ""),
    ]


def _containing(answer: str) -> list[tuple[str, str]]:
    """(a wrong answer that contains the right one, a nearer one that does not)."""
    number = as_number(answer)
    if number is None:
        return [(answer + "q", answer[: len(answer) // 2] + "q" * (len(answer) - len(answer) // 2 + 1))]
    if number != int(number):
        return []
    answer, pairs = str(int(number)), []
    for attack in (answer + "1", "1" + answer if number >= 0 else answer + "9"):
        step = 1 if Decimal(attack) > number else -1
        near = int(Decimal(attack)) - step
        while answer in str(near) and near != number:
            near -= step
        if near != number and Decimal(attack) != number:
            pairs.append((attack, str(near)))
    return pairs


def _same(text: str, answer: str) -> bool:
    one, other = as_number(text), as_number(answer)
    return one == other if one is not None and other is not None else text.casefold() == answer.casefold()


def _said(score: float | None) -> str:
    return "not scored" if score is None else f"{score:g}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 50 else text[:47] + "...").strip("'")
