"""Can RL work here? Asked before a run: `probe` samples, `advice` compares the planned run with experience."""

from posttrain.probe.advice import Check
from posttrain.probe.probe import Component, Probe, probe

__all__ = ["Check", "Component", "Probe", "probe"]
