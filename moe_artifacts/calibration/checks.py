"""What calibration takes: arrays of one axis that hold finite numbers."""

from __future__ import annotations

import numpy as np

from moe_artifacts.errors import InputError


def pairs(
    first: np.ndarray, second: np.ndarray, names: tuple[str, str] = ("prob", "label")
) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise InputError(f"{names[0]} and {names[1]} must be equally long, got {len(first)} and {len(second)}")
    return unit_interval(names[0], first), unit_interval(names[1], second)


def unit_interval(name: str, values: np.ndarray) -> np.ndarray:
    values = finite(name, values)
    if values.min() < 0 or values.max() > 1:
        raise InputError(f"{name} must be in [0, 1], got values from {values.min():g} to {values.max():g}")
    return values


def finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"{name} must be an array of one axis with at least one number, got shape {values.shape}")
    if bad := int((~np.isfinite(values)).sum()):
        raise InputError(f"{name} must hold finite numbers, got {bad} that are not, of {len(values)}")
    return values
