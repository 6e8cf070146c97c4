"""Transforms of torchvision for single training images."""

from mixmo_fastai.data.transforms import ImageTransform
from mixmo_fastai.errors import InputError, check_count


def rand_augment(
    num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31
) -> ImageTransform:
    """Return torchvision's RandAugment.

    Source: Cubuk et al., "RandAugment", NeurIPS 2020.

    Args:
        num_ops: number of operations per image.
        magnitude: strength of the operations, from 0 to `num_magnitude_bins` - 1.
        num_magnitude_bins: number of strengths.

    Raises:
        InputError: an argument is not an integer, or out of range.
    """
    check_count("num_ops", num_ops)
    check_count("num_magnitude_bins", num_magnitude_bins, minimum=2)
    check_count("magnitude", magnitude, minimum=0)
    if magnitude >= num_magnitude_bins:
        raise InputError(
            f"magnitude must be below num_magnitude_bins={num_magnitude_bins}; got {magnitude}."
        )
    from torchvision.transforms import RandAugment  # importing takes 1.5 s, and few runs need it

    return ImageTransform(RandAugment(num_ops, magnitude, num_magnitude_bins))


def trivial_augment(num_magnitude_bins: int = 31) -> ImageTransform:
    """Return torchvision's TrivialAugmentWide: one operation of random strength per image.

    Source: Müller, Hutter, "TrivialAugment", ICCV 2021.

    Args:
        num_magnitude_bins: number of strengths.

    Raises:
        InputError: the number is not an integer above 1.
    """
    check_count("num_magnitude_bins", num_magnitude_bins, minimum=2)
    from torchvision.transforms import TrivialAugmentWide

    return ImageTransform(TrivialAugmentWide(num_magnitude_bins))


def augmix(
    severity: int = 3,
    mixture_width: int = 3,
    chain_depth: int = -1,
    alpha: float = 1.0,
    all_ops: bool = True,
) -> ImageTransform:
    """Return torchvision's AugMix, without its consistency loss.

    Source: Hendrycks et al., "AugMix", ICLR 2020.

    Args:
        severity: strength of the operations, from 1 to 10.
        mixture_width: number of chains of operations that are averaged.
        chain_depth: operations per chain; -1 to draw 1 to 3.
        alpha: concentration of the weights of the chains.
        all_ops: whether to use brightness, colour, contrast and sharpness too, which overlap with
            the corruptions of CIFAR-C.

    Raises:
        InputError: an argument is out of range.
    """
    check_count("severity", severity)
    if severity > 10:
        raise InputError(f"severity must be from 1 to 10; got {severity}.")
    check_count("mixture_width", mixture_width)
    if chain_depth != -1:
        check_count("chain_depth, if it is not -1,", chain_depth)
    if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise InputError(f"alpha must be a number above 0; got {alpha!r}.")
    from torchvision.transforms import AugMix

    return ImageTransform(
        AugMix(severity, mixture_width, chain_depth, alpha, all_ops), stream="augmix"
    )
