import math

import pytest

from lightning_rlhf.core import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule

SCHEDULES = [ConstantSchedule, LinearSchedule, CosineSchedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_linearly_from_a_tenth(schedule):
    # InstructGPT's RL stage: 0.1 + 0.9·step/10
    moving = schedule(warmup=10)
    for step, expected in ((0, 0.1), (1, 0.19), (5, 0.55), (9, 0.91), (10, 1.0)):
        assert abs(moving.factor(step, 500) - expected) <= 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert schedule().factor(0, 100) == 1.0


def test_warmup_start_is_the_first_factor():
    assert ConstantSchedule(warmup=4, warmup_start=0.0).factor(0, 9) == 0.0
    assert ConstantSchedule(warmup=4, warmup_start=0.5).factor(2, 9) == 0.75  # 0.5 + 0.5·2/4


def test_constant_stays_at_the_peak():
    assert [ConstantSchedule(warmup=2).factor(step, 6) for step in (2, 3, 5, 6, 100)] == [1.0] * 5


def test_linear_falls_to_its_floor():
    # after 2 of 10 steps warm-up: step 6 is half way, step 8 three quarters
    schedule = LinearSchedule(warmup=2)
    for step, expected in ((2, 1.0), (6, 0.5), (8, 0.25), (10, 0.0)):
        assert abs(schedule.factor(step, 10) - expected) <= 1e-12
    assert abs(LinearSchedule(warmup=2, floor=0.2).factor(6, 10) - 0.6) <= 1e-12  # 1 − 0.8/2


def test_cosine_falls_to_a_tenth():
    # floor + (1 − floor)·½(1 + cos πp), p = 0, ¼, ½, 1
    schedule = CosineSchedule()
    quarter = 0.1 + 0.45 * (1 + math.sqrt(0.5))
    for step, expected in ((0, 1.0), (2, quarter), (4, 0.55), (8, 0.1)):
        assert abs(schedule.factor(step, 8) - expected) <= 1e-12
    assert abs(CosineSchedule(floor=0.0).factor(8, 8)) <= 1e-12
    # negative control: a line would be at 0.775 after a quarter
    assert abs(schedule.factor(2, 8) - 0.775) > 0.05


@pytest.mark.parametrize(
    ("schedule", "end"), [(LinearSchedule(floor=0.3), 0.3), (CosineSchedule(floor=0.3), 0.3), (ConstantSchedule(), 1.0)]
)
def test_steps_past_the_end_stay_at_the_end(schedule, end):
    for step in (10, 11, 1000):
        assert abs(schedule.factor(step, 10) - end) <= 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factor_never_rises_after_warmup(schedule):
    factors = [schedule(warmup=3).factor(step, 20) for step in range(3, 21)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_shorter_than_its_warmup_only_warms_up(schedule):
    assert abs(schedule(warmup=10).factor(4, 5) - 0.46) <= 1e-12  # 0.1 + 0.9·4/10
    assert 0.0 <= schedule(warmup=10).factor(10, 10) <= 1.0


def test_schedules_refuse_numbers_out_of_range():
    with pytest.raises(ValueError, match="`warmup` must be a number of at least 0: got -1"):
        ConstantSchedule(warmup=-1)
    for schedule in SCHEDULES:
        with pytest.raises(ValueError, match=r"`warmup_start` must lie in \[0, 1\]: got 1.5"):
            schedule(warmup_start=1.5)
    for schedule in (LinearSchedule, CosineSchedule):
        with pytest.raises(ValueError, match=r"`floor` must lie in \[0, 1\]: got -0.1"):
            schedule(floor=-0.1)
        with pytest.raises(ValueError, match="`warmup`"):
            schedule(warmup=-1)


def test_schedule_is_abstract():
    with pytest.raises(TypeError):
        Schedule()
