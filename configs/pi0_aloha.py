"""pi0 on ALOHA: by default the simulated cube transfer that ships with the project.

`--config=pi0_aloha` takes `base` where the device can train it and `mini` where it can't; `:base`, `:mini` and
`:debug` decide. `base` starts from openpi's published weights, the others from fresh ones. `--config.data.repo_id=`
takes another data set: a directory, or a name on the Hugging Face hub.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.edge import to_edge
from openpi_port.config import EXPERT, LANGUAGE, SIGLIP, Compute, Data, Optimizer, Pi0, Train

CAMERAS = {"base_0_rgb": "observation.images.top"}


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    data = Data(repo_id="aloha_sim_transfer_cube", robot="aloha_sim", cameras=CAMERAS)
    sizes = {"vision": SIGLIP[size], "language": LANGUAGE[size], "expert": EXPERT[size], "size": size}
    if size == "base":
        config = Train(
            name="pi0_aloha",
            model=Pi0(**sizes),
            data=data,
            compute=Compute(dtype="bfloat16", remat="auto", gradients="auto"),
            init="gs://openpi-assets/checkpoints/pi0_base",
        )
    else:
        steps = 360 if size == "mini" else 20
        config = Train(
            name=f"pi0_aloha_{size}",
            model=Pi0(**sizes, vocab_size=512, action_dim=14, max_token_len=11, cameras=tuple(CAMERAS)),
            data=data,
            optimizer=Optimizer(peak_lr=1e-3, end_lr=1e-5, warmup_steps=steps // 10, decay_steps=steps),
            tokenizer="small",
            batch_size=8 if size == "mini" else 4,
            draws=4,
            num_steps=steps,
            log_every=10,
            eval_every=steps // 4,
            save_every=steps // 2,
        )
    return to_edge(config)
