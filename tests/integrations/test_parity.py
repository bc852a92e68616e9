"""AdaLoRA beside PEFT's under further schedules; the default suite has one of them."""

import pytest
import test_parity_peft


@pytest.mark.parametrize(("warmup", "final", "interval", "target"), [(20, 60, 1, 2), (10, 50, 7, 2), (0, 100, 10, 1)])
def test_two_hundred_steps(warmup: int, final: int, interval: int, target: int) -> None:
    """A decision at each step, a longer interval, and a schedule that begins at once."""
    test_parity_peft.test_adalora_in_its_peft_variant_is_peft_s_for_200_steps(warmup, final, interval, target)
