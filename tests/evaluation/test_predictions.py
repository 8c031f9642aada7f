"""Files of predictions: their formats, and what EvalAI would refuse."""

import json
import sys

import pytest

from scl_jax.evaluation.classification import Predictions
from scl_jax.evaluation.predictions import (
    SubmissionError,
    check_answers,
    main,
    write_answers,
    write_entailment,
    write_statements,
)

GOOD = [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "2"}]


def test_formats(tmp_path):
    answers = write_answers(Predictions(["262148000", "7"], ["café", "2"]), tmp_path / "deep/vqa.json")
    assert json.loads(answers.read_text()) == [
        {"question_id": 262148000, "answer": "café"},
        {"question_id": 7, "answer": "2"},
    ]
    statements = write_statements(Predictions(["test1-0-0-0", "test1-0-0-1"], ["true", "false"]), tmp_path / "n.csv")
    assert statements.read_text() == "test1-0-0-0,True\ntest1-0-0-1,False\n"
    pairs = write_entailment(Predictions(["4,5.jpg#1r1e"], ["neutral"]), tmp_path / "s.csv")
    assert pairs.read_text() == 'pairID,label\n"4,5.jpg#1r1e",neutral\n'


def test_answers_that_evalai_takes():
    check_answers(GOOD, [2, 1])


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (GOOD[:1], r"1 question\(s\) not answered, such as 2"),
        ([*GOOD, GOOD[0]], r"1 question\(s\) answered more than once, such as 1"),
        ([*GOOD, {"question_id": 3, "answer": "no"}], r"1 question\(s\) answered, but not of this split, such as 3"),
        ([GOOD[0], {"question_id": "2", "answer": "no"}], "question_id '2' is no whole number"),
        ([GOOD[0], {"question_id": 2, "answer": 2}], r"entry 1 \(question 2\): the answer 2 is no text"),
        ([GOOD[0], {"question_id": 2, "answer": " "}], "the answer ' ' is no text"),
        ([GOOD[0], {"question_id": 2}], "entry 1: exactly the keys question_id and answer"),
        ({"answers": GOOD}, "a list of answers is wanted"),
    ],
)
def test_answers_that_evalai_would_refuse(answers, problem):
    with pytest.raises(SubmissionError, match=problem):
        check_answers(answers, [1, 2])


def test_what_evalai_would_refuse_is_said_and_written_all_the_same(tmp_path):
    file = tmp_path / "vqa.json"
    with pytest.warns(UserWarning, match=r"vqa.json: EvalAI would refuse .*\n.*question_id 'q7' is no whole number"):
        write_answers(Predictions(["q7", "8"], ["yes", "no"]), file)
    assert json.loads(file.read_text())[0] == {"question_id": "q7", "answer": "yes"}
    with pytest.warns(UserWarning, match=r"1 question\(s\) answered more than once, such as 8"):
        write_answers(Predictions(["8", "8"], ["yes", "no"]), file)
    assert len(json.loads(file.read_text())) == 2


def test_the_command_checks_a_file(tmp_path, monkeypatch, capsys):
    answers, questions = tmp_path / "answers.json", tmp_path / "questions.json"
    answers.write_text(json.dumps(GOOD))
    monkeypatch.setattr(sys, "argv", ["predictions", str(answers), f"--questions={questions}"])
    questions.write_text(json.dumps({"questions": [{"question_id": 1}, {"question_id": 2}]}))
    main()
    assert "2 answers, one for each question" in capsys.readouterr().out
    questions.write_text(json.dumps({"questions": [{"question_id": 1}, {"question_id": 3}]}))
    with pytest.raises(SystemExit, match="not answered, such as 3"):
        main()
    for wrong in ("[]", "{}", '{"questions": [1]}', '{"questions": [{"question_id": "1"}]}'):
        questions.write_text(wrong)
        with pytest.raises(SystemExit, match=r'error: .*questions.json: \{"questions": .* is expected'):
            main()
    questions.write_text("questions")
    with pytest.raises(SystemExit, match="error: .*questions.json: not JSON"):
        main()
    answers.write_bytes(b"\xff")
    with pytest.raises(SystemExit, match="error: .*answers.json: not JSON"):
        main()
