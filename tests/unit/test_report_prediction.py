"""How far predictions were off, and that a page shows it where there are any."""

import pytest

from loadtest.report import prediction, write
from tests.support.made_results import made_result, write_result


def test_errors_are_of_the_actual():
    found = prediction.errors([(1.0, 2.0), (3.0, 2.0), (2.0, 2.0), (6.0, 2.0), (1.9, 2.0)])
    assert (found.pairs, found.median, found.p90) == (5, 0.5, 2.0)
    assert found.signed == 0.0
    assert found.within == {0.1: 0.4, 0.25: 0.4, 0.6: 0.8, 1.0: 0.8}


def test_nothing_has_no_error():
    found = prediction.errors([])
    assert (found.pairs, found.median, found.p90, found.signed, found.within) == (0, None, None, None, {})


@pytest.fixture
def page(tmp_path):
    def make(predicted, **how):
        result = made_result(requests=100, **how)
        actual = result["requests"]["ttft_s"]
        result["requests"] |= {"actual_ttft_s": actual, "predicted_ttft_s": [predicted(value) for value in actual]}
        return write([write_result(tmp_path, result)]).read_text()

    return make


@pytest.mark.parametrize("shed_share", [0.0, 0.3])
def test_a_page_shows_them(page, shed_share):
    text = page(lambda seen: None if seen is None else 1.5 * seen, shed_share=shed_share)
    assert "Predicted against actual TTFT" in text
    assert "+50.0\u00a0%" in text  # all are too long by half


def test_without_predictions_there_is_no_section(page):
    assert "Predicted against actual" not in page(lambda _: None)


def test_one_prediction_is_a_page(page):
    seen = iter([0.25])
    assert "Predicted against actual" in page(lambda _: next(seen, None))
