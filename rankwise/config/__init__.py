"""What every command can be told: one dataclass per section, one per command, made of sections.

Standard library only, so that `rankwise --help` answers at once. `options.py` turns these into flags and reads
config files; a stage receives the finished object. Defaults are the documented ones; where a document's value
belongs to its own workflow (r 128 of the depth guide, say) it lives in that workflow's recipe.
"""

from __future__ import annotations

from rankwise.config.bundle import BundleConfig
from rankwise.config.card import CardConfig
from rankwise.config.commands import (
    BatchConfig,
    CheckConfig,
    CompareConfig,
    CompressConfig,
    DemoConfig,
    DiffConfig,
    EvaluateConfig,
    ExtractConfig,
    FinetuneConfig,
    MergeConfig,
    RanksConfig,
    ReportConfig,
    RunConfig,
    TinyConfig,
    TrainConfig,
)
from rankwise.config.export import ExportConfig
from rankwise.config.features import (
    ARCHITECTURES,
    AllocatorSection,
    CaptureConfig,
    DownstreamConfig,
    FactorCompareConfig,
    FactorShowConfig,
    FactorTrainConfig,
)
from rankwise.config.label import LabelConfig, TeacherSection
from rankwise.config.sections import (
    DTYPES,
    MAX_SEQ_LENGTH,
    OVERLONG,
    SCORED_TASKS,
    SPLITS,
    TASKS,
    TOWERS,
    TRAINERS,
    AllocationSection,
    DataSection,
    DepthSection,
    DepthUseSection,
    EstimateSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    PhasesSection,
    ScoredData,
    SelectionSection,
    SitesSection,
    SpectrumSection,
    TowersSection,
)
from rankwise.config.study import GridSection, ProbeSection, StudyConfig
from rankwise.config.validate import ValidateConfig

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "MAX_SEQ_LENGTH",
    "OVERLONG",
    "SCORED_TASKS",
    "SPLITS",
    "TASKS",
    "TOWERS",
    "TRAINERS",
    "AllocationSection",
    "AllocatorSection",
    "BatchConfig",
    "BundleConfig",
    "CaptureConfig",
    "CardConfig",
    "CheckConfig",
    "CompareConfig",
    "CompressConfig",
    "DataSection",
    "DemoConfig",
    "DepthSection",
    "DepthUseSection",
    "DiffConfig",
    "DownstreamConfig",
    "EstimateSection",
    "EvaluateConfig",
    "ExportConfig",
    "ExtractConfig",
    "FactorCompareConfig",
    "FactorShowConfig",
    "FactorTrainConfig",
    "FinetuneConfig",
    "GenerationSection",
    "GridSection",
    "LabelConfig",
    "LoraSection",
    "MergeConfig",
    "ModelSection",
    "PhasesSection",
    "ProbeSection",
    "RanksConfig",
    "ReportConfig",
    "RunConfig",
    "ScoredData",
    "SelectionSection",
    "SitesSection",
    "SpectrumSection",
    "StudyConfig",
    "TeacherSection",
    "TinyConfig",
    "TowersSection",
    "TrainConfig",
    "ValidateConfig",
]
