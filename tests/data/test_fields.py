"""The template language: columns, pipes, braces, and its mistakes."""

import pytest

from posttrain.data.fields import TemplateField
from posttrain.errors import UserError

ROW = {"question": "2+2?", "answer": "2+2=<<2+2=4>>4 #### 1,080 ", "n": 3, "chat": [{"role": "user", "content": "x"}], "none": None}


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("{question}", "2+2?"),
        ("Q: {question}\nA:", "Q: 2+2?\nA:"),
        ("{answer|after:####}", "1,080"),
        ("{answer|after:####|int}", 1080),
        ("{answer|before:=|strip}", "2+2"),
        ("{n}", 3),
        ("{n}{n}", "33"),
        ("{chat}", ROW["chat"]),
        ("{{{question}}}", "{2+2?}"),
        ("{ question | strip }", "2+2?"),
        ("constant", "constant"),
    ],
)
def test_a_template_is_filled(template, value):
    assert TemplateField(template, "x").fill(ROW, 0) == value


def test_after_takes_the_last_mark_and_before_the_first():
    row = {"a": "1#2#3"}
    assert TemplateField("{a|after:#}", "x").fill(row, 0) == "3"
    assert TemplateField("{a|before:#}", "x").fill(row, 0) == "1"


def test_a_value_with_braces_is_not_a_template():
    assert TemplateField("{a}!", "x").fill({"a": "{b}{{"}, 0) == "{b}{{!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{answer|aftr:x}", "there is no '|aftr'.* Did you mean 'after'"),
        ("{answer|after}", "write '|after:####'"),
        ("{answer|strip:x}", "write '|strip'"),
        ("{answer", "single '{'"),
        ("answer}", "single '}'"),
        (3, "must be text"),
    ],
)
def test_a_mistake_in_a_template_is_explained(template, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        TemplateField(template, "answer")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{answer|after:@@}", "row 7: 'answer' has no '@@'"),
        ("{question|int}", "row 7: 'question' is no whole number: '2[+]2[?]'"),
        ("{none}", "row 7 has no 'none'"),
        ("{gone}", "row 7 has no 'gone'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(template, message):
    with pytest.raises(UserError, match=message):
        TemplateField(template, "answer").fill(ROW, 7)


def test_a_column_that_no_row_has_is_found_before_any_row_is_filled():
    with pytest.raises(UserError, match=r"asks for the column 'anwser'; the data has: question, answer.* Did you mean 'answer'"):
        TemplateField("{anwser}", "answer").check(["question", "answer"])
