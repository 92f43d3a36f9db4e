from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.inversion import check_settings, edit_beside_source
from antidiffusion.models.base import Surrogate


def test_phases_hold_for_their_steps(tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    active, seen = [""], list[tuple[str, int]]()
    predict = tiny.predict

    @contextmanager
    def phase(name: str) -> Any:
        active.append(name)
        yield
        active.pop()

    def watched(z: Tensor, t: Tensor, embedding: Any) -> Tensor:
        seen.append((active[-1], len(z)))
        return predict(z, t, embedding)

    monkeypatch.setattr(tiny, "predict", watched)
    phases = [(0, phase("never")), (1, phase("a")), (3, phase("b"))]
    calls: list[tuple[int, int]] = []
    options: Any = {"steps": 3, "guidance": 2.0, "progress": lambda *call: calls.append(call[1:])}
    edit_beside_source(x, Prompts("a hat"), tiny, 0, phases=phases, **options)
    assert seen == [("", 2)] * 3 + [("a", 6)] + [("b", 6)] * 2
    assert calls == [(done, 6) for done in range(1, 7)]


def test_settings() -> None:
    check_settings(1, {"share": 0.0, "other": 1.0})
    with pytest.raises(ValueError, match="expected at least 1 step, got 0"):
        check_settings(0, {})
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"expected share in \[0, 1\], got"):
            check_settings(5, {"share": share})
