"""How an answer is written must not matter, and what it is must: pairs of a gold answer and a completion whose verdicts were given by hand."""

import pytest

from posttrain.errors import UserError
from posttrain.rewards.library.answers import numeric_answer
from posttrain.rewards.library.arithmetic import right_number
from posttrain.rewards.library.gsm8k import correctness
from posttrain.rewards.library.math import last_box, math_answer

pytest.importorskip("math_verify")

# kind: (gold answer, completions that are right, completions that are wrong)
TABLE = {
    "mixed numbers": [
        ("2 2/3", [r"\boxed{8/3}", "2 2/3", r"\boxed{2\frac{2}{3}}"], [r"\boxed{4/3}", "2/3"]),
        ("8/3", [r"\boxed{2 2/3}", "The answer is 2 2/3."], []),
        (r"2\frac{2}{3}", [r"$\frac{8}{3}$"], [r"$\frac{4}{3}$"]),
        ("-1 1/2", [r"\boxed{-1.5}", r"\boxed{-\frac{3}{2}}"], [r"\boxed{-0.5}"]),
        ("2½", [r"\boxed{2.5}"], []),
        ("2.5", [r"\boxed{2½}"], []),
        ("½", [r"\boxed{0.5}"], []),
        ("3 1/4", ["13/4", "3.25"], [r"\boxed{3/4}"]),
        (r"\frac{8}{3}", [r"\boxed{2\dfrac{2}{3}}"], []),
        ("10/3", [r"\boxed{3 \tfrac13}"], []),
    ],
    "money": [
        (
            "18",
            [
                r"\boxed{\$18}",
                "It costs $18.",
                r"\boxed{\$18.00}",
                r"\boxed{€18}",
                r"\boxed{18€}",
                r"\boxed{18 dollars}",
                r"\boxed{\text{18 dollars}}",
                r"\boxed{18\text{ dollars}}",
                r"$\$18$",
                r"\boxed{\textbf{\$18}}",
            ],
            [r"\boxed{\$17}"],
        ),
        ("1080", [r"\boxed{\$1,080}"], []),
        (r"\$18", [r"\boxed{18}"], []),
        ("$18", ["18"], []),
        ("0.5", [r"\boxed{\$0.50}"], []),
        ("-5", [r"\boxed{-\$5}"], []),
        ("$1,080.50", ["1080.5"], []),
    ],
    "bold": [
        (
            "73",
            [
                "**73**",
                "**73**.",
                "The answer is **73**.",
                r"**\boxed{73}**",
                r"\boxed{**73**}",
                r"\boxed{\mathbf{73}}",
                r"\boxed{\textbf{73}}",
                "`73`",
                "**Answer:** 73",
            ],
            ["So **74**"],
        ),
        ("8", ["2**3"], []),
    ],
    "precision": [
        ("0.0000002", [], [r"\boxed{0.0000001}"]),
        ("2e-7", [], ["1e-7"]),
        ("1e-7", ["1e-7", r"\boxed{10^{-7}}"], []),
        (r"\frac{1}{2006!}", [], [r"$\frac{1}{2004!}$"]),
        (r"\frac{1}{2004!}", [r"$\frac{1}{2004!}$"], []),
        (r"\frac{1}{2^{98}}", [], [r"$\frac{1}{2^{99}}$"]),
        (r"\frac{1}{2^{99}}", [r"\boxed{2^{-99}}"], []),
        ("0.333333", ["$1/3$"], []),
        ("0.166667", ["$1/6$"], []),
        ("0.000166667", [r"\boxed{\frac{1}{6000}}"], []),
        ("0.000167", [], [r"\boxed{0.000166}"]),
        ("0.33", [], ["$1/3$"]),
        ("3.14159", [], [r"\boxed{\pi}"]),
        (r"\{0.0000001, 1\}", [r"\boxed{\{1, 0.0000001\}}"], [r"\boxed{\{0.0000002, 1\}}"]),
        ("(0.0000001, 1)", [], [r"\boxed{(0.0000002, 1)}"]),
        ("[0.0000001, 1]", [], [r"\boxed{[0.0000002, 1]}"]),
        ("x > 0.0000001", [], [r"\boxed{x > 0.0000002}"]),
        ("x = 0.0000001", [], [r"\boxed{x = 0.0000002}"]),
        ("10^{-7}x", [], [r"\boxed{2\cdot 10^{-7}x}"]),
        (r"6.02\times 10^{23}", [r"\boxed{6.02e23}"], [r"\boxed{6.03e23}"]),
        ("0", ["0", r"\boxed{0.0}"], [r"\boxed{0.0000001}"]),
        (r"\sqrt{2}+\sqrt{3}", [r"\boxed{\sqrt{5+2\sqrt{6}}}"], []),
        (r"1.6\times 10^{-19}", [r"\boxed{1.6\cdot10^{-19}}", r"\boxed{1.6e-19}"], [r"\boxed{1.7\cdot10^{-19}}"]),
    ],
    "thousands": [
        ("1080", [r"\boxed{1,080}", r"\boxed{1{,}080}", r"\boxed{1\,080}", r"\boxed{1 080}"], [r"\boxed{1,081}", r"\boxed{1}"]),
        ("1,080", ["1080"], []),
        ("1080000", [r"\boxed{1,080,000}", r"\boxed{1\!080\!000}"], []),
        ("80", [], [r"\boxed{1\,080}"]),
        ("81", [], [r"\boxed{1\,080}"]),
    ],
    "scientific": [
        ("1500", ["1.5e3", "The result is 1.5e3."], []),
        ("1e-7", ["It is 1e-7."], []),
        ("1", [], ["It is 1e-7."]),
        ("0.00032", [r"\boxed{3.2\times10^{-4}}"], [r"\boxed{3.2\times10^{-5}}"]),
        ("320000", [r"\boxed{3.2E5}"], []),
        ("1e3", ["1000"], []),
    ],
    "percent": [
        ("50%", [r"\boxed{50\%}", r"\boxed{0.5}"], [r"\boxed{5\%}"]),
        (r"50\%", ["50%"], []),
        ("0.5", [r"\boxed{50\%}"], []),
        ("12.5%", [r"\boxed{\frac{1}{8}}"], []),
        ("0.00001%", [], [r"\boxed{0.00002\%}"]),
    ],
    "units": [
        ("5", [r"\boxed{5\text{ cm}}", r"\boxed{5 cm}", r"\boxed{5\ \mathrm{km/h}}", r"\boxed{5\text{ m}^2}", r"It is \(5\text{ cm}^2\)."], []),
        ("5 cm", [r"\boxed{5}", r"\boxed{5 centimeters}", r"The length is $5\text{ cm}$."], [r"\boxed{6\text{ cm}}", r"\boxed{5\text{ m}}"]),
        ("90", [r"\boxed{90^\circ}"], []),
        (r"90^\circ", [r"\boxed{90}"], []),
        ("4", [r"\boxed{4 apples}"], ["The answer is $4$ or $5$"]),
        ("4 apples", [], [r"\boxed{5 apples}"]),
        ("12", [r"\boxed{12 hours}"], [r"\boxed{12 or 13}"]),
        ("8/3", [r"\boxed{2 2/3 hours}"], []),
        (r"5\text{ m}^2", [], [r"\boxed{5\text{ m}}"]),
        (
            r"25\pi",
            [r"\boxed{25\pi \text{ cm}^2}", r"\boxed{25\pi\text{ square units}}", r"\boxed{25\pi\ \text{in}^3}"],
            [r"\boxed{5\pi \text{ cm}^2}"],
        ),
        (r"25\pi\text{ cm}^2", [r"\boxed{25\pi}"], [r"\boxed{25\pi\text{ cm}}", r"\boxed{25\pi\text{ m}^2}"]),
        ("2x", [r"\boxed{2x\text{ units}}"], [r"\boxed{x\text{ units}}"]),
        ("$18", ["$18$"], [r"\boxed{18\%}"]),
        ("2ab", [r"\boxed{2ba}", "$2ab$"], [r"\boxed{2}"]),
        ("2 ab", [], [r"\boxed{2}"]),
        ("2xyz", [], [r"\boxed{2}"]),
        ("5m", [], [r"\boxed{5k}"]),
        ("3 hours", [], [r"\boxed{3\text{ minutes}}"]),
        (r"3\pi", [], [r"\boxed{3}"]),
        ("silent", [], [r"\boxed{listen}"]),
        ("12 or 13", [], [r"\boxed{12}"]),
        ("7", [], [r"\boxed{7 \text{ or } 8}"]),
        ("x", [r"\boxed{x}"], []),
        ("sin x", [r"\boxed{\sin x}"], []),
        ("sqrt(2)", [r"\boxed{\sqrt{2}}"], []),
        ("pi/2", [r"\boxed{\frac{\pi}{2}}"], []),
        ("5 m", [r"\boxed{5}"], []),
        ("60 km/h", [r"\boxed{60}"], []),
        (r"60\text{ km/h}", [], [r"\boxed{60\text{ km}}"]),
        ("$5$", [r"\boxed{5 \%}"], []),
        ("£5", [r"\boxed{5}"], []),
        (r"\$5", [], [r"\boxed{£5}"]),
        ("100", ["It rose from $5 to $100", "from **$5** to **$100**"], []),
    ],
    "intervals, sets, tuples": [
        ("(1,2]", [r"\boxed{(1,2]}"], [r"\boxed{[1,2]}", r"\boxed{(1,3]}"]),
        (r"(-\infty,1)\cup(2,\infty)", [r"\boxed{(-\infty,1)\cup(2,\infty)}"], [r"\boxed{(-\infty,1)\cup(3,\infty)}"]),
        (r"\{1,2\}", [r"\boxed{\{2,1\}}"], [r"\boxed{\{1,3\}}"]),
        ("(1,2)", [], [r"\boxed{(2,1)}"]),
        ("1, 2", [r"\boxed{2, 1}", r"\boxed{x=1\text{ or }x=2}"], []),
        ("1,2", [], [r"\boxed{1}"]),
        (r"(\frac12, 3)", [r"\boxed{(0.5, 3)}"], []),
        ("(1, 2, 3)", [], [r"\boxed{(1, 2, 4)}"]),
        ("(100,200)", [r"\boxed{(100,200)}"], []),
        ("(100, 200)", [], [r"\boxed{(100, 201)}"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"], [r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}"]),
    ],
    "other": [
        (r"0.\overline{3}", [r"\boxed{1/3}"], []),
        ("1/6", [r"\boxed{0.1\overline{6}}"], [r"\boxed{0.\overline{16}}"]),
        ("−5", [r"\boxed{-5}"], []),
        ("-5", ["−5"], []),
        ("√2", [r"\boxed{\sqrt{2}}"], []),
        (r"2\pi", [r"\boxed{2π}"], []),
        ("Tuesday", [r"\boxed{\text{Tuesday}}"], [r"\boxed{\text{Monday}}"]),
        (r"\text{(B)}", [r"\boxed{B}"], []),
        ("B", [], [r"\boxed{\text{(C)}}"]),
        ("yes", [r"\boxed{\text{yes}}", r"\boxed{\text{Yes}}", "yes"], [r"\boxed{\text{no}}", r"\boxed{no}"]),
        (r"\text{odd}", [r"\boxed{odd}", r"$\boxed{\text{odd}}$"], [r"\boxed{even}"]),
        (r"\text{no solution}", [r"\boxed{no solution}", r"\boxed{\text{No solution}}"], [r"\boxed{0}", r"\boxed{\text{one solution}}"]),
        (r"\text{DNE}", [r"\boxed{DNE}"], [r"\boxed{D}"]),
        ("Tuesday", [r"\text{Tuesday}"], []),
        ("3x+2", [r"\boxed{2+3x}"], [r"\boxed{3x-2}"]),
        ("y=3x+2", [r"\boxed{3x+2}"], []),
        ("73", [r"\boxed{73.}", r"\[\boxed{73}\]", r"\(73\)"], []),
        ("1 + 2 = 3\n#### 3", [r"\boxed{3}"], []),
        ("#### 1,080", ["1080"], []),
        (r"\pm 2", [r"\boxed{\pm 2}"], []),
        ("3:4", [r"\boxed{3/4}"], []),
        ("2(2/3)", [r"\boxed{4/3}"], []),
        (r"2\cdot\frac{2}{3}", [r"\boxed{4/3}"], []),
        ("x^2 - 1", [r"\boxed{(x-1)(x+1)}"], []),
        ("1/3", [r"\boxed{2/6}"], []),
        ("3 + 1/2", [r"\boxed{3.5}"], []),
        ("2+3i", [r"\boxed{3i+2}"], []),
    ],
}
PAIRS = [
    (gold, said, right)
    for rows in TABLE.values()
    for gold, *both in rows
    for right, listed in zip((True, False), both, strict=True)
    for said in listed
]


