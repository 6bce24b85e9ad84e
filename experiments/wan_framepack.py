"""FramePack (arXiv 2504.12626) on Wan2.1-T2V-1.3B, fine-tuned on a folder of videos.

    python -m hiar_jax.convert --source=Wan2.1-T2V-1.3B --out=weights/wan_1_3b
    python -m hiar_jax.train --config=experiments/wan_framepack.py --workdir=runs/wan_framepack \
      --config.data.folder=clips

For accelerators; not trained yet. The data stage passes each clip once through Wan's VAE and keeps
its latents. The authors have published no training code. Comments: "Table", "v3" are the paper's;
"Helios" and "musubi-tuner" the recipes of others, which train adapters (LoRA), where this trains
all weights.

On the 8 GPUs of 80 GB of one node, as the paper; for other numbers of devices docs/framepack.md has
the lines to change, and what one update takes.
"""

from ml_collections import config_dict

from hiar_jax.experiments import hiar_wan_1_3b


def get_config() -> config_dict.ConfigDict:
  c = hiar_wan_1_3b.get_config()
  c.weights.teacher = ""  # no real score: nothing is distilled
  del c.teacher_model
  c.data = config_dict.ConfigDict(
    dict(
      source="videos",
      folder="clips",
      # 36 latent frames, four sections: the last one has 27 behind it, more than the schedule's 19
      frames=141,
      size=config_dict.FieldReference((480, 832), field_type=object),  # or one number
      fps=16.0,  # Wan2.1
      latent_dtype="float32",  # of the stored latents; or "bfloat16", half the size
    )
  )
  c.history.update(block=9, window=0)  # a section; no window
  c.framepack = config_dict.ConfigDict(
    dict(
      hiar_wan_1_3b.TRAINING,
      packing="td_f16k4f2k2f1k1_g9",  # Table 1
      orders=("vanilla",),
      steps=10_000,  # none is published
      batch=64,  # v3: batches of about 64 on 8 GPUs
      accumulate=8,  # a clip on each of 8 devices at a time
      # none is published for all weights; adapters: Helios 5e-5, musubi-tuner 2e-4
      lr=1e-5,
      given=0,
      published=False,  # frame indices are the frames' own
      history_level="section",  # FramePack; Helios: "clean"
      hears=True,  # FramePack; Helios: False
      history_noise=0.0,  # Helios: up to 1/3
      # Wan2.1's generate.py; its README recommends 8 to 12 for the 1.3B, musubi-tuner trains at 3
      shift=5.0,
      caption_dropout=0.1,  # classifier-free guidance, as the base
    )
  )
  c.mesh.update(data=1, fsdp=-1)  # weights over all devices, of one node or of one card
  c.sample.update(
    order="vanilla",
    steps=25,  # FramePack's published demo
    solver="unipc",  # Wan2.1's own, of order 2
    guidance=5.0,  # Wan2.1's README for the 1.3B, where it is 6: cond + 5 (cond - uncond)
  )
  return c
