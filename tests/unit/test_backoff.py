"""Rests between tries."""

from shared.backoff import Backoff


def test_rests_double_to_the_longest_and_begin_anew():
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_after_any_number_of_tries_it_is_the_longest():
    backoff = Backoff(0.1, 5.0)
    backoff.tries = 100_000
    assert backoff.next_s() == 5.0


def test_many_do_not_come_at_once():
    rests_s = {Backoff(1.0, 2.0, spread=(0.5, 1.0)).next_s() for _ in range(50)}
    assert len(rests_s) > 40
    assert all(0.5 <= rest_s <= 1.0 for rest_s in rests_s)
