"""Where replies state their answer: siblings of every kind of reply that models were seen to give.

Each is (reply, candidates joined by "|", the stated answer).
"""

from __future__ import annotations

import pytest

from rar.ranker.answer import MAX_CHARS, answering
from rar.ranker.reply import parse
from rar.schema import RankStatus

SIBLINGS = [
    ("<thinking>cat?</thinking>\ndog", "cat|dog|bird", "dog"),
    ("[THINK]cat bird[/THINK]dog", "cat|dog|bird", "dog"),
    ("◁think▷cat◁/think▷dog", "cat|dog|bird", "dog"),
    ("<think>it has wings... so a bird? no. Final answer: dog", "cat|dog|bird", "dog"),
    ("<seed:think>cat</seed:think>dog", "cat|dog|bird", "dog"),
    ("<reasoning>cat</reasoning><answer>dog</answer>", "cat|dog|bird", "dog"),
    ("<|begin_of_thought|>cat<|end_of_thought|><|begin_of_solution|>dog<|end_of_solution|>", "cat|dog|bird", "dog"),
    ("&lt;think&gt;cat&lt;/think&gt;dog", "cat|dog|bird", "dog"),
    ("<unused94>thought\ncat bird<unused95>dog", "cat|dog|bird", "dog"),
    ("analysiscat or bird?assistantfinaldog", "cat|dog|bird", "dog"),
    ("<|begin_of_box|>dog<|end_of_box|>", "cat|dog|bird", "dog"),
    ("cat or bird? The result is \\boxed{dog}.", "cat|dog|bird", "dog"),
    ("$\\boxed{\\text{B}}$", "cat|dog|bird", "dog"),
    ("\\boxed{B}", "cat|dog|bird", "dog"),
    ("The cat... \\(\\boxed{\\textbf{dog}}\\)", "cat|dog|bird", "dog"),
    ("<final_answer>B</final_answer>", "cat|dog|bird", "dog"),
    ("<answer>dog", "cat|dog|bird", "dog"),
    ("cat? <Answer>(B)</Answer>", "cat|dog|bird", "dog"),
    ("B.", "cat|dog|bird", "dog"),
    ("(B)", "cat|dog|bird", "dog"),
    ("b", "cat|dog|bird", "dog"),
    ("Answer: C.", "cat|dog|bird", "bird"),
    ("The correct option is B", "cat|dog|bird", "dog"),
    ("I would choose B", "cat|dog|bird", "dog"),
    ("I think it's B", "cat|dog|bird", "dog"),
    ("选B", "cat|dog|bird", "dog"),
    ("我选择B。", "cat|dog|bird", "dog"),
    ("正确答案：(B)", "cat|dog|bird", "dog"),
    ("答えはBです", "cat|dog|bird", "dog"),
    ("정답은 B입니다", "cat|dog|bird", "dog"),
    ("คำตอบคือ B", "cat|dog|bird", "dog"),
    ("Bです", "cat|dog|bird", "dog"),
    ("B because it has floppy ears", "cat|dog|bird", "dog"),
    ("B. Unlike the cat, it barks", "cat|dog|bird", "dog"),
    ("B\n\nThe cat would have whiskers", "cat|dog|bird", "dog"),
    ('{"choice": "B"}', "cat|dog|bird", "dog"),
    ('{"answer": "(b)"}', "cat|dog|bird", "dog"),
    ('{"reasoning": "not a cat, maybe a bird", "answer": "dog"}', "cat|dog|bird", "dog"),
    ("{'cat': 0.05, 'dog': 0.9, 'bird': 0.05}", "cat|dog|bird", "dog"),
    ('{"A":0.1,"B":0.8,"C":0.1}', "cat|dog|bird", "dog"),
    ('{"1":"dog","2":"cat","3":"bird"}', "cat|dog|bird", "dog"),
    ('{"scores":{"cat":1,"dog":3,"bird":2}}', "cat|dog|bird", "dog"),
    ('{"ranks":{"cat":2,"dog":1,"bird":3}}', "cat|dog|bird", "dog"),
    ('{"labels":["cat","dog","bird"],"scores":[0.1,0.8,0.1]}', "cat|dog|bird", "dog"),
    ('[["cat",0.1],["dog",0.8],["bird",0.1]]', "cat|dog|bird", "dog"),
    ('[{"rank":2,"label":"cat"},{"rank":1,"label":"dog"},{"rank":3,"label":"bird"}]', "cat|dog|bird", "dog"),
    ('{"rank":2,"label":"cat"}\n{"rank":1,"label":"dog"}', "cat|dog|bird", "dog"),
    ('{"cat":"5%","dog":"90%","bird":"5%"}', "cat|dog|bird", "dog"),
    ("[0.05, 0.9, 0.05]", "cat|dog|bird", "dog"),
    (
        '```json\n{"predictions":[{"class":"cat","confidence":0.2},{"class":"dog","confidence":0.7}]}\n```',
        "cat|dog|bird",
        "dog",
    ),
    ('{"cat": false, "dog": true, "bird": false}', "cat|dog|bird", "dog"),
    ('{"dog": {"score": 0.9}, "cat": {"score": 0.1}}', "cat|dog|bird", "dog"),
    ('{"cat": {"score": 0.1}, "dog": {"score": 0.9}}', "cat|dog|bird", "dog"),
    ("cat (2nd), dog (1st), bird (3rd)", "cat|dog|bird", "dog"),
    ("cat: 0.1, dog: 0.8, bird: 0.1", "cat|dog|bird", "dog"),
    ("2. cat\n1. dog\n3. bird", "cat|dog|bird", "dog"),
    ("5% cat\n90% dog\n5% bird", "cat|dog|bird", "dog"),
    ("cat = 0.05; dog = 0.9; bird = 0.05", "cat|dog|bird", "dog"),
    ("- cat: 10/100\n- dog: 85/100\n- bird: 5/100", "cat|dog|bird", "dog"),
    ("cat: no\ndog: yes\nbird: no", "cat|dog|bird", "dog"),
    ("Cat: low\nDog: high\nBird: medium", "cat|dog|bird", "dog"),
    ("cat — 5 %\ndog — 90 %\nbird — 5 %", "cat|dog|bird", "dog"),
    ("| class | score |\n|---|---|\n| cat | 0.1 |\n| dog | 0.9 |\n| bird | 0.0 |", "cat|dog|bird", "dog"),
    ("| rank | class |\n|---|---|\n| 2 | cat |\n| 1 | dog |\n| 3 | bird |", "cat|dog|bird", "dog"),
    ("| class | rank |\n|--|--|\n| cat | 2 |\n| dog | 1 |\n| bird | 3 |", "cat|dog|bird", "dog"),
    ("class,score\ncat,0.1\ndog,0.9\nbird,0.0", "cat|dog|bird", "dog"),
    ("cat\t0.1\ndog\t0.9\nbird\t0.0", "cat|dog|bird", "dog"),
    ("dog → cat → bird", "cat|dog|bird", "dog"),
    ("dog -> cat -> bird", "cat|dog|bird", "dog"),
    ("dog ≻ cat ≻ bird", "cat|dog|bird", "dog"),
    ("bird < cat < dog", "cat|dog|bird", "dog"),
    ("dog >> cat >> bird", "cat|dog|bird", "dog"),
    ("dog => cat => bird", "cat|dog|bird", "dog"),
    ("B > A > C", "cat|dog|bird", "dog"),
    ("[2] > [1] > [3]", "cat|dog|bird", "dog"),
    ("From least to most likely: bird, cat, dog", "cat|dog|bird", "dog"),
    ("图中是一只狗", "猫|狗|鸟", "狗"),
    ("这不是猫，而是狗", "猫|狗|鸟", "狗"),
    ("猫ではなく犬です", "猫|犬", "犬"),
    ("이것은 개입니다", "고양이|개", "개"),
    ("고양이가 아니라 개입니다", "고양이|개", "개"),
    ("개구리입니다", "개|개구리", "개구리"),
    ("ไม่ใช่แมว แต่เป็นสุนัข", "แมว|สุนัข", "สุนัข"),
    ("यह बिल्ली नहीं, कुत्ता है", "बिल्ली|कुत्ता", "कुत्ता"),
    ("ليس قطة بل كلب", "قطة|كلب", "كلب"),
    ("هذا هو الكلب", "قطة|كلب", "كلب"),
    ("Das ist keine Katze, sondern ein Hund", "Katze|Hund", "Hund"),
    ("Ce n'est pas un chat mais un chien", "chat|chien", "chien"),
    ("No es un gato, es un perro", "gato|perro", "perro"),
    ("Это не кошка, а собака", "кошка|собака", "собака"),
    ("答案：狗", "猫|狗", "狗"),
    ("この画像に写っているのは柴犬です", "秋田犬|柴犬", "柴犬"),
    ("male duck", "drake, male duck|hen", "drake, male duck"),
    ("Carassius auratus", "tench, Tinca tinca|goldfish, Carassius auratus", "goldfish, Carassius auratus"),
    ("drake", "hen|drake, male duck", "drake, male duck"),
    ("ring", "bow_(weapon)|ring_(jewelry)", "ring_(jewelry)"),
    (
        "great white shark",
        "tiger shark, Galeocerdo cuvieri|great white shark, white shark, man-eater",
        "great white shark, white shark, man-eater",
    ),
    ("★★", "★|★★|★★★", "★★"),
    ("👍🏽", "👍|👍🏽", "👍🏽"),
    ("-", "-|+|×", "-"),
    ("×", "-|+|×", "×"),
    ("The symbol is +.", "-|+", "+"),
    ("C#", "C|C++|C#", "C#"),
    ("c++", "C|C++|C#", "C++"),
    ("It is C++", "C|C++", "C++"),
    ("❤", "💔|❤️", "❤️"),
    ("♀", "♂|♀", "♀"),
    ("geese", "duck|goose", "goose"),
    ("wolves", "wolf|fox", "wolf"),
    ("a woman", "man|woman", "woman"),
    ("Weißbrot", "Schwarzbrot|Weissbrot", "Weissbrot"),
    ("Muenchen", "Bonn|München", "München"),
    ("annual crops", "AnnualCrop|PermanentCrop", "AnnualCrop"),
    ("herbaceous vegetation", "HerbaceousVegetation|Highway", "HerbaceousVegetation"),
    ("annual_crop", "AnnualCrop|PermanentCrop", "AnnualCrop"),
    ("hotdog", "dog|hot dog", "hot dog"),
    ("There is no helmet", "helmet|no helmet", "no helmet"),
    ("The worker is without a helmet", "helmet|no helmet", "no helmet"),
    ("The surface isn't cracked", "cracked|not cracked", "not cracked"),
    ("not_cracked", "cracked|not_cracked", "not_cracked"),
    ("with mask", "with mask|without mask", "with mask"),
    ("with mask", "without mask|with mask", "with mask"),
    ("It could be a cat or a bird, but I think it's a dog.", "cat|dog|bird", "dog"),
    ("At first it looks like a cat, but it is a dog", "cat|dog|bird", "dog"),
    ("It is neither a cat nor a bird; it's a dog", "cat|dog|bird", "dog"),
    ("This is a dog rather than a cat", "cat|dog|bird", "dog"),
    ("Rather than a cat, this is a dog", "cat|dog|bird", "dog"),
    ("Not a cat. A dog.", "cat|dog|bird", "dog"),
    ("Compared to cats, this dog ...", "cat|dog|bird", "dog"),
    ("The cat can be ruled out; dog.", "cat|dog|bird", "dog"),
    ("Cat: incorrect. Bird: incorrect. Dog.", "cat|dog|bird", "dog"),
    ("It resembles a cat but the ears are those of a dog", "cat|dog|bird", "dog"),
    ("The animal isn't a cat or a bird, it's a dog", "cat|dog|bird", "dog"),
    ("I don't think it is a cat. Dog.", "cat|dog|bird", "dog"),
    ("While cats have whiskers, this is a dog", "cat|dog|bird", "dog"),
    ("The number is 3", "1|2|3", "3"),
    ("3.", "1|2|3", "3"),
    ('["3","1","2"]', "1|2|3", "3"),
    ('{"answer": 3}', "1|2|3", "3"),
    ("The digit is seven", "1|7", "7"),
    ("The hand shows the letter B", "C|A|B", "B"),
    ("This is a B", "C|A|B", "B"),
    ("['Cat','cat']", "cat|Cat", "Cat"),
    ("dark blue", "blue|dark\nblue", "dark\nblue"),
    ("blue", "blue|dark\nblue", "blue"),
    ("bow weapon", "bow_(weapon)|bow_(decorative_ribbons)", "bow_(weapon)"),
    ("**Answer:** dog", "cat|dog|bird", "dog"),
    ("**dog**", "cat|dog|bird", "dog"),
    ("Sure! The answer is: **dog** (Canis familiaris).", "cat|dog|bird", "dog"),
    ("Answer: dog\nReason: it is unlike the cat", "cat|dog|bird", "dog"),
    ("A. cat\nB. dog\nC. bird\n\nAnswer: B", "cat|dog|bird", "dog"),
    ("Among cat, dog and bird, the best match is dog.", "cat|dog|bird", "dog"),
    ("dog, not cat", "cat|dog|bird", "dog"),
    ("图片显示的是 dog", "cat|dog|bird", "dog"),
    ("狗（dog）", "猫|狗", "狗"),
]


