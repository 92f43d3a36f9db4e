import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import draw

from antidiffusion.batch import Settings, run
from antidiffusion.card import card_path, read_card
from antidiffusion.folders import plan
from antidiffusion.models.base import Surrogate
from antidiffusion.recipes import RandomSign
from antidiffusion.workers import spread


def load(folder: str) -> Surrogate:
    return Surrogate.from_pretrained(folder)


def deadly(folder: str) -> Surrogate:
    """A model at which one picture kills its process, as one that needs too much memory does."""
    surrogate = load(folder)
    posterior = surrogate.posterior

    def killed(x: Any) -> Any:
        if x.shape[-1] == 128:
            os.kill(os.getpid(), signal.SIGKILL)
        return posterior(x)

    surrogate.posterior = killed  # type: ignore[method-assign]
    return surrogate


def broken(folder: str) -> Surrogate:
    raise ValueError(f"expected a model, got {folder}; name another")


@pytest.mark.slow
@pytest.mark.timeout(900)  # six starts of a process
def test_several_processes_give_the_same_bytes_and_survive_one_that_dies(
    photos: Path, sd15: Any, tiny: Surrogate
) -> None:
    draw(photos / "c.png", 5)
    draw(photos / "wide.png", 9, width=256)  # 128 at the model's size
    jobs = plan([photos], Path("out")).jobs
    found = {o.job.source.name: o for o in spread(jobs, Settings(RandomSign()), partial(deadly, str(sd15.folder)), 2)}
    assert {name: o.kind for name, o in found.items() if o.kind == "failed"} == {"wide.png": "failed"}
    assert "got one that was killed twice" in str(found["wide.png"].error)
    assert len(found) == len(jobs) == 4
    assert not [path for path in Path("out").rglob("*") if path.name.startswith(".")]
    alone = plan([photos], Path("alone")).jobs
    for outcome in run([job for job in alone if job.source.name != "wide.png"], Settings(RandomSign()), tiny):
        assert outcome.kind == "done"
    for job in alone:
        other = Path("out") / job.target.relative_to("alone")
        if job.source.name == "wide.png":
            assert not other.exists() and not card_path(other).exists()
            continue
        assert other.read_bytes() == job.target.read_bytes()
        cards = [read_card(path) or {} for path in (other, job.target)]
        assert cards[0]["options"] == cards[1]["options"]


def test_a_model_that_cannot_be_loaded_is_said_once(photos: Path) -> None:
    with pytest.raises(ValueError, match="expected a model, got nothing; name another"):
        list(spread(plan([photos], Path("out")).jobs, Settings(RandomSign()), partial(broken, "nothing"), 1))
