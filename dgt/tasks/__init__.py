"""What is learned: a task builds the network, computes a micro-batch's loss, and makes metrics of totals."""

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks.classification import Classification, ClassificationConfig
from dgt.tasks.task import Inputs, Task

__all__ = ["Classification", "ClassificationConfig", "Inputs", "Task", "TaskConfig", "build_task"]

TaskConfig = ClassificationConfig
"""Configuration of any task; the field `name` says which."""


def build_task(task: TaskConfig, model: ModelConfig, data: DataConfig) -> Task:
    """The task that `task.name` names, for this network and data."""
    return Classification(task, model, data)
