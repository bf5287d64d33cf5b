"""What is learned: a task builds the network, computes a micro-batch's loss, and makes metrics of totals."""

from data_pipeline.config import DataConfig
from dgt.models import ModelConfig
from dgt.tasks.classification import Classification, ClassificationConfig
from dgt.tasks.detection_config import DetectionConfig
from dgt.tasks.segmentation_config import SegmentationConfig
from dgt.tasks.task import Findings, Inputs, Task

__all__ = [
    "Classification",
    "ClassificationConfig",
    "DetectionConfig",
    "Findings",
    "Inputs",
    "SegmentationConfig",
    "Task",
    "TaskConfig",
    "build_task",
]

TaskConfig = ClassificationConfig | SegmentationConfig | DetectionConfig
"""Configuration of any task; the field `name` says which."""


def build_task(task: TaskConfig, model: ModelConfig, data: DataConfig) -> Task:
    """The task that `task.name` names, for this network and data."""
    if isinstance(task, SegmentationConfig):
        from dgt.tasks.segmentation import Segmentation

        return Segmentation(task, model, data)
    if isinstance(task, DetectionConfig):
        from dgt.tasks.detection import Detection

        return Detection(task, model, data)
    return Classification(task, model, data)
