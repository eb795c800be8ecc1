"""Real records as rows on the unit sphere, by constants that stand here and each row alone.

scikit-learn's bundled data: no download. A row's key depends on that row and on public constants
only, which is what every statement about a private memory needs.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from sklearn import datasets


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows on the unit sphere with labels, and how many of them are public queries."""

    name: str
    rows: np.ndarray
    labels: np.ndarray
    queries: int

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    def split(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the private rows and of the public queries."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        return order[self.queries :], order[: self.queries]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def digits() -> Task:
    """1797 images of 8×8 pixels; a pixel counts 0..16 dots by the format, so 8 is its middle."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    return Task("digits", unit_rows(pixels - 8.0), labels, queries=450)


# Order-of-magnitude ranges of a cell nucleus outlined in a 640 × 400 frame of 8-bit grey (the
# imaging described by Street, Wolberg and Mangasarian 1993), from geometry and not from the
# published minima and maxima of this very data set, which are functions of the private rows.
# Lengths are pixels. A range only centres and scales: values beyond it are clamped, and ranges
# shifted at random by a third of their half width change the accuracy by about a percent.
_RADIUS = (5.0, 40.0)  # smaller cannot be outlined; ten larger ones do not fit into the frame
_NUCLEUS = {
    "radius": _RADIUS,
    "texture": (5.0, 64.0),  # std of grey levels: camera noise to a quarter of the 8-bit scale
    "perimeter": (2 * math.pi * _RADIUS[0], 2 * math.pi * _RADIUS[1]),  # of a circle
    "area": (math.pi * _RADIUS[0] ** 2, math.pi * _RADIUS[1] ** 2),  # of a circle
    "smoothness": (0.02, 0.3),  # radius against its neighbours': a fraction of the radius
    "compactness": (0.01, 1.0),  # perimeter²/(4π area) − 1: circle on a grid to a 4:1 ellipse
    "concavity": (0.01, 1.0),  # depth of dents as a fraction of the radius
    "concave points": (0.01, 0.5),  # fraction of the outline that is dented: at most half
    "symmetry": (0.05, 0.5),  # relative difference of the two sides
    "fractal dimension": (0.02, 0.25),  # coastline − 1: smooth line to the coast of Britain
}
# "error": standard error of the mean of 10..40 nuclei that differ by 5..50 % of the mean.
_STANDARD_ERROR = (0.05 / math.sqrt(40), 0.5 / math.sqrt(10))


def breast_cancer() -> Task:
    """569 aspirates, 30 features: mean, standard error and worst of ten, as logs in [-1, 1]."""
    bunch: Any = datasets.load_breast_cancer()
    low, high = np.array(
        [nucleus_range(str(name)) for name in bunch.feature_names], dtype=np.float64
    ).T
    middle, half = np.log(low * high) / 2, np.log(high / low) / 2
    logs = np.log(np.clip(bunch.data, low, high))
    return Task("breast_cancer", unit_rows((logs - middle) / half), bunch.target, queries=143)


def nucleus_range(feature: str) -> tuple[float, float]:
    """The public range of one of the 30 columns, by its name."""
    if feature.endswith(" error"):
        low, high = _NUCLEUS[feature.removesuffix(" error")]
        return low * _STANDARD_ERROR[0], high * _STANDARD_ERROR[1]
    return _NUCLEUS[feature.removeprefix("mean ").removeprefix("worst ")]