@pytest.mark.parametrize(("reply", "names", "best"), SIBLINGS)
def test_the_stated_answer_is_first(reply: str, names: str, best: str) -> None:
    candidates = names.split("|")
    order, _ = parse(reply, candidates)
    assert candidates[order[0]] == best


@pytest.mark.parametrize(
    "reply",
    [
        "It could be a cat, a dog or a bird.",
        "cat? dog? bird?",
        "cat or dog or bird",
        "I think it is a cat, but it has the ears of a dog and the wings of a bird",
        '{"cat": 2, "dog": 1, "bird": 3}',  # ranks, or scores of 1 to 3
        '{"cat": 0.4, "dog": 0.4, "bird": 0.2}',
        "not a cat, dog, bird",
        "[2, 1, 3]",
    ],
)
def test_doubt_is_never_ranked(reply: str) -> None:
    assert parse(reply, ["cat", "dog", "bird"])[1] is not RankStatus.RANKED


@pytest.mark.parametrize(
    "reply", ["<think>cat or bird", "[THINK] a dog", "<|channel|>analysis<|message|>dog", "```thinking\ndog"]
)
def test_an_unclosed_thought_is_no_answer(reply: str) -> None:
    assert parse(reply, ["cat", "dog", "bird"]) == ((0, 1, 2), RankStatus.FALLBACK)


def test_an_answer_at_the_end_of_a_long_reply_is_read() -> None:
    assert parse("The cat has fur. " * 5000 + "Final answer: dog", ["cat", "dog"])[0] == (1, 0)
    assert len(answering("x" * 10 * MAX_CHARS)[0]) <= MAX_CHARS + 1
