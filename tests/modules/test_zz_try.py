import sys; sys.path.insert(0,"/work/main/tests/modules")
import pytest, time
from test_modules_objectives_exact import *
from test_modules_objectives_exact import gap_closed
ON={"epochs":1,"minibatch":128}
@pytest.mark.parametrize("rollouts",[40,60])
@pytest.mark.parametrize("lr",[0.01,0.02,0.03])
@pytest.mark.parametrize("m",["rloo","cispo"])
def test_x(gap_closed, m, rollouts, lr):
    a=time.process_time()
    print("\nRES", m, lr, rollouts, gap_closed(**(METHODS[m] | ON | {"rollouts":rollouts,"lr":lr})), time.process_time()-a)
@pytest.mark.parametrize("rollouts",[25,35])
@pytest.mark.parametrize("lr",[0.01,0.02])
@pytest.mark.parametrize("m",["cispo","dr-grpo-tokens","dr-grpo","running-mean","learned-value"])
def test_y(gap_closed, m, rollouts, lr):
    a=time.process_time()
    print("\nRES", m, lr, rollouts, gap_closed(**(METHODS[m] | {"rollouts":rollouts,"lr":lr})), time.process_time()-a)
