"""Which part of a reply answers: thoughts cut, whatever their tags, and what is stated as the answer before what is only said.

Thinking models write their thoughts between tags of many names, forget the opening or the closing one, or use channels. What
is thought is no answer, so it is cut; only where nothing else is left, an answer that it states in so many words is read.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from rar.ranker.spelling import normal

MAX_CHARS = 20_000  # of a reply: its first and last halves; more is a model that repeats itself

JSON_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
_THOUGHT = (
    r"(?:[\w.-]{1,20}:)?(?:inner_?)?"
    r"(?:think|thought|reason|reflect|rationale|analysis|scratch_?pad|deliberat|monologue|cot\b)\w{0,20}"
)
OPENING = re.compile(rf"[<\[◁【]\|?\s*(?:begin_of_|start_of_)?{_THOUGHT}(?:\s[^<>\[\]\n]{{0,80}})?\|?[>\]▷】]", re.IGNORECASE)
CLOSING = re.compile(rf"[<\[◁【]\|?\s*(?:/|end_of_|end_)\s*{_THOUGHT}\s*\|?[>\]▷】]", re.IGNORECASE)
FENCED_THOUGHT = re.compile(rf"```\s*{_THOUGHT}[ \t]*\n.*?(?:```|\Z)", re.IGNORECASE | re.DOTALL)
GEMMA_THOUGHT = re.compile(r"<unused94>.*?(?:<unused95>|\Z)", re.DOTALL)
CHANNEL = re.compile(r"<\|?channel\|?>\s*(\w*)[^<]{0,40}(?:<\|?(?:message|channel)\|?>)?", re.IGNORECASE)
BARE_CHANNELS = re.compile(r"\A\s*analysis.*assistant\s*final", re.IGNORECASE | re.DOTALL)
SPECIAL = re.compile(r"~~[^~\n]+~~|<\|[^<>|\n]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>|\[/?INST\]")
BOX = re.compile(r"\\?\b(?:boxed|fbox)\s*\{|<\|begin_of_box\|>")
LATEX = re.compile(r"\\?\b(?:text|textbf|mathrm|mathbf|operatorname|textit)\s*\{")
TAGS = (
    "answer|final_?answer|final|result|output|response|prediction|label|class|choice|ranking|solution|conclusion|summary|"
    "name|species|category|best"
)
TAG = re.compile(
    rf"[<\[](?P<tag>{TAGS})(?:\s[^<>]{{0,80}})?[>\]](?P<in>.*?)(?=[<\[]/\s*(?P=tag)\s*[>\]]|\Z)", re.IGNORECASE | re.DOTALL
)
ANY_TAG = re.compile(r"</?[A-Za-z][\w:-]{0,30}(?:\s[^<>\n]{0,80})?/?>")
BARE_LABEL = re.compile(r"\A[\s*_\"'(\[$]{0,6}([A-Z])[\s*_\"').\]:$]{0,6}(?:\n|\Z)")
CONCLUSION = re.compile(
    r"(?:^[^\w\n]*(?:final |my |best )?(?:answer|prediction|ranking|result|conclusion)[^\w\n]*\n"
    r"|\b(?:answer|conclusion|species|ranking|result|prediction|verdict|"
    r"(?:final|best|correct|top) (?:choice|option|guess|match|label|class)|label|class|category|classification|"
    r"antwort|réponse|respuesta|resposta|risposta|ответ)\b"
    r"(?:\s+(?:is|are|ist|est|es|è|é))?\W{0,4}(?::|=|->|=>|→|：)"
    r"|\b(?:the |my )?(?:final |correct |best |right )(?:answer|choice|option|guess|match)\s+(?:is|would be)\b"
    r"|\banswer\s+(?:is|would be)\b|\bi(?:'d| would)? (?:choose|pick|go with|answer)\b"
    r"|\bdie antwort ist\b|\bla (?:réponse|respuesta) (?:est|es)\b"
    r"|答案\s*(?:是|为|為|[:：])|(?:结论|結論|选择|選擇|我选|我選|应选|應選|选|選)\s*(?:是|[:：])?"
    r"|答え\s*は|答え\s*[:：]|"
    r"正解\s*は|정답\s*[은:]|답\s*[은:]|คำตอบ\s*(?:คือ|:)"
    r"|الإجابة\s*(?:هي|:)|उत्तर\s*(?:है|:))",
    re.IGNORECASE | re.MULTILINE,
)
BOLD_ITEM = re.compile(r"^[^\w\n*]*(?:\d+[.)] *)?\*\*([^*\n]+)\*\*\W*?$", re.MULTILINE)
LISTED = re.compile(r"\[[^\[\]]*\]")


def answering(response: str) -> tuple[str, str]:
    """(what is said, what is thought): both in the form in which names are compared, each of at most about MAX_CHARS."""
    text = response
    if len(text) > 2 * MAX_CHARS:  # room for tags that are cut, bounded all the same
        text = text[:MAX_CHARS] + "\n" + text[-MAX_CHARS:]
    text = JSON_ESCAPE.sub(lambda escape: chr(int(escape.group(1), 16)), text)
    if "&" in text:
        text = html.unescape(text)
    text = normal(text.replace("\\n", "\n").replace("\r", "\n").replace("▁", "_"))
    if found := BARE_CHANNELS.match(text):
        text = text[found.end() :]
    said, thought = _without_thoughts(*_final_channel(text))
    return _capped(SPECIAL.sub(" ", _marked(said))), _capped(SPECIAL.sub(" ", _marked(thought)))


def _marked(text: str) -> str:
    return text.replace("<|begin_of_box|>", "\\boxed{").replace("<|end_of_box|>", "}")


def _capped(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS // 2] + "\n" + text[-MAX_CHARS // 2 :]


def _final_channel(text: str) -> tuple[str, str]:
    """(what stands in the last channel that is no thought, the rest): `<|channel|>final<|message|>...`."""
    found = list(CHANNEL.finditer(text))
    if not found:
        return text, ""
    ends = [*(one.start() for one in found[1:]), len(text)]
    parts = [(one.group(1).lower(), text[one.end() : end]) for one, end in zip(found, ends, strict=True)]
    final = [part for kind, part in parts if kind in ("final", "answer", "response", "")]
    thought = "\n".join(part for kind, part in parts if kind not in ("final", "answer", "response", ""))
    return (final[-1] if final else text[: found[0].start()]), thought


def _without_thoughts(text: str, thought: str) -> tuple[str, str]:
    """Both texts after moving what stands between tags of thought; a tag that is missing is at the text's begin or end."""
    thoughts = [thought]
    for pattern in (FENCED_THOUGHT, GEMMA_THOUGHT):
        thoughts += pattern.findall(text)
        text = pattern.sub("\n", text)
    marks = [(one.start(), one.end(), 1) for one in OPENING.finditer(text)]
    marks = sorted(marks + [(one.start(), one.end(), -1) for one in CLOSING.finditer(text)])
    said: list[str] = []
    depth, at = 0, 0
    for start, end, step in marks:
        (thoughts if depth else said).append(text[at:start])
        if step < 0 and not depth:  # closed, never opened: all before was thought
            thoughts += said
            said = []
        depth, at = max(0, depth + step), end
    (thoughts if depth else said).append(text[at:])
    return "\n".join(said), "\n".join(thoughts)


