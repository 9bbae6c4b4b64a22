"""Compute the same faster: one door, `apply`, behind `--speed auto|off`."""

from common.speed.apply import Speed, apply

__all__ = ["Speed", "apply"]
