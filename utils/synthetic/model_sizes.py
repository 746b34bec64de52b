"""The sizes of the models that `make_model` writes: Stable Diffusion, DeepFloyd IF, the x4 upscaler.

To add a shape, add an entry to `SHAPES`. To add a model family, add a builder to `random_models.BUILDERS` as well.
"""

from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from utils.synthetic import shapes
from utils.synthetic.small_tokenizers import END

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,  # unused by PNDM, but a DDPM scheduler read from the same file needs it
}
IF_SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}
X4_SCHEDULE = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
# More noise at the end than SD's own: on 64 latents instead of 4096, it would show the picture's mean colour.
SHAPES_SCHEDULE = {**NOISE_SCHEDULE, "beta_end": 0.02}
PNDM = (PNDMScheduler, {**NOISE_SCHEDULE, "skip_prk_steps": True})
DDIM = (DDIMScheduler, NOISE_SCHEDULE)
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_THIN = {"d_model": 4096, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1}
T5_TINY = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
TINY_IF_UNET = {
    "widths": (16, 24, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 4,
}

T5_SHAPES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SHAPES_IF_UNET = {
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 4,
    "cross_attention_dim": 64,
}

# Widths count from the highest resolution down. In a U-Net, all levels but the lowest attend to the text. A text
# encoder without `vocab_size` takes the tokenizer's. In an IF U-Net, the `attending` lowest levels attend to the text.
SHAPES = {
    "tiny": {  # for tests: a step takes milliseconds, the folder less than 3 MB
        "family": "sd",
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {
            "widths": (24, 48),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 3,
            "sample_size": 8,
        },
        "vae": {"widths": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "small": {  # for benchmarks: at 256 pixels, encoding costs about as much as the U-Net's step
        "family": "sd",
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {"widths": (64, 128, 256, 256), "layers_per_block": 2, "attention_head_dim": 8, "sample_size": 32},
        "vae": {"widths": (64, 128, 256, 256), "layers_per_block": 2, "sample_size": 256},
        "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
    "sd15": {  # the published configuration of Stable Diffusion 1.5
        "family": "sd",
        "scheduler": PNDM,
        "prediction_type": "epsilon",
        "pad_token": END,
        "unet": {"widths": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8, "sample_size": 64},
        "vae": {"widths": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text": {**CLIP_L, "vocab_size": 49408, "projection_dim": 768},
    },
    "sd21": {  # the published configuration of Stable Diffusion 2.1 for 768 pixels
        "family": "sd",
        "scheduler": DDIM,
        "prediction_type": "v_prediction",
        "pad_token": "!",
        "unet": {
            "widths": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20, 20),
            "sample_size": 96,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "vae": {"widths": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
        "text": {**OPEN_CLIP_H, "vocab_size": 49408, "projection_dim": 512, "hidden_act": "gelu"},
    },
    "tiny-if1": {  # for tests: image sides are multiples of 4
        "family": "if1",
        "unet": {**TINY_IF_UNET, "attending": 2, "sample_size": 16},
        "text": T5_TINY,
    },
    "tiny-if2": {  # for tests, together with tiny-if1, whose text encoder it shares
        "family": "if2",
        "unet": {**TINY_IF_UNET, "attending": 1, "sample_size": 64},
        "text": T5_TINY,
    },
    "tiny-x4": {  # for tests, behind tiny-if2
        "family": "x4",
        "unet": {
            "widths": (16, 24, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "sample_size": 16,
        },
        "vae": {"widths": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64},
        "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    # What `utils.lab.train_models` trains on pictures of `utils.synthetic.shapes`.
    "shapes-sd": {  # 16 pixels
        "family": "sd",
        "scheduler": (DDPMScheduler, SHAPES_SCHEDULE),
        "prediction_type": "epsilon",
        "pad_token": END,
        "words": shapes.WORDS,
        "unet": {
            "widths": (64, 104),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "sample_size": 8,
        },
        "vae": {"widths": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16},
        "text": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "shapes-if1": {  # 16 pixels
        "family": "if1",
        "words": shapes.WORDS,
        "unet": {**SHAPES_IF_UNET, "widths": (64, 96), "attending": 1, "sample_size": 16},
        "text": T5_SHAPES,
    },
    "shapes-if2": {  # 16 to 64 pixels
        "family": "if2",
        "words": shapes.WORDS,
        "unet": {**SHAPES_IF_UNET, "widths": (32, 64, 96), "attending": 1, "sample_size": 64},
        "text": T5_SHAPES,
    },
    "small-if1": {  # for benchmarks: 64 pixels
        "family": "if1",
        "unet": {"widths": (64, 128, 192, 256), "layers_per_block": 2, "attending": 3, "sample_size": 64},
        "text": {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    },
    # The published configurations of DeepFloyd IF.
    "if1-m": {
        "family": "if1",
        "unet": {"widths": (192, 384, 576, 768), "layers_per_block": 3, "attending": 3, "sample_size": 64},
        "text": T5_XXL,
    },
    "if1-l": {
        "family": "if1",
        "unet": {"widths": (320, 640, 960, 1280), "layers_per_block": 3, "attending": 3, "sample_size": 64},
        "text": T5_XXL,
    },
    "if1-xl": {
        "family": "if1",
        "unet": {"widths": (704, 1408, 2112, 2816), "layers_per_block": 3, "attending": 3, "sample_size": 64},
        "text": T5_XXL,
    },
    "if2-m": {
        "family": "if2",
        "unet": {
            "widths": (96, 192, 384, 576, 768),
            "layers_per_block": (2, 2, 3, 5, 5),
            "attending": 1,
            "sample_size": 256,
        },
        "text": T5_XXL,
    },
    "if2-l": {
        "family": "if2",
        "unet": {
            "widths": (160, 320, 640, 960, 1280),
            "layers_per_block": (2, 2, 3, 5, 5),
            "attending": 2,
            "sample_size": 256,
        },
        "text": T5_XXL,
    },
}
