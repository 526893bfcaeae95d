"""What a picture of a page shows: its parts, their colours, and how well one stands out from another."""

import numpy as np


def region(pixels, left, top, right, bottom):
    """A part of a picture."""
    return pixels[round(top) : round(bottom), round(left) : round(right)]


def farthest(part, colour):
    """The colour of a part that differs most from one."""
    flat = part.reshape(-1, 3)
    return flat[np.abs(flat - colour).sum(axis=1).argmax()]


def contrast(one, other):
    """WCAG's contrast ratio."""

    def luminance(colour):
        c = np.asarray(colour) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