@pytest.mark.parametrize(("gold", "said", "is_right"), PAIRS)
def test_every_pair_is_judged_as_by_hand(gold, said, is_right):
    assert math_answer(said, gold) is is_right


@pytest.mark.parametrize(("gold", "said", "is_right"), [pair for pair in PAIRS if last_box(pair[1]) is not None and "#" not in pair[0]])
def test_gold_and_answer_can_be_exchanged(gold, said, is_right):
    assert math_answer(f"\\boxed{{{gold}}}", last_box(said)) is is_right


NUMBERS = {
    "1080": (
        ["$1,080.", "**1080**", r"\$1,080", "1{,}080", r"1\,080", "1 080", r"\boxed{1080}", "$1080$", "1.08e3", "€1,080"],
        ["1,081", "80", "**80**", "1 0800"],
    ),
    "-5": (["-$5", "$-5", "−5", "**-5**"], ["5", "$5"]),
    "0.5": (["0.50", "$.5"], ["1/2 or 0.5", "5"]),
}


@pytest.mark.parametrize(
    ("gold", "said", "is_right"), [(g, s, r) for g, both in NUMBERS.items() for r, all_ in zip((True, False), both, strict=True) for s in all_]
)
def test_plain_numbers_too_are_read_in_every_writing(gold, said, is_right):
    assert numeric_answer()(said, gold) is is_right
    assert (correctness(f"<answer>{said}</answer>", gold) == 2.0) is is_right


@pytest.mark.parametrize(
    ("said", "number", "part"),
    [("2/3", None, "3"), ("so 3/4", "0.75", "4"), ("2 1/2", "2.5", "2"), (r"$\frac{1}{4}$", "0.25", "4"), (r"$2\frac{1}{2}$", "2.5", "2"), ("10^6", "1000000", "6"),
     ("2^{10}", "1024", "10"), (r"1\,080", "1080", "80"), ("1{,}080", "1080", "80"), ("0^0", None, "0"), ("1/0", None, "0")],
)  # fmt: skip
def test_a_part_of_the_last_number_earns_nothing(said, number, part):
    assert right_number(said, part) == -3.0
    if number is not None:
        assert right_number(said, number) == 3.0


def test_the_last_number_of_a_date_or_a_list_is_its_last_number():
    assert right_number("12/25/2024", "2024") == 3.0
    assert right_number("1/2 or 7", "7") == 3.0
    assert right_number("3-4", "4") == 3.0


def test_a_solution_that_ends_in_its_answer_is_a_gold_answer():
    assert math_answer(r"\boxed{18}", "He pays $3 * 6 = $18.\n#### 18") is True
    with pytest.raises(UserError, match="cannot be parsed"):
        math_answer("18", "He pays.\n####")
