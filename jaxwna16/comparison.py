"""Checkpoints beside each other: `compare_checkpoints` and what it measures."""

from jaxwna16.evaluation.comparison import Compared as Compared
from jaxwna16.evaluation.comparison import Divergence as Divergence
from jaxwna16.evaluation.comparison import compare_checkpoints as compare_checkpoints
from jaxwna16.evaluation.comparison import measure_divergence as measure_divergence
from jaxwna16.evaluation.comparison import open_plans as open_plans
