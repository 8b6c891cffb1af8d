"""`python -m experiments.train`, in which one process of torchrun's first attempt is killed in the middle of step 3."""

from __future__ import annotations

import os
import signal

from experiments import flags, train
from openpi_port.pi_torch.train import Trainer

update = Trainer.update


def update_or_die(self: Trainer, batch: dict) -> dict:
    """Kills one process when all are about to compute."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)


Trainer.update = update_or_die

if __name__ == "__main__":
    flags.run(train.main)
