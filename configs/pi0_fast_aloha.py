"""pi0-FAST on ALOHA: by default the simulated cube transfer that ships with the project.

`base` (where the device can train it) writes actions with the published universal tokenizer; `mini` and `debug` with
one that was fitted to this data set, which ships as `fast_transfer_cube`:

    python -m experiments.fit_fast --config=pi0_fast_aloha:mini --scale=20 --vocab_size=1024 \\
        --out=fast_transfer_cube

It rounds finely (0.0024 rad RMS on the joints; the cube's grasp forgives about 0.02) and its chunks last half a second,
as long as evaluation plays one: 39 tokens on average. `--config.fast_tokenizer=` takes another: a directory, or a
name on the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from configs.edge import to_edge
from openpi_port.config import LANGUAGE, SIGLIP, Compute, Data, Optimizer, Pi0Fast, Train

CAMERAS = {"base_0_rgb": "observation.images.top"}


def get_config(size: str = "base") -> ConfigDict:
    """The run at a named size."""
    data = Data(repo_id="aloha_sim_transfer_cube", robot="aloha_sim", cameras=CAMERAS, norm="quantile")
    sizes = {"vision": SIGLIP[size], "language": LANGUAGE[size], "size": size}
    if size == "base":
        config = Train(
            name="pi0_fast_aloha",
            model=Pi0Fast(**sizes, max_token_len=500),
            data=data,
            compute=Compute(dtype="bfloat16", remat="auto", gradients="auto"),
            init="gs://openpi-assets/checkpoints/pi0_fast_base",
        )
    else:
        steps = 360 if size == "mini" else 20
        if size == "mini":  # all of the model writes actions, so it has what pi0 gives its expert
            sizes["language"] = dataclasses.replace(LANGUAGE[size], depth=6, mlp_dim=768)
        config = Train(
            name=f"pi0_fast_aloha_{size}",
            model=Pi0Fast(
                **sizes,
                vocab_size=1984,
                action_dim=14,
                action_horizon=25,
                max_token_len=128,
                cameras=tuple(CAMERAS),
                positions="contiguous",  # a fresh model has not learned to live with the number that openpi skips
            ),
            data=data,
            optimizer=Optimizer(peak_lr=1e-3, end_lr=1e-5, warmup_steps=steps // 10, decay_steps=steps),
            tokenizer="small_numbers",
            fast_tokenizer="fast_transfer_cube",
            batch_size=8 if size == "mini" else 4,
            num_steps=steps,
            log_every=10,
            eval_every=steps // 4,
            save_every=steps // 2,
        )
    return to_edge(config)
