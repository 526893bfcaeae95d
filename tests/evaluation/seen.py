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


def assert_drawn(chart, surface, coloured):
    """A chart has lines and legible text, so many pixels in colour, and is not in one corner."""
    drawn = np.abs(chart - surface).max(axis=2) > 40
    assert 0.005 < drawn.mean() < 0.5
    assert (np.ptp(chart, axis=2) > 50).sum() > coloured
    assert contrast(surface, farthest(chart, surface)) > 4.5
    rows, columns = np.nonzero(drawn)
    assert np.ptp(rows) > 0.7 * chart.shape[0]
    assert np.ptp(columns) > 0.7 * chart.shape[1]


def assert_legible(text, surface):
    """A part of a page has text that stands out."""
    assert contrast(surface, farthest(text, surface)) > 7
    assert (np.abs(text - surface).max(axis=2) > 100).sum() > 200
