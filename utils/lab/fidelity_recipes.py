"""What `utils.lab.fidelity` runs and measures: recipes, columns of its tables, and ranges for its quick runs.

To add a line to the tables, add a recipe to `RECIPES`.
"""

import dataclasses

from utils.run.scripts import FULL, LORA

CHOSEN = ("quartered circle", "striped square", "badged triangle", "two-armed cross")
SD, SD_V, IF1, IF2 = "shapes-sd", "shapes-sd-v", "shapes-if1", "shapes-if2"
PIXELS = {SD: 16, SD_V: 16, IF1: 16, IF2: 64}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train."""

    model: str
    method: str  # what is trained, a key of `scripts.SCRIPTS`
    flags: str
    seeds: int = 2  # runs on each subject unless --seeds says otherwise; fewer of what is only compared with


@dataclasses.dataclass(frozen=True)
class Column:
    """A measure of the table."""

    measure: str
    against: str = ""  # "ratio" or "gain": in comparison with the base model
    percent: bool = True
    digits: int = 0


BASE_COLUMNS = {
    "class right": Column("class right"),
    "colour right": Column("colour right"),
    "background right": Column("background right"),
    "class colours, bits": Column("diversity of class colours, bits", percent=False, digits=2),
}
COLUMNS = {
    "subject, unseen backgrounds": Column("subject, unseen backgrounds"),
    "seen backgrounds": Column("subject, seen backgrounds"),
    "mean match": Column("match, unseen backgrounds", percent=False, digits=2),
    "prompts obeyed, of base": Column("prompts obeyed", "ratio"),
    "other prompts, of base": Column("other prompts obeyed", "ratio"),
    "class colours, of base": Column("diversity of class colours, bits", "ratio"),
    "leak into class": Column("leak into the class"),
    "into other classes": Column("leak into other classes"),
    "seconds": Column("seconds", percent=False),
}
IF2_COLUMNS = {
    "subject, PSNR gain in dB": Column("PSNR, subject", "gain", percent=False, digits=2),
    "SSIM gain": Column("SSIM, subject", "gain", percent=False, digits=3),
    "its class": Column("PSNR, class", "gain", percent=False, digits=2),
    "other classes": Column("PSNR, others", "gain", percent=False, digits=2),
    "seconds": Column("seconds", percent=False),
}
IF2_BASE_COLUMNS = {
    name: Column(name, percent=False, digits=1)
    for topic in ("subject", "class", "others")
    for name in (f"PSNR, {topic}", f"PSNR, {topic}, bilinear")
}
COMMON = "--snr_gamma=5 --lr_scheduler=cosine --lr_warmup_steps=0"
DRAWN = "--class_guidance_scale=1.5 --sample_batch_size=32"
PRIOR = f"--with_prior_preservation --num_class_images=96 {DRAWN}"
IF1_PRIOR = f"--with_prior_preservation --num_class_images=48 {DRAWN}"
IF2_PRIOR = "--with_prior_preservation --num_class_images=96"
# The larger epsilon keeps AdamW from moving weights whose gradients are small: with 1e-8, more damage is done to other
# prompts by the time that the subject is there.
FULL_FLAGS = f"--learning_rate=1e-3 --adam_epsilon=1e-4 --max_train_steps=600 {COMMON}"
IF1_FULL_FLAGS = f"--learning_rate=7e-4 --adam_epsilon=1e-4 --max_train_steps=500 {COMMON}"
# A subject's pattern is finer than the resolution at which these U-Nets attend: a LoRA of the attention alone (seen on
# stage I) does not reach it.
LAYERS = "to_k,to_q,to_v,to_out.0,conv1,conv2"
LORA_FLAGS = f"--learning_rate=1e-3 --rank=16 --max_train_steps=500 {COMMON} --lora_layers={LAYERS}"
# Without the last six, stage I had stripes in 30 to 40 % of the pictures before seen backgrounds; with them in 80 to
# 100 %.
IF1_LAYERS = f"{LAYERS},add_k_proj,add_v_proj,conv_in,conv_out,conv_shortcut,time_emb_proj,linear_1,linear_2"
IF1_LORA_FLAGS = f"--learning_rate=2.5e-3 --rank=16 --max_train_steps=500 {COMMON} --lora_layers={IF1_LAYERS}"
TEXT = "--train_text_encoder --text_encoder_lr=2e-4"
# As its model was trained: without offset noise, the colours of what it enlarges drift. So they do without pictures of
# the class, which are given here: it cannot draw them from words alone.
IF2_FLAGS = f"--learning_rate=1e-4 --max_train_steps=120 --train_batch_size=2 --noise_offset=0.15 {COMMON} {IF2_PRIOR}"
CAPTIONS = "--caption_strategy=textfile"
RECIPES = {
    "SD, full": Recipe(SD, FULL, FULL_FLAGS, seeds=1),
    "SD, full, prior": Recipe(SD, FULL, f"{FULL_FLAGS} {PRIOR}"),
    "SD, full, prior, captions": Recipe(SD, FULL, f"{FULL_FLAGS} {PRIOR} {CAPTIONS}"),
    "SD, LoRA": Recipe(SD, LORA, LORA_FLAGS, seeds=1),
    "SD, LoRA, prior": Recipe(SD, LORA, f"{LORA_FLAGS} {PRIOR}"),
    "SD, LoRA + text encoder": Recipe(SD, LORA, f"{LORA_FLAGS} {TEXT}", seeds=1),
    "SD, LoRA + text encoder, prior": Recipe(SD, LORA, f"{LORA_FLAGS} {TEXT} {PRIOR}", seeds=1),
    "SD, velocity, LoRA, prior": Recipe(SD_V, LORA, f"{LORA_FLAGS} {PRIOR}", seeds=1),
    "IF I, full, prior": Recipe(IF1, FULL, f"{IF1_FULL_FLAGS} {IF1_PRIOR}"),
    "IF I, full, prior, captions": Recipe(IF1, FULL, f"{IF1_FULL_FLAGS} {IF1_PRIOR} {CAPTIONS}"),
    "IF I, LoRA, prior": Recipe(IF1, LORA, f"{IF1_LORA_FLAGS} {IF1_PRIOR}"),
    "IF II, full": Recipe(IF2, FULL, IF2_FLAGS),
    "IF II, full, timesteps": Recipe(IF2, FULL, f"{IF2_FLAGS} --class_labels_conditioning=timesteps", seeds=1),
}
# What --quick runs, and between what its measures must be: wide enough for other machines, narrow enough for a broken
# loss, a wrong target or an adapter that was not trained.
QUICK = {
    "SD, LoRA, prior": {
        "seen backgrounds": (0.8, 1),
        "subject, unseen backgrounds": (0.7, 1),
        "mean match": (0.5, 1),
        "prompts obeyed, of base": (0.75, 1.2),
        "other prompts, of base": (0.75, 1.2),
        "class colours, of base": (0.6, 1.5),
        "leak into class": (0, 0.2),
    },
    "IF I, full, prior": {
        "seen backgrounds": (0.6, 1),
        "prompts obeyed, of base": (0.6, 1.2),
        "other prompts, of base": (0.5, 1.2),
        "class colours, of base": (0.6, 1.5),
        "leak into class": (0, 0.2),
    },
    "IF II, full": {"subject, PSNR gain in dB": (-0.2, 4), "SSIM gain": (0.002, 0.1)},
}
