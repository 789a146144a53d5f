"""The stages of a run, one file each.

To add one, write a :class:`~mlxlora_core.runs.stages.stage.Stage` in a file of
its own and name it in :data:`STAGES`: planning, skipping, the record and the
words on the terminal follow from the object.
"""

from mlxlora_core.runs.stages.after import AfterStage
from mlxlora_core.runs.stages.before import BeforeStage
from mlxlora_core.runs.stages.data import DataStage
from mlxlora_core.runs.stages.export import ExportStage
from mlxlora_core.runs.stages.model import ModelStage
from mlxlora_core.runs.stages.stage import Stage
from mlxlora_core.runs.stages.train import TrainStage

#: in the order in which they are done
STAGES: tuple[Stage, ...] = (
    ModelStage(),
    DataStage(),
    BeforeStage(),
    TrainStage(),
    AfterStage(),
    ExportStage(),
)
