"""How alike drawn pictures, photos and prompts are, by the DreamBooth paper's measures (arXiv 2208.12242, section 4).

Each measure is a mean of cosines between embeddings, so it is at most 1. CLIP-I and DINO compare drawn pictures with
photos of the subject, CLIP-T compares them with their prompts, PRES compares pictures of the class with the photos.
The paper's own numbers for Stable Diffusion are DINO 0.668, CLIP-I 0.803 and CLIP-T 0.305, with DINO ViT-S/16 and 25
prompts a subject. Every CLIP and every DINO has a scale of its own: only numbers of the same two can be compared.

P counts prompts, S seeds, N pictures, K photos; D is an encoder's width. Embeddings are float32, of length 1.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from utils.core.errors import UserError
from utils.evaluation.encoders import BATCH_SIZE, Encoder, embed_pictures, embed_texts
from utils.evaluation.standard_errors import Estimate, mean_of


def measure(
    clip: Encoder,
    dino: Encoder,
    photos: Sequence[Image.Image],
    drawn: Sequence[tuple[str, Sequence[Image.Image]]],
    class_pictures: Sequence[Image.Image] = (),
    batch_size: int = BATCH_SIZE,
) -> dict[str, Estimate]:
    """Measure what a subject's pictures have of its photos and of their prompts, and what is left of the class.

    Args:
        photos: Of the subject.
        drawn: Each prompt without the rare word (drawn with "a sks dog in the snow": "a dog in the snow"), and its
            pictures, one for each seed, in the same order of seeds for every prompt.
        class_pictures: Drawn with the class prompt ("a dog"), each with a seed of its own; two or more, or none.

    Returns:
        CLIP-I, CLIP-T and DINO, higher is better. With class pictures also PRES, lower is better: how much the class
        has become the subject; and DIV-DINO, higher is better (see `estimate_diversity`). Errors are over seeds.

    Raises:
        UserError: There is nothing to measure, or prompts have unequal numbers of pictures.
    """
    check_counts(photos, drawn, class_pictures)
    prompts, pictures = [text for text, _ in drawn], [picture for _, group in drawn for picture in group]
    seeds = len(pictures) // len(prompts)
    by_clip, by_dino = (embed_pictures(encoder, pictures, batch_size) for encoder in (clip, dino))
    clip_photos, dino_photos = (embed_pictures(encoder, photos, batch_size) for encoder in (clip, dino))
    texts = embed_texts(clip, prompts, batch_size).repeat_interleave(seeds, dim=0)
    cosines = {
        "CLIP-I": compare(by_clip, clip_photos),
        "CLIP-T": (by_clip * texts).sum(-1),
        "DINO": compare(by_dino, dino_photos),
    }
    # Pictures of one seed share their noise: the error is that of the S means over prompts.
    means = {name: values.view(len(prompts), seeds).mean(0) for name, values in cosines.items()}
    found = {name: mean_of(per_seed.tolist()) for name, per_seed in means.items()}
    if class_pictures:
        of_class = embed_pictures(dino, class_pictures, batch_size)
        found |= {"PRES": mean_of(compare(of_class, dino_photos).tolist()), "DIV-DINO": estimate_diversity(of_class)}
    return found


def check_counts(photos: Sequence, drawn: Sequence[tuple[str, Sequence]], class_pictures: Sequence) -> None:
    """Raise UserError if there are too few pictures for a measure, or not as many for each prompt."""
    if not photos:
        raise UserError("There are no photos of the subject to compare with: give at least one.")
    if not drawn or not drawn[0][1]:
        raise UserError("There are no drawn pictures to measure: give at least one prompt with one picture.")
    expected = len(drawn[0][1])
    for prompt, pictures in drawn:
        if len(pictures) != expected:
            raise UserError(
                f"The prompt {prompt!r} has {len(pictures)} pictures, {drawn[0][0]!r} has {expected}: results are "
                "averaged seed by seed, so every prompt needs a picture of each seed. Draw those that are missing."
            )
    if len(class_pictures) == 1:
        raise UserError("One class picture has no diversity: draw at least two, or give none.")


def compare(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return each picture's mean cosine with all photos.

    Args:
        pictures: (N, D), rows of length 1.
        photos: (K, D), rows of length 1.

    Returns:
        (N,) in [-1, 1].
    """
    return (pictures @ photos.T).mean(-1)


def estimate_diversity(pictures: Tensor) -> Estimate:
    """Return 1 - (mean cosine of all pairs of pictures), and its standard error by the jackknife.

    It stands for the paper's DIV, which is a mean of LPIPS distances: neither its numbers nor its scale. Each picture
    is in N - 1 pairs, which are therefore not independent. Hence the jackknife: with d_i the diversity of all pictures
    but the i-th, the error is sqrt((N - 1) / N * sum((d_i - mean of d)^2)).

    Args:
        pictures: (N, D), rows of length 1, N at least 2.
    """
    cosines, count = (pictures @ pictures.T).double(), len(pictures)
    to_others = 1 - (cosines.sum(-1) - cosines.diagonal()) / (count - 1)  # (N,), each one's mean distance
    mean = to_others.mean()
    if count == 2:
        return Estimate(mean.item(), None)
    without_one = (count * mean - 2 * to_others) / (count - 2)
    error = (without_one.var(correction=0) * (count - 1)).sqrt()
    return Estimate(mean.item(), error.item())