def stated(text: str) -> Iterator[tuple[str, bool]]:
    """(a part that is said to be the answer, whether it counts as JSON alone), the most explicit first.

    Boxes, tags, "Answer: ..." after the last bracket, JSON, "Answer: ..." elsewhere, a label alone on the first line, a list.
    """
    boxes = [_braced(text, one.end()) for one in BOX.finditer(text)]
    yield from ((LATEX.sub("", box).replace("}", " "), False) for box in boxes[-1:])
    yield from ((one["in"], False) for one in list(TAG.finditer(text))[-1:])
    ends = [one.end() for one in CONCLUSION.finditer(text)][-4:][::-1]
    shut = max(text.rfind("}"), text.rfind("]"))
    yield from ((text[end:], False) for end in ends if end > shut)
    yield text, True
    yield from ((text[end:], False) for end in ends if end <= shut)
    if found := BARE_LABEL.match(text):
        yield found.group(1), False
    bold = BOLD_ITEM.findall(text)
    yield from ((one, False) for one in bold if len(bold) == 1)
    yield from ((one.group(), False) for one in LISTED.finditer(text) if any(map(str.isalpha, one.group())))


def _braced(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes the one before it."""
    depth = 1
    for place in range(start, min(len(text), start + 2000)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return text[start : start + 2000]
