"""The end of a compute: nothing is said before everything is done."""

from __future__ import annotations

import pytest

from compute.agent.steps import Steps


def test_what_failed_is_done_again_and_nothing_is_said_before() -> None:
    done: list[str] = []
    failing = True

    def unmount() -> None:
        if failing:
            raise OSError("device or resource busy")
        done.append("unmount")

    steps = Steps(kill=lambda: done.append("kill"), unmount=unmount, wipe=lambda: done.append("wipe"))
    for _ in range(2):
        with pytest.raises(OSError, match="busy"):
            steps.run()
        assert done == ["kill", "wipe"]  # each once, and what comes behind the failure, too
    failing = False
    said = steps.run()
    assert done == ["kill", "wipe", "unmount"]
    assert set(said) == {"kill", "unmount", "wipe"}
    assert steps.run() == said
    assert done == ["kill", "wipe", "unmount"]


def test_a_step_that_went_otherwise_is_called_otherwise() -> None:
    steps = Steps(wipe=lambda: "did_not_answer", kill=lambda: None)
    assert set(steps.run()) == set(steps.run()) == {"did_not_answer", "kill"}
