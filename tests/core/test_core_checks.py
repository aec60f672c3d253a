import pytest

from lightning_rlhf.core.checks import MOST, check_count, check_not_negative, check_positive, check_unit_interval

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, NAN, INF, -INF])
def test_check_positive_names_the_argument_and_what_came(bad):
    with pytest.raises(ValueError, match=rf"^`horizon` must be a number above 0: got {bad}$"):
        check_positive(coef=1.0, horizon=bad)


@pytest.mark.parametrize("bad", [-1e-9, -1, NAN, INF])
def test_check_not_negative_names_the_argument_and_what_came(bad):
    with pytest.raises(ValueError, match=rf"^`coef` must be a number of at least 0: got {bad}$"):
        check_not_negative(coef=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN, INF])
def test_check_unit_interval_names_the_argument_and_what_came(bad):
    with pytest.raises(ValueError, match=rf"^`lam` must lie in \[0, 1\]: got {bad}$"):
        check_unit_interval(gamma=0.5, lam=bad)


@pytest.mark.parametrize("bad", [0, -3, NAN])
def test_check_count_wants_at_least_one(bad):
    with pytest.raises(ValueError, match=rf"^`n` must be a number above 0: got {bad}$"):
        check_count(k=1, n=bad)


@pytest.mark.parametrize("bad", [2**20 + 1, 10**400])
def test_check_count_refuses_what_no_machine_takes(bad):
    with pytest.raises(ValueError, match=rf"^`n` must be at most 1048576: got {bad}$"):
        check_count(k=1, n=bad)


def test_whole_numbers_beyond_floats_are_compared():
    check_positive(a=10**400)
    with pytest.raises(ValueError, match="`b` must be a number of at least 0: got -1000"):
        check_not_negative(b=-(10**400))


def test_checks_pass_the_edges():
    check_count(a=1, b=MOST)
    check_positive(a=1e-300, b=1)
    check_not_negative(a=0, b=0.0, c=5.0)
    check_unit_interval(a=0, b=1, c=0.5)
